"""Replication slots as an operator handles them, over an ordinary connection.

Ours carries wake-ups only: losing, dropping, advancing or recreating it costs latency until the next sweep and never a
change. Its possible cost is disk: a slot without a reader keeps WAL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from cdc.core.errors import CdcError, NotFoundError, RefusedError, StreamError, UsageError
from cdc.core.lsn import Lsn
from cdc.core.model import PLUGINS, publication_name
from cdc.core.stream_reason import Reason
from cdc.postgres.open_transactions import end_oldest
from cdc.replication.refusals import ErrorContext, Phase, classify
from cdc.replication.slot_health import ABSENT_STANDBYS, SlotReport

AUTO = "auto"
"""As a plugin: the first of PLUGINS that the server has and allows."""

_NAME = re.compile(r"[a-z0-9_]{1,63}")
_CREATE_LIMIT_S = 5.0
"""For each open write transaction that creating a slot waits for; several in sequence take longer."""
_LEAVE_LIMIT_S = 10.0
"""For a reader to end after it was terminated."""
_FAILOVER_SINCE = 170_000

# As JSON: the columns depend on the server's version, and a missing one is read as None.
_LOOK = sql.SQL("""
    SELECT to_jsonb(s) AS slot,
           to_jsonb(stats) AS stats,
           s.slot_type = 'logical' AND s.plugin = ANY (%(plugins)s) AND s.database = current_database() AS ours,
           pg_wal_lsn_diff(now.lsn, s.restart_lsn)::bigint AS retained,
           pg_wal_lsn_diff(now.lsn, s.confirmed_flush_lsn)::bigint AS confirmed_lag,
           now.lsn::text AS current_lsn,
           age(s.catalog_xmin) AS catalog_xmin_age,
           reader.application_name,
           walsender.state AS walsender_state,
           extract(epoch FROM walsender.flush_lag)::float8 AS walsender_lag_s,
           ({absent_standbys}) AS held_by,
           clock_timestamp() AS seen_at
      FROM pg_catalog.pg_replication_slots s
      LEFT JOIN pg_catalog.pg_stat_replication_slots stats USING (slot_name)
      LEFT JOIN pg_catalog.pg_stat_activity reader ON reader.pid = s.active_pid
      LEFT JOIN pg_catalog.pg_stat_replication walsender ON walsender.pid = s.active_pid
     CROSS JOIN (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                             ELSE pg_current_wal_flush_lsn() END AS lsn) now
     WHERE %(name)s::text IS NULL OR s.slot_name = %(name)s
     ORDER BY s.slot_name
