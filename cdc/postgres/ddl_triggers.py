"""The event triggers that have DDL on tracked tables captured, by capture_ddl(): made, taken away, looked at.

There are two for an outbox: what is altered shows at the end of a command, what is dropped by its own event. Each
fires for every role of the database, with a function that belongs to the role that captures. Whoever may replace that
function could run code as whoever issues DDL. So they are made only where nobody can who logs in, but superusers and
the role that makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from cdc.core.errors import CdcError, NotFoundError, RefusedError
from cdc.core.model import trigger_name
from cdc.postgres.migration_scripts import LOCK_TIMEOUT
from cdc.postgres.remarks import DDL, Remark
from cdc.postgres.tracked_tables import Ddl, Tracked

TAGS = (
    "ALTER DOMAIN", "ALTER EXTENSION", "ALTER FOREIGN TABLE", "ALTER INDEX", "ALTER MATERIALIZED VIEW", "ALTER SCHEMA",
    "ALTER SEQUENCE", "ALTER TABLE", "ALTER TYPE", "ALTER VIEW", "CREATE TRIGGER",
)  # fmt: skip
"""Commands by which columns or names of a table change, or which table is captured. ALTER VIEW renames a table, too."""
_FUNCTION = "capture_ddl"
_SHOWN = 5

_INSTALLED = """
SELECT FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
WHERE n.nspname = %s AND p.proname = %s
"""
_PRESENT = """
SELECT e.evtname::text, e.evtevent::text, e.evtenabled::text, coalesce(e.evttags, '{}')::text[],
  p.oid IS NOT NULL AND e.evtfoid = p.oid
FROM pg_catalog.pg_event_trigger AS e
LEFT JOIN pg_catalog.pg_proc AS p ON p.proname = %(function)s AND p.pronargs = 0
  AND p.pronamespace = pg_catalog.to_regnamespace(pg_catalog.quote_ident(%(schema)s))
WHERE e.evtname = ANY (%(names)s::name[]) OR e.evtfoid = p.oid
ORDER BY e.evtname
"""
# Who may have the function replaced, or code run by it: who can act as an owner of the tables that it writes, of its
# schema, or of itself and what it calls; who may create a trigger on these tables; and before version 16 who has
# CREATEROLE, by which a role makes itself a member of any but a superuser.
_OUTSIDERS = """
WITH written (relation, owner, acl) AS (
  SELECT c.oid, c.relowner, c.relacl FROM pg_catalog.pg_class AS c
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE n.nspname = {schema} AND c.relname IN ('entity_changes', 'cdc_barriers', 'cdc_columns')
), owner (role) AS (
  SELECT owner FROM written
  UNION SELECT n.nspowner FROM pg_catalog.pg_namespace AS n WHERE n.nspname = {schema}
  UNION SELECT p.proowner FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
  WHERE n.nspname = {schema}
    AND p.proname IN ('capture_ddl', 'captured_columns', 'capture_barrier', 'bounded_text', 'default_entity_type')
), able (role) AS (
  SELECT role FROM owner
  UNION SELECT a.grantee FROM written CROSS JOIN LATERAL pg_catalog.aclexplode(written.acl) AS a
  WHERE a.privilege_type = 'TRIGGER'
  UNION SELECT r.oid FROM pg_catalog.pg_roles AS r
  WHERE r.rolcreaterole AND pg_catalog.current_setting('server_version_num')::int < 160000
    AND EXISTS (SELECT FROM owner JOIN pg_catalog.pg_roles AS o ON o.oid = owner.role WHERE NOT o.rolsuper)
)
SELECT r.rolname::text FROM pg_catalog.pg_roles AS r
WHERE r.rolcanlogin AND NOT r.rolsuper AND r.rolname <> ALL ({trusted})
  -- 0 is PUBLIC.
  AND EXISTS (SELECT FROM able WHERE able.role = 0 OR pg_catalog.pg_has_role(r.oid, able.role, 'MEMBER'))
ORDER BY 1
"""
_REFUSING = """\
DO $cdc$
DECLARE
  v_roles text;
BEGIN
  SELECT pg_catalog.string_agg(pg_catalog.quote_ident(rolname), ', ') INTO v_roles FROM ({outsiders}) AS outsider;
  IF v_roles IS NOT NULL THEN
    RAISE EXCEPTION '% could run code as whoever issues DDL in this database', v_roles
      USING HINT = 'give the outbox an owner of its own that nobody logs in as: docs/operations/roles.md';
  END IF;
