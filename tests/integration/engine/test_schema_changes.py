"""A change of a table's columns is a barrier: handlers get it between the rows of before and those of after."""

from __future__ import annotations

import psycopg
import pytest
from pydantic import BaseModel

import cdc
from cdc import testing
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled
from tests.handler_kinds import KINDS, handler

pytestmark = pytest.mark.server

_ROWS = "INSERT INTO orders (id) SELECT n FROM generate_series(%s::int, %s::int) AS n"


class Order(BaseModel):
    id: int


@pytest.fixture
def orders(outbox: str, outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    done(outbox, "db", "ddl")
    done(outbox, "track", "orders", "--type", "order", "--ddl", "event")
    return outbox_db


@pytest.mark.parametrize("kind", KINDS)
async def test_it_starts_after_all_before_it_and_before_all_after_it(
    kind: str, outbox: str, orders: psycopg.Connection
) -> None:
    started: list[cdc.Change] = []
    router = cdc.Router()
    router.on("order", name="rows")(handler(kind, started.extend))
    router.on("order", "SCHEMA", name="columns")(handler(kind, started.extend))

    async def all_settled() -> bool:
        return settled(orders)

    async with consuming(outbox, router):
        orders.execute(_ROWS, [1, 50])
        orders.execute("ALTER TABLE orders ADD note text")
        with orders.transaction():
            orders.execute(_ROWS, [51, 100])
            orders.execute("ALTER TABLE orders RENAME note TO remark")
            orders.execute(_ROWS, [101, 150])
        await eventually_async(all_settled, within_s=30)
    assert len(started) == 152
    columns = frozenset[str]({"id"})
    for place, change in enumerate(started):
        if change.operation == "SCHEMA":
            assert max(before.seq for before in started[:place]) < change.seq
            assert frozenset(change.old) == columns
            columns = frozenset(change.new)
        else:
            assert frozenset(change.new) == columns
    assert columns == {"id", "remark"}


async def test_a_handler_of_rows_is_not_called_for_it(outbox: str, orders: psycopg.Connection) -> None:
    router, seen = cdc.Router(), list[str]()
    router.on("order", name="rows")(lambda change: seen.append(change.operation))
    orders.execute("INSERT INTO orders VALUES (1); ALTER TABLE orders ADD note text; DELETE FROM orders")
    drained = await testing.drain(outbox, router)
    assert (seen, drained.processed, drained.skipped) == (["INSERT", "DELETE"], 2, 1)


async def test_its_columns_can_be_filtered_by_and_are_no_row_of_a_model(
    outbox: str, orders: psycopg.Connection
) -> None:
    router, seen = cdc.Router(), list[frozenset[str]]()
    router.on("order", "SCHEMA", model=Order, changed={"note"})(lambda change: seen.append(change.changed))
    orders.execute("ALTER TABLE orders ADD note text; ALTER TABLE orders ADD other int")
    orders.execute("ALTER TABLE orders ALTER note SET NOT NULL, ADD third int")
    drained = await testing.drain(outbox, router)
    assert seen == [{"note"}, {"note", "third"}]
    assert (drained.filtered, drained.dead_letters) == (1, ())


async def test_a_replay_of_it_is_a_barrier_too(outbox: str, orders: psycopg.Connection) -> None:
    router, seen = cdc.Router(), list[str]()
    router.on("order", "INSERT", "SCHEMA", name="all")(lambda change: seen.append(change.operation))
    orders.execute("INSERT INTO orders VALUES (1); ALTER TABLE orders ADD note text; INSERT INTO orders VALUES (2)")
    await testing.drain(outbox, router)
    done(outbox, "outbox", "replay", "--type", "order", "--yes")
    await testing.drain(outbox, router)
    assert seen == ["INSERT", "SCHEMA", "INSERT"] * 2
