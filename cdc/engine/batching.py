"""What a handler gets at once: a batch, which may wait for more, a group that shares a transaction, or the latest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from cdc.core.latest import Latest
from cdc.core.model import Change
from cdc.core.router import Handler
from cdc.core.scheduler import KeyScheduler
from cdc.engine.coalescing import Coalescing
from cdc.engine.executor import Executor
from cdc.engine.transactions import AskTheTableError
from cdc.runtime.deadline import wait_within

_BATCH_BYTES = 4 << 20
"""Documents of a batch of more than one change: they are in memory several times over while they are sent."""


class PutOffError(Exception):
    """The change is no longer started; it starts again later."""


class Batching:
    """``connections``: those for transactional handlers. ``put_off``: called when a change is to start again later."""

    def __init__(
        self,
        scheduler: KeyScheduler,
        executor: Executor,
        connections: int,
        coalescing: Coalescing,
        put_off: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._connections = connections
        self.coalescing = coalescing
        self._put_off = put_off
        # For each kind of handler as many as there are connections, so that a group is made when it can begin.
        self.transactions = {is_async: asyncio.Semaphore(connections) for is_async in (True, False)}
        self.lingering: dict[Handler, tuple[list[Change], asyncio.Event]] = {}
        """Batches that wait for more, each with the event that says it is full."""

    async def gather(self, handler: Handler, batch: list[Change]) -> None:
        """Fill a batch for a handler that takes many, or a group that shares a transaction."""
        limit = handler.batch or self._executor.group_limit(handler)
        if limit == 1 or self.runs_alone(batch[0]):
            return
        if handler.batch is None:
            limit = min(limit, 1 + self._scheduler.waiting_like(batch[0]) // self._connections)
        self._scheduler.start_with(batch, limit, self._fits_into(batch))
        if handler.linger_s and len(batch) < limit and handler not in self.lingering:
            full = asyncio.Event()
            self.lingering[handler] = waiting = batch, full
            try:
                await wait_within(full, handler.linger_s)
            finally:
                if self.lingering.get(handler) is waiting:  # a full one has left, and another may wait by now
                    del self.lingering[handler]

    async def latest(self, handler: Handler, change: Change, *, may_wait: bool = True) -> Latest:
        """What the call stands for. Raises PutOffError; where there is no room for another that waits, it is early.

        Raises AskTheTableError, too: the change, or one of its key before it, is not as it was read.
        """
        latest = await self._ask(handler, change, may_wait=may_wait)
        if latest.wait_s:
            if self._scheduler.put_off(change, time.monotonic() + latest.wait_s):
                self._put_off()
                raise PutOffError
            latest = await self._ask(handler, change, may_wait=False)
        if latest.later:
            self._scheduler.deferred.handled(change.key, change.seq, latest.change.seq)
        return latest

    async def _ask(self, handler: Handler, change: Change, *, may_wait: bool) -> Latest:
        latest = await self.coalescing.ask(handler, change, may_wait=may_wait)
        if latest.before is None:
            return latest
        if change.shard in self._scheduler.ownership.active:
            self._scheduler.deferred.defer(change.key, latest.before, change.shard, blocked=False, last=latest.before)
        raise AskTheTableError("one of its key before it has become visible late, and is called first", 0.0)

    def join(self, handler: Handler, change: Change) -> None:
        """Put a started change into the batch of its handler that still waits for more."""
        batch, full = self.lingering[handler]
        batch.append(change)
        limit = handler.batch or 1
        self._scheduler.start_with(batch, limit, self._fits_into(batch))
        if len(batch) >= limit:
            full.set()
            del self.lingering[handler]

    def _fits_into(self, batch: Sequence[Change]) -> Callable[[Change], bool]:
        """Whether a change may run together with the batch, and its documents fit into it. One that may joins it."""
        left = _BATCH_BYTES - sum(change.size for change in batch)
        runs_alone = self.runs_alone

        def fits(change: Change) -> bool:
            nonlocal left
            if change.size > left or runs_alone(change):
                return False
            left -= change.size
            return True

        return fits

    def runs_alone(self, change: Change) -> bool:
        """Whether it must not run together with others: its failure would cost them an attempt."""
        return change.crashed or self._executor.lost.has(change)