END
$cdc$"""

_FORGET = """
DELETE FROM {} AS c WHERE c.columns IS NULL OR NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS t WHERE t.oid = c.trigger AND t.tgrelid = c.relation)
"""
_NOTE = """
INSERT INTO {} AS c SELECT s.* FROM pg_catalog.unnest(%s::oid[]) AS u (relation) CROSS JOIN LATERAL {}(u.relation) AS s
ON CONFLICT (relation) DO NOTHING RETURNING c.relation
"""


@dataclass(frozen=True, slots=True)
class DdlTrigger:
    """An event trigger. ``enabled``: pg_event_trigger.evtenabled. ``ours``: it calls capture_ddl() of the outbox."""

    name: str
    event: str
    tags: tuple[str, ...] = ()
    enabled: str = "O"
    ours: bool = True


def expected(schema: str) -> tuple[DdlTrigger, DdlTrigger]:
    return (
        DdlTrigger(trigger_name(schema, "cdc_ddl"), "ddl_command_end", TAGS),
        DdlTrigger(trigger_name(schema, "cdc_drop"), "sql_drop"),
    )


def present(connection: psycopg.Connection, schema: str) -> list[DdlTrigger]:
    """Those of our names, and those that call capture_ddl() under another."""
    parameters = {"function": _FUNCTION, "schema": schema, "names": [each.name for each in expected(schema)]}
    return [
        DdlTrigger(name, event, tuple(sorted(tags)), enabled, ours)
        for name, event, enabled, tags, ours in connection.execute(_PRESENT.encode(), parameters).fetchall()
    ]


def faults(schema: str, found: Sequence[DdlTrigger], tracked: Sequence[Tracked]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) of each that is not as expected, where a table needs it or the other is there."""
    if not found and not any(each.ddl == Ddl.EVENT for each in tracked):
        return
    by_name = {each.name: each for each in found}
    for wanted in expected(schema):
        name, there = wanted.name, by_name.get(wanted.name)
        if there is None:
            yield name, "missing"
        elif not there.ours:
            yield name, "not ours"
        elif there.enabled not in ("O", "A"):
            yield name, "disabled"
        elif (there.event, there.tags) != (wanted.event, wanted.tags):
            yield name, "of another version"


def outsiders(connection: psycopg.Connection, schema: str) -> list[str]:
    """Roles that may log in, are no superusers and own none of the two, and could have capture_ddl() replaced."""
    owners = (
        "ARRAY(SELECT pg_catalog.pg_get_userbyid(evtowner) FROM pg_catalog.pg_event_trigger WHERE evtname = ANY ({}))"
    )
    named = sql.SQL(owners).format(sql.Literal([each.name for each in expected(schema)]))
    return [name for (name,) in connection.execute(_outsiders(schema, trusted=named)).fetchall()]


def _outsiders(schema: str, *, trusted: sql.Composable) -> sql.Composed:
    return sql.SQL(_OUTSIDERS).format(schema=sql.Literal(schema), trusted=trusted)


def remarks(connection: psycopg.Connection, schema: str, tracked: Sequence[Tracked]) -> Iterator[Remark]:
    """What is wrong with them, for the tables that need them, and who could misuse them."""
    found = present(connection, schema)
    for name, what in faults(schema, found, tracked):
        tables = sorted(each.table for each in tracked if each.ddl == Ddl.EVENT)
        some = ", ".join(tables[:_SHOWN]) + (f" and {len(tables) - _SHOWN} more" if len(tables) > _SHOWN else "")
        yield Remark(
            DDL,
            f"the event trigger {name} is {what}: DDL on {some or 'tables'} is not captured as it should be",
            "as a superuser, or the administrator of a managed service: cdc db ddl, or cdc db ddl --off",
            object=f"event trigger {name}",
        )
    if found and (others := outsiders(connection, schema)):
        yield Remark(
            DDL,
            f"{', '.join(others)} could run code as whoever issues DDL in this database: as the owner of the outbox or"
            " of its schema, by a trigger on its tables, or by CREATEROLE before PostgreSQL 16",
            "give the outbox an owner that nobody logs in as and revoke TRIGGER on its tables"
            " (docs/operations/roles.md), or: cdc db ddl --off",
            object=f"function {_FUNCTION}()",
        )


def refuse_missing(connection: psycopg.Connection, schema: str) -> None:
    """Raises RefusedError where DDL would not be captured."""
    found = present(connection, schema)
    lacking = [f"the event trigger {name} is {what}" for name, what in faults(schema, found, ())]
    if not found or lacking:
        raise RefusedError(
            f"DDL is not captured in this database: {'; '.join(lacking) or 'there is no event trigger'}",
            hint="as a superuser, or as the administrator that a managed service gives: cdc db ddl",
        )


