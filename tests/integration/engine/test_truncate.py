"""A captured TRUNCATE: it starts when all of its type before it is settled, and before anything after it starts."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cdc
from cdc import testing
from cdc.core.model import SHARDS
from cdc.core.type_filter import TypeFilter
from cdc.engine.dispatcher import OtherTasks
from cdc.postgres import barriers, tracking
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.outbox import Store
from cdc.postgres.tracked_tables import Truncate
from tests.commands import done
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, metric, settled, states
from tests.handler_kinds import KINDS, handler

_ROWS = "INSERT INTO orders SELECT n FROM generate_series(1, %s) AS n"
_CALLS = """
CREATE TABLE calls (seq bigint, key text, attempt int, pid int, started timestamptz DEFAULT clock_timestamp(),
  ended timestamptz)
"""
_OUT_OF_ORDER = """
SELECT count(*) FROM calls AS one JOIN calls AS other ON one.seq < other.seq AND one.started >= other.started
WHERE EXISTS (SELECT FROM entity_changes AS t WHERE t.operation = 'TRUNCATE' AND t.seq IN (one.seq, other.seq))
"""


@pytest.fixture
def orders(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, takes_s float8)")
    tracking.track(outbox_db, "public", "orders", entity_type="order", truncate=Truncate.EVENT)
    return outbox_db


def truncate(db: psycopg.Connection) -> int:
    """Its number."""
    db.execute("TRUNCATE orders")
    [(seq,)] = db.execute("SELECT max(seq) FROM entity_changes WHERE operation = 'TRUNCATE'").fetchall()
    return int(seq)


def recording(started: list[cdc.Change], *, but: Callable[[cdc.Change], None] = lambda change: None) -> cdc.Router:
    """``but``: what the handler of TRUNCATE does besides."""
    router = cdc.Router()

    @router.on("*")
    async def row(change: cdc.Change) -> None:
        started.append(change)
        await OtherTasks()

    @router.on("order", "TRUNCATE")
    async def truncated(change: cdc.Change) -> None:
        started.append(change)
        but(change)

    return router


async def all_settled(db: psycopg.Connection) -> None:
    async def now() -> bool:
        return settled(db)

    await eventually_async(now, within_s=30)


async def none_is_left(db: psycopg.Connection) -> None:
    async def now() -> bool:
        return db.execute("SELECT FROM cdc_barriers").fetchone() is None

    await eventually_async(now, within_s=30, what="the barriers to be removed")


def barred(db: psycopg.Connection, seq: int) -> bool:
    """What each read is told of this change of an order."""
    [(answer,)] = db.execute("SELECT barred('order', %s)", [seq]).fetchall()
    return bool(answer)


def in_order(started: list[cdc.Change]) -> bool:
    """Whether each TRUNCATE comes after all before it, and before all after it."""
    seqs = [change.seq for change in started if change.entity_type == "order"]
    places = [seqs.index(change.seq) for change in started if change.operation == "TRUNCATE"]
    return all(
        max(seqs[:place], default=0) < seqs[place] < min(seqs[place + 1 :], default=seqs[place] + 1) for place in places
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_a_truncate_starts_after_all_before_it_and_before_all_after_it(
    kind: str, outbox: str, orders: psycopg.Connection
) -> None:
    started: list[cdc.Change] = []
    router = cdc.Router()
    router.on("order", name="rows")(handler(kind, started.extend))
    router.on("order", "TRUNCATE", name="truncates")(handler(kind, started.extend))
    async with consuming(outbox, router):
        for _ in range(3):
            orders.execute(_ROWS, [50])
            truncate(orders)
            with orders.transaction():
                orders.execute(_ROWS, [50])
                orders.execute("DELETE FROM orders WHERE id > 25")
                truncate(orders)
        await all_settled(orders)
        await none_is_left(orders)
    assert in_order(started)
    truncates = [change for change in started if change.operation == "TRUNCATE"]
    assert len(truncates) == 6
    assert {(change.entity_id, change.old, change.new) for change in truncates} == {("", None, None)}


@pytest.mark.parametrize("behind", [True, False], ids=["with fresh changes behind it", "alone"])
async def test_it_waits_for_a_retry_before_it_and_holds_nothing_of_another_type_back(
    behind: bool, outbox: str, orders: psycopg.Connection
) -> None:
    started: list[cdc.Change] = []
    router = recording(started)
    again = asyncio.Event()

    @router.on("order", "INSERT")
    async def fails(change: cdc.Change) -> None:
        started.append(change)
        if change.new["id"] == 1 and not again.is_set():
            raise cdc.Retry(after=0.05)

    async with consuming(outbox, router, max_attempts=1_000):
        orders.execute(_ROWS, [10])
        if behind:
            orders.execute("UPDATE orders SET takes_s = 1")
        seq = truncate(orders)
        orders.execute(_ROWS, [10])
        orders.execute("SELECT publish_change('other', n::text) FROM generate_series(1, 100) AS n")

        async def others_done() -> bool:
            [(left,)] = orders.execute(
                "SELECT count(*) FROM entity_changes WHERE entity_type = 'other' AND NOT processed"
            ).fetchall()
            attempts = max((change.attempt for change in started), default=0)
            return bool(left == 0 and attempts > 3)

        async def nothing_fresh_is_before_it() -> bool:
            return orders.execute("SELECT clear FROM cdc_barriers WHERE seq = %s", [seq]).fetchone() == (True,)

        await eventually_async(others_done, within_s=30)
        if not behind:
            await eventually_async(nothing_fresh_is_before_it, what="only the retry keeps it from starting")
        assert barred(orders, seq)
        assert [change for change in started if change.entity_type == "order" and change.seq >= seq] == []
        again.set()
        await all_settled(orders)
    assert in_order(started)


async def test_while_it_waits_for_its_own_retry_nothing_after_it_starts_and_dead_it_lets_them_go_on(
    outbox: str, orders: psycopg.Connection
) -> None:
    def fail(change: cdc.Change) -> None:
        raise LookupError

    started: list[cdc.Change] = []
    async with consuming(outbox, recording(started, but=fail), backoff_base=0.01):
        orders.execute(_ROWS, [10])
        truncate(orders)
        orders.execute(_ROWS, [10])
        await all_settled(orders)
        await none_is_left(orders)
    assert [change.operation for change in started].count(cdc.Operation.TRUNCATE) == 3
    assert states(orders) == {"processed": 20, "dead": 1}
    operations = [change.operation for change in started]
    assert operations[10:13] == [cdc.Operation.TRUNCATE] * 3


@pytest.mark.parametrize(
    "decision",
    [
        "UPDATE entity_changes SET processed = true WHERE seq = %s",
        "DELETE FROM entity_changes WHERE seq = %s",
        "DELETE FROM cdc_barriers WHERE seq = %s",
    ],
)
async def test_a_dead_one_that_pauses_holds_its_type_until_somebody_has_decided_also_in_sql(
    decision: str, outbox: str, orders: psycopg.Connection
) -> None:
    router, started = cdc.Router(), list[cdc.Change]()

    @router.on("order")
    async def row(change: cdc.Change) -> None:
        started.append(change)

    @router.on("order", "TRUNCATE", dead="pause")
    async def truncated(change: cdc.Change) -> None:
        raise cdc.Reject("not here")

    async with consuming(outbox, router):
        seq = truncate(orders)
        orders.execute(_ROWS, [10])
        orders.execute("SELECT publish_change('order', 'another')")

        async def dead() -> bool:
            return states(orders).get("dead") == 1

        await eventually_async(dead)
        assert barred(orders, seq + 1)
        assert started == []
        orders.execute(decision.encode(), [seq])
        await all_settled(orders)
    assert len(started) == 11


async def test_without_a_handler_for_it_it_is_skipped_in_its_place(outbox: str, orders: psycopg.Connection) -> None:
    router, started = cdc.Router(), list[cdc.Change]()

    @router.on("order")
    async def row(change: cdc.Change) -> None:
        started.append(change)

    orders.execute(_ROWS, [10])
    truncate(orders)
    orders.execute(_ROWS, [10])
    async with consuming(outbox, router) as app:
        await all_settled(orders)
        await none_is_left(orders)
        skipped = metric(app.metrics.registry, "cdc_changes_handled_total", outcome="skipped")
    assert (len(started), skipped) == (20, 1)


async def test_a_backlog_of_other_types_that_nobody_handles_is_walked_once_and_does_not_stop_it(
    outbox: str, orders: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barriers, "_SCAN_MAX", 3)
    orders.execute("SELECT publish_change('nobody''s', n::text) FROM generate_series(1, 2000) AS n")
    orders.execute(_ROWS, [10])
    seq = truncate(orders)
    orders.execute(_ROWS, [10])
    router, started = cdc.Router(), list[cdc.Change]()
    router.on("order", name="rows")(handler("at once", started.extend))
    router.on("order", "TRUNCATE", name="truncates")(handler("at once", started.extend))
    async with consuming(outbox, router):

        async def handled() -> bool:
            [(left,)] = orders.execute(
                "SELECT count(*) FROM entity_changes WHERE entity_type = 'order' AND NOT processed"
            ).fetchall()
            return bool(left == 0)

        await eventually_async(handled, within_s=60)
    assert in_order(started)
    assert [change.operation for change in started if change.seq == seq] == ["TRUNCATE"]


async def test_one_shard_that_is_not_walked_to_its_end_keeps_it_from_starting(
    outbox: str, orders: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barriers, "_SCAN_MAX", 3)
    orders.execute("SELECT publish_change('nobody''s', '7') FROM generate_series(1, 20)")
    orders.execute("INSERT INTO orders VALUES (7)")  # behind them: of the same shard
    seq = truncate(orders)
    looks = barriers.Barriers("public")
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
        for _ in range(10):
            await looks.advance(connection)
            assert barred(orders, seq)
        orders.execute("UPDATE entity_changes SET processed = true WHERE entity_type = 'order' AND seq < %s", [seq])
        for _ in range(10):
            await looks.advance(connection)
    assert not barred(orders, seq)


def test_nothing_starts_out_of_order_beside_a_truncate_while_consumers_are_killed(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    outbox_db.execute(_CALLS)
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, takes_s float8)")
    tracking.track(outbox_db, "public", "orders", entity_type="counted", truncate=Truncate.EVENT)
    processes += [Process(outbox, tmp_path / name) for name in ("one.log", "two.log")]
    for process in processes:
        process.wait_for(f"owns {SHARDS // 2} of {SHARDS} shards")
    for _ in range(4):
        outbox_db.execute("INSERT INTO orders SELECT n, 0.02 FROM generate_series(1, 200) AS n")
        outbox_db.execute("TRUNCATE orders")

    def handled(count: int) -> Callable[[], bool]:
        def now() -> bool:
            [(calls,)] = outbox_db.execute("SELECT count(*) FROM calls").fetchall()
            return int(calls) >= count

        return now

    for number, count in enumerate((50, 300, 500)):
        eventually(handled(count), within_s=60)
        processes[number % 2].kill()
        processes[number % 2] = Process(outbox, tmp_path / f"{number}.log")
    eventually(lambda: settled(outbox_db), within_s=60)
    assert states(outbox_db) == {"processed": 804}
    assert outbox_db.execute("SELECT count(DISTINCT seq) FROM calls").fetchone() == (804,)
    assert outbox_db.execute(_OUT_OF_ORDER).fetchone() == (0,)


async def test_a_replayed_truncate_stands_between_the_replays_as_it_did_between_their_originals(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute(_ROWS, [50])
    truncate(orders)
    orders.execute(_ROWS, [50])
    first: list[cdc.Change] = []
    await testing.drain(outbox, recording(first))
    done(outbox, "outbox", "replay", "--type", "order", "--all", "--yes")
    again: list[cdc.Change] = []
    drained = await testing.drain(outbox, recording(again), within_s=30)
    assert drained.processed == 101
    assert in_order(again)
    assert [change.replay_of for change in again if change.operation == "TRUNCATE"] == [
        change.id for change in first if change.operation == "TRUNCATE"
    ]


async def test_rows_of_a_backfill_wait_for_a_truncate_as_others_do(outbox: str, orders: psycopg.Connection) -> None:
    started: list[cdc.Change] = []
    seq = truncate(orders)
    orders.execute(_ROWS, [10])
    done(outbox, "backfill", "orders")
    await testing.drain(outbox, recording(started), within_s=30)
    assert started[0].seq == seq
    assert [change.operation for change in started].count(cdc.Operation.READ) == 10


@pytest.mark.parametrize(
    ("stays", "raised", "left"),
    [
        ("INSERT", cdc.Retry(after=3600), (1, 2)),
        ("TRUNCATE", cdc.Retry(after=3600), (1, 1)),
        ("TRUNCATE", cdc.Reject("never"), (0, 1)),
    ],
)
async def test_a_drain_leaves_what_a_truncate_holds_back_for_longer(
    outbox: str, orders: psycopg.Connection, stays: str, raised: Exception, left: tuple[int, int]
) -> None:
    router = cdc.Router()

    @router.on("order", "INSERT", "TRUNCATE", dead="pause")
    async def handle(change: cdc.Change) -> None:
        if change.operation == stays:
            raise raised

    orders.execute("INSERT INTO orders VALUES (1)")
    truncate(orders)
    orders.execute("INSERT INTO orders VALUES (2)")
    drained = await testing.drain(outbox, router, within_s=3, allow_dead=True)
    assert (drained.waiting, drained.held) == left


def test_a_truncate_that_is_rolled_back_holds_nothing_back(orders: psycopg.Connection) -> None:
    with orders.transaction(force_rollback=True):
        orders.execute("TRUNCATE orders")
    assert orders.execute("SELECT FROM cdc_barriers").fetchall() == []


def test_what_a_handler_truncates_names_the_change_that_caused_it(orders: psycopg.Connection) -> None:
    cause: dict[str, Any] = {"cause": "11111111-1111-1111-1111-111111111111,2"}
    with orders.transaction():
        orders.execute("SELECT set_config('cdc.cause', %(cause)s, true)", cause)
        orders.execute("TRUNCATE orders")
    [(caused_by, depth)] = orders.execute("SELECT caused_by::text, depth FROM entity_changes").fetchall()
    assert (f"{caused_by},{depth - 1}") == cause["cause"]


async def test_the_next_one_of_a_type_is_found_at_the_next_look_however_many_wait_behind_it(
    outbox: str, orders: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of thousands would take as many looks as there are pages of them."""
    monkeypatch.setattr(barriers, "_BARRIERS_MAX", 5)
    seqs = [truncate(orders) for _ in range(4)]
    orders.execute(
        "INSERT INTO cdc_barriers (entity_type, seq, id)"
        " SELECT entity_type, seq + n, id FROM cdc_barriers, generate_series(1, 20) AS n WHERE seq = %s",
        [seqs[-1]],
    )
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
        looking = barriers.Barriers("public")
        for seq in seqs:
            await looking.advance(connection)
            assert orders.execute("SELECT clear FROM cdc_barriers WHERE seq = %s", [seq]).fetchall() == [(True,)]
            orders.execute("UPDATE entity_changes SET processed = true WHERE seq = %s", [seq])


