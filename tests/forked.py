"""``python -m MODULE ARGUMENTS`` without the imports, which are most of what a start costs.

A server that has imported the command line once forks for each: a process of its own in all that tests look at, pid,
signals, memory, files, environment, exit code. That the command starts from nothing is tested where that is the point
(tests/test_wheel.py, tests/container, tests/integration/app/test_secrets.py).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PRELOADED = ["cdc.cli", "cdc.cli.run", "cdc.app.serve", "cdc.contrib.whatsapp.handlers"]


class Forked:
    """What tests use of ``subprocess.Popen``. ``log`` takes stdout and stderr."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str], log: Path
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._process = context.Process(target=_become, args=(module, list(arguments), cwd, dict(environment), log))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(module: str, arguments: list[str], cwd: Path, environment: dict[str, str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if str(cwd) not in sys.path:
        sys.path.insert(0, str(cwd))  # as -m does
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
