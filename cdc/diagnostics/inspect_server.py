"""Reads the server's state, and connections to it. Each function returns one fact, or raises why it cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from cdc.core.errors import CdcError, NotFoundError
from cdc.diagnostics.facts import OpenTransactions, ReplicationLink, ServerFacts, SessionFacts, Subject, Transaction
from cdc.diagnostics.findings import Unknown
from cdc.postgres.connect import SERVER_TCP, connect, describe, explain
from cdc.postgres.open_transactions import oldest_writer
from cdc.replication.lsn_tracker import status_interval_s
from cdc.replication.stream import StreamSettings

T = TypeVar("T")
NAME = "cdc: doctor"
"""The application name of its sessions."""
_LOOPBACK = ("localhost", "127.", "::1")

_SESSION = """
    SELECT current_user::text AS role,
           pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') AS sees_all_sessions,
           coalesce((SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS encrypted,
           (SELECT setting::float8 / 1000 FROM pg_catalog.pg_settings WHERE name = 'idle_session_timeout')
             AS idle_session_timeout_s,
           (SELECT setting::float8 / 1000 FROM pg_catalog.pg_settings
             WHERE name = 'idle_in_transaction_session_timeout') AS idle_in_transaction_timeout_s
"""
_SETTINGS = "SELECT name, setting FROM pg_catalog.pg_settings WHERE name = ANY (%s)"

# Walsenders are counted in a view whose rows every role sees, if not their content.
_SERVER = """
    SELECT current_setting('server_version_num')::int AS version_num,
           split_part(current_setting('server_version'), ' ', 1) AS version,
           pg_is_in_recovery() AS in_recovery,
           EXISTS (SELECT FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
                     CROSS JOIN LATERAL unnest(s.setconfig) AS c (one)
                    WHERE d.datname = current_database() AND s.setrole = 0
                      AND c.one ~* '^default_transaction_read_only=(on|true|yes|1)$') AS reads_by_default,
           clock_timestamp() AS server_time,
           current_setting('wal_level') AS wal_level,
           (SELECT count(*) FROM pg_catalog.pg_replication_slots)::int AS slots,
           current_setting('max_replication_slots')::int AS slots_max,
           ARRAY(SELECT slot_name::text FROM pg_catalog.pg_replication_slots WHERE NOT active ORDER BY 1) AS idle_slots,
           (SELECT count(*) FROM pg_catalog.pg_stat_replication)::int AS walsenders,
           current_setting('max_wal_senders')::int AS walsenders_max,
           (SELECT nullif(setting::bigint, -1) * 1048576 FROM pg_catalog.pg_settings
             WHERE name = 'max_slot_wal_keep_size') AS slot_keep_bytes,
           (SELECT setting::float8 * CASE unit WHEN 'ms' THEN 0.001 WHEN 'min' THEN 60 ELSE 1 END
              FROM pg_catalog.pg_settings WHERE name = 'idle_replication_slot_timeout') AS slot_idle_timeout_s,
           pg_notification_queue_usage() AS notify_queue_ratio
"""
# RDS has a role for this attribute.
_MAY_REPLICATE = """
    SELECT current_user::text,
           (SELECT rolsuper OR rolreplication FROM pg_catalog.pg_roles WHERE rolname = current_user)
             OR EXISTS (SELECT FROM pg_catalog.pg_roles
                         WHERE rolname = 'rds_replication' AND pg_has_role(current_user, oid, 'member'))
"""
_LINK = """
    SELECT (SELECT setting::float8 / 1000 FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'),
           coalesce((SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_backend_pid()), false)
"""
# Vacuum's own transactions hold nothing back, and a walsender's belongs to the slot's check.
_OLD = """
    SELECT pid, NULL AS gid, datname AS database, application_name, state,
           extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age_s, backend_xid IS NOT NULL AS writes
      FROM pg_catalog.pg_stat_activity
     WHERE xact_start < clock_timestamp() - make_interval(secs => %(limit_s)s) AND pid <> pg_backend_pid()
       AND backend_type NOT IN ('walsender', 'autovacuum worker')
       AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL)
    UNION ALL
    SELECT NULL, gid, database, NULL, NULL, extract(epoch FROM clock_timestamp() - prepared)::float8, true
      FROM pg_catalog.pg_prepared_xacts
     WHERE prepared < clock_timestamp() - make_interval(secs => %(limit_s)s)
     ORDER BY age_s DESC
"""
_WAITING_COMMITS = "SELECT pid FROM pg_catalog.pg_stat_activity WHERE wait_event = 'SyncRep' ORDER BY xact_start"


def known(look: Callable[[], T]) -> T | Unknown:
    """The result of ``look``, or the reason of its failure."""
    try:
        return look()
    except CdcError as error:
        return Unknown(str(error), error.hint)
    except (errors.UndefinedTable, errors.UndefinedColumn):
        return Unknown("the outbox lacks what is to be looked at: see schema")
    except psycopg.Error as error:
        explained = explain(error)
        return Unknown(str(explained), explained.hint if explained else "")


def one(connection: psycopg.Connection, statement: str, parameters: Any = None, *, what: str = "it") -> dict[str, Any]:
    """The one row of a query. Raises NotFoundError, "there is no ``what``", where the query returns none."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(statement.encode(), parameters).fetchone()
    if row is None:
        raise NotFoundError(f"there is no {what}")
    return row


def column(connection: psycopg.Connection, statement: str, parameters: Any = None) -> tuple[Any, ...]:
    return tuple(value for (value,) in connection.execute(statement.encode(), parameters))


def session(connection: psycopg.Connection, subject: Subject) -> SessionFacts:
    pids = tuple(pid for _ in range(3) for pid in column(connection, "SELECT pg_backend_pid()"))
    return SessionFacts(
        place=describe(subject.dsn),
        is_local=_is_local(connection),
        sslmode=_sslmode(connection),
        handshake_pid=connection.info.backend_pid,
        pids=pids,
        settings=_unlike_asked_for(connection),
        **one(connection, _SESSION),
    )


def _is_local(connection: psycopg.Connection) -> bool:
    return connection.info.host.startswith(("/", "@", *_LOOPBACK))


def _sslmode(connection: psycopg.Connection) -> str:
    return connection.info.get_parameters().get("sslmode", "prefer")


def _unlike_asked_for(connection: psycopg.Connection) -> dict[str, str]:
    if connection.info.host.startswith(("/", "@")):
        return {}  # over a Unix socket they all are 0
    found = connection.execute(_SETTINGS, [list(SERVER_TCP)]).fetchall()
    return {name: value for name, value in found if value != SERVER_TCP[name]}


def server(connection: psycopg.Connection) -> ServerFacts:
    before = time.time()
    row = one(connection, _SERVER)
    ahead_s = (before + time.time()) / 2 - row["server_time"].timestamp()
    lists = {name: tuple(value) for name, value in row.items() if isinstance(value, list)}
    return ServerFacts(clock_ahead_s=ahead_s, **{**row, **lists})


def link(subject: Subject) -> ReplicationLink:
    """Never raises for a refused connection: the refusal is the fact."""
    role, may_replicate = "", None
    try:
        with connect(subject.stream_dsn, application_name=NAME) as ordinary:
            [(role, may_replicate)] = ordinary.execute(_MAY_REPLICATE).fetchall()
        return _replication_link(subject, role, may_replicate)
    except CdcError as refused:
        return ReplicationLink(role=role, may_replicate=may_replicate, refused=(str(refused), refused.hint))


def _replication_link(subject: Subject, role: str, may_replicate: bool | None) -> ReplicationLink:
    wanted = StreamSettings(dsn=subject.stream_dsn, schema=subject.schema, slot=subject.slot)
    with connect(
        subject.stream_dsn, application_name=NAME, session=wanted.server_settings, replication="database"
    ) as connection:
        [(timeout_s, encrypted)] = connection.execute(_LINK).fetchall()
        return ReplicationLink(
            role=role,
            may_replicate=may_replicate,
            encrypted=encrypted,
            is_local=_is_local(connection),
            sslmode=_sslmode(connection),
            wal_sender_timeout_s=timeout_s,
            wanted_timeout_s=wanted.wal_sender_timeout_s,
            status_interval_s=status_interval_s(wanted.wal_sender_timeout_s),
        )


def transactions(connection: psycopg.Connection, *, limit_s: float, sees_all: bool) -> OpenTransactions:
    with connection.cursor(row_factory=dict_row) as cursor:
        old = [_transaction(connection, row) for row in cursor.execute(_OLD, {"limit_s": limit_s})]
    oldest = oldest_writer(connection)
    [(standbys,)] = connection.execute("SELECT current_setting('synchronous_standby_names')").fetchall()
    return OpenTransactions(
        old=tuple(old),
        limit_s=limit_s,
        sees_all=sees_all,
        oldest_writer=oldest[0] if oldest else None,
        waiting_commits=column(connection, _WAITING_COMMITS),
        synchronous_standbys=standbys,
    )


def _transaction(connection: psycopg.Connection, row: dict[str, Any]) -> Transaction:
    if row["gid"] is None:
        return Transaction(**row, ends_it=f"SELECT pg_terminate_backend({row['pid']});")
    ends_it = sql.SQL("ROLLBACK PREPARED {};").format(sql.Literal(row["gid"])).as_string(connection)
    return Transaction(**row, ends_it=ends_it)
