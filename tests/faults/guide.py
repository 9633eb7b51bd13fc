"""docs/guides/migrate.md as a script: the commands of each step, run as they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.eventually import eventually

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/guides/migrate.md"


def steps(part: str) -> dict[str, list[list[str]]]:
    """Of one part of the guide, by the title of each step, its blocks of commands in order."""
    [text] = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    found: dict[str, list[list[str]]] = {}
    for title, body in re.findall(r"^### \d\. (.*?)\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL):
        found[title] = [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", body, re.DOTALL)]
    return found


class Shell:
    """Runs commands as somebody does who follows the guide, in a folder with a ``handlers.py``."""

    def __init__(self, dsn: str, folder: Path, slot: str) -> None:
        self._folder = folder
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **os.environ, "CDC_DSN": dsn, "PATH": path, "PYTHONPATH": str(ROOT),
            "CDC_HTTP_PORT": "0", "CDC_SLOT_NAME": slot, "CDC_POLL_INTERVAL": "0.1",
        }  # fmt: skip
        (folder / "handlers.py").write_text("from tests.handlers_migration import router\n")

    def run(self, commands: list[str]) -> None:
        """Each to its end, except ``cdc run``, which is at work when this returns."""
        for command in commands:
            if command.startswith("cdc run"):
                self._start(command)
            else:
                done = subprocess.run(
                    ["bash", "-c", command], cwd=self._folder, env=self.environment, capture_output=True, text=True,
                    check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{command}: {done.stderr}"

    def _start(self, command: str) -> None:
        log = self._folder / f"log{len(list(self._folder.glob('log*')))}"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self._folder, env=self.environment, stderr=output
            )
        self._running.append((process, log))
        told = "streaming the slot" if "--observe" in command else "owns 64 of 64 shards"

        def at_work() -> bool:
            assert process.poll() is None, log.read_text()
            return told in log.read_text()

        eventually(at_work, what=f"{command} is at work")

    def stop(self) -> None:
        """What ``cdc run`` has been started, by SIGTERM."""
        while self._running:
            process, log = self._running.pop()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()

    def kill(self) -> None:
        for process, _ in self._running:
            process.kill()
            process.wait()
