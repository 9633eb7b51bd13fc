"""Statements about a trigger of a table, with names that are valid on any search_path."""

from __future__ import annotations

from psycopg import sql

from cdc.postgres.tracked_tables import Fires, Tracked

FIRES = {"O": Fires.ORIGIN, "A": Fires.ALWAYS, "R": Fires.REPLICA, "D": Fires.DISABLED}
"""By pg_trigger.tgenabled."""
_ENABLE = {Fires.ORIGIN: "ENABLE", Fires.ALWAYS: "ENABLE ALWAYS", Fires.REPLICA: "ENABLE REPLICA"}


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