""").format(absent_standbys=sql.SQL(ABSENT_STANDBYS))


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a replication slot",
            hint="1 to 63 lower-case letters, digits and underscores",
        )
    return name


def list_slots(connection: psycopg.Connection) -> list[SlotReport]:
    """All slots of the server, of every database, by name."""
    return _reports(connection, None)


def snapshot(connection: psycopg.Connection, name: str) -> SlotReport | None:
    """One slot now; None when there is none of that name."""
    return next(iter(_reports(connection, name)), None)


def status(connection: psycopg.Connection, name: str) -> SlotReport:
    """Raises NotFoundError."""
    found = snapshot(connection, check_name(name))
    if found is None:
        raise NotFoundError(
            f"there is no replication slot {name}", hint="cdc slot list shows all; cdc run creates its own"
        )
    return found


def create(
    connection: psycopg.Connection,
    name: str,
    *,
    plugin: str = AUTO,
    schema: str = "public",
    if_not_exists: bool = False,
    temporary: bool = False,
    failover: bool = False,
    limit_s: float = _CREATE_LIMIT_S,
) -> SlotReport:
    """Create a slot for the wake-ups of the outbox in ``schema``; ``plugin`` is one of PLUGINS, or AUTO.

    pgoutput's empty publication is created with a durable slot. A temporary slot ends with the connection; one for
    ``failover`` (PostgreSQL 17 and later) is copied to standbys. Raises RefusedError when the name is taken or a
    write transaction stays open longer than ``limit_s``, StreamError when the server does not create the slot.
    """
    _refuse_failover(connection, temporary=temporary, failover=failover)
    taken = snapshot(connection, check_name(name))
    if taken is not None:
        if if_not_exists and taken.ours and plugin in (AUTO, taken.plugin):
            return taken
        raise _taken(taken, plugin)
    wanted = _NewSlot(name, schema, limit_s, temporary=temporary, failover=failover)
    _create_first_allowed(connection, wanted, PLUGINS if plugin == AUTO else (plugin,))
    return status(connection, name)


@dataclass(frozen=True, slots=True)
class _NewSlot:
    name: str
    schema: str
    limit_s: float
    temporary: bool
    failover: bool


def _create_first_allowed(connection: psycopg.Connection, wanted: _NewSlot, plugins: Sequence[str]) -> None:
    plugin, *others = plugins
    try:
        _create(connection, wanted, plugin)
    except StreamError as error:
        if not others or error.reason not in (Reason.PLUGIN_MISSING, Reason.PLUGIN_REFUSED):
            raise
        _create_first_allowed(connection, wanted, others)


def _create(connection: psycopg.Connection, wanted: _NewSlot, plugin: str) -> None:
    if plugin == "pgoutput" and not wanted.temporary:
        _publish_nothing(connection, wanted)
    # Only 17 and later take the argument for failover, which follows the one for two-phase commit.
    arguments = [wanted.name, plugin, wanted.temporary, *([False, True] if wanted.failover else [])]
    call = sql.SQL("SELECT pg_catalog.pg_create_logical_replication_slot({})").format(
        sql.SQL(", ").join([sql.Placeholder()] * len(arguments))
    )
    limit_ms = f"{wanted.limit_s * 1000:.0f}ms"
    try:
        with connection.transaction():
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [limit_ms])
            connection.execute(call, arguments)
    except (errors.LockNotAvailable, errors.QueryCanceled) as error:
        raise _waits_for_a_writer(connection, wanted.name) from error
    except errors.DuplicateObject:
        raise _taken(status(connection, wanted.name), plugin) from None
    except psycopg.Error as error:
        raise _classified(connection, error, wanted.name, plugin) from error


def _publish_nothing(connection: psycopg.Connection, wanted: _NewSlot) -> None:
    """Runs before the slot is created: pgoutput cannot decode WAL written while its publication was missing."""
    publication = publication_name(wanted.schema)
    if connection.execute("SELECT FROM pg_catalog.pg_publication WHERE pubname = %s", [publication]).fetchall():
        return
    try:
        connection.execute(sql.SQL("CREATE PUBLICATION {}").format(sql.Identifier(publication)))
    except errors.DuplicateObject:
        pass  # another session was faster
    except psycopg.Error as error:
        names = replace(_names(connection, wanted.name, "pgoutput"), publication=publication)
        raise classify(error.sqlstate, error.diag.source_function, Phase.PUBLISH, names) from error


def drop(connection: psycopg.Connection, name: str, *, force: bool = False, terminate: bool = False) -> SlotReport:
    """Drop it; returns what it was. Raises RefusedError for a slot that is not ours or is being read.

    ``force``: also another plugin's or database's slot. ``terminate``: end its reader first; a consumer reconnects.
    """
    found = status(connection, name)
    if not found.ours and not force:
        raise RefusedError(
            f"the slot {name} is not ours: {found.kind}",
            hint="another program may depend on it and lose data; if you are sure, add --force",
        )
    if found.active and terminate:
        _end_reader(connection, found)
    elif found.active:
        raise _active(found)
    with _refusals(connection, name):
        connection.execute("SELECT pg_catalog.pg_drop_replication_slot(%s)", [name])
    return found


def advance(connection: psycopg.Connection, name: str) -> tuple[SlotReport, SlotReport]:
    """Move a slot of ours to the end of the WAL; returns it before and after.

    It skips wake-ups only; the sweep finds the changes. Raises RefusedError for a slot that is being read, is not
    ours, or cannot be moved.
    """
    before = status(connection, name)
    if before.active:
        raise _active(before)
    if not before.ours:
        raise RefusedError(
            f"the slot {name} is not ours: {before.kind}", hint="what it skips would be lost to its reader"
        )
    if before.wal_status == "lost" or before.ahead:
        raise _immovable(name)
    with _refusals(connection, name):
        connection.execute(
            "SELECT pg_catalog.pg_replication_slot_advance(%s, %s::text::pg_lsn)", [name, str(before.current_lsn)]
        )
    return before, status(connection, name)


def _end_reader(connection: psycopg.Connection, found: SlotReport) -> None:
    try:
        [(gone,)] = connection.execute(
            "SELECT pg_catalog.pg_terminate_backend(%s, %s)", [found.active_pid, round(_LEAVE_LIMIT_S * 1000)]
        )
    except errors.InsufficientPrivilege as denied:
        raise RefusedError(
            f"the role may not end {found.reader}", hint="stop that consumer, or GRANT pg_signal_backend TO this role"
        ) from denied
    if not gone:
        raise _active(found)


@contextmanager
def _refusals(connection: psycopg.Connection, name: str) -> Iterator[None]:
    """Explains the server's errors against a change of a slot that existed a moment ago."""
    try:
        yield
    except errors.ObjectInUse:
        raise _active(status(connection, name)) from None
    except errors.UndefinedObject:
        status(connection, name)  # another session was faster: raises the usual error
    except errors.ObjectNotInPrerequisiteState as error:
        raise _immovable(name) from error
    except errors.InsufficientPrivilege as error:
        raise _classified(connection, error, name, PLUGINS[0]) from error


