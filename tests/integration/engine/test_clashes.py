"""A transaction that the server rolls back because of another one: nobody's fault, and no attempt."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

import cdc
from cdc.core import lost_transactions
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled

_CLASH = "DO $$ BEGIN RAISE EXCEPTION 'in the way' USING ERRCODE = '{}'; END $$"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.001)


async def _settle(dsn: str, db: psycopg.Connection, router: cdc.Router) -> tuple[Any, ...]:
    db.execute("SELECT publish_change('x', '1')")

    async def all_settled() -> bool:
        return settled(db)

    async with consuming(dsn, router, backoff_base=0.01, max_attempts=3):
        await eventually_async(all_settled, what="processed or dead")
    row = db.execute("SELECT processed, error_count FROM entity_changes").fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_it_is_tried_again_and_counts_for_nothing(
    outbox: str, outbox_db: psycopg.Connection, sqlstate: str
) -> None:
    router, attempts = cdc.Router(), list[int]()

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        attempts.append(change.attempt)
        if len(attempts) <= 5:
            await connection.execute(_CLASH.format(sqlstate).encode())

    assert await _settle(outbox, outbox_db, router) == (True, 0)
    assert attempts == [1] * 6


async def test_so_it_is_for_a_handler_in_a_thread(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, attempts = cdc.Router(), list[int]()

    @router.on("x")
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        attempts.append(change.attempt)
        if len(attempts) <= 5:
            connection.execute(_CLASH.format("40P01").encode())

    assert await _settle(outbox, outbox_db, router) == (True, 0)
    assert attempts == [1] * 6


async def test_one_that_always_clashes_becomes_a_dead_letter(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, attempts = cdc.Router(), list[int]()

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        attempts.append(change.attempt)
        await connection.execute(_CLASH.format("40001").encode())

    assert await _settle(outbox, outbox_db, router) == (False, 3)
    assert attempts == [1] * 10 + [2] * 10 + [3] * 10


async def test_serializable_by_default_fails_nothing_of_a_consumer_alone(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE done (id text)")
    name = outbox_db.info.dbname
    outbox_db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'".encode())
    router, levels = cdc.Router(), set[str]()

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        cursor = await connection.execute("SELECT current_setting('transaction_isolation')")
        levels.update(level for (level,) in await cursor.fetchall())
        await connection.execute("INSERT INTO done VALUES (%s)", [change.entity_id])

    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 300) AS n")
    assert (await _settle(outbox, outbox_db, router))[1] == 0
    [(failed,)] = outbox_db.execute(
        "SELECT count(*) FROM entity_changes WHERE NOT processed OR error_count > 0"
    ).fetchall()
    assert failed == 0
    assert levels == {"read committed"}
