"""Keys with changes that the window does not hold: one number for each. Pure.

A *watermark* says that changes of the key from its ``seq`` on were seen and not admitted. ``blocked``: an earlier
change of the key waits, and the key is not read before that one has settled. Otherwise a ``KeyRead`` reads the key
from there, as soon as its queue is empty.

The memory for watermarks is bounded, and each entity type has a limit in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from cdc.core.dynamic_limit import DynamicLimit
from cdc.core.model import Key

_FACTOR = 4


class KeyRead(NamedTuple):
    """Read this key on: its fresh changes from ``seq`` on."""

    key: Key
    shard: int
    seq: int


class Watermark:
    __slots__ = ("blocked", "seq", "shard")

    def __init__(self, seq: int, shard: int, blocked: bool) -> None:
        self.seq = seq
        self.shard = shard
        self.blocked = blocked


class DeferredKeys:
    """Up to ``size`` watermarks, not counting those that must be kept. ``sole``: there is one entity type only."""

    def __init__(self, size: int, *, sole: bool = True) -> None:
        self._limit = DynamicLimit(size, _FACTOR, sole=sole)
        self.watermarks: Final[dict[Key, Watermark]] = {}
        """By key; others only read it. Most keys have none, and each change asks three times: a method costs more."""
        self.reads: Final[dict[str, dict[Key, None]]] = {}
        """The keys to be read on; others only read it. By type, the type that was served last stands last."""

    def __len__(self) -> int:
        return len(self.watermarks)

    def has_room(self, key: Key) -> bool:
        """Whether the key has a mark or may get one."""
        return key in self.watermarks or self._limit.admits(key[0])

    def defer(self, key: Key, seq: int, shard: int, *, blocked: bool) -> None:
        """Mark the key from ``seq`` on, whether there is room or not."""
        mark = self.watermarks.get(key)
        if mark is None:
            self.watermarks[key] = Watermark(seq, shard, blocked)
            self._limit.acquire(key[0])
        else:
            mark.seq = min(mark.seq, seq)
            mark.blocked = mark.blocked or blocked

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
