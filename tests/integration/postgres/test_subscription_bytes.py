"""What a subscription keeps beside a change: nothing where it is done, and little while it is pending."""

from __future__ import annotations

import asyncio

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


async def test_a_change_that_is_done_ahead_of_the_position_takes_eighty_bytes_and_nothing_when_it_has_passed(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    _, of_empty_indexes = _bytes(outbox_db)
    store = SubscriptionStore("public", Subscriptions("public").named(outbox_db, "search"), 16, EVERYTHING)
    session = await connect_async(outbox, application_name="cdc: test", session=SubscriptionStore.session)
    read_changes(session)
    try:
        with psycopg.connect(outbox) as writer:
            writer.execute("SELECT pg_current_xact_id()")  # so no position moves
            fill(outbox_db, _CHANGES)
            assert _bytes(outbox_db) == (0, of_empty_indexes), "what is fresh takes nothing"
            there = outbox_db.execute("SELECT seq, shard FROM entity_changes ORDER BY seq").fetchall()
            for first in range(0, _CHANGES, _BATCH):
                some = [testing.change("x", seq=seq, shard=shard) for seq, shard in there[first : first + _BATCH]]
                await store.settle(session, [Settlement(change, Processed()) for change in some])
                await store.advance(session, range(SHARDS))
            assert kept(outbox_db, number) == _CHANGES
            table, indexes = _bytes(outbox_db)
            assert (table + indexes - of_empty_indexes) / _CHANGES <= _PENDING_MAX
        for _ in range(3):
            await store.advance(session, range(SHARDS))
    finally:
        await session.close()
    assert is_done(outbox_db, number)
    assert kept(outbox_db, number) == 0
    await asyncio.to_thread(outbox_db.execute, "VACUUM cdc_subscription_changes")
    assert _bytes(outbox_db)[0] == 0
