"""Changes whose transaction or session was lost while they ran, and how often in a row. Pure.

What was lost counts as no attempt, since it may be nobody's fault: a failover, an operator, another transaction. But a
handler that closes its connection, or that crashes the server, over whatever connection, would lose it for ever. So
there is a bound, and a pause that grows.

A statement that crashes its backend ends every session of the server, and with it each transaction that was under way.
So whatever was lost runs one at a time from then on, beside what was not: then the next loss is one change's, and only
the one to blame comes to the bound. What else was lost is cleared when it has an outcome.

The consumer's session is lost for all that runs, and handlers without a transaction may take long. One after the other
they would take for ever, and after a failover for nothing. So these run alone when it was lost under them three times
in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from cdc.core.model import Change

LOSSES_MAX = 10
SESSIONS_MAX = 3
"""Losses of the session under a change, until it runs alone."""
REMEMBERED = 10_000
"""Those of which no more was heard, as somebody else has handled them, make room for others."""
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 5.0


class Losses:
    def __init__(self) -> None:
        self._times: dict[UUID, int] = {}
        self.suspects = set[UUID]()
        """Those that are to run one at a time."""

    def doubts(self, change: Change) -> bool:
        """Whether it is one of those that are to run one at a time."""
        return bool(self.suspects) and change.id in self.suspects

    def times(self, change_id: UUID) -> int:
        """How often in a row by now."""
        return self._times.get(change_id, 0)

    def add(self, changes: Iterable[Change], *, suspect_at: int = 1) -> int:
        """They have lost a transaction. Returns how often in a row the one that did most often.

        ``suspect_at``: how often until they are to run one at a time.
        """
        most = 0
        for change in changes:
            times = self._times.pop(change.id, 0) + 1
            self._times[change.id] = times
            if times >= suspect_at:
                self.suspects.add(change.id)
            most = max(most, times)
        while len(self._times) > REMEMBERED:
            self._forget(next(iter(self._times)))
        return most

    def forget(self, changes: Iterable[Change]) -> None:
        """They have an outcome."""
        if self._times:
            for change in changes:
                self._forget(change.id)

    def _forget(self, change_id: UUID) -> None:
        self._times.pop(change_id, None)
        self.suspects.discard(change_id)


def pause_s(times: int) -> float:
    """Seconds to wait after so many losses."""
    return min(_PAUSE_MIN_S * 2.0 ** min(times - 1, 16), _PAUSE_MAX_S)
