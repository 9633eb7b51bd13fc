"""Changes whose transaction was lost while they ran, and how often in a row. Pure.

A lost transaction counts as no attempt, since it may be nobody's fault: a failover, an operator, another transaction.
But a handler that closes its connection, or whose statement crashes the server, would lose it for ever. So there is a
bound, and a pause that grows.

A statement that crashes its backend ends every session of the server, and with it each transaction that was under way.
So whatever was lost runs one at a time from then on, beside what was not: then the next loss is one change's, and only
the one to blame comes to the bound. What else was lost is cleared when it has an outcome.
"""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from cdc.model import Change

LOSSES_MAX = 10
_REMEMBERED = 10_000
"""Those of which no more was heard, as somebody else has handled them, make room for others."""
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 5.0


class Losses:
    def __init__(self) -> None:
        self._times: dict[UUID, int] = {}

    def __contains__(self, change_id: UUID) -> bool:
        return change_id in self._times

    def times(self, change_id: UUID) -> int:
        """How often in a row by now."""
        return self._times.get(change_id, 0)

    def add(self, changes: Iterable[Change]) -> int:
        """They have lost a transaction. Returns how often in a row the one that did most often."""
        most = 0
        for change in changes:
            times = self._times.pop(change.id, 0) + 1
            self._times[change.id] = times
            most = max(most, times)
        while len(self._times) > _REMEMBERED:
            del self._times[next(iter(self._times))]
        return most

    def forget(self, changes: Iterable[Change]) -> None:
        """They have an outcome."""
        if self._times:
            for change in changes:
                self._times.pop(change.id, None)


def pause_s(times: int) -> float:
    """Seconds to wait after so many losses."""
    return min(_PAUSE_MIN_S * 2.0 ** min(times - 1, 16), _PAUSE_MAX_S)
