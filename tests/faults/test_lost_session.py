"""A consumer settles on the session that holds its locks: without the one it has lost the other."""

from __future__ import annotations

import asyncio
import threading
from typing import LiteralString

import psycopg
import pytest

import cdc
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.postgres.shard_locks import lock_class
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states


async def _take_over(rival: psycopg.Connection, db: psycopg.Connection, shard: int) -> None:
    """End the session of the consumer that owns the shard, with another in the queue for the lock."""
    lock = [lock_class("public"), shard]
    taking = asyncio.create_task(asyncio.to_thread(rival.execute, "SELECT pg_advisory_lock(%s, %s)", lock))

    async def queued() -> bool:
        return bool(db.execute("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchall())

    await eventually_async(queued)
    db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'cdc: shards' AND datname = current_database()"
    )
    await taking


@pytest.mark.promise("G3")
@pytest.mark.parametrize("outcome", [None, ValueError("no"), cdc.Retry(after=0), cdc.Discard("no need")], ids=repr)
async def test_every_outcome_is_written_by_the_session_that_holds_the_shard(
    outcome: Exception | None, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """So it ends with that session, also on its way: nobody else can have the shard by then."""
    called = asyncio.Event()
    router = Router()

    @router.on("x", max_attempts=1 if isinstance(outcome, ValueError) else 2)
    async def handle(change: cdc.Change) -> None:
        called.set()
        if outcome and change.attempt == 1:
            raise outcome

    async def waiting() -> list[tuple[int, int]]:
        return outbox_db.execute(
            "SELECT waits.pid, owns.pid"
            " FROM pg_stat_activity AS waits JOIN pg_locks AS owns ON owns.database = waits.datid"
            " WHERE waits.wait_event_type = 'Lock' AND waits.datname = current_database()"
            " AND owns.locktype = 'advisory' AND owns.objid = %s AND owns.classid = (%s::bigint & 4294967295)::oid",
            [shard, lock_class("public")],
        ).fetchall()

    outbox_db.execute("SELECT publish_change('x', '1')")
    [(shard,)] = outbox_db.execute("SELECT shard FROM entity_changes").fetchall()
    with psycopg.connect(outbox) as rival:
        rival.execute("SELECT FROM entity_changes FOR UPDATE")
        async with consuming(outbox, router, stream=False):
            await called.wait()
            [(waits, owns)] = await eventually_async(waiting, what="the settle waits for the row")
            assert waits == owns
            rival.rollback()

            async def done() -> bool:
                return settled(outbox_db)

            await eventually_async(done)


@pytest.mark.promise("G3")
async def test_what_ends_after_the_session_was_lost_is_left_to_the_next_owner(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: list[int] = []
    runs, may_return = threading.Event(), threading.Event()
    router = Router()

    @router.on("x")
    def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        runs.set()
        assert may_return.wait(20)

    async with consuming(outbox, router) as app:
        outbox_db.execute("SELECT publish_change('x', '1')")
        await eventually_async(lambda: asyncio.to_thread(runs.wait, 0.01))
        [(shard,)] = outbox_db.execute("SELECT shard FROM entity_changes").fetchall()
        with psycopg.connect(outbox, autocommit=True) as rival:
            await _take_over(rival, outbox_db, shard)
            rival.execute("UPDATE cdc_shards SET owner = gen_random_uuid() WHERE shard = %s", [shard])
            may_return.set()

            async def back() -> bool:
                return metric(app.metrics.registry, "cdc_shards_owned") == SHARDS - 1

            await eventually_async(back, what="it is back, and the shard is another's")
            assert states(outbox_db) == {"fresh": 1}
            assert len(calls) == 1

        async def done() -> bool:
            return settled(outbox_db)

        await eventually_async(done)
    assert len(calls) == 2
    assert states(outbox_db) == {"processed": 1}


_SETTLED: dict[str, LiteralString] = {
    "processed": "UPDATE entity_changes SET processed = true, processed_at = now()",
    "dead": "UPDATE entity_changes SET dead_at = now(), last_error = 'discarded by hand'",
}


@pytest.mark.promise("G2")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("meanwhile", [False, True], ids=["before the settle", "while the settle waits for it"])
@pytest.mark.parametrize("state", _SETTLED)
async def test_what_somebody_else_has_settled_stays_as_it_is(
    state: str, meanwhile: bool, fails: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    runs, may_return = asyncio.Event(), asyncio.Event()
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        runs.set()
        await may_return.wait()
        if fails:
            raise ValueError

    async def waits() -> bool:
        return bool(outbox_db.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall())

    async with consuming(outbox, router) as app:
        outbox_db.execute("SELECT publish_change('x', '1')")
        await asyncio.wait_for(runs.wait(), 20)
        with psycopg.connect(outbox) as rival:
            rival.execute(_SETTLED[state])
            if meanwhile:
                may_return.set()
                await eventually_async(waits, what="the settle waits for the row")
        before = outbox_db.execute("SELECT * FROM entity_changes").fetchall()
        may_return.set()

        async def noticed() -> bool:
            return metric(app.metrics.registry, "cdc_settle_skipped_total") == 1

        await eventually_async(noticed, what="it notices that the change was settled")
    assert states(outbox_db) == {state: 1}
    assert outbox_db.execute("SELECT * FROM entity_changes").fetchall() == before
