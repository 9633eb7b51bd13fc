"""An attempt that failed, as it is shown to people. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that failed, as the log tells it: ``told`` is class and place, and nothing of the row.

    ``at`` in seconds of the epoch. ``again_in_s`` is None where the change is now a dead letter.
    """

    at: float
    handler: str
    told: str
    entity_type: str
    id: UUID
    attempt: int
    again_in_s: float | None
