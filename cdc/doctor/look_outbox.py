"""Looks at the outbox: its objects, its triggers, the rights of the role, who works on it, and what is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import errors, sql

from cdc import schema, tracking
from cdc.doctor.facts import (
    Backlog,
    CaptureFunction,
    Installed,
    Rights,
    ShardHolders,
    Subject,
    Table,
    Trigger,
)
from cdc.doctor.look import column, one
from cdc.model import SHARDS
from cdc.outbox.shards import MAY_MARK, lock_class, outbox_name
from cdc.outbox.store import Store

"""The application name of the sessions that hold shards."""
_MARKED = ("processed", "processed_at", "next_attempt_at", "dead_at", "error_count", "last_error", "started_by")
"""Columns a settle writes."""

_OWNER = """
    SELECT pg_catalog.pg_get_userbyid(c.relowner)::text
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %s AND c.relname = 'entity_changes'
"""
_ELSEWHERE = """
    SELECT n.nspname::text
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relname = 'entity_changes' AND c.relkind IN ('r', 'p') AND n.nspname <> %s
       AND EXISTS (SELECT FROM pg_catalog.pg_class l WHERE l.relnamespace = n.oid AND l.relname = 'cdc_migrations')
     ORDER BY 1
"""
_CAPTURE = """
    SELECT format('%%I.%%I()', n.nspname, p.proname) AS name,
           r.rolname::text AS owner,
           r.rolsuper AS owner_is_superuser,
           p.prosecdef AS security_definer,
           coalesce(p.proconfig, '{}') AS settings,
           EXISTS (SELECT FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
                    WHERE a.grantee = 0 AND a.privilege_type = 'EXECUTE') AS public_may_call
      FROM pg_catalog.pg_proc p
      JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
      JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
     WHERE n.nspname = %s AND p.proname = 'capture_entity_change' AND p.pronargs = 0
"""
# By oid: the role need not have rights on the application's schemas to see what is in the catalogs.
_TRIGGERS = """
    SELECT t.tgrelid::regclass::text AS spelt, t.tgname::text AS trigger,
           ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = t.tgrelid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
           t.tgparentid <> 0 AS on_partition,
           t.tgenabled NOT IN ('O', 'A') AS disabled,
           pg_catalog.pg_partition_root(t.tgrelid)::regclass::text AS root,
           format('ALTER TABLE %%I.%%I ENABLE TRIGGER %%I;', n.nspname, c.relname, t.tgname) AS enable
      FROM pg_catalog.pg_trigger t
      JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE t.tgfoid = pg_catalog.to_regprocedure(format('%%I.capture_entity_change()', %s::text))
     ORDER BY 1, 2
"""
_RIGHTS = """
    SELECT current_user::text AS role,
           has_schema_privilege(n.oid, 'USAGE') AS usage,
           has_table_privilege(c.oid, 'SELECT') AS "select",
           has_table_privilege(c.oid, 'DELETE') AS "delete",
           ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attname = ANY (%(marked)s)
                    AND NOT has_column_privilege(c.oid, a.attnum, 'UPDATE')
                  ORDER BY a.attnum) AS unmarked,
           (SELECT bool_and(has_table_privilege(s.oid, p)) FROM pg_catalog.pg_class s, unnest(%(owning)s::text[]) p
             WHERE s.relnamespace = n.oid AND s.relname = 'cdc_shards') AS owning
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %(schema)s AND c.relname = 'entity_changes'
"""
_OWNING = ("SELECT", "INSERT", "UPDATE", "DELETE")
"""What a consumer does with cdc_shards."""
_SILENT_S = 10.0
"""A consumer that owns shards looks at them every second."""
_HOLDERS = f"""
    SELECT l.pid, concat(a.application_name, ', role ', a.usename) AS name,
           (count(*) FILTER (WHERE l.objid < %(shards)s))::int AS shards,
           bool_or(l.objid = %(shards)s) AS member,
           {MAY_MARK.format(locks="l")} AS may_mark,
           extract(epoch FROM clock_timestamp() - a.state_change)::float8 AS silent_s
      FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
       AND l.classid = (%(class)s::bigint & 4294967295)::oid
       AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
       AND l.objid <= %(shards)s
     GROUP BY l.pid, a.application_name, a.usename, a.state_change ORDER BY l.pid
