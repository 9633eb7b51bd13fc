"""The statement trigger of a tracked table that captures or refuses a TRUNCATE, by capture_truncate().

It goes with the table's row trigger: it names the same entity type and fires for the same sessions. PostgreSQL copies
statement triggers to no partition: that of a partitioned table fires for a TRUNCATE of the table, and not of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cdc.core.model import truncate_trigger_name
from cdc.postgres.tracked_tables import Fires, Tracked, Truncate, TruncateTrigger
from cdc.postgres.trigger_catalog import GIVEN, texts
from cdc.postgres.trigger_statements import FIRES, dropping, enabling

# 32: TRUNCATE.
_FIND = f"""
SELECT t.tgrelid AS oid, t.tgname::text AS trigger, t.tgenabled::text AS fires, given.arguments
FROM pg_catalog.pg_trigger AS t
JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
{GIVEN}
WHERE n.nspname = %(schema)s AND p.proname = 'capture_truncate' AND t.tgtype::int4 & 32 <> 0
  AND (%(tables)s::oid[] IS NULL OR t.tgrelid = ANY (%(tables)s::oid[]))
ORDER BY t.tgrelid, t.tgname
"""  # noqa: S608 - of pieces of our own


def find(
    connection: psycopg.Connection, schema: str, tables: Sequence[int] | None
) -> Mapping[int, tuple[TruncateTrigger, ...]]:
    """By table, those that capture into ``schema``; of these ``tables``, or all."""
    found: dict[int, tuple[TruncateTrigger, ...]] = {}
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(_FIND.encode(), {"schema": schema, "tables": None if tables is None else list(tables)})
        for row in cursor:
            entity_type, does = texts(row["arguments"], 2)
            trigger = TruncateTrigger(
                trigger=row["trigger"],
                entity_type=entity_type,
                does=Truncate.REFUSE if does == Truncate.REFUSE else Truncate.EVENT,
                fires=FIRES[row["fires"]],
            )
            found[row["oid"]] = (*found.get(row["oid"], ()), trigger)
    return found


def differ(schema: str, before: Tracked | None, wanted: Tracked) -> bool:
    """Whether the table has other ones than those that go with ``wanted``."""
    return before is not None and before.truncates != _wanted(schema, wanted, wanted.truncate)


def replacing(schema: str, made: Tracked, does: Truncate) -> list[sql.Composed]:
    """The statements that give the table of the row trigger ``made`` the one for TRUNCATE, or none; [] if it is so."""
    wanted = _wanted(schema, made, does)
    if made.truncates == wanted:
        return []
    statements = [
        dropping(made, each.trigger) for each in made.truncates if each.trigger not in {one.trigger for one in wanted}
    ]
    return statements + [statement for each in wanted for statement in _creating(schema, made, each)]


def script(schema: str, made: Tracked, before: Tracked | None) -> list[str]:
    """The statements that make those of ``made`` out of those ``before``, whatever of it is there already."""
    kept = {each.trigger for each in made.truncates}
    statements = [
        dropping(made, each.trigger) for each in (before.truncates if before else ()) if each.trigger not in kept
    ]
    statements += [statement for each in made.truncates for statement in _creating(schema, made, each)]
    return [statement.as_string() for statement in statements]


def _wanted(schema: str, made: Tracked, does: Truncate) -> tuple[TruncateTrigger, ...]:
    if does == Truncate.IGNORE:
        return ()
    name = truncate_trigger_name(schema)
    return (TruncateTrigger(trigger=name, entity_type=made.entity_type or "", does=does, fires=made.fires),)


def _creating(schema: str, made: Tracked, trigger: TruncateTrigger) -> list[sql.Composed]:
    create = sql.SQL("CREATE OR REPLACE TRIGGER {} {} TRUNCATE ON {} EXECUTE FUNCTION {}({}, {})").format(
        sql.Identifier(trigger.trigger),
        sql.SQL("BEFORE" if trigger.does == Truncate.REFUSE else "AFTER"),
        sql.Identifier(made.namespace, made.name),
        sql.Identifier(schema, "capture_truncate"),
        sql.Literal(trigger.entity_type),
        sql.Literal(trigger.does.value),
    )
    if trigger.fires in (Fires.ORIGIN, Fires.DISABLED):
        return [create]
    return [create, enabling(made.namespace, made.name, trigger.trigger, trigger.fires)]
