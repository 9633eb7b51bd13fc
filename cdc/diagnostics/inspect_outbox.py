"""Reads the outbox: its objects, its triggers, the rights of the role, the sessions at work, and the backlog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from cdc.core.errors import NotFoundError
from cdc.core.model import SHARDS, SNOOZED
from cdc.core.pauses import Pauses
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.diagnostics.facts import (
    Astray,
    Backlog,
    Captured,
    CaptureFunctionFacts,
    Creators,
    DataReader,
    DataReaders,
    Installed,
    Numbering,
    Rights,
    RowSecurity,
    Senders,
    ShardHolders,
    Subject,
    TableFacts,
    Unhandled,
)
from cdc.diagnostics.inspect_server import column, one
from cdc.postgres import (
    capture_catalog,
    ddl_triggers,
    migration_scripts,
    migrations,
    remarks,
    sequence,
    table_functions,
)
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.barriers import Barriers
from cdc.postgres.controls import Controls
from cdc.postgres.due import DueChanges
from cdc.postgres.grants import (
    ATTEMPT_RIGHTS,
    BARRED,
    BARRIER_RIGHTS,
    DUE_DESCRIPTION,
    FLOOR_RIGHTS,
    KEEPING,
    LEASE_RIGHTS,
    NUMBERS,
    PAYLOAD,
    POSITIONS,
    PUBLISH_DUE,
    SHARD_RIGHTS,
    STATE,
    reader,
)
from cdc.postgres.loaders import read_anything
from cdc.postgres.outbox import Store
from cdc.postgres.remarks import SettingOwner
from cdc.postgres.shard_locks import MAY_MARK, lock_class, outbox_name

_INTERNAL = ("cdc_shards", "cdc_migrations", "cdc_sets", "cdc_backfills", "cdc_due_changes", "cdc_barriers",
             "cdc_columns", "cdc_subscriptions", "cdc_positions", "cdc_subscription_changes",
             "cdc_controls", "change_attempts", "cdc_actions", "cdc_limit_leases")  # fmt: skip
"""Other tables of an outbox."""

_WAITING_EXAMINED_MAX = 10_000
_SNOOZED = """
    SELECT count(*)::int
      FROM (SELECT error_summary, changed_at FROM {}
             WHERE NOT processed AND next_attempt_at <= 'infinity' AND dead_at IS NULL LIMIT %(bound)s) AS waiting
     WHERE error_summary = %(snoozed)s AND changed_at < now() - interval '1 day'
"""
_ASTRAY_COUNTED_MAX = 1_000
# Of the fresh changes the first of each shard, and all that no consumer looks for; of the others some that have failed.
_ASTRAY = """
SELECT count(*)::int FROM (
  SELECT FROM {changes}
  WHERE shard < 0 AND NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
  UNION ALL
  SELECT FROM {changes}
  WHERE shard >= {shards} AND NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
  UNION ALL
  SELECT FROM generate_series(0, {shards} - 1) AS s (shard) CROSS JOIN LATERAL (
    SELECT entity_id FROM {changes} AS n
    WHERE n.shard = s.shard::smallint AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT 100
  ) AS first
  WHERE pg_catalog.hashtext(first.entity_id) & ({shards} - 1) <> s.shard
  UNION ALL
  SELECT FROM (
    SELECT entity_id, shard FROM {changes}
    WHERE NOT processed AND next_attempt_at <= 'infinity' AND dead_at IS NULL
    ORDER BY dead_at, next_attempt_at LIMIT {bound}
  ) AS waiting
  WHERE pg_catalog.hashtext(waiting.entity_id) & ({shards} - 1) <> waiting.shard
  LIMIT {bound}
) AS astray
"""
_THERE = """
    SELECT true FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %s AND c.relname = 'entity_changes'
"""
_ELSEWHERE = """
    SELECT n.nspname::text
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relname = 'entity_changes' AND c.relkind IN ('r', 'p') AND n.nspname <> %s
       AND EXISTS (SELECT FROM pg_catalog.pg_class l WHERE l.relnamespace = n.oid AND l.relname = 'cdc_migrations')
     ORDER BY 1
