"""Keys with changes that the window does not hold: one number for each. Pure.

A *watermark* says that changes of the key from its ``seq`` on were seen and not admitted. ``blocked``: an earlier
change of the key waits, and the key is not read before that one has settled. Otherwise a ``KeyRead`` reads the key
from there, as soon as its queue is empty. ``last``: no change beyond this number was seen and not admitted.
A key may be *held* until a time, and is not read before.

The memory for watermarks is bounded, and each entity type has a limit in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf
from typing import Final, NamedTuple

from cdc.core.dynamic_limit import DynamicLimit
from cdc.core.model import SEQ_MAX, Key

_FACTOR = 4
_ENDED_MAX = 100
"""Holds that have ended otherwise, and are forgotten when there are more of them than of others."""


class KeyRead(NamedTuple):
    """Read this key on: its fresh changes from ``seq`` on."""

    key: Key
    shard: int
    seq: int


class Watermark:
    __slots__ = ("blocked", "last", "seq", "shard", "until")

    def __init__(self, seq: int, shard: int, blocked: bool, last: int) -> None:
        self.seq = seq
        self.shard = shard
        self.blocked = blocked
        self.last = last
        self.until: float | None = None
        """The key is held, and blocked, until then."""


class DeferredKeys:
    """Up to ``size`` watermarks, not counting those that must be kept. ``sole``: there is one entity type only."""

    def __init__(self, size: int, *, sole: bool = True) -> None:
        self._limit = DynamicLimit(size, _FACTOR, sole=sole)
        self.watermarks: Final[dict[Key, Watermark]] = {}
        """By key; others only read it. Most keys have none, and each change asks three times: a method costs more."""
        self.reads: Final[dict[str, dict[Key, None]]] = {}
        """The keys to be read on; others only read it. By type, the type that was served last stands last."""
        self.held: list[tuple[float, Key]] = []
        """A heap; an entry whose key has another time by now, or none, has ended."""

    def __len__(self) -> int:
        return len(self.watermarks)

    def has_room(self, key: Key) -> bool:
        """Whether the key has a mark or may get one."""
        return key in self.watermarks or self._limit.admits(key[0])

    def defer(self, key: Key, seq: int, shard: int, *, blocked: bool, last: int = SEQ_MAX) -> None:
        """Mark the key from ``seq`` on, whether there is room or not. ``last``: if it is known what was seen of it."""
        mark = self.watermarks.get(key)
        if mark is None:
            self.watermarks[key] = Watermark(seq, shard, blocked, last)
            self._limit.acquire(key[0])
        else:
            mark.seq = min(mark.seq, seq)
            mark.last = max(mark.last, last)
            mark.blocked = mark.blocked or blocked

    def handled(self, key: Key, first: int, through: int) -> None:
        """All changes of the key from ``first`` to ``through`` that were seen are taken care of; earlier ones are not.

        One of these may become visible when a later one runs: a replay is made without the lock of a row.
        """
        if (mark := self.watermarks.get(key)) and mark.seq >= first:
            if mark.last <= through:
                self.forget([key])
            else:
                mark.seq = max(mark.seq, through + 1)

    def hold(self, key: Key, until: float) -> None:
        """Do not read the marked key before."""
        mark = self.watermarks[key]
        mark.blocked, mark.until = True, until
        self.cancel_read(key)
        heappush(self.held, (until, key))
        if len(self.held) > 2 * len(self.watermarks) + _ENDED_MAX:
            self.held = [(mark.until, key) for key, mark in self.watermarks.items() if mark.until is not None]
            heapify(self.held)

    @property
    def held_until(self) -> float:
        """When the next of the keys that are held is to be read; inf: none is held."""
        while self.held:
            until, key = self.held[0]
            if (mark := self.watermarks.get(key)) and mark.until == until:
                return until
            heappop(self.held)
        return inf

    def read_held(self, now: float) -> None:
        """Read the keys whose time has come; they are held no more."""
        while self.held_until <= now:
            _, key = heappop(self.held)
            mark = self.watermarks[key]
            mark.until, mark.blocked = None, False
            self.request_read(key)

    def release(self, key: Key) -> None:
        """Read the key now, if it is held."""
        mark = self.watermarks.get(key)
        if mark is not None and mark.until is not None:
            mark.until, mark.blocked = None, False
            self.request_read(key)

    def count(self, entity_type: str) -> int:
        """How many keys of the type have a mark."""
        return self._limit.held(entity_type)

    def forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            del self.watermarks[key]
            self._limit.release(key[0])
            self.cancel_read(key)

    def of_shards(self, shards: Collection[int]) -> Iterator[Key]:
        return (key for key, mark in self.watermarks.items() if mark.shard in shards)

    def clear(self) -> None:
        self.watermarks.clear()
        self.reads.clear()
        self.held.clear()
        self._limit.clear()

    def request_read(self, key: Key) -> None:
        """The key is to be read on."""
        self.reads.setdefault(key[0], {})[key] = None

    def cancel_read(self, key: Key) -> None:
        if keys := self.reads.get(key[0]):
            keys.pop(key, None)
            if not keys:
                del self.reads[key[0]]

    def take_reads(self, limit: int, has_room: Callable[[str], bool]) -> list[KeyRead]:
        """Keys to read on, of the next type that has room in the window; each is requested once."""
        entity_type = next(filter(has_room, self.reads), None)
        if entity_type is None:
            return []
        keys = self.reads[entity_type] = self.reads.pop(entity_type)
        chosen = list(islice(keys, limit))
        for key in chosen:
            self.cancel_read(key)
        return [KeyRead(key, mark.shard, mark.seq) for key in chosen if (mark := self.watermarks.get(key))]
