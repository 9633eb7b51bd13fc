"""Child processes: the consumer as users run it, and programs that write and listen beside it. None outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_ROOT = Path(__file__).parents[2]
_POLL_INTERVAL_S = 0.1
"""Looking takes time from what is measured: not oftener than needed."""
_STOP_S = 20.0


class Consumer:
    """``with Consumer(dsn, "noop") as consumer:`` runs ``cdc run`` with that router of tests.bench.handlers.

    It sees no settings but these and ``settings``: not those of our environment, nor a cdc.toml. Raises RuntimeError,
    with what the consumer said last, when it ends before it is told to, or with an error.
    """

    def __init__(self, dsn: str, router: str, **settings: object) -> None:
        named = {"dsn": dsn, "handlers": f"tests.bench.handlers:{router}", "http_port": 0, **settings}
        if "deliver_to" in settings:
            del named["handlers"]
        self._arguments = [
            word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        self.calls: array[int] = array("q")
        """What the handlers kept; there once the consumer has ended."""

    def __enter__(self) -> Consumer:
        self._folder = tempfile.TemporaryDirectory(prefix="cdcbench")
        self._said = Path(self._folder.name, "stderr")
        self._kept = Path(self._folder.name, "calls")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG"))}
        environment |= {"BENCH_CALLS": str(self._kept), "PYTHONPATH": str(_ROOT)}
        self.started_at = time.time()
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cdc", "run", *self._arguments],
                cwd=self._folder.name, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            code = _ended(self._process)
            if error is None and code != 0:
                raise RuntimeError(f"the consumer ended with {code}; it said last:\n{self._last_words()}")
            if self._kept.exists():
                self.calls.frombytes(self._kept.read_bytes())
        finally:
            self._folder.cleanup()

    def until(self, condition: Callable[[], bool], *, within_s: float, look_every_s: float = _POLL_INTERVAL_S) -> None:
        """Let it work until the condition holds."""
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done within {within_s:g} s; it said last:\n{self._last_words()}")
            try:
                code = self._process.wait(look_every_s)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"the consumer ended with {code}; it said last:\n{self._last_words()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Processor time that it has used so far, its start included."""
        # The fields behind the name, which may hold blanks: utime and stime are the 14th and 15th of all.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mb(self) -> float:
        """In MB of 1,000,000 bytes, as all of them."""
        return self._status("VmRSS")

    @property
    def peak_rss_mb(self) -> float:
        return self._status("VmHWM")

    def _status(self, field: str) -> float:
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))

    def _last_words(self) -> str:
        return "\n".join(self._said.read_text(errors="replace").splitlines()[-15:])


@contextmanager
def child(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m tests.bench.MODULE``, its standard output a pipe; ended with us."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.bench.{module}", *arguments],
        cwd=_ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            _ended(process)


def finish(process: subprocess.Popen[str], *, within_s: float) -> None:
    """Wait for a child that ends by itself. Raises RuntimeError when it fails, TimeoutExpired when it takes longer."""
    if code := process.wait(within_s):
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with {code}")  # type: ignore[arg-type]


def _ended(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> int:
    """Its exit code, after ending it if it has not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