"""
# The outbox's tables, and whether their row-level security applies to this role, or to it and the capture function.
_ROW_SECURITY = """
    SELECT current_user::text AS role,
           coalesce(array_agg(format('%%I.%%I', n.nspname, c.relname) ORDER BY c.relname)
             FILTER (WHERE c.relrowsecurity), '{}') AS tables,
           coalesce(array_agg(format('%%I.%%I', n.nspname, c.relname) ORDER BY c.relname)
             FILTER (WHERE row_security_active(c.oid)), '{}') AS active
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %(schema)s AND c.relname = ANY (%(relations)s::name[]) AND c.relkind IN ('r', 'p')
"""
# Roles, except the owner, with a right on a column that holds the application's data. A consumer and an operator may
# also mark a change, which no default privilege grants; a reader may read the history, and nothing else here.
_READERS = """
    WITH outbox AS (
      SELECT c.oid, c.relowner, n.oid AS namespace, n.nspname
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
       WHERE n.nspname = %(schema)s AND c.relname = 'entity_changes'
    ), holding AS (
      SELECT c.oid, c.relacl, format('%%I.%%I', outbox.nspname, c.relname) AS name
        FROM outbox JOIN pg_catalog.pg_class c ON c.relnamespace = outbox.namespace
       WHERE c.relname IN ('entity_changes', 'cdc_due_changes')
    ), readable AS (
      SELECT holding.name, a.grantee FROM holding CROSS JOIN LATERAL pg_catalog.aclexplode(holding.relacl) a
       WHERE a.privilege_type = 'SELECT'
      UNION
      SELECT holding.name, a.grantee FROM holding
        JOIN pg_catalog.pg_attribute c ON c.attrelid = holding.oid AND c.attname = ANY (%(payload)s::name[])
       CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) a
       WHERE a.privilege_type = 'SELECT'
    ), granted AS (
      SELECT r.grantee, array_agg(r.name ORDER BY r.name DESC) AS tables FROM readable r
       WHERE r.grantee NOT IN (SELECT relowner FROM outbox) GROUP BY r.grantee
    )
    SELECT g.tables, outbox.relowner::regrole::text AS owner,
           CASE WHEN g.grantee = 0::oid THEN 'PUBLIC' ELSE r.rolname::text END AS role,
           g.grantee <> 0::oid AND (
             EXISTS (SELECT FROM pg_catalog.pg_attribute c CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) a
                      WHERE c.attrelid = outbox.oid AND c.attname = 'processed' AND a.grantee = g.grantee
                        AND a.privilege_type = 'UPDATE')
             OR NOT EXISTS (SELECT FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) a
                             WHERE c.relnamespace = outbox.namespace AND a.grantee = g.grantee
                               AND c.relname = ANY (%(internal)s::name[]))
             AND EXISTS (SELECT FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) a
                          WHERE c.relnamespace = outbox.namespace AND c.relname = 'recent_action_history'
                            AND a.grantee = g.grantee AND a.privilege_type = 'SELECT')
           ) AS intended,
           ARRAY(SELECT format('ALTER DEFAULT PRIVILEGES FOR ROLE %%I %%sREVOKE ALL ON TABLES FROM %%s;',
                          pg_catalog.pg_get_userbyid(d.defaclrole),
                          CASE WHEN d.defaclnamespace <> 0::oid THEN format('IN SCHEMA %%I ', outbox.nspname) END,
                          CASE WHEN g.grantee = 0::oid THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END)
                   FROM pg_catalog.pg_default_acl d
                  WHERE d.defaclobjtype = 'r' AND d.defaclrole = outbox.relowner
                    AND d.defaclnamespace IN (0::oid, outbox.namespace)
                    AND EXISTS (SELECT FROM pg_catalog.aclexplode(d.defaclacl) a WHERE a.grantee = g.grantee)
           ) AS by_default
      FROM outbox LEFT JOIN granted g ON true LEFT JOIN pg_catalog.pg_roles r ON r.oid = g.grantee
     ORDER BY role
