"""Time limits of calls on the event loop.

A call that never waits needs none. For each of the others its own timer would cost as much as many handlers. But
calls under the same limit overrun in the order in which they began, so one timer is enough for all of them, set for the
first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from cdc.core.errors import OverrunError
from cdc.engine.calls import StartedCall
from cdc.runtime.cancelling import is_being_cancelled

_T = TypeVar("_T")


class Limit:
    """``seconds`` that a call may take; None: any time. For the tasks of one event loop.

    ``ignored``: called with the task of a call that goes on ``grace_s`` seconds after it was cancelled.
    """

    def __init__(
        self,
        seconds: float | None,
        ignored: Callable[[asyncio.Task[Any]], None] = lambda _: None,
        *,
        grace_s: float = 1.0,
    ) -> None:
        self._seconds = seconds
        self._ignored = ignored
        self._grace_s = grace_s
        self._ends: dict[asyncio.Task[Any], float] = {}
        """When a task's call overruns, on the monotonic clock; in that order."""
        self._overran = set[asyncio.Task[Any]]()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Number of calls that a limit runs for."""
        return len(self._ends)

    async def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run it. Raises OverrunError if its time passes."""
        started = time.monotonic()
        try:
            waits_for = coroutine.send(None)
        except StopIteration as returned:
            return cast("_T", returned.value)
        return await self.resume(StartedCall(coroutine, waits_for, started), started)

    async def resume(self, call: Awaitable[_T], started: float) -> _T:
        """The rest of a call, with what is left of its time since the start; or all of one that certainly waits."""
        if self._seconds is None:
            return await call
        task = asyncio.current_task()
        assert task is not None
        self._ends[task] = at = started + self._seconds
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
                self._overran.remove(task)
                task.uncancel()

    def _set_timer(self, at: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(at - time.monotonic(), self._cancel_overdue)

    def _cancel_overdue(self) -> None:
        """Cancel the calls whose time has passed, and set the timer for the next, if there is one."""
        self._timer = None
        now = time.monotonic()
        for task, at in list(self._ends.items()):
            if at > now:
                self._set_timer(at)
                return
            del self._ends[task]
            self._overran.add(task)
            task.cancel()
            asyncio.get_running_loop().call_later(self._grace_s, self._report_if_ignored, task)

    def _report_if_ignored(self, task: asyncio.Task[Any]) -> None:
        if task in self._overran:
            self._ignored(task)
