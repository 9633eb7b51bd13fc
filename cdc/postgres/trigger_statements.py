"""Statements about a trigger of a table, with names that are valid on any search_path."""

from __future__ import annotations

from typing import Any, cast

import psycopg
from psycopg import sql

from cdc.core.model import Operation
from cdc.postgres.tracked_tables import Fires, SourceTable, Tracked, all_arguments

FIRES = {"O": Fires.ORIGIN, "A": Fires.ALWAYS, "R": Fires.REPLICA, "D": Fires.DISABLED}
"""By pg_trigger.tgenabled."""
_ENABLE = {Fires.ORIGIN: "ENABLE", Fires.ALWAYS: "ENABLE ALWAYS", Fires.REPLICA: "ENABLE REPLICA"}
_DEFINITION = "SELECT pg_catalog.pg_get_triggerdef(oid) FROM pg_catalog.pg_trigger WHERE tgrelid = %s AND tgname = %s"


def creating(schema: str, source: SourceTable, wanted: Tracked, function: str) -> sql.Composed:
    """``function``: that of the table's own, or "" for capture_entity_change()."""
    events = [
        sql.SQL("UPDATE OF {}").format(sql.SQL(", ").join(map(sql.Identifier, wanted.update_of)))
        if operation is Operation.UPDATE and wanted.update_of
        else sql.SQL(operation.value)
        for operation in wanted.operations
    ]
    # On a line of its own, so that a comment in it ends; the statement is the table owner's, as all of SQL is.
    condition = sql.SQL(cast("Any", f"WHEN ({wanted.when}\n) ")) if wanted.when else sql.SQL("")
    # OR REPLACE also enables a trigger that was disabled, and unlike DROP TRIGGER needs no ownership of the table.
    return sql.SQL("CREATE OR REPLACE TRIGGER {} AFTER {} ON {} FOR EACH ROW {}EXECUTE FUNCTION {}({})").format(
        sql.Identifier(wanted.trigger),
        sql.SQL(" OR ").join(events),
        sql.Identifier(source.namespace, source.name),
        condition,
        sql.Identifier(schema, function or "capture_entity_change"),
        sql.SQL(", ").join(map(sql.Literal, all_arguments(wanted))),
    )


def statements(connection: psycopg.Connection, tracked: Tracked) -> list[str]:
    """SQL that makes a trigger as it is, with names that are valid on any search_path."""
    made = connection.execute(_DEFINITION, [tracked.oid, tracked.trigger]).fetchall()
    definitions = [str(definition).replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", 1) for (definition,) in made]
    places = [(tracked.namespace, tracked.name, tracked.fires)]
    places += [(copy.namespace, copy.name, copy.fires) for copy in tracked.copies]
    unusual = [place for place in places if place[2] not in (Fires.ORIGIN, Fires.DISABLED)]
    return definitions + [enabling(space, name, tracked.trigger, fires).as_string() for space, name, fires in unusual]


def enabling(namespace: str, table: str, trigger: str, fires: Fires) -> sql.Composed:
    """Makes a trigger fire that way, on this table alone."""
    return sql.SQL("ALTER TABLE ONLY {} {} TRIGGER {}").format(
        sql.Identifier(namespace, table), sql.SQL(_ENABLE[fires]), sql.Identifier(trigger)
    )


def dropping(tracked: Tracked, trigger: str | None = None) -> sql.Composed:
    """Drops the trigger, or another one of its table."""
    return sql.SQL("DROP TRIGGER {} ON {}").format(
        sql.Identifier(trigger or tracked.trigger), sql.Identifier(tracked.namespace, tracked.name)
    )
