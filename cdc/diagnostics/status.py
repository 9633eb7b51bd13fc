"""A summary of the outbox from the database: unprocessed changes, consumers, throughput, and the slot.

Every read is bounded, and none shows row content: an error's text may quote the row, so only its summary is read.
``cdc outbox show`` shows the rest, to operators who may see rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

import psycopg

from cdc.core.model import ChangeState
from cdc.core.subscription import DEFAULT
from cdc.postgres.admin import ChangeSummary, Filter, OutboxAdmin, Stats, Throughput
from cdc.postgres.barriers import Barriers
from cdc.postgres.controls import Control, Controls
from cdc.postgres.due import DueChanges
from cdc.postgres.loaders import read_anything
from cdc.postgres.pages import Barrier, DueLater
from cdc.postgres.shard_locks import Member, members, observers
from cdc.postgres.subscription_admin import SubscriptionAdmin
from cdc.postgres.subscriptions import Subscription, SubscriptionProgress, Subscriptions
from cdc.replication import slots
from cdc.replication.slot_health import SlotReport

_SHOWN = 10
"""Dead letters shown, and as many waiting changes."""
_PER_SHARD = 200
_SCAN = 10_000
"""With half a million unprocessed changes a read takes a quarter of a second; with the bounds of OutboxAdmin, 5 s."""
_LIMIT_S = 5
_TYPES_MAX = 500
"""The types with the most unprocessed changes; the page shows a fraction of them."""
_NAME_MAX = 200
"""Characters of a type, which nothing else bounds: the summary is kept in memory and sent to every client."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A waiting or dead change. ``at``: when it is due, or when it died. ``error``: its summary."""

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
    """``dead_letters``: the latest dead ones, then the waiting ones that are due next.

    ``due_later``: events that are not published yet; None: not known.
    """

    stats: Stats
    dead_letters: list[DeadLetter]
    due_later: DueLater | None = None


@dataclass(frozen=True, slots=True)
class SlotReading:
    """``at`` by time.monotonic(). ``slot`` is None where no slot has the name; ``before``: the reading before."""

    at: float
    name: str
    slot: SlotReport | None
    before: SlotReport | None = None


@dataclass(frozen=True, slots=True)
class Readings:
    """Readings for people alone, besides the figures. ``outbox`` with its time; None: it could not be read."""

    outbox: tuple[float, Outbox] | None = None
    slot: SlotReading | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """``slot`` is None where no slot has that name. ``barrier``: the TRUNCATE that holds back its type the longest.

    ``subscriptions``: those beside the default one; None: this role may not see them. All else is of ``subscription``.
    ``pace``: None: not known, as of another one than the default. ``paused``: the same, where it may not be seen.
    """

    seen_at: datetime
    database: str
    outbox: Outbox
    pace: Throughput | None
    members: list[Member]
    observers: list[Member]
    slot: SlotReport | None
    barrier: Barrier | None = None
    subscriptions: list[SubscriptionProgress] | None = None
    paused: list[Control] | None = None
    subscription: str = DEFAULT


def read(connection: psycopg.Connection, schema: str, slot: str, subscription: str = DEFAULT) -> Status:
    """Everything, read on demand. Raises NotFoundError."""
    read_anything(connection)
    if subscription != DEFAULT:
        return _of_another(connection, schema, slot, Subscriptions(schema).named(connection, subscription))
    admin = OutboxAdmin(schema)
    row = connection.execute("SELECT clock_timestamp(), current_database()").fetchone()
    assert row is not None
    return Status(
        seen_at=row[0],
        database=row[1],
        outbox=summarize(connection, admin, DueChanges(schema)),
        pace=admin.pace(connection),
        members=members(connection, schema),
        observers=observers(connection, schema),
        slot=slots.snapshot(connection, slot),
        barrier=Barriers(schema).oldest(connection),
        subscriptions=Subscriptions(schema).figures(connection, None, _PER_SHARD),
        paused=Controls(schema).seen(connection),
    )


def _of_another(connection: psycopg.Connection, schema: str, slot: str, subscription: Subscription) -> Status:
    [(seen_at, database)] = connection.execute("SELECT clock_timestamp(), current_database()").fetchall()
    progress = Subscriptions(schema).figures(connection, subscription.number, _PER_SHARD)
    return Status(
        seen_at=seen_at,
        database=database,
        outbox=summarize(connection, SubscriptionAdmin(schema, subscription), DueChanges(schema)),
        pace=None,
        members=members(connection, schema, subscription.number),
        observers=[],
        slot=slots.snapshot(connection, slot),
        subscriptions=progress,
        paused=None if progress is None else [control for each in progress for control in each.pauses],
        subscription=subscription.name,
    )


def summarize(connection: psycopg.Connection, admin: OutboxAdmin, due: DueChanges) -> Outbox:
    """Cheap enough for every few seconds: counts stop earlier than those of ``cdc outbox stats``."""
    stats = admin.stats(connection, per_shard=_PER_SHARD, scan=_SCAN, limit_s=_LIMIT_S)
    found = [admin.find(connection, state, Filter(), _SHOWN) for state in ("dead", "waiting")]
    most = sorted(stats.types, key=lambda each: each.fresh + each.waiting + each.dead, reverse=True)[:_TYPES_MAX]
    stats = replace(stats, types=sorted(most, key=lambda each: each.entity_type))
    dead_letters = [_dead_letter(entry) for each in found for entry in each.entries]
    return Outbox(stats, dead_letters, due.count(connection))


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