async def test_one_look_every_half_second_is_enough_for_all_types_that_are_kept_from_starting(
    outbox: str, orders: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[float]()
    advance = barriers.Barriers.advance

    async def counted(self: barriers.Barriers, connection: psycopg.AsyncConnection) -> bool:
        looks.append(time.monotonic())
        return await advance(self, connection)

    monkeypatch.setattr(barriers.Barriers, "advance", counted)
    router = cdc.Router()
    router.on("*")(handler("at once", lambda changes: None))

    @router.on("order", "TRUNCATE")
    async def waits(change: cdc.Change) -> None:
        raise cdc.Retry(after=3600)

    truncate(orders)
    orders.execute(
        "INSERT INTO cdc_barriers (entity_type, seq, id)"
        " SELECT 'type ' || n, seq, id FROM cdc_barriers, generate_series(1, 60) AS n"
    )
    orders.execute("SELECT publish_change('type ' || n, '1') FROM generate_series(1, 60) AS n")
    async with consuming(outbox, router):

        async def looked() -> bool:
            return len(looks) >= 6

        await eventually_async(looked, within_s=60)
    assert [later - one for one, later in pairwise(looks) if later - one < 0.45] == []


def test_what_a_truncate_holds_back_is_not_ready_and_for_how_long_it_stands_is_told(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute("SELECT publish_change('other', '1')")
    seq = truncate(orders)
    orders.execute(_ROWS, [3])
    orders.execute("UPDATE entity_changes SET changed_at = now() - interval '1 hour' WHERE entity_type = 'order'")
    everything, ours = Store("public"), Store("public", scope=TypeFilter(("order",), include=True))
    observer = Store("public", observes=True)
    assert everything.figures(orders).oldest_ready_age_s < 3_000
    assert ours.figures(orders).oldest_ready_age_s == 0
    for store in (everything, ours):
        assert store.figures(orders).fresh >= 4
        assert store.figures(orders).truncate_age_s >= 3_600
    seen = done(outbox, "status")
    assert f"{seq} of order holds back what comes after it, for 60 min" in seen
    assert re.search(r"^order +4 +0 +0 +0 +-$", seen, re.MULTILINE), "none of them is ready"
    assert observer.figures(orders).truncate_age_s == 0
    orders.execute("UPDATE cdc_barriers SET clear = true")
    assert ours.figures(orders).oldest_ready_age_s >= 3_600, "it may start itself"
    orders.execute("UPDATE entity_changes SET processed = true WHERE seq = %s", [seq])
    assert ours.figures(orders).oldest_ready_age_s >= 3_600, "what comes after it"
    assert ours.figures(orders).truncate_age_s == 0


def test_who_may_not_see_the_barriers_has_figures_without_them(orders: psycopg.Connection) -> None:
    truncate(orders)
    orders.execute(_ROWS, [3])
    orders.execute("GRANT SELECT ON entity_changes TO pg_monitor; SET ROLE pg_monitor")
    [of_orders] = OutboxAdmin("public").stats(orders).types
    assert (of_orders.fresh, of_orders.oldest_ready_age_s is not None) == (4, True)
