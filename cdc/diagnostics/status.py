"""The state of things at a glance, from the database: what is not processed, who works, how fast, and the slot.

Every read is bounded, and none shows what is in a row: the text of an error may quote it, so of an error only its
summary is taken. The rest is for ``cdc outbox show``, which somebody runs who may see rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

import psycopg

from cdc.core.model import ChangeState
from cdc.postgres.admin import ChangeSummary, Filter, OutboxAdmin, Stats, Throughput
from cdc.postgres.loaders import read_anything
from cdc.postgres.shard_locks import Member, members, observers
from cdc.replication import slots
from cdc.replication.slot_health import SlotReport

_SHOWN = 10
"""Dead letters, and as many of those that wait."""
_PER_SHARD = 200
_SCAN = 10_000
"""With half a million changes that are not processed: a quarter of a second, of 5 s with the bounds of Letters."""
_LIMIT_S = 5
_TYPES_MAX = 500
"""Of the types with something that is not processed, those with the most; the page shows a fraction of them."""
_NAME_MAX = 200
"""Characters of a type: nothing else bounds it, and what is here is kept in memory and sent to whoever asks."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A change that waits or is dead. ``at``: when it is tried again, or when it died. ``error``: its summary."""

    seq: int
    id: UUID
    state: ChangeState
    entity_type: str
    attempts: int
    at: datetime | None
    pauses_key: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Outbox:
    """``dead_letters``: the dead ones that died last, then the waiting ones that are due next."""

    stats: Stats
    dead_letters: list[DeadLetter]


@dataclass(frozen=True, slots=True)
class SlotReading:
    """``at`` by time.monotonic(). ``slot`` is None where there is none of the name; ``before``: the reading before."""

    at: float
    name: str
    slot: SlotReport | None
    before: SlotReport | None = None


@dataclass(frozen=True, slots=True)
class Readings:
    """What is read for people alone, beside the figures. ``outbox`` with its time; None: it could not be read."""

    outbox: tuple[float, Outbox] | None = None
    slot: SlotReading | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """``slot`` is None where there is none of that name."""

    seen_at: datetime
    database: str
    outbox: Outbox
    pace: Throughput
    members: list[Member]
    observers: list[Member]
    slot: SlotReport | None


def read(connection: psycopg.Connection, schema: str, slot: str) -> Status:
    """Everything, for somebody who asks."""
    read_anything(connection)
    admin = OutboxAdmin(schema)
    row = connection.execute("SELECT clock_timestamp(), current_database()").fetchone()
    assert row is not None
    return Status(
        seen_at=row[0],
        database=row[1],
        outbox=summarize(connection, admin),
        pace=admin.pace(connection),
        members=members(connection, schema),
        observers=observers(connection, schema),
        slot=slots.snapshot(connection, slot),
    )


def summarize(connection: psycopg.Connection, admin: OutboxAdmin) -> Outbox:
    """What may be asked every few seconds: counts end sooner than those of ``cdc outbox stats``."""
    stats = admin.stats(connection, per_shard=_PER_SHARD, scan=_SCAN, limit_s=_LIMIT_S)
    found = [admin.find(connection, state, Filter(), _SHOWN) for state in ("dead", "waiting")]
    most = sorted(stats.types, key=lambda each: each.fresh + each.waiting + each.dead, reverse=True)[:_TYPES_MAX]
    stats = replace(stats, types=sorted(most, key=lambda each: each.entity_type))
    return Outbox(stats, [_dead_letter(entry) for each in found for entry in each.entries])


def _dead_letter(entry: ChangeSummary) -> DeadLetter:
    return DeadLetter(
        seq=entry.seq,
        id=entry.id,
        state=entry.state,
        entity_type=entry.entity_type[:_NAME_MAX],
        attempts=entry.error_count,
        at=entry.dead_at or entry.next_attempt_at,
        pauses_key=entry.pauses_key,
        error=entry.error_summary,
    )
