"""Which changes start together with one that has started, in its batch. Pure. See ``scheduler``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from cdc.core.key_queue import KeyQueue
from cdc.core.model import Change, Key
from cdc.core.ready_queues import ReadyQueues
from cdc.core.router import Handler


class BatchStart:
    """``queues``: those of all keys. ``start_next`` starts the first change of a queue."""

    def __init__(
        self,
        ready_queues: ReadyQueues,
        queues: Mapping[Key, KeyQueue],
        start_next: Callable[[KeyQueue], Change],
        make_ready: Callable[[KeyQueue], None],
    ) -> None:
        self._ready_queues = ready_queues
        self._queues = queues
        self._start_next = start_next
        self._make_ready = make_ready

    def fill(self, batch: list[Change], limit: int, handler: Handler | None, belongs: Callable[[Change], bool]) -> None:
        """Start up to ``limit`` changes of the handler that belong to the batch, of its keys first."""
        queues = self._queues
        for key in dict.fromkeys(change.key for change in batch):
            if queue := queues.get(key):
                self._start_run(queue, batch, limit, belongs)
        others: list[KeyQueue] = []
        while len(batch) < limit and (keys := deque(self._ready_queues.take(handler, limit - len(batch)))):
            while keys and len(batch) < limit:
                queue = queues.get(keys.popleft())
                if queue is None or not queue.startable:
                    continue
                if not self._start_run(queue, batch, limit, belongs):
                    others.append(queue)
            for queue in map(queues.get, reversed(keys)):
                if queue is not None and queue.needs is not None:
                    self._ready_queues.put_back(queue.key, queue.needs)
        for queue in others:
            self._make_ready(queue)

    def _start_run(self, queue: KeyQueue, batch: list[Change], limit: int, belongs: Callable[[Change], bool]) -> bool:
        """Returns whether any of its changes belongs to the batch."""
        before = len(batch)
        while queue.queued and len(batch) < limit and belongs(queue.queued[0]):
            if queue.running and queue.queued[0].seq < queue.running[-1].seq:
                break  # an operator requeued it meanwhile: it runs by itself
            batch.append(self._start_next(queue))
        return len(batch) > before
