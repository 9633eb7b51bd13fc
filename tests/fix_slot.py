"""A replication slot for one test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from tests.eventually import eventually

SlotFacts = dict[str, Any]


@pytest.fixture
def slot(db: psycopg.Connection) -> Iterator[str]:
    """A name that no slot has yet. A slot of that name is dropped afterwards, once no consumer reads it."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    eventually(lambda: not slot_facts(db, name).get("active"), what="a reader leaves the test's slot")
    if slot_facts(db, name):
        db.execute("SELECT pg_drop_replication_slot(%s)", [name])


def slot_facts(db: psycopg.Connection, name: str) -> SlotFacts:
    """The row of pg_replication_slots, or {} when there is none."""
    with db.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM pg_replication_slots WHERE slot_name = %s", [name]).fetchone() or {}


def make_slot(db: psycopg.Connection, name: str, plugin: str) -> None:
    db.execute("SELECT pg_create_logical_replication_slot(%s, %s)", [name, plugin])


def allow(db: psycopg.Connection, *plugins: str) -> None:
    """This session and new ones of its database may name these output plugins, where the server has a list of them."""
    if db.execute("SELECT FROM pg_settings WHERE name = 'output_plugin_libraries'").rowcount:
        names = sql.SQL(", ").join(map(sql.Identifier, plugins))  # not one string, which would be one name
        setting = sql.SQL("SET output_plugin_libraries = {}").format(names)
        db.execute(setting)
        db.execute(sql.SQL("ALTER DATABASE {} {}").format(sql.Identifier(db.info.dbname), setting))


def lose(db: psycopg.Connection, slot: str) -> None:
    """Write until the server, with a small max_slot_wal_keep_size, gives the slot up."""

    def lost() -> bool:
        db.execute("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 8000000)), pg_switch_wal()")
        db.execute("CHECKPOINT")
        return slot_facts(db, slot)["wal_status"] == "lost"

    eventually(lost, what="the server invalidates the slot")


@pytest.fixture
def confirms(db: psycopg.Connection) -> Callable[[str], None]:
    """``confirms(slot)`` waits until the slot has confirmed all WAL there was when it was called."""

    def wait(name: str) -> None:
        end = db.execute("SELECT pg_current_wal_flush_lsn()").fetchone()
        behind = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
        eventually(lambda: db.execute(behind, [end[0], name]).fetchone() == (True,), what="the slot confirms")

    return wait