"""
# Whom the schema's owner has let create in it, maybe PUBLIC. The owners of schema and outbox may replace ours anyway.
_CREATORS = """
    SELECT n.nspname::text AS schema,
           ARRAY(SELECT DISTINCT CASE WHEN a.grantee = 0::oid THEN 'PUBLIC' ELSE r.rolname::text END
                   FROM pg_catalog.aclexplode(n.nspacl) a LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
                  WHERE a.privilege_type = 'CREATE' AND a.grantee NOT IN (n.nspowner, c.relowner)
                    AND NOT coalesce(r.rolsuper, false)
                  ORDER BY 1) AS others
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %s AND c.relname = 'entity_changes'
"""
# The server has one for text and one for bytea. Their owner is the role that created the cluster.
_SENDERS = """
    WITH message AS (
      SELECT p.oid, p.proowner, coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner)) AS acl,
             format('pg_catalog.%I(%s)', p.proname, pg_catalog.oidvectortypes(p.proargtypes)) AS name
        FROM pg_catalog.pg_proc p
       WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = 'pg_logical_emit_message'
    ), granted AS (
      SELECT m.name, a.grantee FROM message m CROSS JOIN LATERAL pg_catalog.aclexplode(m.acl) a
       WHERE a.privilege_type = 'EXECUTE' AND a.grantee <> m.proowner
    ), owner AS (
      SELECT DISTINCT p.proowner AS oid FROM pg_catalog.pg_proc p
       WHERE p.proname IN ('capture_entity_change', 'publish_change')
         AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace = p.pronamespace
                        AND c.relname = 'entity_changes')
    )
    SELECT ARRAY(SELECT name FROM granted WHERE grantee = 0::oid ORDER BY name) AS open_to_all,
           ARRAY(SELECT pg_catalog.pg_get_userbyid(oid)::text FROM owner ORDER BY 1) AS owners,
           ARRAY(SELECT DISTINCT r.rolname::text FROM granted g JOIN pg_catalog.pg_roles r ON r.oid = g.grantee
                  WHERE NOT r.rolsuper AND g.grantee NOT IN (SELECT oid FROM owner) ORDER BY 1) AS others
"""
_SAYINGS = """
SELECT CASE WHEN s.setrole = 0::oid THEN 'every role' ELSE pg_catalog.format('the role %I', r.rolname) END,
  pg_catalog.substr(c.one, pg_catalog.strpos(c.one, '=') + 1)
FROM pg_catalog.pg_db_role_setting AS s
CROSS JOIN LATERAL pg_catalog.unnest(s.setconfig) AS c (one)
LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = s.setrole
WHERE c.one LIKE 'cdc.handled=%'
  AND (s.setdatabase = 0::oid
    OR s.setdatabase = (SELECT d.oid FROM pg_catalog.pg_database AS d WHERE d.datname = pg_catalog.current_database()))
