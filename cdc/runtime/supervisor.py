"""Restarts tasks and threads that are to run as long as the process does.

    runs ── ends unexpectedly ──> logged, counted ── pause ──> runs

Only a bug in cdc ends one: errors of a server or a connection are handled inside. So it is restarted, after a
pause that doubles from 0.1 to 30 seconds; after it has run for a minute the pause starts at 0.1 again. After
eight ends in a row it is failing: a restart of the process may fix what its own did not, and /livez requests it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from cdc.runtime.cancelling import cancel
from cdc.runtime.deadline import deadline

log = logging.getLogger("cdc")

FAILING_AT = 8
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 30.0
_STEADY_S = 60.0


class Ends(NamedTuple):
    """``times``: how often it has ended in a row."""

    times: int = 0

    def after(self, ran_s: float) -> Ends:
        """It has ended once more, after ``ran_s`` seconds."""
        return Ends(1 if ran_s >= _STEADY_S else self.times + 1)

    @property
    def pause_s(self) -> float:
        return min(_PAUSE_MIN_S * 2.0 ** min(self.times - 1, 16), _PAUSE_MAX_S)

    def failing(self, ran_s: float) -> bool:
        """``ran_s``: since its last start, in seconds."""
        return self.times >= FAILING_AT and ran_s < _STEADY_S


class Supervisor:
    """``ended`` is called with the name of what has ended. Thread-safe."""

    def __init__(self, ended: Callable[[str], None] = lambda _: None) -> None:
        self._ended = ended
        self._ends: dict[str, tuple[Ends, float]] = {}
        """Also when it was last started, on the monotonic clock. Each name is written by its own task or thread."""
        self._threads: dict[str, tuple[threading.Thread, threading.Event]] = {}

    async def keep(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run it until cancelled. A return is an unexpected end, too.

        It runs in a task of its own, because foreign code in it may cancel that task.
        """
        while True:
            began = time.monotonic()
            task = asyncio.create_task(run())
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                cancel(task)
                await asyncio.wait([task])
                raise
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            with contextlib.suppress(TimeoutError):
                async with deadline(self._note(name, began, error)):
                    await asyncio.Event().wait()

    def keep_here(self, name: str, run: Callable[[], None], stopping: threading.Event) -> None:
        """Run it in this thread until it returns because it is ``stopping``.

        Also after a BaseException: foreign code can raise SystemExit in a thread, which would end it silently.
        """
        self._threads[name] = threading.current_thread(), stopping
        while True:
            began = time.monotonic()
            error: BaseException | None = None
            try:
                run()
            except BaseException as raised:  # noqa: BLE001 - whatever ends it, it goes on
                error = raised
            if stopping.is_set() or stopping.wait(self._note(name, began, error)):
                return

    def failed(self, name: str, began: float, error: BaseException) -> float:
        """Report what restarts itself: it has ended by ``error``. Returns the seconds to pause."""
        return self._note(name, began, error)

    def failing(self) -> list[tuple[str, int]]:
        """Names that end again and again, or whose thread is gone, each with how often it has ended in a row."""
        now = time.monotonic()
        ends = dict(self._ends)
        failing = {name: each.times for name, (each, began) in ends.items() if each.failing(now - began)}
        for name, (thread, stopping) in list(self._threads.items()):
            if not thread.is_alive() and not stopping.is_set():
                failing.setdefault(name, ends[name][0].times if name in ends else 1)
        return list(failing.items())

    def _note(self, name: str, began: float, error: BaseException | None) -> float:
        """Record an end. Returns the seconds to pause."""
        now = time.monotonic()
        before, _ = self._ends.get(name, (Ends(), now))
        ends = before.after(now - began)
        self._ends[name] = (ends, now + ends.pause_s)
        log.critical(
            "%s has ended: %s; this is a bug. It is started again in %.1f s", name, _summary(error), ends.pause_s
        )
        self._ended(name)
        return ends.pause_s


def _summary(error: BaseException | None) -> str:
    """Class and place: the text may quote anything."""
    if error is None:
        return "it returned"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__