def enable(connection: psycopg.Connection, schema: str) -> list[str]:
    """Make those that are missing, and replace those that are not as expected; returns the names of those made.

    Raises NotFoundError where the outbox has no capture_ddl(), RefusedError where the role may make none, or where a
    role that is no superuser could run code by them.
    """
    with _changing(connection):
        if connection.execute(_INSTALLED, [schema, _FUNCTION]).fetchone() is None:
            raise NotFoundError(f"schema {schema} has no {_FUNCTION}()", hint="run: cdc db install, or cdc db upgrade")
        ours = sql.SQL("ARRAY[current_user]")
        if others := [name for (name,) in connection.execute(_outsiders(schema, trusted=ours)).fetchall()]:
            raise RefusedError(
                f"{', '.join(others)} could run code as whoever issues DDL in this database, superusers too: who can"
                " act as the owner of the outbox or of its schema may replace the function of an event trigger, who may"
                " create a trigger on the outbox has it fired, and CREATEROLE before PostgreSQL 16 gives any role",
                hint="give the outbox an owner of its own that nobody logs in as, and revoke TRIGGER on its tables:"
                " docs/operations/roles.md",
            )
        made = [name for name, _ in faults(schema, present(connection, schema), ())] or (
            [] if present(connection, schema) else [each.name for each in expected(schema)]
        )
        for trigger in expected(schema):
            if trigger.name in made:
                for statement in _statements(schema, trigger):
                    connection.execute(statement)
        return made


def disable(connection: psycopg.Connection, schema: str) -> list[str]:
    """Drop those that call capture_ddl() of this outbox; returns their names. For who owns them, or a superuser."""
    with _changing(connection):
        names = [each.name for each in present(connection, schema) if each.ours]
        for name in names:
            connection.execute(sql.SQL("DROP EVENT TRIGGER {}").format(sql.Identifier(name)))
        return names


def note(connection: psycopg.Connection, schema: str, tracked: Sequence[Tracked]) -> list[str]:
    """Note the columns of the tables of which none are, as after a restore; returns the tables' names.

    For the owner of the outbox. Does nothing where no event trigger is.
    """
    if not present(connection, schema):
        return []
    names = {each.oid: each.table for each in tracked if each.ddl == Ddl.EVENT and not each.broken}
    columns, of = sql.Identifier(schema, "cdc_columns"), sql.Identifier(schema, "captured_columns")
    with connection.transaction():
        connection.execute("SET LOCAL search_path = pg_catalog")
        connection.execute(sql.SQL(_FORGET).format(columns))
        noted = connection.execute(sql.SQL(_NOTE).format(columns, of), [list(names)]).fetchall()
    return [names[oid] for (oid,) in noted]


def script(schema: str, *, off: bool = False) -> str:
    """One script for psql, safe to repeat, that makes them, or drops them."""
    refusing = sql.SQL(_REFUSING).format(outsiders=_outsiders(schema, trusted=sql.SQL("ARRAY[current_user]")))
    lines = ["\\set ON_ERROR_STOP on", "BEGIN;", *([] if off else [f"{refusing.as_string()};"])]
    for trigger in expected(schema):
        drop, create = (statement.as_string() for statement in _statements(schema, trigger))
        lines += [f"{drop};"] if off else [f"{drop};", f"{create};"]
    return "\n".join([*lines, "COMMIT;", ""])


def _statements(schema: str, trigger: DdlTrigger) -> tuple[sql.Composed, sql.Composed]:
    tags = sql.SQL(" WHEN TAG IN ({})").format(sql.SQL(", ").join(map(sql.Literal, trigger.tags)))
    return (
        sql.SQL("DROP EVENT TRIGGER IF EXISTS {}").format(sql.Identifier(trigger.name)),
        sql.SQL("CREATE EVENT TRIGGER {} ON {}{} EXECUTE FUNCTION {}()").format(
            sql.Identifier(trigger.name),
            sql.SQL("sql_drop" if trigger.event == "sql_drop" else "ddl_command_end"),
            tags if trigger.tags else sql.SQL(""),
            sql.Identifier(schema, _FUNCTION),
        ),
    )


@contextmanager
def _changing(connection: psycopg.Connection) -> Iterator[None]:
    """One transaction. Raises RefusedError for a role that may not change event triggers."""
    try:
        with connection.transaction():
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [LOCK_TIMEOUT])
            connection.execute("SET LOCAL client_min_messages = warning")
            connection.execute("SET LOCAL search_path = pg_catalog")
            yield
    except errors.InsufficientPrivilege as denied:
        raise RefusedError(
            f"the role may not do this: {denied.diag.message_primary}",
            hint="event triggers are for superusers, or the administrator of a managed service; as one: cdc db ddl,"
            " or to be rid of them: cdc db ddl --off",
        ) from denied
    except (errors.LockNotAvailable, errors.DeadlockDetected) as busy:
        raise CdcError(
            f"the event triggers stayed locked for {LOCK_TIMEOUT}; nothing was changed", hint="run this again"
        ) from busy
