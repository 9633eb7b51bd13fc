"""What a subscription keeps beside a change: nothing where it is done, and little while it is pending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from cdc import testing
from cdc.core.model import SHARDS, Processed
from cdc.core.read_reconciler import Settlement
from cdc.core.type_filter import EVERYTHING
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscriptions
from tests.fix_outbox import fill
from tests.subscriptions import is_done, kept, subscribe

pytestmark = pytest.mark.server
_CHANGES, _BATCH = 20_000, 500
_PENDING_MAX = 80
_BYTES = """
SELECT pg_relation_size('cdc_subscription_changes')::bigint, pg_indexes_size('cdc_subscription_changes')::bigint
"""


def _bytes(db: psycopg.Connection) -> tuple[int, int]:
    [(table, indexes)] = db.execute(_BYTES).fetchall()
    return table, indexes


@pytest.fixture
async def session(outbox: str) -> AsyncIterator[psycopg.AsyncConnection]:
    session = await connect_async(outbox, application_name="cdc: test", session=SubscriptionStore.session)
    read_changes(session)
    try:
        yield session
    finally:
        await session.close()


def _store(db: psycopg.Connection) -> SubscriptionStore:
    return SubscriptionStore("public", Subscriptions("public").named(db, "search"), 16, EVERYTHING)


def _done(db: psycopg.Connection) -> list[Settlement]:
    """Every change there is, as processed."""
    there = db.execute("SELECT seq, shard FROM entity_changes ORDER BY seq").fetchall()
    return [Settlement(testing.change("x", seq=seq, shard=shard), Processed()) for seq, shard in there]


async def test_what_is_done_up_to_a_number_that_is_proved_leaves_with_one_look(
    outbox_db: psycopg.Connection, session: psycopg.AsyncConnection
) -> None:
    number = subscribe(outbox_db)
    store = _store(outbox_db)
    fill(outbox_db, 1_000)
    done = _done(outbox_db)
    await store.settle(session, done[:300])
    for _ in range(2):  # the first names the last number that there is, the second finds that nothing more is to come
        await store.advance(session, range(SHARDS))
    assert kept(outbox_db, number) < 300
    await store.settle(session, done[300:])
    await store.advance(session, range(SHARDS))
    assert kept(outbox_db, number) == 0
    assert is_done(outbox_db, number)


@pytest.mark.parametrize("at_once", [5, 500])
async def test_what_is_settled_again_has_been_missed_whether_it_has_a_row_or_the_position_has_passed_it(
    outbox_db: psycopg.Connection, session: psycopg.AsyncConnection, at_once: int
) -> None:
    number = subscribe(outbox_db)
    store = _store(outbox_db)
    fill(outbox_db, at_once)
    done = _done(outbox_db)
    assert (await store.settle(session, done)).missed == 0
    assert (await store.settle(session, done)).missed == at_once, "each has a row"
    for _ in range(2):
        await store.advance(session, range(SHARDS))
    assert kept(outbox_db, number) == 0
    assert (await store.settle(session, done)).missed == at_once, "the position has passed each"
    assert kept(outbox_db, number) == 0


async def test_a_change_that_is_done_ahead_of_the_position_takes_eighty_bytes_and_nothing_when_it_has_passed(
    outbox: str, outbox_db: psycopg.Connection, session: psycopg.AsyncConnection
) -> None:
    number = subscribe(outbox_db)
    _, of_empty_indexes = _bytes(outbox_db)
    store = _store(outbox_db)
    with psycopg.connect(outbox) as writer:
        writer.execute("SELECT pg_current_xact_id()")  # so no position moves
        fill(outbox_db, _CHANGES)
        assert _bytes(outbox_db) == (0, of_empty_indexes), "what is fresh takes nothing"
        done = _done(outbox_db)
        for first in range(0, _CHANGES, _BATCH):
            await store.settle(session, done[first : first + _BATCH])
            await store.advance(session, range(SHARDS))
        assert kept(outbox_db, number) == _CHANGES
        table, indexes = _bytes(outbox_db)
        assert (table + indexes - of_empty_indexes) / _CHANGES <= _PENDING_MAX
    for _ in range(3):
        await store.advance(session, range(SHARDS))
    assert is_done(outbox_db, number)
    assert kept(outbox_db, number) == 0
    await session.close()
    await asyncio.to_thread(outbox_db.execute, "VACUUM cdc_subscription_changes")
    assert _bytes(outbox_db)[0] == 0
