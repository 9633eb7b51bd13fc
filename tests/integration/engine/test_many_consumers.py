"""Several consumers on one outbox: one streams, all process, each its share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg

import cdc
from cdc.app.application import App
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.observability.snapshots import Role
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, metric, settled, slot_name, states

_REBALANCED_WITHIN_S = 6.0
_TAKEN_OVER_WITHIN_S = 4.0
"""Twice what is promised: this machine is busy with all of them."""


def _router(calls: Counter[str], name: str) -> Router:
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls[name] += 1

    return router


def _publish(db: psycopg.Connection, count: int, first_key: int = 1) -> None:
    db.execute("SELECT publish_change('x', (n + %s::int)::text) FROM generate_series(1, %s) AS n", [first_key, count])


async def _streams(app: App) -> None:
    async def connected() -> bool:
        return app.status.role is Role.STREAMING

    await eventually_async(connected, what="it streams")


async def _shared(*apps: App) -> None:
    async def fair() -> bool:
        return [app.status.consumer.owned_shards for app in apps] == [SHARDS // len(apps)] * len(apps)

    await eventually_async(fair, what="each owns its share")


async def test_a_newcomer_gets_its_share_and_its_wake_ups_are_relayed_to_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: Counter[str] = Counter()
    never: dict[str, Any] = {"slot_name": slot_name(), "sweep_interval": 3600, "poll_interval": 3600}
    async with consuming(outbox, _router(calls, "first"), **never) as first:
        await _streams(first)
        async with consuming(outbox, _router(calls, "second"), **never) as second:
            await _shared(first, second)

            async def listens() -> bool:
                return second.status.listening and not second.status.consumer.catching_up

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


async def test_who_does_not_stream_is_woken_by_notify_also_after_the_streamer_has_left(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """The one that stood by takes the slot over, and relays to the third, which looks for nothing by itself."""
    calls: Counter[str] = Counter()
    never: dict[str, Any] = {"slot_name": slot_name(), "sweep_interval": 3600, "poll_interval": 3600}
    async with consuming(outbox, _router(calls, "first"), **never) as first:
        await _streams(first)
        async with (
            consuming(outbox, _router(calls, "second"), **never) as second,
            consuming(outbox, _router(calls, "third"), **never) as third,
        ):
            first.consumer.stop()

            async def streams_and_the_other_listens() -> bool:
                if not all(app.status.consumer.owned_shards == SHARDS // 2 for app in (second, third)):
                    return False
                listens = [
                    app.status.listening and not app.status.consumer.catching_up
                    for app in (second, third) if app.status.role is not Role.STREAMING
                ]  # fmt: skip
                return listens == [True]

            await eventually_async(streams_and_the_other_listens, what="one of the two left has the slot")
            [relayed] = [app for app in (second, third) if app.status.role is not Role.STREAMING]
            name = "second" if relayed is second else "third"
            before = calls[name]
            for _ in range(5):
                _publish(outbox_db, 100)

                async def done() -> bool:
                    return settled(outbox_db)

                await eventually_async(done)
            assert metric(relayed.metrics.registry, "cdc_wakeups_total", source="notify") == calls[name] - before > 100


async def _owning(app: App, shards: int) -> None:
    async def owns() -> bool:
        return app.status.consumer.owned_shards == shards

    await eventually_async(owns, within_s=_REBALANCED_WITHIN_S, what=f"it owns {shards} shards")


@contextlib.asynccontextmanager
async def _writing(db: psycopg.Connection) -> AsyncIterator[None]:
    """Changes of many keys come in all the time; at the end all are settled."""
    stop, keys = asyncio.Event(), itertools.count(1, 20)

    async def write() -> None:
        while not stop.is_set():
            _publish(db, 20, next(keys))
            await _pass(0.05)

    writing = asyncio.create_task(write())
    yield
    stop.set()
    await writing

    async def done() -> bool:
        return settled(db)

    await eventually_async(done)


async def _pass(seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()


def _recording(handled: list[tuple[int, float]], takes_s: float) -> Router:
    """Writes down the shard of each change and when it was done."""
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        await _pass(takes_s)
        handled.append((change.shard, time.monotonic()))

    return router


async def test_while_shards_move_the_work_on_all_others_goes_on(outbox: str, outbox_db: psycopg.Connection) -> None:
    stays: list[tuple[int, float]] = []
    comes: list[tuple[int, float]] = []
    slot = slot_name()
    async with consuming(outbox, _recording(stays, 0.05), slot_name=slot) as first, _writing(outbox_db):
        await _owning(first, SHARDS)
        joined = time.monotonic()
        async with consuming(outbox, _recording(comes, 0.05), slot_name=slot) as second:
            await _owning(second, SHARDS // 2)
            rebalanced = time.monotonic()

            async def both_work() -> bool:
                return bool(comes) and any(done > rebalanced for _, done in stays)

            await eventually_async(both_work)
        left = time.monotonic()
        given = {shard for shard, _ in comes}
        await _owning(first, SHARDS)
        taken_back = time.monotonic()
    for what, began, ended in (("joined", joined, rebalanced), ("left", left, taken_back)):
        at = [began, *(done for shard, done in stays if shard not in given and began < done < ended), ended]
        # Handlers take a twentieth of a second and changes come in all the time: nothing else may make it wait.
        longest_s = max(later - earlier for earlier, later in itertools.pairwise(at))
        assert longest_s < 2, f"work stood still for {longest_s:.1f} s when the other {what}"
    assert states(outbox_db).keys() == {"processed"}


def test_a_killed_consumers_shards_are_taken_over_by_all_others(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    processes += [Process(outbox, tmp_path / name) for name in ("one.log", "two.log", "three.log")]
    eventually(lambda: _shares(outbox_db) in ([20, 22, 22], [21, 21, 22]), what="each owns its share")
    processes[0].kill()
    eventually(lambda: _shares(outbox_db) == [32, 32], within_s=_TAKEN_OVER_WITHIN_S, what="its shards are taken over")


def _shares(db: psycopg.Connection) -> list[int]:
    """How many shards each of the consumers holds, the least first."""
    rows = db.execute(
        "SELECT count(*) FROM pg_locks JOIN pg_database AS d ON d.oid = database"
        " WHERE locktype = 'advisory' AND objsubid = 2 AND objid < %s AND datname = current_database()"
        " GROUP BY pid ORDER BY 1",
        [SHARDS],
    ).fetchall()
    return [count for (count,) in rows]


async def test_when_one_leaves_the_others_take_its_shards_and_the_slot(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: Counter[str] = Counter()
    slot = slot_name()
    async with consuming(outbox, _router(calls, "stays"), slot_name=slot) as stays:
        async with consuming(outbox, _router(calls, "leaves"), slot_name=slot) as leaves:
            await _shared(stays, leaves)

        async def alone() -> bool:
            return not stays.consumer.notifications.is_sharing and stays.status.role is Role.STREAMING

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
        [(handled, dispatcher)] = outbox_db.execute("SELECT count(*), count(DISTINCT pid) FROM calls").fetchall()
        return bool(handled > 100 and dispatcher == 2)

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
