"""Replication slots as an operator handles them, over an ordinary connection.

Ours is a doorbell: losing, dropping or making it anew costs latency until the next sweep and never a change. What it
can cost is disk: a slot that nobody reads keeps WAL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from cdc.errors import NotFoundError, RefusedError, UsageError
from cdc.lsn import Lsn
from cdc.refusals import During, Names, classify

PLUGIN = "wal2json"
_NAME = re.compile(r"[a-z0-9_]{1,63}")
_MUCH_WAL_BYTES = 1 << 30
_CREATE_LIMIT_S = 5.0
"""For each open write transaction that creating a slot waits for; some in a row make it longer."""

# As JSON: which columns there are depends on the server's version, and those it does not have read as None.
_LOOK = """
    SELECT to_jsonb(s) AS slot,
           to_jsonb(stats) AS stats,
           s.slot_type = 'logical' AND s.plugin = %(plugin)s AND s.database = current_database() AS ours,
           pg_wal_lsn_diff(now.lsn, s.restart_lsn)::bigint AS retained,
           pg_wal_lsn_diff(now.lsn, s.confirmed_flush_lsn)::bigint AS confirmed_lag,
           now.lsn::text AS current_lsn,
           age(s.catalog_xmin) AS catalog_xmin_age,
           reader.application_name,
           walsender.state AS walsender_state
      FROM pg_catalog.pg_replication_slots s
      LEFT JOIN pg_catalog.pg_stat_replication_slots stats USING (slot_name)
      LEFT JOIN pg_catalog.pg_stat_activity reader ON reader.pid = s.active_pid
      LEFT JOIN pg_catalog.pg_stat_replication walsender ON walsender.pid = s.active_pid
     CROSS JOIN (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                             ELSE pg_current_wal_flush_lsn() END AS lsn) now
     WHERE %(name)s::text IS NULL OR s.slot_name = %(name)s
     ORDER BY s.slot_name
