"""Time limits of calls on the event loop.

A timer for each call would cost as much as many handlers. But calls under the same limit overrun in the order in which
they began, so one timer is enough for all of them, set for the first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cdc.core.errors import OverrunError
from cdc.runtime.cancelling import is_being_cancelled

_T = TypeVar("_T")


class TimeLimit:
    """``seconds`` that a call may take; None: any time. For the tasks of one event loop.

    ``ignored``: called for a call that goes on ``grace_s`` seconds after it was cancelled, with what it is ``of``.
    """

    def __init__(
        self,
        seconds: float | None,
        ignored: Callable[[Any], None] = lambda _: None,
        *,
        grace_s: float = 1.0,
    ) -> None:
        self._seconds = seconds
        self._ignored = ignored
        self._grace_s = grace_s
        self._ends: dict[asyncio.Task[Any], tuple[float, object]] = {}
        """When a task's call overruns, on the monotonic clock, and what it is of; in the order of that."""
        self._overran: dict[asyncio.Task[Any], object] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Number of calls that a limit runs for."""
        return len(self._ends)

    async def call(self, call: Awaitable[_T], *, started: float | None = None, of: object = None) -> _T:
        """Await it. Raises OverrunError if its time passes, counted from ``started``, or from now."""
        if self._seconds is None:
            return await call
        task = asyncio.current_task()
        assert task is not None
        at = (time.monotonic() if started is None else started) + self._seconds
        self._ends[task] = at, of
        if self._timer is None:
            self._set_timer(at)
        try:
            return await call
        except (asyncio.CancelledError, TimeoutError) as error:
            if task in self._overran and not is_being_cancelled(task):
                raise OverrunError(f"took longer than {self._seconds:g} s") from error
            raise
        finally:
            self._ends.pop(task, None)
            if task in self._overran:
                del self._overran[task]
                task.uncancel()

    def _set_timer(self, at: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(at - time.monotonic(), self._cancel_overdue)

    def _cancel_overdue(self) -> None:
        """Cancel the calls whose time has passed, and set the timer for the next, if there is one."""
        self._timer = None
        now = time.monotonic()
        for task, (at, of) in list(self._ends.items()):
            if at > now:
                self._set_timer(at)
                return
            del self._ends[task]
            self._overran[task] = of
            task.cancel()
            asyncio.get_running_loop().call_later(self._grace_s, self._report_if_ignored, task)

    def _report_if_ignored(self, task: asyncio.Task[Any]) -> None:
        if task in self._overran:
            self._ignored(self._overran[task])
