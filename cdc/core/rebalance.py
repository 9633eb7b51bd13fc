"""Who should own which shard. Pure; the locks themselves are in ``postgres.shard_locks``.

Every consumer decides for itself from three figures: how many members are alive, how many shards it holds and how
many are free. With m members a fair share is at least ``SHARDS // m`` and at most one more. A member above the
fair share gives the surplus back; one below it takes free shards. No member takes a shard from another, so two members
that count differently for a moment cannot fight over a shard: at worst it stays free until the next poll.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from cdc.core.model import SHARDS


class Move(NamedTuple):
    """``acquire``: how many free shards to lock; ``release``: which shards to release once they are idle."""

    acquire: int
    release: frozenset[int]


def fair_share(members: int, *, shards: int = SHARDS) -> tuple[int, int]:
    """(least, most) shards a member should hold."""
    least, left_over = divmod(shards, max(members, 1))
    return least, least + (left_over > 0)


def balance(members: int, owned: Collection[int], free: int, *, shards: int = SHARDS) -> Move:
    """What this member does next. ``free``: the number of shards that no member holds.

    A free shard is always taken up to the upper bound, because an unowned shard is work that waits; only shards
    above the bound are given back, the highest numbers first, so that equal members settle on equal answers.
    """
    _, most = fair_share(members, shards=shards)
    surplus = len(owned) - most
    if surplus > 0:
        return Move(0, frozenset(sorted(owned)[-surplus:]))
    return Move(min(free, -surplus), frozenset())


_HANDED_OVER_S = 10.0
"""What runs on a shard ends before it is given away; longer than most of it takes."""
_AGAIN_S = 60.0


class NoShardReminder:
    """When to report that a member has no shard, though there are enough for all."""

    def __init__(self) -> None:
        self._due: float | None = None

    def due(self, owned: int, members: int, now: float) -> bool:
        """Call it at each poll; ``now`` in monotonic seconds."""
        if owned or not fair_share(members)[0]:
            self._due = None
            return False
        if self._due is None:
            self._due = now + _HANDED_OVER_S
        if now < self._due:
            return False
        self._due = now + _AGAIN_S
        return True