"""
# Other roles' transactions show no start and no xid to a role without pg_monitor: then none is named.
_OLDEST_WRITER = """
    SELECT pid, extract(epoch FROM clock_timestamp() - xact_start)::int AS age_s, datname, application_name
      FROM pg_catalog.pg_stat_activity
     WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
     ORDER BY xact_start
     LIMIT 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A slot as the server sees it now. None where the server's version does not say, or there is nothing to say.

    ``retained_wal_bytes`` (since restart_lsn) is the disk it costs; ``confirmed_lag_bytes`` how far its reader is
    behind; ``catalog_xmin_age`` in transactions. The spill figures count what decoding wrote to disk.
    """

    name: str
    plugin: str | None
    slot_type: str
    database: str | None
    temporary: bool
    ours: bool
    active: bool
    active_pid: int | None
    application_name: str | None
    walsender_state: str | None
    wal_status: str | None
    restart_lsn: Lsn | None
    confirmed_lsn: Lsn | None
    current_lsn: Lsn
    retained_wal_bytes: int | None
    confirmed_lag_bytes: int | None
    safe_wal_bytes: int | None
    catalog_xmin_age: int | None
    conflicting: bool | None
    invalidation_reason: str | None
    inactive_since: datetime | None
    failover: bool | None
    synced: bool | None
    two_phase: bool | None
    spilled_transactions: int | None
    spilled_bytes: int | None
    streamed_bytes: int | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """``fine`` is False when something is to be done about the slot: ``remedy`` says what."""

    fine: bool
    sentence: str
    remedy: str = ""


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a replication slot",
            hint="1 to 63 lower-case letters, digits and underscores",
        )
    return name


def list_slots(connection: psycopg.Connection) -> list[Slot]:
    """All slots of the server, of every database, by name."""
    return _look(connection, None)


def snapshot(connection: psycopg.Connection, name: str) -> Slot | None:
    """One slot now; None when there is none of that name."""
    return next(iter(_look(connection, name)), None)


def status(connection: psycopg.Connection, name: str) -> Slot:
    """Raises NotFoundError."""
    found = snapshot(connection, check_name(name))
    if found is None:
        raise NotFoundError(
            f"there is no replication slot {name}", hint="cdc slot list shows all; cdc run creates its own"
        )
    return found


def create(
    connection: psycopg.Connection, name: str, *, if_not_exists: bool = False, limit_s: float = _CREATE_LIMIT_S
) -> Slot:
    """A durable slot for our doorbell. Raises RefusedError when the name is taken, StreamError when it cannot be.

    Waits for every transaction, of any database, that is writing now; gives up after ``limit_s`` for one of them.
    """
    taken = snapshot(connection, check_name(name))
    if taken is not None:
        if if_not_exists and taken.ours:
            return taken
        raise _taken(taken)
    names = Names(slot=name, plugin=PLUGIN, database=connection.info.dbname, role=connection.info.user)
    try:
        with connection.transaction():
            connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{limit_s * 1000:.0f}ms"])
            connection.execute("SELECT pg_catalog.pg_create_logical_replication_slot(%s, %s)", [name, PLUGIN])
    except psycopg.errors.LockNotAvailable as error:
        raise _waits_for_a_writer(connection, name) from error
    except psycopg.errors.DuplicateObject:
        raise _taken(status(connection, name)) from None
    except psycopg.Error as error:
        raise classify(error.sqlstate, error.diag.source_function, During.CREATE, names) from error
    return status(connection, name)


def drop(connection: psycopg.Connection, name: str, *, force: bool = False) -> Slot:
    """Drop it; returns what it was. ``force``: also another plugin's or database's. Never one that is being read."""
    found = status(connection, name)
    if found.active:
        raise _active(found)
    if not found.ours and not force:
        raise RefusedError(
            f"the slot {name} is not ours: {_kind(found)}",
            hint="another program may depend on it and lose data; if you are sure, add --force",
        )
    try:
        connection.execute("SELECT pg_catalog.pg_drop_replication_slot(%s)", [name])
    except psycopg.errors.ObjectInUse:
        raise _active(status(connection, name)) from None
    except psycopg.errors.UndefinedObject:
        status(connection, name)  # somebody was faster: the usual sentence
    except psycopg.errors.InsufficientPrivilege as error:
        names = Names(slot=name, plugin=PLUGIN, database=connection.info.dbname, role=connection.info.user)
        raise classify(error.sqlstate, None, During.CREATE, names) from error
    return found


def judge(slot: Slot) -> Verdict:
    """What an operator should think of it. Pure."""
    anew = f"cdc slot drop {slot.name}; no change is lost, and a running consumer makes it anew by itself"
    because = f" ({slot.invalidation_reason})" if slot.invalidation_reason else ""
    much = (slot.retained_wal_bytes or 0) > _MUCH_WAL_BYTES
    cases = (
        (
            slot.wal_status == "lost",
            Verdict(False, f"lost{because}: the server no longer keeps the WAL it needs", anew),
        ),
        (
            (slot.confirmed_lag_bytes or 0) < 0,
            Verdict(False, "deaf: confirmed ahead of the server's WAL, so it delivers nothing", anew),
        ),
        (
            slot.wal_status == "unreserved",
            Verdict(
                False,
                "about to be lost: it keeps more WAL than max_slot_wal_keep_size allows",
                "start a consumer, or raise max_slot_wal_keep_size",
            ),
        ),
        (
            much and not slot.active,
            Verdict(False, "keeps much WAL, and nobody reads it", f"start a consumer, or {anew}"),
        ),
        (
            much,
            Verdict(
                False,
                "keeps much WAL, though it is being read",
                "end the oldest write transaction of the server: every slot keeps what was written since it began",
            ),
        ),
        (
            not slot.active,
            Verdict(True, "nobody reads it; it keeps WAL until somebody does"),
        ),
    )
    return next((verdict for applies, verdict in cases if applies), Verdict(True, "fine"))


def _look(connection: psycopg.Connection, name: str | None) -> list[Slot]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return [_slot(row) for row in cursor.execute(_LOOK, {"name": name, "plugin": PLUGIN})]


def _slot(row: dict[str, Any]) -> Slot:
    slot, stats = row["slot"], row["stats"] or {}
    return Slot(
        name=slot["slot_name"],
        plugin=slot["plugin"],
        slot_type=slot["slot_type"],
        database=slot["database"],
        temporary=slot["temporary"],
        ours=bool(row["ours"]),
        active=slot["active"],
        active_pid=slot["active_pid"],
        application_name=row["application_name"],
        walsender_state=row["walsender_state"],
        wal_status=slot["wal_status"],
        restart_lsn=_lsn(slot["restart_lsn"]),
        confirmed_lsn=_lsn(slot["confirmed_flush_lsn"]),
        current_lsn=Lsn.parse(row["current_lsn"]),
        retained_wal_bytes=row["retained"],
        confirmed_lag_bytes=row["confirmed_lag"],
        safe_wal_bytes=slot["safe_wal_size"],
        catalog_xmin_age=row["catalog_xmin_age"],
        conflicting=slot.get("conflicting"),
        invalidation_reason=slot.get("invalidation_reason"),
        inactive_since=_time(slot.get("inactive_since")),
        failover=slot.get("failover"),
        synced=slot.get("synced"),
        two_phase=slot.get("two_phase"),
        spilled_transactions=stats.get("spill_txns"),
        spilled_bytes=stats.get("spill_bytes"),
        streamed_bytes=stats.get("stream_bytes"),
        total_bytes=stats.get("total_bytes"),
    )


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else Lsn.parse(text)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _kind(slot: Slot) -> str:
    return f"plugin {slot.plugin}, database {slot.database}" if slot.plugin else "a physical slot"


def _taken(slot: Slot) -> RefusedError:
    hint = "nothing needs to be done; --if-not-exists accepts it" if slot.ours else "choose another name (--slot-name)"
    return RefusedError(f"there is a replication slot {slot.name} already: {_kind(slot)}", hint=hint)


def _active(slot: Slot) -> RefusedError:
    reader = f"process {slot.active_pid}" + (f" ({slot.application_name})" if slot.application_name else "")
    return RefusedError(
        f"the slot {slot.name} is being read by {reader} on the server", hint="stop that consumer first"
    )


def _waits_for_a_writer(connection: psycopg.Connection, name: str) -> RefusedError:
    oldest = connection.execute(_OLDEST_WRITER).fetchone()
    hint = "end the oldest write transaction of the server, of any database: see pg_stat_activity, pg_prepared_xacts"
    if oldest is not None:
        pid, age_s, database, application = oldest
        who = f"process {pid}, {age_s} s old, database {database}" + (f", {application}" if application else "")
        hint = f"the oldest is {who}; wait for it, or end it: SELECT pg_terminate_backend({pid})"
    return RefusedError(f"the slot {name} cannot be created while a transaction that writes stays open", hint=hint)
