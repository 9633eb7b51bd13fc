"""What a consumer leaves behind when its shards go to another: nothing that blames, blocks or ends anybody."""

from __future__ import annotations

import psycopg
import pytest

import cdc
from cdc.core.model import SHARDS, WakeUp
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.router import Router
from cdc.core.shard_cursor import Snapshot
from cdc.core.shard_ownership import Acquired
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, slot_name, states


def test_a_shard_that_is_given_away_while_it_is_read_leaves_nothing_to_look_for() -> None:
    planner, snapshot = ReadPlanner(sweep_interval_s=5.0), Snapshot(10, 10)
    planner.acquired(Acquired([0, 1]))
    planner.streaming(connected=True)
    for now in (0.0, 0.1):
        sweep = planner.next(now, 100, 10)
        assert isinstance(sweep, Sweep)
        planner.swept(sweep, [], {}, snapshot, now)
    planner.notified([WakeUp(7, 0)])
    fetch = planner.next(0.2, 100, 10)
    assert isinstance(fetch, Fetch)
    planner.revoked([0])
    planner.fetched(fetch, set(), snapshot, 0.2)  # not visible yet
    assert planner.next(0.3, 100, 10) is None


@pytest.fixture
def orphaned(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """An outbox whose last consumer died, so that the next one starts what it finds carefully."""
    outbox_db.execute(
        "INSERT INTO cdc_shards (shard, owner) SELECT n, gen_random_uuid() FROM generate_series(0, %s - 1) AS n",
        [SHARDS],
    )
    return outbox_db


@pytest.mark.promise("G1")
async def test_what_a_living_consumer_started_and_could_not_finish_is_not_counted_when_its_shard_moves(
    outbox: str, orphaned: psycopg.Connection
) -> None:
    """Three such moves would make a dead letter of a change that nobody has ever handled."""
    slot, done = slot_name(), list[int]()
    unlucky, lucky = Router(), Router()

    @unlucky.on("x")
    async def lose_the_connection(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    @lucky.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        done.append(change.attempt)

    orphaned.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 200) AS n")
    async with consuming(outbox, unlucky, slot_name=slot):

        async def started() -> bool:
            return orphaned.execute("SELECT FROM entity_changes WHERE started_by IS NULL").fetchone() is None

        await eventually_async(started, what="all are written down as started")
        async with consuming(outbox, lucky, slot_name=slot) as second:

            async def its_share_is_done() -> bool:
                owned = metric(second.metrics.registry, "cdc_shards_owned")
                return owned == SHARDS // 2 and len(done) > 50

            await eventually_async(its_share_is_done)
    assert orphaned.execute("SELECT max(error_count) FROM entity_changes").fetchone() == (0,), "nobody died"
    assert set(done) == {1}


@pytest.mark.promise("G4")
async def test_a_row_that_a_half_dead_consumer_still_holds_keeps_nothing_else_from_its_successor(
    outbox: str, orphaned: psycopg.Connection
) -> None:
    """Stopped, or cut off from the server: its handler's transaction goes on as long as the server thinks it lives."""
    router = Router()
    router.on("free")(lambda change: None)

    @router.on("held")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None: ...

    orphaned.execute("SELECT publish_change('held', '1')")
    orphaned.execute("SELECT publish_change('free', n::text) FROM generate_series(1, 200) AS n")
    with psycopg.connect(outbox) as half_dead:
        half_dead.execute("SELECT FROM entity_changes WHERE entity_type = 'held' FOR UPDATE")
        async with consuming(outbox, router):

            async def all_others_are_done() -> bool:
                return states(orphaned) == {"processed": 200, "fresh": 1}

            await eventually_async(all_others_are_done, within_s=8, what="the others are processed")
            half_dead.rollback()

            async def done() -> bool:
                return settled(orphaned)

            await eventually_async(done)
    assert states(orphaned) == {"processed": 201}
