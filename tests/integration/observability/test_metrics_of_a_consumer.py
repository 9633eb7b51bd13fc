"""Figures that only a working consumer has. What each metric is: tests/unit/observability/test_metrics.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from cdc.core.model import Change
from cdc.core.router import Router
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric
from tests.fix_outbox import count, fill
from tests.fix_proxy import Proxy


def publish(db: psycopg.Connection, entity_type: str, number: int) -> None:
    db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, number])


@pytest.fixture
def link(outbox: str) -> Iterator[Proxy]:
    running = Proxy(outbox)
    running.start()
    yield running
    running.stop()


async def test_keys_that_wait_or_pause_are_counted_once_each(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 3, state="paused")
    fill(outbox_db, 2, state="dead")
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, next_attempt_at)"
        " SELECT 'y', 'INSERT', 'one key', now() + interval '1 hour' FROM generate_series(1, 4)"
    )
    assert count(outbox_db) == 9
    async with consuming(outbox, Router(), stream=False, unhandled="discard") as app:

        async def blocked() -> bool:
            return metric(app.metrics.registry, "cdc_outbox_blocked_keys") == 4

        await eventually_async(blocked, what="three pausing keys and one that waits")
        assert 0 <= metric(app.metrics.registry, "cdc_notify_queue_usage_ratio") < 1
        assert metric(app.metrics.registry, "cdc_loop_last_iteration_timestamp_seconds", loop="collector") > 0


async def test_busy_connections_and_handlers_that_wait_for_one_are_seen(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    release = asyncio.Event()
    router = Router()

    @router.on("order")
    async def hold(change: Change, connection: psycopg.AsyncConnection) -> None:
        await release.wait()

    publish(outbox_db, "order", 5)
    async with consuming(outbox, router, stream=False, transactions=1) as app:

        async def busy() -> bool:
            return metric(app.metrics.registry, "cdc_transaction_connections", kind="async", state="busy") == 1

        async def idle() -> bool:
            return metric(app.metrics.registry, "cdc_transaction_connections", kind="async", state="idle") == 1

        await eventually_async(busy, what="a handler has the connection")
        assert metric(app.metrics.registry, "cdc_transaction_connections", kind="sync") == 0
        release.set()
        await eventually_async(idle, what="it is given back")
        assert metric(app.metrics.registry, "cdc_transaction_waiting") == 0


async def test_a_lost_connection_is_counted_by_its_reason(link: Proxy) -> None:
    async with consuming(link.dsn, Router(), stream=False) as app:

        async def working() -> bool:
            return metric(app.metrics.registry, "cdc_shards_owned") == 64

        async def counted() -> bool:
            return metric(app.metrics.registry, "cdc_interruptions_total", reason="connection") >= 1

        await eventually_async(working, what="it works")
        link.cut()
        await eventually_async(counted, what="the interruption")
        assert metric(app.metrics.registry, "cdc_interruptions_total", reason="statement") == 0
        await eventually_async(working, what="it works again")
