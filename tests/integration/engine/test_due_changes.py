"""Events that are due later reach their handlers when they are due: published by one consumer, once, and in order."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cdc
from cdc import testing
from cdc.core.errors import CdcError
from cdc.core.model import SHARDS
from cdc.core.router import Router
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, metric, settled, slot_name, states
from tests.integration.postgres.test_due import keys, later, make_due, waiting

_PUBLISHERS = """
SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc: due' AND datname = current_database()
"""


def _router(seen: list[str]) -> Router:
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.append(change.entity_id)

    return router


def _soon(db: psycopg.Connection, key: str, delay_s: float = 0.5) -> None:
    statement = "SELECT publish_change('x', %s, due => clock_timestamp() + make_interval(secs => %s))"
    assert db.execute(statement, [key, delay_s]).fetchone() == (None,)


async def test_an_event_is_handled_once_it_is_due_and_not_before_and_holds_nothing_back(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seen: list[str] = []
    later(outbox_db, "k")
    _soon(outbox_db, "k", 1.0)
    never: dict[str, Any] = {"sweep_interval": 3600, "poll_interval": 3600}
    async with consuming(outbox, _router(seen), **never):
        outbox_db.execute("SELECT publish_change('x', 'k')")

        async def handled() -> bool:
            return len(seen) == 2 and settled(outbox_db)

        await eventually_async(handled, what="the one of now, and the one that was due")
    assert waiting(outbox_db) == 1
    assert outbox_db.execute(
        "SELECT changed_at >= (metadata ->> 'due')::timestamptz FROM entity_changes WHERE metadata IS NOT NULL"
    ).fetchall() == [(True,)]


async def test_one_of_several_consumers_publishes_also_for_types_that_it_does_not_handle(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seen: list[str] = []
    other = Router()

    @other.on("y")
    async def nothing(_: cdc.Change) -> None: ...

    async with (
        consuming(outbox, other, slot_name=slot_name(), only=["y"]) as first,
        consuming(outbox, _router(seen), only=["x"]) as second,
    ):

        async def shared() -> bool:
            return [each.status.consumer.owned_shards for each in (first, second)] == [SHARDS // 2] * 2

        await eventually_async(shared, what="each has its share")
        for number in range(5):
            _soon(outbox_db, str(number))

        async def published() -> bool:
            return waiting(outbox_db) == 0

        await eventually_async(published, what="they are published")
        assert outbox_db.execute(_PUBLISHERS).fetchone() == (1,)
    assert keys(outbox_db) == [str(number) for number in range(5)]


async def test_a_lost_connection_delays_what_is_due_and_loses_nothing(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seen: list[str] = []
    async with consuming(outbox, _router(seen)):

        async def ended() -> bool:
            terminated = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc: due'"
            return bool(outbox_db.execute(terminated + " AND datname = current_database()").fetchall())

        await eventually_async(ended, what="its connection is there, and ended")
        _soon(outbox_db, "k", 0.1)

        async def handled() -> bool:
            return bool(seen)

        await eventually_async(handled, what="it is published by another connection")
    assert seen == ["k"]


async def test_the_metric_and_the_page_count_what_is_due_later(outbox: str, outbox_db: psycopg.Connection) -> None:
    later(outbox_db)
    async with consuming(outbox, _router([])) as app:

        async def counted() -> bool:
            return metric(app.metrics.registry, "cdc_outbox_due_later_changes") == 1

        await eventually_async(counted, what="it is counted")


async def test_a_consumer_that_may_not_publish_says_so_once_and_does_all_else(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    outbox_db.execute("ALTER FUNCTION publish_due RENAME TO hidden")
    async with consuming(outbox, _router(seen)):
        outbox_db.execute("SELECT publish_change('x', 'k')")

        async def said() -> bool:
            return bool(seen) and "events that are due later are not published" in caplog.text

        await eventually_async(said, what="it says so")
    assert "cdc db upgrade" in caplog.text


async def test_a_drain_waits_for_what_is_due_within_its_time_and_counts_what_is_due_later(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seen: list[str] = []
    _soon(outbox_db, "soon")
    later(outbox_db, "later")
    outbox_db.execute("SELECT publish_change('nobody', '1', due => clock_timestamp() + interval '1 s')")
    drained = await testing.drain(outbox, _router(seen), within_s=10)
    assert seen == ["soon"]
    assert (drained.processed, drained.due_later >= 1) == (1, True)


async def test_a_drain_names_what_is_due_and_could_not_be_published(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("ALTER FUNCTION publish_due RENAME TO hidden")
    _soon(outbox_db, "soon", 0.01)
    with pytest.raises(CdcError, match="events of x that are due"):
        await testing.drain(outbox, _router([]), within_s=0.5)


def _start(processes: list[Process], dsn: str, folder: Path) -> None:
    log = folder / f"{len(processes)}.log"
    processes.append(Process(dsn, log, slot_name=slot_name(), options=["--no-stream"]))


def _fewer_than(db: psycopg.Connection, number: int) -> bool:
    return waiting(db) < number


@pytest.mark.promise("G1")
@pytest.mark.promise("G2")
def test_consumers_that_are_killed_publish_each_event_once(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    total = 6_000
    outbox_db.execute(
        "SELECT count(publish_change('nothing', n::text, due => now() + interval '1 h' + n * interval '1 ms'))"
        " FROM generate_series(1, %s) AS n",
        [total],
    )
    identities = outbox_db.execute("SELECT id FROM cdc_due_changes ORDER BY number").fetchall()
    for _ in range(2):
        _start(processes, outbox, tmp_path)
    processes[0].wait_for("owns 32 of 64")
    make_due(outbox_db)
    while left := waiting(outbox_db):
        eventually(partial(_fewer_than, outbox_db, left), what="some are published")
        _start(processes, outbox, tmp_path)
        processes[-3].kill()
    eventually(lambda: settled(outbox_db), what="all are handled", within_s=60)
    assert states(outbox_db) == {"processed": total}
    assert outbox_db.execute("SELECT id FROM entity_changes ORDER BY seq").fetchall() == identities
