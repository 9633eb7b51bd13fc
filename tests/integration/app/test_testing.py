"""``cdc.testing.drain``: the whole way, from a write to its mark, inside a test."""

from __future__ import annotations

import asyncio
import re

import psycopg
import pytest

import cdc
from cdc import testing
from cdc.core.errors import SchemaError
from tests.fix_consumer import states

_PUBLISH = "SELECT publish_change('order', %s, new_data => '{\"secret\": \"4711\"}')"


async def test_a_drain_ends_when_every_change_is_settled_and_says_what_it_did(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, tries = cdc.Router(), []

    @router.on("order", "INSERT")
    async def welcome(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        tries.append(change.attempt)
        if change.attempt < 3:
            raise ValueError("not yet")
        # What a handler causes is drained as well.
        await connection.execute("SELECT publish_change('letter', %s)", [change.entity_id])

    @router.on("letter")
    def send(_: cdc.Change) -> None:
        raise cdc.Discard("no address")

    outbox_db.execute(_PUBLISH, ["1"])
    outbox_db.execute("SELECT publish_change('nobody', '1')")
    drained = await testing.drain(outbox, router)
    assert tries == [1, 2, 3]
    assert (drained.processed, drained.retried, drained.discarded, drained.skipped, drained.dead) == (1, 2, 1, 0, 0)
    assert drained.unhandled == 1
    assert states(outbox_db) == {"processed": 2, "fresh": 1}
    assert outbox_db.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'cdc'").fetchone() == (0,)


async def test_a_dead_letter_is_an_error_unless_the_test_expects_it(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = cdc.Router()

    @router.on("order", max_attempts=1)
    def refuse(change: cdc.Change) -> None:
        raise ValueError(change.new["secret"])

    outbox_db.execute(_PUBLISH, ["1"])
    with pytest.raises(testing.DeadLetterError, match="of order, dead after 1 failed attempts") as raised:
        await testing.drain(outbox, router)
    assert "4711" not in str(raised.value)
    outbox_db.execute(_PUBLISH, ["2"])
    drained = await testing.drain(outbox, router, allow_dead=True)
    assert [letter.entity_id for letter in drained.dead_letters] == ["2"], "the one before is not this drain's"
    assert str(drained.dead_letters[0].last_error).split("\n")[0] == "ValueError: 4711"


async def test_the_time_limit_says_what_is_left_by_number_type_and_state_and_not_what_is_in_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()

    @router.on("order")
    async def hang(_: cdc.Change) -> None:
        await asyncio.Event().wait()

    outbox_db.execute(_PUBLISH, ["1"])
    with pytest.raises(testing.UnsettledError) as raised:
        await testing.drain(outbox, router, within_s=0.3)
    assert re.fullmatch(r"not settled within 0.3 s: \d+ \([0-9a-f-]{36}\) of order, fresh", str(raised.value))


async def test_where_a_key_settles_for_longer_than_the_limit_the_hint_says_so(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()

    @router.on("product", name="search", latest=True, settle=60)
    async def index(_: cdc.Change) -> None:
        pass

    outbox_db.execute("SELECT publish_change('product', '1')")
    with pytest.raises(testing.UnsettledError) as raised:
        await testing.drain(outbox, router, within_s=0.3)
    assert "handler search is called when its key has been quiet for 60 s" in str(raised.value.hint)


async def test_what_asks_for_a_longer_wait_than_the_limit_is_left_and_counted_with_what_it_holds(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()

    @router.on("order")
    def later(change: cdc.Change) -> None:
        if change.entity_id == "1":
            raise cdc.Retry(after=3600)

    for key in ("1", "1", "2"):
        outbox_db.execute(_PUBLISH, [key])
    drained = await testing.drain(outbox, router)
    assert (drained.processed, drained.retried, drained.waiting, drained.held) == (1, 1, 1, 1)


async def test_a_database_without_an_outbox_is_an_error_at_once(database: str) -> None:
    with pytest.raises(SchemaError, match="there is no table"):
        await testing.drain(database, cdc.Router())
