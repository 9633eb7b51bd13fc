"""The capture functions that are made for one table each: created, rewritten, dropped (``table_capture``).

Only a role that may create what belongs to the role that captures makes one: a superuser, or the owner of the outbox.
No function that runs with its owner's rights does it for others. Who may not is given capture_entity_change().
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import psycopg
from psycopg import sql

from cdc.core.errors import UsageError
from cdc.core.model import trigger_name
from cdc.postgres import capture_catalog, source_tables, table_capture
from cdc.postgres.capture_catalog import CaptureFunction, Spell
from cdc.postgres.migration_scripts import ADVISORY_LOCK
from cdc.postgres.remarks import Remark, outdated, owned_by
from cdc.postgres.table_capture import CAPTURE_ROLE, TableCapture
from cdc.postgres.tracked_tables import Asked, SourceTable, Tracked, decide

_PRESENT = """
SELECT p.proname::text, pg_catalog.pg_get_userbyid(p.proowner)::text, p.proconfig, p.prosrc, p.prosecdef
FROM pg_catalog.pg_proc AS p
WHERE p.oid = ANY (%s::oid[]) AND p.proname = ANY (%s::name[])
"""


def present(
    connection: psycopg.Connection, capture: CaptureFunction, names: Collection[str]
) -> dict[str, TableCapture]:
    """Those of these names, as they are; by their names."""
    rows = connection.execute(_PRESENT.encode(), [list(capture.oids), list(names)]).fetchall()
    return {
        name: TableCapture(name, owner, table_capture.settings(config or ()), source, security_definer=definer)
        for name, owner, config, source, definer in rows
    }


def expected(capture: CaptureFunction, schema: str, table: SourceTable, tracked: Tracked) -> TableCapture | None:
    """The function that ``table`` should have of its own, as it is now; None where capture_entity_change() serves."""
    if not capture.security_definer:
        return None
    return table_capture.made_for(schema, table, tracked, capture.source, capture.owner)


def refresh(connection: psycopg.Connection, schema: str) -> list[str]:
    """Rewrite the functions that are made for tables where they are not as expected; returns the tables' names.

    Drops those that no trigger calls. Takes no lock on a table. Does nothing where the role may not do it.
    """
    with connection.transaction():
        connection.execute("SET LOCAL client_min_messages = warning")
        source_tables.use_server_names(connection)
        capture = capture_catalog.capture_function(connection, schema)
        drop_unused(connection, schema, capture)
        written = []
        for each, found, wanted in compared(connection, capture, schema, spell=source_tables.spell):
            # Of another name it is for `cdc track`, because the trigger has to change.
            stale = wanted is not None and found.name == wanted.name and not found.serves_as(wanted)
            if wanted is not None and stale and _may_make(connection, schema, found, wanted):
                _make(connection, schema, wanted)
                written.append(each.table)
        return written


def compared(
    connection: psycopg.Connection, capture: CaptureFunction, schema: str, *, spell: Spell = capture_catalog.spell
) -> list[tuple[Tracked, TableCapture, TableCapture | None]]:
    """The triggers that call such a function, each with that function as it is, and as it is expected."""
    own = [each for each in capture_catalog.triggers(connection, capture, schema, spell=spell) if each.function]
    tables = capture_catalog.tables(connection, capture, schema, [each.oid for each in own], spell=spell)
    found = present(connection, capture, [each.function for each in own])
    return [(each, found[each.function], expected(capture, schema, tables[each.oid], each)) for each in own]


def faults(
    connection: psycopg.Connection, capture: CaptureFunction, schema: str, *, spell: Spell = capture_catalog.spell
) -> list[Remark]:
    """Of the tables whose own function is not as it would be made now, or has the rights of another role."""
    return [
        outdated(each)
        if found.owner == capture.owner or found.owner.startswith(CAPTURE_ROLE)
        else owned_by(each, found.owner, capture.owner)
        for each, found, wanted in compared(connection, capture, schema, spell=spell)
        if wanted is None or not found.serves_as(wanted)
    ]


def without(
    capture: CaptureFunction, schema: str, triggers: Sequence[Tracked], tables: Mapping[int, SourceTable]
) -> Iterator[Tracked]:
    """Of each table that `cdc track` would give a function of its own, a trigger that calls capture_entity_change()."""
    by_table: dict[int, list[Tracked]] = {}
    for each in triggers:
        by_table.setdefault(each.oid, []).append(each)
    for oid, present in by_table.items():
        general = next((each for each in present if not each.function), None)
        if general is None or oid not in tables:
            continue
        with contextlib.suppress(UsageError):  # `cdc track` would refuse it
            wanted = decide(tables[oid], present, Asked(), trigger_name(schema))
            if expected(capture, schema, tables[oid], wanted):
                yield general


def provide(
    connection: psycopg.Connection,
    capture: CaptureFunction,
    schema: str,
    source: SourceTable,
    wanted: Tracked,
    *,
    to_call: bool,
) -> tuple[str, bool]:
    """The name of the function that this table has of its own, "" for none, and whether it was written now.

    ``to_call``: for a trigger that is made, and not only for one that is there, which asks for the right to call it.
    """
    made = expected(capture, schema, source, wanted)
    if made is None:
        return "", False
    found = present(connection, capture, [made.name]).get(made.name)
    if found is not None and found.serves_as(made):
        return (made.name if not to_call or _may_call(connection, schema, made) else ""), False
    if not _may_make(connection, schema, found, made):
        return "", False
    _make(connection, schema, made)
    return made.name, True


_MAY_MAKE = r"""
SELECT pg_catalog.has_schema_privilege(n.oid, 'CREATE') AND pg_catalog.pg_has_role(r.oid, 'USAGE')
    AND (u.rolsuper OR pg_catalog.has_schema_privilege(n.oid, 'CREATE WITH GRANT OPTION'))
    AND r.rolname LIKE 'cdc\_capture\_%%',
  u.rolsuper OR pg_catalog.has_schema_privilege(r.oid, n.oid, 'CREATE'),
  EXISTS (SELECT FROM pg_catalog.pg_roles AS o JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid
          WHERE o.rolname = %s AND c.relname = 'entity_changes' AND (o.rolsuper OR o.oid = c.relowner)
            AND pg_catalog.pg_has_role(o.oid, 'USAGE'))
