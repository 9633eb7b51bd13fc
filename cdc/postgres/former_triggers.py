"""Our triggers of former versions, which had another name: they are renamed, so that they fire first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from cdc.core.errors import CdcError
from cdc.core.model import former_trigger_name, trigger_name
from cdc.postgres import source_tables
from cdc.postgres.tracked_tables import Tracked
from cdc.postgres.trigger_statements import dropping


@dataclass(frozen=True, slots=True)
class Renaming:
    """One trigger with our former name. ``refused``: why it keeps that name."""

    table: str
    refused: str = ""


def rename_all(connection: psycopg.Connection, schema: str, tracked: Sequence[Tracked]) -> list[Renaming]:
    """Rename those among ``tracked``, each in a transaction of its own.

    Takes ACCESS EXCLUSIVE on each such table for a moment. A trigger keeps its name where that lock is not granted
    within 5 s, or the role does not own the table; its Renaming says so.
    """
    done = []
    for each in tracked:
        if each.trigger != former_trigger_name(schema):
            continue
        try:
            with source_tables.changing(connection, each.table):
                _rename(connection, each, trigger_name(schema))
            done.append(Renaming(each.table))
        except (CdcError, errors.DuplicateObject) as refused:
            why = str(refused) if isinstance(refused, CdcError) else "there is one of the new name"
            done.append(Renaming(each.table, why))
    return done


def rename(connection: psycopg.Connection, schema: str, present: Sequence[Tracked]) -> None:
    """Rename the one among the triggers of one table; drop it where there is one of the new name."""
    new = trigger_name(schema)
    taken = any(each.trigger == new for each in present)
    for each in present:
        if each.trigger == former_trigger_name(schema):
            if taken:
                source_tables.as_owner(connection, dropping(each))
            else:
                _rename(connection, each, new)


def _rename(connection: psycopg.Connection, trigger: Tracked, new: str) -> None:
    """Up to PostgreSQL 14 the copies on partitions must be renamed, too."""
    places = [(trigger.namespace, trigger.name, trigger.trigger)]
    if connection.info.server_version < 150_000:
        places += [(copy.namespace, copy.name, copy.trigger) for copy in trigger.copies]
    for namespace, name, old in places:
        source_tables.as_owner(
            connection,
            sql.SQL("ALTER TRIGGER {} ON {} RENAME TO {}").format(
                sql.Identifier(old), sql.Identifier(namespace, name), sql.Identifier(new)
            ),
        )
