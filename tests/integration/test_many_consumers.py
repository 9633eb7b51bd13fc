"""Several consumers on one outbox: one streams, all process, each its share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psycopg

import cdc
from cdc.app import App
from cdc.model import SHARDS
from cdc.routing import Router
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, metric, settled, slot_name, states


def _router(calls: Counter[str], name: str) -> Router:
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls[name] += 1

    return router


def _publish(db: psycopg.Connection, count: int) -> None:
    db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, %s) AS n", [count])


async def _shared(*apps: App) -> None:
    async def fair() -> bool:
        return [len(app.consumer._owned) for app in apps] == [SHARDS // len(apps)] * len(apps)

    await eventually_async(fair, what="each owns its share")


async def test_a_newcomer_gets_its_share_and_its_wake_ups_are_relayed_to_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: Counter[str] = Counter()
    never = {"slot_name": slot_name(), "sweep_interval": 3600, "poll_interval": 3600}
    async with consuming(outbox, _router(calls, "first"), **never) as first:

        async def streams() -> bool:
            return first._stream is not None and first._stream.status.connected

        await eventually_async(streams)
        async with consuming(outbox, _router(calls, "second"), **never) as second:
            await _shared(first, second)

            async def listens() -> bool:
                return second._listener.connected and not second.consumer._intake.catching_up

            await eventually_async(listens)
            for _ in range(5):
                _publish(outbox_db, 100)

                async def done() -> bool:
                    return settled(outbox_db)

                await eventually_async(done)
            assert metric(second.metrics.registry, "cdc_role", role="standby") == 1
            assert metric(second.metrics.registry, "cdc_wakeups_total", source="notify") == calls["second"]
            # One for many: not one for each change.
            assert 0 < metric(first.metrics.registry, "cdc_relay_notifies_total") < 100
    assert calls["first"] + calls["second"] == 500
    assert min(calls.values()) > 100
    assert states(outbox_db) == {"processed": 500}


async def test_when_one_leaves_the_others_take_its_shards_and_the_slot(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: Counter[str] = Counter()
    slot = slot_name()
    async with consuming(outbox, _router(calls, "stays"), slot_name=slot) as stays:
        async with consuming(outbox, _router(calls, "leaves"), slot_name=slot) as leaves:
            await _shared(stays, leaves)

        async def alone() -> bool:
            return not stays.consumer.shares and stays._stream is not None and stays._stream.status.connected

        await eventually_async(alone)
        _publish(outbox_db, 100)

        async def done() -> bool:
            return settled(outbox_db)

        await eventually_async(done)
    assert calls == {"stays": 100}


def test_a_killed_consumers_changes_are_handled_by_the_others(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    outbox_db.execute(
        "CREATE TABLE calls (seq bigint, key text, attempt int, pid int,"
        " started timestamptz DEFAULT clock_timestamp(), ended timestamptz)"
    )
    processes += [Process(outbox, tmp_path / name) for name in ("one.log", "two.log")]
    for process in processes:
        process.wait_for(f"owns {SHARDS // 2} of {SHARDS} shards")
    outbox_db.execute(
        "SELECT publish_change('counted', (n % 50)::text, 'INSERT', '{\"takes_s\": 0.05}')"
        " FROM generate_series(1, 1000) AS n"
    )

    def busy() -> bool:
        [(handled, workers)] = outbox_db.execute("SELECT count(*), count(DISTINCT pid) FROM calls").fetchall()
        return bool(handled > 100 and workers == 2)

    eventually(busy, what="both work")
    processes[0].kill()
    eventually(lambda: settled(outbox_db))
    assert states(outbox_db) == {"processed": 1000}
    assert outbox_db.execute("SELECT count(DISTINCT seq) FROM calls").fetchone() == (1000,)
    # Of one key never two at a time, and never a later one before an earlier one.
    assert outbox_db.execute(
        "SELECT count(*) FROM calls AS a JOIN calls AS b ON a.key = b.key AND a.seq < b.seq AND b.started < a.started"
        " WHERE a.attempt = 1 AND NOT EXISTS (SELECT FROM calls AS c WHERE c.seq = a.seq AND c.started < a.started)"
    ).fetchone() == (0,)
