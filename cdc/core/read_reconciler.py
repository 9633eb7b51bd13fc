"""What happens while a read of the table is under way. Pure.

Reads and settles use different sessions, so a read may return rows older than a settle that began after it; and shards
may be released and acquired meanwhile. The reconciler keeps what corrects the answer. Without it a change settled
during a sweep would run a second time, and the successor of a failed one would overtake it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from cdc.core.model import Change, Key, Outcome


class Settlement(NamedTuple):
    change: Change
    outcome: Outcome


class ReadReconciler:
    """A context: from the beginning of a read until its answer has been taken in. One read at a time."""

    def __init__(self) -> None:
        self.eventful = False
        """Something has happened meanwhile: call ``keys`` and ``outdates``."""
        self.under_way = False
        self._settled: dict[int, Settlement] = {}
        self._arrived: set[int] = set()
        self._cut_off: set[Key] = set()

    def __enter__(self) -> ReadReconciler:
        self.under_way = True
        return self

    def close(self, *_: object) -> None:
        self.under_way = False
        if self.eventful:
            self.eventful = False
            self._settled.clear()
            self._arrived.clear()
            self._cut_off.clear()

    __exit__ = close

    def settled(self, batch: Iterable[Settlement]) -> None:
        if self.under_way:
            self.eventful = True
            self._settled.update({finished.change.seq: finished for finished in batch})

    def arrived(self, shards: Iterable[int]) -> None:
        """Shards were acquired; they may have been owned when the read began, and by another consumer since."""
        if self.under_way:
            self.eventful = True
            self._arrived.update(shards)

    def cut_off(self, key: Key) -> None:
        """A change of the key was cut off; only the table has its outcome."""
        if self.under_way:
            self.eventful = True
            self._cut_off.add(key)

    def outdates(self, change: Change) -> bool:
        """Whether the read is older than what is known about the change."""
        return change.seq in self._settled or change.shard in self._arrived

    def keys(self) -> tuple[Set[Key], Mapping[Key, int]]:
        """The keys that a change may have blocked, and blocks no more; those of which a change has begun to wait, and
        the number of the first such one.
        """
        unblocked, waiting = set(self._cut_off), dict[Key, int]()
        for change, outcome in self._settled.values():
            if outcome.blocks_key:
                waiting[change.key] = min(change.seq, waiting.get(change.key, change.seq))
            else:
                unblocked.add(change.key)
        return unblocked, waiting
