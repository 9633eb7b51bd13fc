"""The signals that end a process, from its first instruction to its last.

    before ``hand_over``   the main thread is interrupted wherever it is: importing handlers, starting a server
    after ``hand_over``    the first signal is reported to its callback, which ends the work in good order
    the second signal      ends the process at once, with 128 and its number, whatever it is doing

Process 1 of a container has no default actions: a signal that comes before its handler is lost. So the handlers are
set before anything else is loaded. A signal that is ignored at the start (nohup) stays so.
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
    """A signal has come before there was work; code that handles Ctrl-C handles the others as well."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class _State:
    pid = 0
    first: int | None = None
    on_signal: Callable[[int], object] | None = None
    abandoned = False


_state = _State()


def handle_signals() -> None:
    """In the main thread; again after other code may have set handlers of its own."""
    _state.pid = os.getpid()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _received)


def hand_over(on_signal: Callable[[int], object]) -> None:
    """Call ``on_signal`` with the first signal from now on; at once if it has come already. In the main thread."""
    handle_signals()
    _state.on_signal = on_signal
    if _state.first is not None:
        on_signal(_state.first)


def interrupted() -> bool:
    """Whether a signal has come: the interrupted code may have swallowed it."""
    return _state.first is not None


def _received(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _state.pid:  # a child that a handler has forked: the signal is not for this consumer
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _state.first is not None:
        os._exit(128 + number)
    _state.first = number
    if _state.on_signal is None:
        raise Interrupted(number)
    _state.on_signal(number)


def abandon() -> None:
    """Some task or thread of this process cannot be ended: ``leave`` does not wait for it."""
    _state.abandoned = True


def leave(code: int) -> NoReturn:
    """End the process, without waiting for what was abandoned: the interpreter would join its threads."""
    if _state.abandoned:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
