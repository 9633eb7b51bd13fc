"""The tasks of the dispatcher: workers, and those of single changes beside them.

A worker that finds nothing to do ends, but for one, which rests until there is something. So a change that comes alone
costs no task: to make one, to enter it where asyncio keeps all of them, and to take note of its end take longer than
many handlers. A worker at rest holds nothing, and is none of those that are counted, drained or cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from cdc.core.ready_queues import NOTHING, Run


class Workers:
    """``work``: what a worker does; ``ended``: called with each that has ended."""

    def __init__(
        self, work: Callable[[], Coroutine[Any, Any, None]], ended: Callable[[asyncio.Task[None]], None]
    ) -> None:
        self._work = work
        self._ended = ended
        self.tasks: dict[asyncio.Task[None], Run] = {}
        """Each with the changes that an error which escapes from it is about."""
        self.unstarted = set[asyncio.Task[None]]()
        """Those that have not taken a change yet: for what is ready for them, no others are started."""
        self._resting: tuple[asyncio.Task[None], asyncio.Future[bool]] | None = None

    def start(self, number: int) -> None:
        """Set so many to work."""
        for _ in range(number):
            if self._resting is not None:
                task, rest = self._resting
                self._resting = None
                rest.set_result(True)
            else:
                task = asyncio.create_task(self._work())
                task.add_done_callback(self._ended)
            self.tasks[task] = NOTHING
            self.unstarted.add(task)

    async def rest(self, task: asyncio.Task[None]) -> bool:
        """``task``, the current one, has nothing to do. False: it is to end; True: there is something again."""
        if self._resting is not None:
            return False
        del self.tasks[task]
        rest: asyncio.Future[bool] = task.get_loop().create_future()
        self._resting = task, rest
        try:
            return await rest
        finally:
            if self._resting is not None and self._resting[1] is rest:  # somebody else has cancelled it
                self._resting = None

    def dismiss(self) -> None:
        """The worker that rests ends."""
        if self._resting is not None:
            self._resting[1].set_result(False)
            self._resting = None
