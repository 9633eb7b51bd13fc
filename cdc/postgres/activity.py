"""What consumers did of late, as the database has it: no consumer is asked, and none writes anything for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg import errors
from psycopg.rows import class_row

from cdc.postgres.admin import bounded
from cdc.postgres.sql_files import load

PROCESSED_S = 60.0
FAILED_S = 3_600.0
"""Seconds that are looked back."""
_BOUND = 10_000
_SHOWN = 100
_LIMIT_S = 5


@dataclass(frozen=True, slots=True)
class ProcessingRate:
    """Changes a second of the last minute; latencies in seconds, from the change to its mark, None: not known."""

    entity_type: str
    operation: str
    per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None


@dataclass(frozen=True, slots=True)
class FailedAttempts:
    """Those of the last hour. ``dead``: after so many the change was dead. ``more``: than were looked at."""

    subscription: str
    handler: str | None
    error_kind: str
    attempts: int
    dead: int
    last_at: datetime
    more: bool


class Activity:
    """The statements for the outbox in ``schema``, on an autocommit connection."""

    def __init__(self, schema: str) -> None:
        self._statements = load("activity.sql", schema)

    def processed(self, connection: psycopg.Connection) -> list[ProcessingRate]:
        """By the default subscription, the most first."""
        given = {"seconds": PROCESSED_S, "bound": _BOUND, "shown": _SHOWN}
        with bounded(connection, _LIMIT_S), connection.cursor(row_factory=class_row(ProcessingRate)) as cursor:
            return cursor.execute(self._statements["processed"], given).fetchall()

    def failed(self, connection: psycopg.Connection) -> list[FailedAttempts] | None:
        """By all subscriptions, the most first. None where the outbox is too old, or the role may not see them."""
        given = {"seconds": FAILED_S, "bound": _BOUND, "shown": _SHOWN}
        try:
            with bounded(connection, _LIMIT_S), connection.cursor(row_factory=class_row(FailedAttempts)) as cursor:
                return cursor.execute(self._statements["failed"], given).fetchall()
        except (errors.UndefinedTable, errors.InsufficientPrivilege):
            return None
