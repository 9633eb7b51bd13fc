"""Figures that only a working consumer has. What each metric is: tests/unit/observability/test_metrics.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from prometheus_client import generate_latest

from cdc.contrib.demo.temp_server import free_port
from cdc.core.model import Change
from cdc.core.router import Router
from tests.commands import done
from tests.commands_subscription import create, fail
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


async def test_a_consumer_of_the_default_subscription_tells_of_all_others(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    publish(outbox_db, "order", 5)
    search = create(outbox, "search", "--from", "beginning")
    create(outbox, "audit", "--from", "beginning")
    fail(outbox_db, search, 1, dead=True)
    fail(outbox_db, search, 2)
    done(outbox, "subscription", "pause", "audit")
    router = Router()

    @router.on("order")
    async def handle(change: Change) -> None:
        pass

    async with consuming(outbox, router, stream=False) as app:

        def value(name: str, **labels: str) -> float:
            return metric(app.metrics.registry, f"cdc_subscription_{name}", subscription="search", **labels)

        async def processed() -> bool:
            app.components.poller.poll_now(everything=True)
            return value("held_back_changes") == 5

        await eventually_async(processed, what="all are processed, and search is done with none")
        assert metric(app.metrics.registry, "cdc_subscriptions") == 2
        assert [value("changes", state=state) for state in ("fresh", "waiting", "dead")] == [3, 1, 1]
        assert value("oldest_age_seconds") > 0
        assert (value("paused"), value("consumers")) == (0, 0)
        assert metric(app.metrics.registry, "cdc_subscription_paused", subscription="audit") == 1
        assert metric(app.metrics.registry, "cdc_collector_success", collector="subscriptions") == 1


@pytest.mark.parametrize("subscription", ["default", "search"])
async def test_what_is_unprocessed_is_counted_by_type_for_each_subscription(
    outbox: str, outbox_db: psycopg.Connection, subscription: str
) -> None:
    number = create(outbox, "search", "--from", "beginning")
    publish(outbox_db, "order", 5)
    publish(outbox_db, "mail", 30)
    if subscription == "default":
        outbox_db.execute(
            "UPDATE entity_changes SET dead_at = now() - interval '2 hours'"
            " WHERE entity_type = 'order' AND entity_id = '1'"
        )
    else:
        fail(outbox_db, number, 1, dead=True)
        outbox_db.execute("UPDATE cdc_subscription_changes SET dead_at = now() - interval '2 hours'")
    done(outbox, "pause", "--because", "so that nothing is handled")
    router = Router()
    router.on("*")(lambda change: None)
    settings: dict[str, Any] = {
        "stream": False,
        "http_port": free_port(),
        "http_page": False,
        "subscription": subscription,
    }
    async with consuming(outbox, router, **settings) as app:

        def counts(entity_type: str) -> list[float | None]:
            return [
                app.metrics.registry.get_sample_value(
                    "cdc_outbox_type_changes", {"entity_type": entity_type, "state": state}
                )
                for state in ("fresh", "waiting", "dead")
            ]

        async def polled() -> bool:
            return counts("order") == [4, 0, 1] and counts("mail") == [30, 0, 0]

        await eventually_async(polled, what="the figures of both types")
        assert metric(app.metrics.registry, "cdc_outbox_type_oldest_ready_age_seconds", entity_type="mail") > 0
        assert 7_200 <= metric(app.metrics.registry, "cdc_outbox_dead_age_seconds") < 10_000


async def test_where_the_role_may_not_see_subscriptions_nothing_is_told_and_nothing_fails(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox)
    outbox_db.execute("ALTER TABLE cdc_subscriptions RENAME TO of_another_version")
    async with consuming(outbox, Router(), stream=False, unhandled="discard") as app:

        async def polled() -> bool:
            return app.status.poller.success.get("outbox", False)

        await eventually_async(polled, what="the first figures")
        assert "\ncdc_subscriptions " not in generate_latest(app.metrics.registry).decode()
        assert "subscriptions" not in app.status.poller.success


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