FROM pg_catalog.pg_namespace AS n, pg_catalog.pg_roles AS r, pg_catalog.pg_roles AS u
WHERE n.nspname = %s AND r.rolname = %s AND u.rolname = current_user
"""


def _may_make(connection: psycopg.Connection, schema: str, found: TableCapture | None, made: TableCapture) -> bool:
    """Whether this role may create what belongs to the role that captures: a superuser, or the outbox's owner.

    One of this name that is theirs was restored from a dump without its owner, and is taken over. One that belongs to
    somebody else is not: triggers of theirs may call it.
    """
    may, _, theirs = _rights(connection, schema, made, "" if found is None else found.owner)
    return may and (found is None or found.owner == made.owner or theirs)


def _rights(
    connection: psycopg.Connection, schema: str, made: TableCapture, owner: str = ""
) -> tuple[bool, bool, bool]:
    """May make it; needs no grant for that; has the rights of ``owner``, who is a superuser or the outbox's owner."""
    row = connection.execute(_MAY_MAKE.encode(), [owner, schema, made.owner]).fetchone()
    return (False, False, False) if row is None else (row[0], row[1], row[2])


def _may_call(connection: psycopg.Connection, schema: str, made: TableCapture) -> bool:
    signature = sql.Identifier(schema, made.name).as_string() + "()"
    asked = "SELECT pg_catalog.has_function_privilege(%s::text, 'EXECUTE')"
    return connection.execute(asked, [signature]).fetchone() == (True,)


def _make(connection: psycopg.Connection, schema: str, made: TableCapture) -> None:
    # Two sessions that grant on one schema at a time would fail.
    lock = "SELECT pg_catalog.pg_advisory_xact_lock(%s, pg_catalog.hashtext(%s))"
    connection.execute(lock, [ADVISORY_LOCK, schema])
    # A function's new owner needs CREATE at that moment, unless a superuser changes the owner.
    grant = not _rights(connection, schema, made)[1]
    names = {"schema": sql.Identifier(schema), "role": sql.Identifier(made.owner)}
    if grant:
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA {schema} TO {role}").format(**names))
    for statement in table_capture.create(schema, made):
        connection.execute(statement)
    if grant:
        connection.execute(sql.SQL("REVOKE CREATE ON SCHEMA {schema} FROM {role}").format(**names))


_UNUSED = r"""
SELECT p.proname::text FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner
WHERE p.oid = ANY (%(functions)s::oid[]) AND p.oid <> %(general)s::oid AND pg_catalog.pg_has_role(r.oid, 'USAGE')
  -- A restore without owners has given it to whoever ran it.
  AND (r.rolname LIKE 'cdc\_capture\_%%' OR pg_catalog.strpos(p.prosrc, %(made)s) > 0 AND (r.rolsuper OR EXISTS (
    SELECT FROM pg_catalog.pg_class AS c
    WHERE c.relnamespace = p.pronamespace AND c.relname = 'entity_changes' AND c.relowner = r.oid)))
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgfoid = p.oid)
"""


def drop_unused(connection: psycopg.Connection, schema: str, capture: CaptureFunction) -> None:
    """Drop those that no trigger calls, as far as the role may and they are surely ours."""
    parameters = {"functions": list(capture.oids), "general": capture.oid, "made": table_capture.MADE}
    for (name,) in connection.execute(_UNUSED.encode(), parameters).fetchall():
        connection.execute(sql.SQL("DROP FUNCTION {}()").format(sql.Identifier(schema, name)))
