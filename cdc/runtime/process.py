"""The signals that end a process, from its first instruction to its last.

    nobody has work yet    the main thread is interrupted wherever it is: importing handlers, starting a server
    after ``hand_over``    whoever has the work is told of the first signal, and ends it in good order
    the second signal      ends the process at once, with 128 and its number, whatever it is doing

Process 1 of a container has no default actions: a signal that comes before its handler is lost. So the handlers are
there before anything else is loaded. A signal that is ignored at the start (nohup) stays so.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal has come before there was work; what handles Ctrl-C handles the others as well."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class _State:
    pid = 0
    first: int | None = None
    told: Callable[[int], object] | None = None
    abandoned = False


_state = _State()


def handle_signals() -> None:
    """In the main thread; again after others may have set handlers of their own."""
    _state.pid = os.getpid()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _received)


def hand_over(told: Callable[[int], object]) -> None:
    """From now on ``told`` is called with the first signal; at once if it has come already. In the main thread."""
    handle_signals()
    _state.told = told
    if _state.first is not None:
        told(_state.first)


def interrupted() -> bool:
    """A signal has come: what was interrupted may have swallowed it."""
    return _state.first is not None


def _received(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _state.pid:  # a child that a handler has forked: none of this is its business
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _state.first is not None:
        os._exit(128 + number)
    _state.first = number
    if _state.told is None:
        raise Interrupted(number)
    _state.told(number)


def abandon() -> None:
    """Something of this process cannot be ended, and its end is not to wait for it."""
    _state.abandoned = True


def leave(code: int) -> NoReturn:
    """End the process. What was abandoned would otherwise be waited for: the interpreter joins threads."""
    if _state.abandoned:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