def _classified(connection: psycopg.Connection, error: psycopg.Error, name: str, plugin: str) -> StreamError:
    names = _names(connection, name, plugin)
    return classify(error.sqlstate, error.diag.source_function, Phase.CREATE, names)


def _names(connection: psycopg.Connection, slot: str, plugin: str) -> ErrorContext:
    return ErrorContext(slot=slot, plugin=plugin, database=connection.info.dbname, role=connection.info.user)


def _reports(connection: psycopg.Connection, name: str | None) -> list[SlotReport]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return [_slot(row) for row in cursor.execute(_LOOK, {"name": name, "plugins": list(PLUGINS)})]


def _slot(row: dict[str, Any]) -> SlotReport:
    slot, stats = row["slot"], row["stats"] or {}
    return SlotReport(
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
        walsender_lag_s=row["walsender_lag_s"],
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
        held_by=row["held_by"],
        synced=slot.get("synced"),
        two_phase=slot.get("two_phase"),
        two_phase_at=_lsn(slot.get("two_phase_at")),
        spilled_transactions=stats.get("spill_txns"),
        spilled_bytes=stats.get("spill_bytes"),
        streamed_bytes=stats.get("stream_bytes"),
        total_bytes=stats.get("total_bytes"),
        seen_at=row["seen_at"],
    )


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else Lsn.parse(text)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _refuse_failover(connection: psycopg.Connection, *, temporary: bool, failover: bool) -> None:
    if failover and temporary:
        raise UsageError("a temporary slot cannot be one for failover", hint="leave one of the two out")
    version = connection.info.server_version
    if failover and version < _FAILOVER_SINCE:
        raise UsageError(
            f"PostgreSQL {version // 10000} has no slots for failover; they came with 17",
            hint="leave --failover out: after a failover the consumer recreates its slot, and no change is lost",
        )


def _taken(slot: SlotReport, plugin: str) -> RefusedError:
    hint = "choose another name (--slot-name)"
    if slot.ours:
        hint = "nothing needs to be done; --if-not-exists accepts it"
    if slot.ours and plugin not in (AUTO, slot.plugin):
        hint = f"recreate it, which loses no change: cdc slot recreate {slot.name} --plugin {plugin}"
    return RefusedError(f"there is a replication slot {slot.name} already: {slot.kind}", hint=hint)


_STOP_IT = "stop that consumer first; cdc slot drop and recreate end its session with --terminate"


def _active(slot: SlotReport) -> RefusedError:
    return RefusedError(f"the slot {slot.name} is being read by {slot.reader}", hint=_STOP_IT)


def _immovable(name: str) -> CdcError:
    return RefusedError(
        f"the server can no longer read the slot {name}",
        hint=f"recreate it, which loses no change: cdc slot recreate {name}",
    )


def _waits_for_a_writer(connection: psycopg.Connection, name: str) -> RefusedError:
    return RefusedError(
        f"the slot {name} cannot be created while a transaction that writes stays open", hint=end_oldest(connection)
    )
