"""Outcomes on their way to the table. Pure; time is an argument.

Theory
------
A known outcome is kept until it is written. The outcomes of a key are written in the order in which they finished:
otherwise a crash could leave the later one marked and the earlier one to run again. The settler returns what the table
rejects:

    split      one of them is rejected: the two halves are written next, and in the end that one alone
    again      all of it is written next, once more
    put_back   these keys cannot be written now; they are held for a while, with all later outcomes of them

    finished ──► next ──take──► taken ──written──► gone
                  ▲  │            │
                  │  └─ held ◄────┤ put_back: by key, until a moment
                  └── parts ◄─────┘ split, again

A lost session loses the shards. Outcomes that were not written are then *parked* by shard; those that were being
written are *maybe written*. If the shard comes back, and no other consumer owned it meanwhile, its outcomes return to
the queue. Those of any other shard are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from itertools import islice
from math import inf
from operator import attrgetter

from cdc.core.model import Key
from cdc.core.read_reconciler import Settlement

_SEQ = attrgetter("change.seq")


class _Held:
    __slots__ = ("at", "waiting")

    def __init__(self) -> None:
        self.at = -inf
        self.waiting: deque[Settlement] = deque()


class SettleQueue:
    """One batch is being written at a time. Bounded by the window, as each outcome keeps its change's place in it."""

    def __init__(self) -> None:
        self._next: deque[Settlement] = deque()
        self._parts: list[list[Settlement]] = []
        """What is written first; the next one stands last."""
        self._held: dict[Key, _Held] = {}
        self._taken: dict[int, Settlement] = {}
        self._parked: dict[int, list[Settlement]] = {}
        self.maybe_written: set[int] = set()
        """Numbers of the changes whose mark was being written when the session was lost."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def ready(self) -> int:
        """How many ``take`` would give, held ones not counted."""
        return len(self._next) + (sum(map(len, self._parts)) if self._parts else 0)

    @property
    def holds(self) -> bool:
        """Some keys cannot be written for now."""
        return bool(self._held)

    @property
    def parked(self) -> Collection[int]:
        """The shards that have parked outcomes."""
        return self._parked.keys()

    def add(self, *finished: Settlement) -> None:
        self._next += finished
        self._count += len(finished)

    def wait_s(self, now: float) -> float:
        """Seconds until ``take`` may give something."""
        if self._next or self._parts:
            return 0.0
        due = [held.at for held in self._held.values() if held.waiting] if self._held else []
        return max(0.0, min(due) - now) if due else inf

    def take(self, limit: int, now: float = inf) -> list[Settlement]:
        """What is to be written next, in the order in which it finished."""
        if not self._count:
            return []
        if not self._held and not self._parts:
            batch = list(islice(self._next, limit))
            for _ in batch:
                self._next.popleft()
        elif self._parts:
            batch = self._unless_held(self._parts.pop())
        else:
            batch = self._due(limit, now)
            while self._next and len(batch) < limit:
                batch += self._unless_held([self._next.popleft()])
        self._taken = dict(zip(map(_SEQ, batch), batch, strict=True))
        return batch if batch or self.wait_s(now) > 0 else self.take(limit, now)

    def written(self, batch: Iterable[Settlement]) -> list[Settlement]:
        """These are in the table. Returns them without those that were not being written any more: put back, or of a
        session that was lost.
        """
        taken = self._taken
        done = [finished for finished in batch if taken.pop(finished.change.seq, None) is not None]
        self._count -= len(done)
        if self.maybe_written:
            self.maybe_written.difference_update(finished.change.seq for finished in done)
        if self._held:
            for finished in done:
                self._no_longer_held(finished.change.key)
        return done

    def _no_longer_held(self, key: Key) -> None:
        held = self._held.get(key)
        if held is not None and held.waiting:
            held.at = -inf
        elif held is not None:
            del self._held[key]

    def split(self, batch: list[Settlement]) -> None:
        """One of several was rejected: write the halves next."""
        middle = len(batch) // 2
        self._write_next(batch[middle:])
        self._write_next(batch[:middle])

    def again(self, batch: list[Settlement]) -> None:
        """Nothing of it was written: write all of it next, once more."""
        self._write_next(batch)

    def becomes(self, finished: Settlement) -> None:
        """Its outcome has changed, and is written next."""
        self._write_next([finished])

    def put_back(self, batch: Iterable[Settlement], until: float) -> None:
        """These were not written; their keys are held until ``until``."""
        by_key: dict[Key, list[Settlement]] = {}
        for finished in batch:
            by_key.setdefault(finished.change.key, []).append(self._taken.pop(finished.change.seq))
        for key, these in by_key.items():
            held = self._held.setdefault(key, _Held())
            held.at = until
            held.waiting.extendleft(reversed(these))

    def park(self) -> list[Settlement]:
        """The session is lost. Returns the outcomes that are kept."""
        self.maybe_written |= self._taken.keys()
        kept = [*self._taken.values()]
        kept += [finished for held in self._held.values() for finished in held.waiting]
        kept += [finished for part in reversed(self._parts) for finished in part]
        kept += [*(finished for of_shard in self._parked.values() for finished in of_shard), *self._next]
        for forgotten in (self._next, self._parts, self._held, self._taken, self._parked):
            forgotten.clear()
        for finished in kept:
            self._parked.setdefault(finished.change.shard, []).append(finished)
        self._count = len(kept)
        return kept

    def unpark(self, shards: Iterable[int]) -> None:
        """These shards are owned again, and no other consumer owned them meanwhile."""
        for shard in shards:
            self._next.extend(self._parked.pop(shard, ()))

    def drop(self, shards: Iterable[int]) -> list[Settlement]:
        """Other consumers own or owned these shards. Returns the outcomes that are forgotten."""
        dropped = [finished for shard in shards for finished in self._parked.pop(shard, ())]
        self._count -= len(dropped)
        self.maybe_written.difference_update(finished.change.seq for finished in dropped)
        return dropped

    def _write_next(self, batch: list[Settlement]) -> None:
        for finished in batch:
            self._taken.pop(finished.change.seq, None)
            if self._held and (held := self._held.pop(finished.change.key, None)):
                self._next.extendleft(reversed(held.waiting))
        if batch:
            self._parts.append(batch)

    def _unless_held(self, batch: list[Settlement]) -> list[Settlement]:
        free: list[Settlement] = []
        for finished in batch:
            held = self._held.get(finished.change.key)
            if held is None:
                free.append(finished)
            else:
                held.waiting.append(finished)
        return free

    def _due(self, limit: int, now: float) -> list[Settlement]:
        batch: list[Settlement] = []
        for held in self._held.values():
            while held.at <= now and held.waiting and len(batch) < limit:
                batch.append(held.waiting.popleft())
        return batch
