"""Which of the keys with a change to run starts one next. Pure.

The keys of one entity type and handler stand in one queue, in the order in which they became ready. The queues take
turns, with one key each, or a run of several if calls of the handler may return at once. A start takes a slot, and
a place in each pool that its handler uses (threads, connections). Each handler has a limit in all of them, so that
handlers that hang leave slots, threads and connections to the others. A change that would wait for a place in a pool
does not start, and holds no slot meanwhile. Nor does a change that its handler's circuit breaker or limit holds back.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

from cdc.core.circuit_breaker import CircuitBreaker
from cdc.core.dynamic_limit import DynamicLimit
from cdc.core.handler_permits import HandlerPermits
from cdc.core.model import Change, Key
from cdc.core.router import Handler

_FACTOR = 2
"""A handler that hangs gets at most two thirds. After three such, one of ten connections is left for a fourth."""
_UNBOUNDED = 1 << 30
_USER = slice(2)
"""Of Requirements, who uses a limit: the type and its handler, whatever else differs between its changes."""


class Requirements(NamedTuple):
    """What a change needs to start: a slot, and a place in each of ``pools``, within the limits of type and handler.

    ``after_settled``: it starts when those of its key before it have settled. ``run``: how many may start at a time.
    ``breaker``: the handler's. ``read``: it is of a backfill, and takes turns with what was written. ``limit``: the
    handler's over all consumers, if it has one, and ``by`` which key of that.
    """

    entity_type: str
    handler: Handler | None = None
    pools: tuple[str, ...] = ()
    after_settled: bool = False
    run: int = 1
    breaker: CircuitBreaker | None = None
    read: bool = False
    limit: HandlerPermits | None = None
    by: str = ""


class Run(NamedTuple):
    """Changes to call and their handler; None: none is declared. Those that ``start`` gives are of different keys."""

    handler: Handler | None
    changes: Sequence[Change]


NOTHING = Run(None, ())


class ReadyQueues:
    """``concurrency`` slots, and the places of each pool. ``sole``: there is one handler only."""

    def __init__(
        self, concurrency: int = _UNBOUNDED, pools: Mapping[str, int] | None = None, *, sole: bool = True
    ) -> None:
        self._slots = DynamicLimit(concurrency, _FACTOR, sole=sole)
        self._pools = {name: DynamicLimit(size, _FACTOR, sole=sole) for name, size in (pools or {}).items()}
        self.queues: OrderedDict[Requirements, deque[Key]] = OrderedDict()
        """In the order in which they were served, the latest last; none of them is empty. Others only read it."""
        self._started: dict[Change, Requirements] = {}
        self.alone: dict[Change, tuple[str, str]] = {}
        """Started changes that wait outside of the queues for a limit: of which handler, and which key of the limit."""
        self._trials: dict[Change, CircuitBreaker] = {}
        """The calls that a breaker which is not closed let through."""

    @property
    def ready(self) -> int:
        """How many runs could start now; 0 if, and only if, ``next`` has none."""
        if not self.queues:
            return 0
        count = 0
        for needs, queue in self.queues.items():
            wanted = len(queue)
            count += ceil(min(wanted, self._room(needs)) / needs.run) if wanted > 1 else self._admits(needs)
        return min(count, self._slots.free)

    def waiting(self, needs: Requirements) -> int:
        """How many keys are ready with the same requirements, whether they could start now or not."""
        return len(self.queues.get(needs, ()))

    def put(self, key: Key, needs: Requirements) -> None:
        """The key has a change to start. It may have been put before."""
        queue = self.queues.get(needs)
        if queue is None:
            queue = self.queues[needs] = deque()
        queue.append(key)

    def next(self) -> tuple[Sequence[Key], Requirements] | None:
        """The keys whose turn it is, if they can start; they are taken out of their queue."""
        for needs, queue in self.queues.items():
            wanted = min(len(queue), needs.run)
            if count := min(wanted, self._room(needs)) if wanted > 1 else self._admits(needs):
                keys = [queue.popleft()] if count == 1 else [queue.popleft() for _ in range(count)]
                if queue:
                    self.queues.move_to_end(needs)
                else:
                    del self.queues[needs]
                return keys, needs
        return None

    def take(self, handler: Handler | None, limit: int) -> list[Key]:
        """Take up to ``limit`` of the keys that are ready for this handler, of any type, out of their queues."""
        taken: list[Key] = []
        for needs in [needs for needs in self.queues if needs.handler is handler]:
            queue = self.queues[needs]
            taken += [queue.popleft() for _ in range(min(len(queue), limit - len(taken)))]
            if not queue:
                del self.queues[needs]
        return taken

    def put_back(self, key: Key, needs: Requirements) -> None:
        """Return a key that was taken and not used to the head of its queue."""
        self.queues.setdefault(needs, deque()).appendleft(key)

    def started(self, changes: Sequence[Change], needs: Requirements) -> None:
        user, places = needs[_USER], len(changes)
        for change in changes:
            self._started[change] = needs
        self._slots.acquire(user, places)
        for pool in needs.pools:
            self._pools[pool].acquire(user, places)
        if needs.breaker is not None and needs.breaker.tripped:
            needs.breaker.trial(places)
            self._trials.update(dict.fromkeys(changes, needs.breaker))
        if needs.limit is not None:
            needs.limit.take(needs.by, places)

    def ended(self, changes: Iterable[Change]) -> None:
        """Free the places of these changes. One that ran in the batch of another holds none, and changes nothing."""
        alike, places = None, 0
        if self._trials:
            changes = list(changes)
            for change in changes:
                if breaker := self._trials.pop(change, None):
                    breaker.trial(-1)
        for change in changes:
            needs = self._started.pop(change, None)
            if needs is not None and needs.limit is not None:
                needs.limit.ended(needs.by, change)
            if needs is not alike:
                if alike is not None:
                    self._free(alike, places)
                alike, places = needs, 0
            places += 1
        if alike is not None:
            self._free(alike, places)

    def begins(self, change: Change) -> None:
        """The call of a started change begins."""
        needs = self._started.get(change)
        if needs is not None and needs.limit is not None:
            needs.limit.begins(needs.by, change)

    def over_limit(self) -> dict[tuple[str, str], int]:
        """How many changes could start but for a limit, by handler and key of the limit."""
        counts: dict[tuple[str, str], int] = {}
        for named in self.alone.values():
            counts[named] = counts.get(named, 0) + 1
        for needs, queue in self.queues.items():
            if needs.limit is not None:
                named = needs.limit.name, needs.by
                counts[named] = counts.get(named, 0) + len(queue)
        return counts

    def forget_ready(self) -> None:
        self.queues.clear()

    def _admits(self, needs: Requirements) -> bool:
        user = needs[_USER]
        if not self._slots.admits(user):
            return False
        if needs.breaker is not None and needs.breaker.tripped and not needs.breaker.room:
            return False
        if needs.limit is not None and not needs.limit.room(needs.by):
            return False
        for pool in needs.pools:  # noqa: SIM110 - a generator would cost more than the rest
            if not self._pools[pool].admits(user):
                return False
        return True

    def _room(self, needs: Requirements) -> int:
        room = self._slots.room(needs[_USER])
        if needs.breaker is not None and needs.breaker.tripped:
            room = min(room, needs.breaker.room)
        if needs.limit is not None and room:
            room = min(room, needs.limit.room(needs.by))
        return min([room, *(self._pools[pool].room(needs[_USER]) for pool in needs.pools)]) if needs.pools else room

    def _free(self, needs: Requirements, places: int) -> None:
        user = needs[_USER]
        self._slots.release(user, places)
        for pool in needs.pools:
            self._pools[pool].release(user, places)
