"""Which shards are ours, and how many of their changes are in flight: started, and not settled yet. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cdc.core.model import Change


class ShardOwnership:
    """A shard that is asked back stays in flight until all that was started of it has settled."""

    def __init__(self) -> None:
        self._owned: set[int] = set()
        self._leaving: set[int] = set()
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    @property
    def owned(self) -> Collection[int]:
        return self._owned

    def own(self, shards: Iterable[int]) -> set[int]:
        """Returns those that are new."""
        arrived = set(shards) - self._owned
        self._owned |= arrived
        self._leaving -= arrived
        return arrived

    def release(self, shards: Iterable[int]) -> set[int]:
        """These are asked back. Returns those that were ours."""
        leaving = self._owned & set(shards)
        self._owned -= leaving
        self._leaving |= leaving
        return leaving

    def released(self) -> set[int]:
        """The shards asked back of which nothing is in flight any more; each is told once."""
        idle = {shard for shard in self._leaving if shard not in self._counts}
        self._leaving -= idle
        return idle

    def started(self, change: Change) -> None:
        self._counts[change.shard] = self._counts.get(change.shard, 0) + 1

    def ended(self, change: Change) -> None:
        """It has settled, or was cut off."""
        ended = self._counts[change.shard] - 1
        if ended:
            self._counts[change.shard] = ended
        else:
            del self._counts[change.shard]

    def clear(self) -> None:
        self._owned.clear()
        self._leaving.clear()
        self._counts.clear()
