"""Changes whose transaction or session was lost while they ran, and how often in a row. Pure.

A loss does not count as an attempt, since the change need not be the cause: it may be a failover, an operator, another
transaction. But a handler that closes its connection, or that crashes the server, over any connection, would lose it
for ever. So there is a bound, and a pause that grows.

A statement that crashes its backend ends every session of the server, and with it each transaction that was open.
So changes that lost a transaction run one at a time from then on, while the others run as before: the next loss is then
one change's, and only the cause reaches the bound. The others are cleared when they have an outcome.

The loss of the consumer's session affects all that runs, and handlers without a transaction may take long. One after
the other they would take for ever, and after a failover in vain. So these run alone only when the session was lost
under them three times in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from cdc.core.model import Change

LOSSES_MAX = 10
SESSIONS_MAX = 3
"""Losses of the session during a change, until it runs alone."""
REMEMBERED = 10_000
"""The oldest entries, such as those that another consumer has handled, make room for new ones."""
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 5.0


class Losses:
    def __init__(self) -> None:
        self.counts: dict[UUID, int] = {}
        """Losses in a row, by change."""
        self.suspects = set[UUID]()
        """The changes that run one at a time."""

    def doubts(self, change: Change) -> bool:
        """Whether this change has to run one at a time."""
        return bool(self.suspects) and change.id in self.suspects  # to hash an id costs more than the rest

    def times(self, change_id: UUID) -> int:
        """How often in a row it has lost a transaction."""
        return self.counts.get(change_id, 0)

    def add(self, changes: Iterable[Change], *, suspect_at: int = 1) -> int:
        """These changes have lost a transaction. Returns the highest number of losses in a row among them.

        ``suspect_at``: the number of losses from which on they run one at a time.
        """
        most = 0
        for change in changes:
            times = self.counts.pop(change.id, 0) + 1
            self.counts[change.id] = times
            if times >= suspect_at:
                self.suspects.add(change.id)
            most = max(most, times)
        while len(self.counts) > REMEMBERED:
            self._forget(next(iter(self.counts)))
        return most

    def forget(self, changes: Iterable[Change]) -> None:
        """These changes have an outcome."""
        if self.counts:
            for change in changes:
                self._forget(change.id)

    def _forget(self, change_id: UUID) -> None:
        self.counts.pop(change_id, None)
        self.suspects.discard(change_id)


class LostCalls:
    """What calls have lost: their connection, or the consumer's session; or an obstacle has ended them."""

    def __init__(self) -> None:
        self.session = 0
        """The number of the consumer's session. What a call of an earlier one brings is lost."""
        self._losses = Losses()
        self._obstacles = Losses()
        self.suspects = self._losses.suspects
        """The changes that may be the cause of lost transactions or sessions: they run one at a time."""

    def is_suspect(self, change: Change) -> bool:
        return self._losses.doubts(change)

    def has(self, change: Change) -> bool:
        """Whether its last call lost something: it runs after a pause, and shares no transaction."""
        if not (self._losses.suspects or self._obstacles.suspects):
            return False
        return self._losses.doubts(change) or self._obstacles.doubts(change)

    def times(self, change: Change) -> int:
        """How often in a row it has lost its connection or the session."""
        return self._losses.times(change.id)

    def pause_s(self, change: Change) -> float:
        """Seconds to wait before it runs again."""
        times = max(self._losses.times(change.id), self._obstacles.times(change.id))
        return min(_PAUSE_MIN_S * 2.0 ** min(times - 1, 16), _PAUSE_MAX_S)

    def session_lost(self) -> None:
        self.session += 1

    def call_ended(self, changes: Iterable[Change], session: int) -> None:
        """Their call, begun in this session, returned or was cut off. If the session was lost, so is the outcome."""
        if session == self.session:
            self.forget(changes)
        else:
            self._losses.add(changes, suspect_at=SESSIONS_MAX)

    def transaction_lost(self, changes: Sequence[Change], *, blocked: bool) -> bool:
        """``blocked``: an obstacle ended it. Returns whether it is one that does not end for this change."""
        times = (self._obstacles if blocked else self._losses).add(changes)
        return blocked and len(changes) == 1 and times >= LOSSES_MAX

    def forget(self, changes: Iterable[Change]) -> None:
        """These changes have an outcome."""
        if self._losses.counts or self._obstacles.counts:
            self._losses.forget(changes)
            self._obstacles.forget(changes)