"""  # noqa: S608 - of pieces of our own
_TABLE = """
    SELECT format('%%I.%%I', n.nspname, c.relname) AS name,
           current_setting('autovacuum')::bool AND current_setting('track_counts')::bool AS autovacuum,
           coalesce((SELECT NOT o.option_value::bool FROM pg_catalog.pg_options_to_table(c.reloptions) o
                      WHERE o.option_name = 'autovacuum_enabled'), false) AS excluded,
           EXISTS (SELECT FROM pg_catalog.pg_options_to_table(c.reloptions) o
                    WHERE o.option_name = 'autovacuum_vacuum_scale_factor') AS tuned,
           coalesce(pg_stat_get_live_tuples(c.oid), 0) AS live,
           coalesce(pg_stat_get_dead_tuples(c.oid), 0) AS dead
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %s AND c.relname = 'entity_changes'
"""


def installed(connection: psycopg.Connection, name: str) -> Installed:
    owner = next(iter(column(connection, _OWNER, [name])), None)
    exists = owner is not None
    pending = _pending(connection, name) if exists else []
    differences = tuple(map(str, schema.verify(connection, name))) if exists and not pending else ()
    complete = exists and not pending and not differences
    return Installed(
        schema=name,
        exists=exists,
        pending=tuple(map(str, pending)),
        differences=differences,
        elsewhere=column(connection, _ELSEWHERE, [name]),
        script="" if complete else schema.print_sql(name, pending or None, owner=owner),
    )


def _pending(connection: psycopg.Connection, name: str) -> list[schema.Migration]:
    try:
        return schema.pending(connection, name)
    except errors.InsufficientPrivilege:
        return []  # what is missing shows in the objects as well


def capture(connection: psycopg.Connection, name: str) -> CaptureFunction:
    row = one(connection, _CAPTURE, [name], what="capture_entity_change()")
    return CaptureFunction(**{**row, "settings": tuple(row["settings"])})


def triggers(connection: psycopg.Connection, name: str) -> tuple[Trigger, ...]:
    tracked = tracking.tracked(connection, name)
    rows = connection.execute(_TRIGGERS.encode(), [name]).fetchall()
    whole = {(row[0], row[1]): row for row in rows if not row[3]}
    return tuple(
        _trigger(each, columns=whole[each.table, each.trigger][2], rows=rows)
        for each in tracked
        if (each.table, each.trigger) in whole
    )


def _trigger(each: tracking.Tracked, *, columns: list[str], rows: list[tuple[Any, ...]]) -> Trigger:
    disabled = [
        (spelt, enable)
        for spelt, trigger, _, on_partition, off, root, enable in rows
        if off and ((on_partition and root == each.table) or (spelt, trigger) == (each.table, each.trigger))
    ]
    return Trigger(
        table=each.table,
        trigger=each.trigger,
        entity_type=each.entity_type,
        operations=tuple(map(str, each.operations)),
        enabled=each.enabled,
        lacks=tuple(name for name in each.key if name not in columns),
        disabled_partitions=tuple(spelt for spelt, _ in disabled if spelt != each.table),
        enable=tuple(enable for _, enable in disabled),
    )


def rights(connection: psycopg.Connection, subject: Subject) -> Rights:
    parameters = {"schema": subject.schema, "marked": list(_MARKED), "owning": list(_OWNING)}
    row = one(connection, _RIGHTS, parameters, what="entity_changes")
    return Rights(role=row["role"], schema=subject.schema, grants=_grants(row, subject))


def _grants(row: Mapping[str, Any], subject: Subject) -> tuple[str, ...]:
    role = sql.Identifier(row["role"])
    table, shards = (sql.Identifier(subject.schema, name) for name in ("entity_changes", "cdc_shards"))
    columns = sql.SQL(", ").join(map(sql.Identifier, row["unmarked"]))
    needed = (
        (not row["usage"], sql.SQL("USAGE ON SCHEMA {}").format(sql.Identifier(subject.schema))),
        (not row["select"], sql.SQL("SELECT ON {}").format(table)),
        (bool(row["unmarked"]), sql.SQL("UPDATE ({}) ON {}").format(columns, table)),
        (subject.prunes and not row["delete"], sql.SQL("DELETE ON {}").format(table)),
        (row["owning"] is False, sql.SQL("{} ON {}").format(sql.SQL(", ".join(_OWNING)), shards)),
    )
    grant = sql.SQL("GRANT {} TO {};")
    return tuple(grant.format(right, role).as_string() for lacking, right in needed if lacking)


def shard_holders(connection: psycopg.Connection, name: str) -> ShardHolders:
    parameters = {"shards": SHARDS, "class": lock_class(name), "outbox": outbox_name(name)}
    # What a session calls itself says nothing: a consumer is who is a member and may mark changes.
    rows = [
        (pid, named, shards, member and may_mark, silent_s)
        for pid, named, shards, member, may_mark, silent_s in connection.execute(_HOLDERS, parameters).fetchall()
    ]
    return ShardHolders(
        held=sum(shards for _, _, shards, _, _ in rows),
        consumers=sum(consumer for _, _, _, consumer, _ in rows),
        strangers=tuple((pid, named, shards) for pid, named, shards, consumer, _ in rows if not consumer),
        silent=tuple(
            (pid, shards, silent_s)
            for pid, _, shards, consumer, silent_s in rows
            if shards and consumer and (silent_s or 0) > _SILENT_S
        ),
    )


def table(connection: psycopg.Connection, name: str) -> Table:
    return Table(**one(connection, _TABLE, [name], what="entity_changes"))


def backlog(connection: psycopg.Connection, name: str) -> Backlog:
    figures = Store(name).figures(connection)
    return Backlog(
        fresh=figures.fresh,
        waiting=figures.waiting,
        dead=figures.dead,
        oldest_ready_age_s=figures.oldest_ready_age_s,
    )
