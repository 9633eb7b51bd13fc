"""Failed attempts, for display. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

_KEPT = 20


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt, as in the log: ``summary`` is class and place, and nothing of the row.

    ``at`` in seconds of the epoch. ``again_in_s`` is None if the change is a dead letter.
    """

    at: float
    handler: str
    summary: str
    entity_type: str
    id: UUID
    attempt: int
    again_in_s: float | None


class RecentFailures:
    """The latest failures. One thread adds; any may take ``all``."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[int, Failure]] = {}

    def add(self, failure: Failure) -> None:
        """An error that repeats is one entry, or it would push out the others."""
        key = (failure.handler, failure.summary)
        times, _ = self._kept.get(key, (0, failure))
        others = [item for item in self._kept.items() if item[0] != key]
        # Replaced whole: another thread sees either the old or the new one.
        self._kept = dict([*others, (key, (times + 1, failure))][-_KEPT:])

    @property
    def all(self) -> list[tuple[int, Failure]]:
        """Each with its number of occurrences, as of the last time; the latest first."""
        return list(reversed(self._kept.values()))
