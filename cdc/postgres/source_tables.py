"""Tables by the names that a user writes, and the transaction in which their triggers are looked at and changed."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors, sql

from cdc.core.errors import CdcError, NotFoundError, RefusedError, UsageError
from cdc.postgres import capture_catalog
from cdc.postgres.capture_catalog import CaptureFunction
from cdc.postgres.tracked_tables import SourceTable, Tracked

LOCK_TIMEOUT = "5s"


@contextmanager
def changing(connection: psycopg.Connection, table: str) -> Iterator[None]:
    """One transaction whose wait for the table's lock does not hold up writers for long."""
    try:
        with connection.transaction():
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [LOCK_TIMEOUT])
            connection.execute("SET LOCAL client_min_messages = warning")
            use_server_names(connection)
            yield
    except (errors.LockNotAvailable, errors.DeadlockDetected) as busy:
        raise CdcError(
            f"{table} stayed locked for {LOCK_TIMEOUT}; nothing was changed",
            hint="end the long transaction that holds it (pg_stat_activity, oldest xact_start), and run this again",
        ) from busy
    except errors.InsufficientPrivilege as denied:
        raise RefusedError(
            f"the role may not do this: {denied.diag.message_primary}",
            hint="it needs the right TRIGGER on the table and EXECUTE on capture_entity_change()",
        ) from denied


_USER_PATH = "cdc.user_path"


def use_server_names(connection: psycopg.Connection) -> None:
    """Until the transaction ends, operators and functions are the server's own, whatever the user's path contains.

    Where that path counts, for a table's name as a user writes it, ``as_user`` restores it; a setting keeps it.
    """
    connection.execute(
        "SELECT pg_catalog.set_config(%s, pg_catalog.current_setting('search_path'), true),"
        " pg_catalog.set_config('search_path', 'pg_catalog', true)",
        [_USER_PATH],
    )


@contextmanager
def as_user(connection: psycopg.Connection) -> Iterator[None]:
    """For a query that is safe on any path."""
    switch = "SELECT pg_catalog.set_config('search_path', {}, true)"
    connection.execute(switch.format("pg_catalog.current_setting(%s)").encode(), [_USER_PATH])
    yield
    connection.execute(switch.format("'pg_catalog'").encode())


def spell(connection: psycopg.Connection, oids: Collection[int]) -> dict[int, str]:
    with as_user(connection):
        return capture_catalog.spell(connection, oids)


def triggers(
    connection: psycopg.Connection, capture: CaptureFunction, schema: str, table: int | None = None
) -> list[Tracked]:
    return capture_catalog.triggers(connection, capture, schema, None if table is None else [table], spell=spell)


def bare_name(connection: psycopg.Connection, name: str) -> str:
    """The name of a table that is written without a schema, as SQL reads it. Raises UsageError."""
    try:
        [(parts,)] = connection.execute("SELECT pg_catalog.parse_ident(%s)", [name]).fetchall()
    except (errors.InvalidName, errors.InvalidParameterValue, errors.SyntaxError) as bad:
        raise _no_name(name) from bad
    if len(parts) != 1:
        raise UsageError(
            f"{name!r} says a schema, and --all-schemas another", hint="name the table alone: cdc track orders ..."
        )
    return str(parts[0])


def resolve(connection: psycopg.Connection, capture: CaptureFunction, schema: str, name: str) -> SourceTable:
    try:
        with as_user(connection):
            [(oid,)] = connection.execute("SELECT pg_catalog.to_regclass(%s)::pg_catalog.oid", [name]).fetchall()
            if oid is None:  # from PostgreSQL 16 on also for what is not a name
                connection.execute("SELECT pg_catalog.parse_ident(%s)", [name])
    except (errors.InvalidName, errors.InvalidParameterValue, errors.SyntaxError, errors.FeatureNotSupported) as bad:
        raise _no_name(name) from bad
    found = {} if oid is None else capture_catalog.tables(connection, capture, schema, [oid], spell=spell)
    if oid not in found:
        raise NotFoundError(f"there is no table {name}", hint=_similar(connection, name))
    return found[oid]


def _no_name(name: str) -> UsageError:
    return UsageError(
        f"{name!r} is not the name of a table", hint='write it as in SQL: schema.table, or "Mixed Case" in quotes'
    )


def _similar(connection: psycopg.Connection, name: str) -> str:
    rows = connection.execute(
        "SELECT c.oid, c.relname::text FROM pg_catalog.pg_class AS c"
        " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p')"
        " AND NOT c.relispartition AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
    ).fetchall()
    bare = name.rpartition(".")[2].strip('"').lower()
    near = set(difflib.get_close_matches(bare, [table.lower() for _, table in rows], n=3))
    spelt = sorted(spell(connection, [oid for oid, table in rows if table.lower() in near]).values())
    return f"did you mean {' or '.join(spelt[:3])}?" if spelt else "write the schema with it: schema.table"


def as_owner(connection: psycopg.Connection, statement: sql.Composed) -> None:
    """Run a statement for which the right TRIGGER is not enough."""
    try:
        connection.execute(statement)
    except errors.InsufficientPrivilege as denied:
        raise RefusedError(
            f"the role may not do this: {denied.diag.message_primary}",
            hint=f"have the owner of the table run: {statement.as_string()}",
        ) from denied
