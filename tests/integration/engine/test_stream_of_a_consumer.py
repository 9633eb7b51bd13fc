"""The stream inside a consumer: its settings arrive, blocked handlers do not starve it, and it follows a failover."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from cdc.app import components
from cdc.app.application import App
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import Change
from cdc.core.router import Router
from cdc.postgres import migrations
from cdc.replication.stream import StreamSettings
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric, settled
from tests.fix_slot import slot_facts
from tests.standby import Standby, standing_by


def publish(db: psycopg.Connection, first: int, last: int) -> None:
    db.execute("SELECT publish_change('note', i::text) FROM generate_series(%s::int, %s) AS i", [first, last])


async def handled(db: psycopg.Connection) -> None:
    async def check() -> bool:
        return settled(db)

    await eventually_async(check, within_s=60, what="every change is processed")


async def streams(app: App) -> None:
    async def connected() -> bool:
        return metric(app.metrics.registry, "cdc_stream_connected") == 1

    await eventually_async(connected, within_s=60, what="the consumer streams")


async def test_a_consumer_with_a_temporary_slot_of_pgoutput_is_woken_and_leaves_nothing_behind(
    outbox: str, outbox_db: psycopg.Connection, slot: str
) -> None:
    router = Router()

    @router.on("note")
    async def note(change: Change) -> None:
        pass

    settings: dict[str, Any] = {"slot_name": slot, "slot_plugin": "pgoutput", "slot_mode": "temporary"}
    async with consuming(outbox, router, **settings) as app:
        await streams(app)
        assert slot_facts(outbox_db, slot).items() >= {"plugin": "pgoutput", "temporary": True}.items()
        publish(outbox_db, 1, 50)
        await handled(outbox_db)
        notified = metric(app.metrics.registry, "cdc_wakeups_total", source="wal")
    assert notified == 50
    eventually(lambda: not slot_facts(outbox_db, slot), what="the slot is gone")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_hook_for_wake_ups_gets_their_numbers_and_the_time(
    outbox: str, outbox_db: psycopg.Connection, slot: str, stream: bool
) -> None:
    router, told, began = Router(), dict[int, float](), time.monotonic()

    @router.on("note")
    async def note(change: Change) -> None:
        pass

    @router.on_wakeup
    def notified(seqs: list[int], at: float) -> None:
        told.update(dict.fromkeys(seqs, at))
        raise RuntimeError("which changes nothing")

    async with consuming(outbox, router, slot_name=slot, stream=stream, poll_interval=0.05) as app:
        if stream:
            await streams(app)
        publish(outbox_db, 1, 3)
        await handled(outbox_db)
        numbers = {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes").fetchall()}

        async def all_told() -> bool:
            return told.keys() == (numbers if stream else set())

        await eventually_async(all_told, what="the hook is called")
    assert all(began < at < time.monotonic() for at in told.values())


async def test_a_handler_that_blocks_the_event_loop_for_long_does_not_cost_the_stream_its_connection(
    outbox: str, outbox_db: psycopg.Connection, slot: str, plugin: str, monkeypatch
) -> None:
    monkeypatch.setattr(components, "StreamSettings", partial(StreamSettings, wal_sender_timeout_s=2.0))
    router, never = Router(), threading.Event()

    @router.on("note")
    async def note(change: Change) -> None:
        if change.entity_id == "2":
            never.wait(10)

    async with consuming(outbox, router, slot_name=slot, slot_plugin=plugin) as app:
        await streams(app)
        [(reader,)] = outbox_db.execute("SELECT active_pid FROM pg_replication_slots").fetchall()
        publish(outbox_db, 1, 1)
        await handled(outbox_db)
        publish(outbox_db, 2, 2)
        await asyncio.to_thread(lambda: eventually(lambda: settled(outbox_db), within_s=30))
        assert slot_facts(outbox_db, slot)["active_pid"] == reader
        assert metric(app.metrics.registry, "cdc_stream_disconnects_total") == 0


@pytest.fixture
def pair() -> Iterator[tuple[TempServer, Standby, str]]:
    """A primary with the outbox, its standby, and the DSN that leads to whichever of them takes writes."""
    with TempServer(durable=False) as primary:
        with psycopg.connect(primary.dsn(), autocommit=True) as db:
            migrations.install(db, "public")
        with standing_by(primary) as (standby, dsn):
            yield primary, standby, dsn


@pytest.mark.needs("pg_basebackup")
async def test_after_a_failover_to_a_standby_without_the_slot_it_is_made_there_and_nothing_is_lost(
    pair: tuple[TempServer, Standby, str],
) -> None:
    primary, standby, dsn = pair
    router, seen = Router(), []

    @router.on("note")
    async def note(change: Change) -> None:
        seen.append(change.entity_id)

    async with consuming(dsn, router, slot_name="cdc") as app:
        await streams(app)
        with psycopg.connect(primary.dsn(), autocommit=True) as db:
            publish(db, 1, 50)
            [(end,)] = db.execute("SELECT pg_current_wal_flush_lsn()").fetchall()
        replayed = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        with psycopg.connect(standby.dsn(), autocommit=True) as db:
            eventually(lambda: db.execute(replayed, [end]).fetchone() == (True,), what="the standby has all of it")
        await asyncio.to_thread(primary.stop, "immediate")
        await asyncio.to_thread(standby.promote)
        with psycopg.connect(standby.dsn(), autocommit=True) as db:
            publish(db, 51, 100)
            await handled(db)
            await streams(app)
            assert slot_facts(db, "cdc")["active"]
            before = metric(app.metrics.registry, "cdc_wakeups_total", source="wal")
            publish(db, 101, 110)
            await handled(db)
            assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == before + 10
    assert set(seen) == {str(i) for i in range(1, 111)}
