"""What a process takes, and an end like that by the memory limit of a container."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

_EVERY_S = 0.005


def megabytes(pid: int, field: str = "VmHWM") -> float:
    """VmHWM at its highest, VmRSS now; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


@contextlib.contextmanager
def killed_above(pid: int, limit_mb: float) -> Iterator[threading.Event]:
    """SIGKILL as soon as it holds more. The event tells that it was."""
    killed, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY_S):
            if megabytes(pid, "VmRSS") > limit_mb:
                os.kill(pid, signal.SIGKILL)
                killed.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
