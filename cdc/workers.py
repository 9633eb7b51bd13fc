"""The tasks that run handlers: each takes one change after the other from the lanes, until none is ready.

A task for each change would cost more than many a handler; a fixed number of waiting tasks would have to be woken one
by one. So a worker is started when a change is ready and there is room, and ends when it finds nothing to do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterable

from cdc.lanes import Lanes
from cdc.model import Change
from cdc.runner import Runner

log = logging.getLogger("cdc.consumer")

_CHANGES_PER_TURN = 100
"""Handlers that never wait would otherwise keep the event loop from everything else for a whole window."""


_CUT_OFF_S = 5.0


class Workers:
    """At most ``concurrency`` of them. ``finished`` is called after each outcome."""

    def __init__(self, lanes: Lanes, runner: Runner, concurrency: int, finished: Callable[[], None]) -> None:
        self._lanes = lanes
        self._runner = runner
        self._concurrency = concurrency
        self._finished = finished
        self._tasks: dict[asyncio.Task[None], Change | None] = {}
        self._stopped = False

    def __len__(self) -> int:
        return len(self._tasks)

    def hand_out(self) -> None:
        """Start workers for what is ready."""
        if self._stopped:
            return
        for _ in range(min(self._lanes.ready, self._concurrency - len(self._tasks))):
            task = asyncio.create_task(self._work())
            self._tasks[task] = None
            task.add_done_callback(self._ended)

    async def drain(self, seconds: float) -> None:
        """Start nothing more; give what runs so much time, then cut it off."""
        self._stopped = True
        if not self._tasks:
            return
        log.info("stopping: %d handlers have %g s to finish", len(self._tasks), seconds)
        await asyncio.wait(list(self._tasks), timeout=seconds)
        await self._cut_off(list(self._tasks))

    async def session_lost(self) -> None:
        """Cut off what can be. A call in a thread goes on; its key stays shut until it returns."""
        in_thread = {task for task, change in self._tasks.items() if change and self._runner.in_thread(change)}
        if in_thread:
            log.warning("%d handlers in threads go on without their session; their keys wait for them", len(in_thread))
        await self._cut_off([task for task in self._tasks if task not in in_thread])

    async def _cut_off(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        running = [(task, self._tasks[task]) for task in tasks]
        for task, change in running:
            if change:
                self._runner.interrupted(change)
            task.cancel()
        if running:
            log.warning("%d handlers were cut off; their changes stay as they were", len(running))
            _, deaf = await asyncio.wait([task for task, _ in running], timeout=_CUT_OFF_S)
            if deaf:
                log.error("%d handlers caught their cancellation and go on; nobody waits for them", len(deaf))

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        turns = 0
        while not self._stopped and (change := self._lanes.start()):
            self._tasks[task] = change
            try:
                outcome = await self._runner.run(change)
            except asyncio.CancelledError:
                self._lanes.interrupted(change)
                raise
            self._lanes.finished(change, outcome)
            self._finished()
            turns += 1
            if turns % _CHANGES_PER_TURN == 0:
                await _OtherTasks()

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()):
            log.critical("a worker failed; this is a bug", exc_info=error)
        self.hand_out()


class _OtherTasks:
    """Awaiting it lets every other task run once."""

    def __await__(self) -> Generator[None, None, None]:
        yield
