"""Which changes of a batch are sent to a broker together, and which of them a lost connection is blamed on. Pure.

Theory
------
*Order.* A batch is sent in rounds, each with one change of a key at most: a later change of a key is sent when the one
before is acknowledged.

*Blame.* A connection that is lost takes all that is under way with it. Mostly the broker is the cause. But a message
may be what ends the connection each time, and all others with it. So after a loss one change is sent alone. If it is
acknowledged, the broker is there, and the next loss is the fault of one of those that were under way, or chance: each
of them remembers it. From its third such loss on a change is sent alone, behind those that were lost less often, and
from the tenth on the loss is its own failure. Losses without an acknowledgement in between are an outage, and count for
nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdc.core.deliveries import DeliveryError, LostError, UnreachedError
from cdc.core.lost_transactions import LOSSES_MAX, Losses
from cdc.core.model import Change, Key

ALONE_FROM = 3


class MessageRounds:
    """For one delivery."""

    def __init__(self) -> None:
        self._losses = Losses()
        self._doubtful = False
        """Nothing has been acknowledged since the last loss."""

    def rounds(self, changes: Sequence[Change]) -> list[list[Change]]:
        """One change of a key in each, in the order of the key; those that were lost behind the others."""
        rounds: list[list[Change]] = []
        counts: dict[Key, int] = {}
        for change in changes:
            place = counts.get(change.key, 0)
            counts[change.key] = place + 1
            if place == len(rounds):
                rounds.append([])
            rounds[place].append(change)
        if self._losses.suspects:
            for each in rounds:
                each.sort(key=lambda change: self._losses.times(change.id))
        return rounds

    def together(self, due: Sequence[Change]) -> int:
        """How many of these, from the first on, are sent next. At least one."""
        if self._doubtful:
            return 1
        if not self._losses.suspects:
            return len(due)
        suspect = next((place for place, change in enumerate(due) if self._losses.doubts(change)), len(due))
        return suspect or 1

    def ended(self, changes: Sequence[Change], results: Sequence[Exception | None]) -> Sequence[Exception | None]:
        """These were sent together. Returns the results, that of a change that is to blame replaced."""
        lost = [change for change, result in zip(changes, results, strict=True) if isinstance(result, LostError)]
        self._losses.forget(set(changes).difference(lost))
        if not lost:
            unreached = any(isinstance(result, UnreachedError) for result in results)
            self._doubtful = self._doubtful and unreached
            return results
        counts = not self._doubtful or len(lost) < len(changes)
        self._doubtful = True
        if counts and self._losses.add(lost, suspect_at=ALONE_FROM) >= LOSSES_MAX and len(changes) == 1:
            self._losses.forget(changes)
            return [DeliveryError(f"{result}, {LOSSES_MAX} times while others were acknowledged") for result in results]
        return results
