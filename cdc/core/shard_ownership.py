"""Which shards this consumer owns, and how many changes of each are in flight. Notifies its listeners. Pure.

A shard is *owned* for as long as this process holds its lock, and *active* while changes of it may be taken in:

    acquire ──► active ──revoke──► in flight until all that was started has settled ──► idle ──released──► gone
                   └────────────── lose: the session, and with it every lock ──────────────────────────────► gone
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import NamedTuple, Protocol

from cdc.core.model import Change


class Acquired(NamedTuple):
    """Shards that were locked: which of them had an owner that died, by ``at`` of the database's clock, and which
    this process had before, with no other owner since.

    ``floors``: by shard, the number below which, and at which, nothing is fresh or still to come. None: 0.
    """

    shards: Collection[int]
    orphaned: Collection[int] = ()
    kept: Collection[int] = ()
    at: datetime = datetime.min.replace(tzinfo=UTC)
    floors: Mapping[int, int] = MappingProxyType({})


class ShardListener(Protocol):
    """Called after the ownership has changed."""

    def acquired(self, acquired: Acquired) -> None:
        """These shards are owned: take their changes in."""

    def revoked(self, shards: Collection[int]) -> None:
        """These shards are to be released: take no more of their changes in."""

    def lost(self) -> None:
        """The session is lost, and all shards with it."""


class ShardOwnership:
    """Listeners are called in the order in which they subscribed."""

    def __init__(self) -> None:
        self.owned: set[int] = set()
        self.active: set[int] = set()
        self._in_flight: dict[int, int] = {}
        """By shard, how many of its changes have started and not settled."""
        self._listeners: list[ShardListener] = []

    def subscribe(self, *listeners: ShardListener) -> None:
        self._listeners += listeners

    def acquire(self, acquired: Acquired) -> None:
        """Their locks are held."""
        self.owned.update(acquired.shards)
        self.active.update(acquired.shards)
        for listener in self._listeners:
            listener.acquired(acquired)

    def revoke(self, shards: Iterable[int]) -> None:
        """Their locks are to be released, as soon as they are idle."""
        if revoked := self.active.intersection(shards):
            self.active -= revoked
            for listener in self._listeners:
                listener.revoked(revoked)

    def idle(self) -> set[int]:
        """The revoked shards with nothing in flight."""
        return {shard for shard in self.owned - self.active if shard not in self._in_flight}

    def released(self, shards: Collection[int]) -> None:
        """The locks of these idle shards are released."""
        self.owned.difference_update(shards)

    def lose(self) -> int:
        """The session is lost. Returns how many shards were owned."""
        count = len(self.owned)
        for forgotten in (self.owned, self.active, self._in_flight):
            forgotten.clear()
        for listener in self._listeners:
            listener.lost()
        return count

    @property
    def in_flight(self) -> int:
        """How many changes have started and not settled."""
        return sum(self._in_flight.values())

    def started(self, change: Change) -> None:
        self._in_flight[change.shard] = self._in_flight.get(change.shard, 0) + 1

    def ended(self, changes: Iterable[Change]) -> None:
        """These have settled, or were cut off."""
        in_flight = self._in_flight
        for change in changes:
            shard = change.shard
            if left := in_flight[shard] - 1:
                in_flight[shard] = left
            else:
                del in_flight[shard]
