"""Changes outside the workers: those that may kill the process, one at a time, and those that lost a session.

    suspect   it was running when its consumer died. It waits for its turn, and the next one has it only when the
              outcome is in the table: otherwise a crash would be counted against both
    held      its start is to be recorded. It waits until there is no suspect: the crash of one would be blamed on it
    lost      its transaction or session was lost. It pauses; one that may be the cause then waits for its turn, too

None of them takes a worker's place while it waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from cdc.core.model import Change
from cdc.core.router import Handler


class Quarantine:
    """``unsettled``: whether there is no outcome in the table yet of the change with this ``seq``."""

    def __init__(self, unsettled: Callable[[int], bool]) -> None:
        self._unsettled = unsettled
        self.tasks: dict[asyncio.Task[None], Change | None] = {}
        """Each with its change, or None as soon as that has its turn."""
        self.suspects = set[asyncio.Task[None]]()
        self.held = deque[tuple[Handler | None, Change]]()
        self.freed = deque[tuple[Handler | None, Change]]()
        """What was held and may start."""
        self.turn = asyncio.Lock()
        """Held by the one that runs."""
        self._settled = asyncio.Event()

    def start(self, change: Change, work: Coroutine[Any, Any, None], *, suspect: bool = False) -> asyncio.Task[None]:
        """A task of the change's own. Call ``ended`` when it is done."""
        task = asyncio.create_task(work)
        self.tasks[task] = change
        if suspect:
            self.suspects.add(task)
        return task

    def ended(self, task: asyncio.Task[None]) -> Change | None:
        """Returns the change of a task that ended before its turn came: also one that was cut off at its first step."""
        change = self.tasks.pop(task, None)
        if task in self.suspects:
            self.suspects.discard(task)
            if not self.suspects:
                self.freed += self.held
                self.held.clear()
        return change

    def attend(self) -> None:
        """The current task takes its change's outcome upon itself."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks[task] = None

    async def until_settled(self, change: Change) -> None:
        """Until the change's outcome is in the table."""
        while self._unsettled(change.seq):
            self._settled.clear()
            await self._settled.wait()

    def settled(self) -> None:
        """Some outcomes are in the table."""
        self._settled.set()
