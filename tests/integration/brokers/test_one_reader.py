"""A broker as one reader of the outbox among others: a subscription, with rows from before it and a replay."""

from __future__ import annotations

import asyncio
from collections import Counter

import psycopg

from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_brokers import BrokerServer
from tests.fix_consumer import consuming, states


async def test_a_subscription_that_delivers_gets_changes_a_backfill_and_a_replay_and_nobody_else_is_concerned(
    small_broker: BrokerServer, outbox: str, outbox_db: psycopg.Connection
) -> None:
    await small_broker.prepare()
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric)")
    outbox_db.execute("INSERT INTO orders SELECT n, n FROM generate_series(1, 20) AS n")
    done(outbox, "track", "orders", "--type", "order")
    done(outbox, "subscription", "create", "events", "--type", "order")

    async def received(**wanted: int) -> None:
        async def check() -> bool:
            found = Counter(each.event["type"].rpartition(".")[2] for each in await small_broker.received())
            return all(found[name] >= count for name, count in wanted.items())

        await eventually_async(check, what=str(wanted), within_s=60.0)

    async with consuming(outbox, None, deliver_to=small_broker.url(), subscription="events"):
        outbox_db.execute("UPDATE orders SET total = total + 1 WHERE id <= 5")
        await received(update=5)
        await asyncio.to_thread(done, outbox, "backfill", "orders", "--subscription", "events", "--backlog", "1000")
        await received(update=5, read=20)
        await asyncio.to_thread(
            done, outbox, "outbox", "replay", "--type", "order", "--subscription", "events", "--yes"
        )
        await received(update=10, read=20)
    assert states(outbox_db)["fresh"] >= 5, "the default subscription has no consumer, and lost nothing"