ORDER BY 1
"""
_RIGHTS = """
    SELECT current_user::text AS role,
           has_schema_privilege(n.oid, 'USAGE') AS usage,
           has_table_privilege(c.oid, 'SELECT') AS "select",
           has_table_privilege(c.oid, 'DELETE') AS "delete",
           (SELECT bool_and(has_table_privilege(k.oid, 'SELECT')) FROM pg_catalog.pg_class k
             WHERE k.relnamespace = n.oid AND k.relname = ANY (%(keeping)s)) AS sharing,
           ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attname = ANY (%(marked)s)
                    AND NOT has_column_privilege(c.oid, a.attnum, 'UPDATE')
                  ORDER BY a.attnum) AS unmarked,
           (SELECT bool_and(has_table_privilege(s.oid, p)) FROM pg_catalog.pg_class s, unnest(%(owning)s::text[]) p
             WHERE s.relnamespace = n.oid AND s.relname = 'cdc_shards') AS owning,
           (SELECT bool_and(has_table_privilege(b.oid, p)) FROM pg_catalog.pg_class b, unnest(%(barrier)s::text[]) p
             WHERE b.relnamespace = n.oid AND b.relname = 'cdc_barriers') AS advancing,
           (SELECT has_table_privilege(k.oid, 'SELECT') FROM pg_catalog.pg_class k
             WHERE k.relnamespace = n.oid AND k.relname = 'cdc_controls') AS heeding,
           (SELECT bool_and(has_table_privilege(k.oid, p)) FROM pg_catalog.pg_class k, unnest(%(attempts)s::text[]) p
             WHERE k.relnamespace = n.oid AND k.relname = 'change_attempts') AS attempting,
           (SELECT bool_and(has_table_privilege(k.oid, p)) FROM pg_catalog.pg_class k, unnest(%(leases)s::text[]) p
             WHERE k.relnamespace = n.oid AND k.relname = 'cdc_limit_leases') AS leasing,
           (SELECT bool_and(has_table_privilege(k.oid, p)) FROM pg_catalog.pg_class k, unnest(%(floors)s::text[]) p
             WHERE k.relnamespace = n.oid AND k.relname = 'cdc_positions') AS keeping_floors,
           (SELECT has_sequence_privilege(s.oid, 'SELECT') FROM pg_catalog.pg_class s
             WHERE s.relnamespace = n.oid AND s.relname = %(numbers)s AND s.relkind = 'S') AS counting,
           (SELECT bool_and(has_function_privilege(p.oid, 'EXECUTE')) FROM pg_catalog.pg_proc p
             WHERE p.pronamespace = n.oid AND p.proname = 'publish_due') AS publishing,
           (SELECT bool_and(has_function_privilege(p.oid, 'EXECUTE')) FROM pg_catalog.pg_proc p
             WHERE p.pronamespace = n.oid AND p.proname = 'barred') AS barring,
           (SELECT has_column_privilege(d.oid, 'due', 'SELECT') FROM pg_catalog.pg_class d
             WHERE d.relnamespace = n.oid AND d.relname = 'cdc_due_changes') AS foreseeing
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %(schema)s AND c.relname = 'entity_changes'
"""
_SILENT_S = 25.0
"""A consumer that owns shards polls them at least every 15 s."""
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
    exists = bool(column(connection, _THERE, [name]))
    pending = _pending(connection, name) if exists else []
    found = migrations.verify(connection, name) if exists and not pending else []
    # The table may have been given away; a statement of ``by_hand`` takes it back before the script runs.
    owner = migrations.owner(connection, name) if exists else None
    complete = exists and not pending and all(each.by_hand for each in found)
    return Installed(
        schema=name,
        exists=exists,
        pending=tuple(map(str, pending)),
        differences=tuple(map(str, found)),
        elsewhere=column(connection, _ELSEWHERE, [name]),
        script="" if complete else migration_scripts.print_sql(name, pending or None, owner=owner),
        by_hand=tuple(dict.fromkeys(each.by_hand for each in found if each.by_hand)),
        owner=owner or "",
    )


def _pending(connection: psycopg.Connection, name: str) -> list[migration_scripts.Migration]:
    try:
        return migrations.pending(connection, name)
    except errors.InsufficientPrivilege:
        return []  # the objects show what is missing, too


def capture(connection: psycopg.Connection, name: str) -> CaptureFunctionFacts:
    found = capture_catalog.capture_function(connection, name)
    return CaptureFunctionFacts(
        name=found.name,
        owner=found.owner,
        owner_is_superuser=found.owner_is_superuser,
        owns_outbox=found.owns_outbox,
        others=found.others,
        security_definer=found.security_definer,
        settings=found.settings,
        public_may_call=found.public_may_call,
        lacks=found.lacks,
        grants=capture_catalog.grants(found, name),
        outbox_owner=migrations.owner(connection, name) or "",
    )


def captured(connection: psycopg.Connection, name: str) -> Captured:
    function = capture_catalog.capture_function(connection, name)
    triggers = capture_catalog.triggers(connection, function, name)
    tables = capture_catalog.tables(connection, function, name, [each.oid for each in triggers])
    said = [remark for each in triggers for remark in remarks.faults(each)]
    said += table_functions.faults(connection, function, name)
    said += [remark for each in triggers if each.oid in tables for remark in remarks.cautions(tables[each.oid], each)]
    said += [*remarks.doubled(triggers), *remarks.shared(triggers)]
    said += remarks.unmatched(
        triggers, capture_catalog.named_so(connection, {each.name for each in triggers if each.all_schemas})
    )
    said += ddl_triggers.remarks(connection, name, triggers)
    said += remarks.handled(triggers, _sayings(connection))
    general = table_functions.without(function, name, triggers, tables)
    return Captured(triggers=tuple(triggers), remarks=tuple(said), general=tuple(general))


def _sayings(connection: psycopg.Connection) -> list[SettingOwner]:
    """Settings of roles and databases that matter here. Settings made within another session are not visible."""
    return [
        SettingOwner(who, frozenset(value.split(",")))
        for who, value in connection.execute(_SAYINGS.encode()).fetchall()
    ]


def row_security(connection: psycopg.Connection, name: str) -> RowSecurity:
    relations = ["entity_changes", *_INTERNAL]
    row = one(connection, _ROW_SECURITY, {"schema": name, "relations": relations}, what="entity_changes")
    return RowSecurity(role=row["role"], tables=tuple(row["tables"]), active=tuple(row["active"]))


def readers(connection: psycopg.Connection, name: str) -> DataReaders:
    # What whoever reads the history may see as a whole says nothing about them.
    seen = {right.object for right in reader("").rights if not right.columns}
    internal = [each for each in _INTERNAL if each not in seen]
    parameters = {"schema": name, "payload": list(PAYLOAD), "internal": internal}
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(_READERS.encode(), parameters).fetchall()
    if not rows:
        raise NotFoundError("there is no entity_changes")
    return DataReaders(
        owner=rows[0]["owner"],
        readers=tuple(
            DataReader(
                role=row["role"],
                tables=tuple(row["tables"]),
                by_default=tuple(row["by_default"]),
                intended=row["intended"],
            )
            for row in rows
            if row["role"] is not None
        ),
    )


def creators(connection: psycopg.Connection, name: str) -> Creators:
    row = one(connection, _CREATORS, [name], what="entity_changes")
    return Creators(schema=row["schema"], others=tuple(row["others"]))


def senders(connection: psycopg.Connection) -> Senders:
    return Senders(**{name: tuple(found) for name, found in one(connection, _SENDERS).items()})


def numbering(connection: psycopg.Connection, name: str) -> Numbering:
    found = sequence.look(connection, name)
    [role] = column(connection, "SELECT current_user::text")
    table = sql.Identifier(name, "entity_changes").as_string()
    return Numbering(role=role, table=table, sequence=found.sequence, last=found.last, highest=found.highest)


def astray(connection: psycopg.Connection, name: str) -> Astray:
    changes = sql.Identifier(name, "entity_changes")
    literals = {"shards": sql.Literal(SHARDS), "bound": sql.Literal(_ASTRAY_COUNTED_MAX)}
    [rows] = column(connection, sql.SQL(_ASTRAY).format(changes=changes, **literals).as_string())
    return Astray(table=changes.as_string(), rows=rows)


def rights(connection: psycopg.Connection, subject: Subject) -> Rights:
    parameters = {"schema": subject.schema, "marked": list(STATE), "owning": list(SHARD_RIGHTS),
                  "barrier": list(BARRIER_RIGHTS), "keeping": list(KEEPING),
                  "attempts": list(ATTEMPT_RIGHTS), "leases": list(LEASE_RIGHTS), "floors": list(FLOOR_RIGHTS),
                  "numbers": NUMBERS}  # fmt: skip
    row = one(connection, _RIGHTS, parameters, what="entity_changes")
    return Rights(role=row["role"], schema=subject.schema, grants=_grants(row, subject))


def _grants(row: Mapping[str, Any], subject: Subject) -> tuple[str, ...]:
    role = sql.Identifier(row["role"])
    tables = (
        "entity_changes", "cdc_shards", "cdc_due_changes", "cdc_barriers", "cdc_controls", "change_attempts",
        "cdc_limit_leases",
    )  # fmt: skip
    table, shards, due_changes, barriers, controls, attempts, leases = (
        sql.Identifier(subject.schema, name) for name in tables
    )
    described = sql.SQL(", ").join(map(sql.Identifier, DUE_DESCRIPTION))
    positions, numbers = sql.Identifier(subject.schema, POSITIONS), sql.Identifier(subject.schema, NUMBERS)
    keeping = sql.SQL(", ").join(sql.Identifier(subject.schema, name) for name in KEEPING)
    columns = sql.SQL(", ").join(map(sql.Identifier, row["unmarked"]))
    publish_due, barred = (
        sql.SQL("{}.{}").format(sql.Identifier(subject.schema), sql.SQL(function)) for function in (PUBLISH_DUE, BARRED)
    )
    needed = (
        (not row["usage"], sql.SQL("USAGE ON SCHEMA {}").format(sql.Identifier(subject.schema))),
        (not row["select"], sql.SQL("SELECT ON {}").format(table)),
        (bool(row["unmarked"]), sql.SQL("UPDATE ({}) ON {}").format(columns, table)),
        (subject.prunes and not row["delete"], sql.SQL("DELETE ON {}").format(table)),
        (row["sharing"] is False, sql.SQL("SELECT ON {}").format(keeping)),
        (row["foreseeing"] is False, sql.SQL("SELECT ({}) ON {}").format(described, due_changes)),
        (row["publishing"] is False, sql.SQL("EXECUTE ON FUNCTION {}").format(publish_due)),
        (row["barring"] is False, sql.SQL("EXECUTE ON FUNCTION {}").format(barred)),
        (row["advancing"] is False, sql.SQL("{} ON {}").format(sql.SQL(", ".join(BARRIER_RIGHTS)), barriers)),
        (row["heeding"] is False, sql.SQL("SELECT ON {}").format(controls)),
        (row["attempting"] is False, sql.SQL("{} ON {}").format(sql.SQL(", ".join(ATTEMPT_RIGHTS)), attempts)),
        (row["leasing"] is False, sql.SQL("{} ON {}").format(sql.SQL(", ".join(LEASE_RIGHTS)), leases)),
        (row["keeping_floors"] is False, sql.SQL("{} ON {}").format(sql.SQL(", ".join(FLOOR_RIGHTS)), positions)),
        (row["counting"] is False, sql.SQL("SELECT ON SEQUENCE {}").format(numbers)),
        (row["owning"] is False, sql.SQL("{} ON {}").format(sql.SQL(", ".join(SHARD_RIGHTS)), shards)),
    )
    grant = sql.SQL("GRANT {} TO {};")
    return tuple(grant.format(right, role).as_string() for lacking, right in needed if lacking)


def shard_holders(connection: psycopg.Connection, name: str) -> ShardHolders:
    parameters = {"shards": SHARDS, "class": lock_class(name), "outbox": outbox_name(name)}
    # An application name proves nothing: a consumer is a member that may mark changes.
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


def table(connection: psycopg.Connection, name: str) -> TableFacts:
    return TableFacts(**one(connection, _TABLE, [name], what="entity_changes"))


def backlog(connection: psycopg.Connection, name: str) -> Backlog:
    figures, controls = Store(name).figures(connection), Controls(name)
    oldest_ready_age_s, paused = figures.oldest_ready_age_s, controls.seen(connection)
    if paused:
        held = Pauses([each.pause for each in paused])
        oldest_ready_age_s = controls.oldest_ready_age_s(connection, held, EVERYTHING)
    return Backlog(
        fresh=figures.fresh,
        waiting=figures.waiting,
        dead=figures.dead,
        oldest_ready_age_s=oldest_ready_age_s,
        snoozed=_snoozed(connection, name),
        due_later=DueChanges(name).count(connection),
        barrier=Barriers(name).oldest(connection),
        pauses=None if paused is None else tuple(each.pause for each in paused),
    )


def _snoozed(connection: psycopg.Connection, name: str) -> int:
    statement = sql.SQL(_SNOOZED).format(sql.Identifier(name, "entity_changes")).as_string()
    (count,) = column(connection, statement, {"bound": _WAITING_EXAMINED_MAX, "snoozed": SNOOZED})
    return int(count)


def unhandled(connection: psycopg.Connection, name: str, scope: TypeFilter) -> Unhandled:
    read_anything(connection)
    types = OutboxAdmin(name).stats(connection).types
    found = [(each.entity_type, each.fresh) for each in types if each.fresh and not scope.has(each.entity_type)]
    return Unhandled(tuple(sorted(found, key=lambda each: -each[1])))
