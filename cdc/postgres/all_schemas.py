"""The same table in many schemas, as a database with a schema for each tenant has it: tracked by a pattern.

First a plan, which only reads: what would be refused for one table is refused before anything is changed. Then each
table in a transaction of its own: locks on all of them at once would stop every tenant's writers, and thousands of them
do not fit into the server's table of locks. So a table that stays locked is left, and the others go on; whoever runs
it again finds the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from cdc.core.errors import CdcError, NotFoundError, RefusedError, UsageError
from cdc.postgres import capture_catalog, source_tables, tracking
from cdc.postgres.tracked_tables import Asked, Tracked, matches
from cdc.postgres.tracking import Decision, Tracking


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made of each table, in the order of their schemas, before anything was changed."""

    asked: Asked
    decided: tuple[Decision, ...]
    like: tuple[Tracked, ...]
    replace: bool


@dataclass(frozen=True, slots=True)
class Untouched:
    """One table that stays as it was."""

    table: str
    error: CdcError


def plan(connection: psycopg.Connection, schema: str, table: str, asked: Asked, *, replace: bool = False) -> Plan:
    """What ``carry_out`` would do to each ``table`` whose schema matches ``asked.all_schemas``; changes nothing.

    A table without a trigger gets the options of those that have one, as far as none are named. Raises as
    ``tracking.track`` does, and UsageError for a name with a schema.
    """
    assert asked.all_schemas is not None
    with connection.transaction():
        source_tables.use_server_names(connection)
        capture = capture_catalog.capture_function(connection, schema)
        oids = _matching(connection, table, asked.all_schemas)
        tables = capture_catalog.tables(connection, capture, schema, oids, spell=source_tables.spell)
        everywhere = source_tables.triggers(connection, capture, schema)
    like = tuple(each for each in everywhere if each.oid in tables and each.ours and not each.broken)
    decided, refused = list[Decision](), list[tuple[str, CdcError]]()
    for oid in oids:
        source = tables[oid]
        try:
            decided.append(tracking.judge(capture, schema, source, everywhere, asked, like=like, replace=replace))
        except CdcError as error:
            refused.append((source.spelt, error))
    if refused:
        raise _all_of(refused)
    if not asked.shared_key:
        tracking.refuse_shared_keys(decided, everywhere)
    return Plan(asked, tuple(decided), like, replace)


def carry_out(
    connection: psycopg.Connection, schema: str, planned: Plan, *, dry_run: bool = False
) -> Iterator[Tracking | Untouched]:
    """Track them one by one; yields each. Raises UsageError, for the rest, where the server refuses a condition."""
    for each in planned.decided:
        try:
            yield tracking.track_as(
                connection, schema, _qualified(each.source.namespace, each.source.name), planned.asked,
                like=planned.like, judged=True, replace=planned.replace, dry_run=dry_run,
            )  # fmt: skip
        except UsageError:
            raise
        except CdcError as error:
            yield Untouched(each.source.spelt, error)


def untrack(
    connection: psycopg.Connection, schema: str, table: str, pattern: str
) -> Iterator[list[Tracked] | Untouched]:
    """``tracking.untrack`` of each ``table`` that is tracked and whose schema matches, one by one; yields each.

    Raises NotFoundError when none is.
    """
    with connection.transaction():
        source_tables.use_server_names(connection)
        capture = capture_catalog.capture_function(connection, schema)
        oids = _matching(connection, table, pattern)
        found = {each.oid: each for each in source_tables.triggers(connection, capture, schema) if each.oid in oids}
    if not found:
        raise NotFoundError(f"no {table} is tracked in a schema that matches {pattern}", hint="see: cdc tracked")
    for each in found.values():
        try:
            yield tracking.untrack(connection, schema, _qualified(each.namespace, each.name))
        except CdcError as error:
            yield Untouched(each.table, error)


def _matching(connection: psycopg.Connection, table: str, pattern: str) -> list[int]:
    name = source_tables.bare_name(connection, table)
    there = capture_catalog.named_so(connection, [name])
    found = [each.oid for each in there if matches(pattern, each.namespace)]
    if not found:
        schemas = ", ".join(each.namespace for each in there[:5])
        hint = f"it is in {schemas}" if there else "no schema has one"
        if "%" in pattern and there:
            hint += "; any characters are *, as in 'tenant_*'"
        raise NotFoundError(f"no schema that matches {pattern} has a table {table}", hint=hint)
    return found


def _qualified(namespace: str, name: str) -> str:
    return sql.Identifier(namespace, name).as_string()


def _all_of(refused: Sequence[tuple[str, CdcError]]) -> CdcError:
    """The first, which says how many there are."""
    (_, first), *others = refused
    if not others:
        return first
    kind = type(first) if isinstance(first, UsageError | RefusedError) else CdcError
    named = ", ".join(table for table, _ in others[:5]) + (", ..." if len(others) > 5 else "")
    return kind(f"{first}; and so for {len(others)} more ({named}); nothing was changed", hint=first.hint)
