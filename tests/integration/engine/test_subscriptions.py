"""Several subscriptions of one outbox: each has a truth of its own, and costs the others nothing."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

import cdc
from cdc.core.errors import NotFoundError, UsageError
from cdc.core.model import SHARDS
from cdc.core.read_planner import Sweep
from cdc.core.router import Router
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import TypeFilter
from cdc.engine.dispatcher import OtherTasks
from cdc.postgres import tracking
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscriptions
from cdc.postgres.tracked_tables import Truncate
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states
from tests.subscriptions import is_done, kept, states_of, subscribe

pytestmark = pytest.mark.server
_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}
Check = Callable[[], Coroutine[Any, Any, bool]]


def _publish(db: psycopg.Connection, entity_id: str = "1", entity_type: str = "x", **new: Any) -> int:
    [(seq,)] = db.execute(
        "SELECT publish_change(%s, %s, 'INSERT', %s)", [entity_type, entity_id, Jsonb(new)]
    ).fetchall()
    return int(seq)


def _is(condition: Callable[[], bool]) -> Check:
    async def check() -> bool:
        return condition()

    return check


def _collecting(*entity_types: str) -> tuple[Router, list[int]]:
    router, seen = Router(), list[int]()

    async def handle(change: cdc.Change) -> None:
        seen.append(change.seq)

    for entity_type in entity_types or ("x",):
        router.on(entity_type)(handle)
    return router, seen


async def test_each_subscription_handles_each_change_once_and_leaves_the_marks_to_the_default_one(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    before = [_publish(outbox_db, str(key)) for key in range(20)]
    (default, by_default), (router, seen) = _collecting(), _collecting()
    async with consuming(outbox, router, subscription="search"):
        await eventually_async(_is(lambda: is_done(outbox_db, number)), what="the subscription is done")
        assert states(outbox_db) == {"fresh": 20}, "what it has done is none of the default one's business"
        async with consuming(outbox, default):
            await eventually_async(_is(lambda: settled(outbox_db)), what="the default one is done")
            after = [_publish(outbox_db, str(key)) for key in range(20)]
            await eventually_async(_is(lambda: settled(outbox_db) and is_done(outbox_db, number)))
    assert sorted(seen) == sorted(by_default) == before + after


async def test_what_is_done_leaves_nothing_behind(outbox: str, outbox_db: psycopg.Connection) -> None:
    number = subscribe(outbox_db)
    for key in range(50):
        _publish(outbox_db, str(key))
    router, _ = _collecting()
    async with consuming(outbox, router, subscription="search"):
        await eventually_async(_is(lambda: is_done(outbox_db, number) and not kept(outbox_db, number)))
    assert set(states_of(outbox_db, number).values()) == {"done"}


async def test_a_retry_holds_back_its_key_in_its_own_subscription_alone(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    (default, by_default), seen = _collecting(), list[tuple[int, int]]()
    router, broken = Router(), True

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.append((change.seq, change.attempt))
        if broken and change.entity_id == "1":
            raise RuntimeError("not yet")

    first, other, second = _publish(outbox_db, "1"), _publish(outbox_db, "2"), _publish(outbox_db, "1")
    async with consuming(outbox, router, subscription="search", **{**_QUICK, "max_attempts": 1_000}):
        async with consuming(outbox, default):
            await eventually_async(_is(lambda: settled(outbox_db)))
        await eventually_async(_is(lambda: (first, 3) in seen), what="a third attempt")
        assert states_of(outbox_db, number) == {first: "waiting", other: "done", second: "fresh"}
        broken = False
        await eventually_async(_is(lambda: is_done(outbox_db, number)))
        await eventually_async(_is(lambda: not kept(outbox_db, number)))
    assert sorted(by_default) == [first, other, second]
    assert [seq for seq, _ in seen if seq in (first, second)][-2:] == [first, second]
    assert [attempt for seq, attempt in seen if seq == first] == list(range(1, len(seen) - 1))


async def test_a_dead_letter_is_one_in_its_own_subscription_alone_and_holds_back_no_position(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    router, default = Router(), _collecting()[0]

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        if change.entity_id == "poison":
            raise cdc.Reject("never")

    poison, later = _publish(outbox_db, "poison"), _publish(outbox_db, "poison")
    others = [_publish(outbox_db, str(key)) for key in range(100)]
    async with consuming(outbox, router, subscription="search"), consuming(outbox, default):
        await eventually_async(_is(lambda: is_done(outbox_db, number) and settled(outbox_db)))
        await eventually_async(_is(lambda: kept(outbox_db, number) == 2), what="only what is dead has rows")
    assert states(outbox_db) == {"processed": 102}
    found = states_of(outbox_db, number)
    assert {seq for seq, state in found.items() if state == "dead"} == {poison, later}
    assert {found[seq] for seq in others} == {"done"}
    tried = outbox_db.execute("SELECT tried -> 'count', tried ->> 'error' FROM cdc_subscription_changes").fetchall()
    assert [(count, "never" in error) for count, error in tried] == [(1, True)] * 2


async def test_a_transaction_that_commits_late_is_not_skipped(outbox: str, outbox_db: psycopg.Connection) -> None:
    number = subscribe(outbox_db)
    router, seen = _collecting()
    async with consuming(outbox, router, subscription="search", sweep_interval=0.2):
        with psycopg.connect(outbox) as late:
            overtaken = [_publish(late, str(key)) for key in range(20)]
            others = [_publish(outbox_db, str(key)) for key in range(200)]
            await eventually_async(_is(lambda: sorted(seen) == others))
            assert max(overtaken) < min(others)
            # Its positions stand where the open transaction's numbers may come, however long it lasts.
            await eventually_async(_is(lambda: bool(_candidates(outbox_db, number))))
            [(highest,)] = outbox_db.execute("SELECT max(seq) FROM cdc_positions").fetchall()
            assert highest < min(overtaken)
            late.commit()
        await eventually_async(_is(lambda: sorted(seen) == overtaken + others))
        await eventually_async(_is(lambda: not kept(outbox_db, number)))
    assert set(states_of(outbox_db, number).values()) == {"done"}


def _candidates(db: psycopg.Connection, number: int) -> list[Any]:
    return db.execute(
        "SELECT shard FROM cdc_positions WHERE subscription = %s AND candidate IS NOT NULL", [number]
    ).fetchall()


async def test_a_subscription_takes_its_types_and_its_position_passes_the_others(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db, types=["x"])
    router, seen = _collecting("x", "y")
    for key in range(30):
        _publish(outbox_db, str(key), "y")
    wanted = _publish(outbox_db, "1", "x")
    _publish(outbox_db, "1", "y")
    async with consuming(outbox, router, subscription="search"):
        await eventually_async(_is(lambda: is_done(outbox_db, number)), what="its positions pass what it does not take")
    assert seen == [wanted]


async def test_what_a_transactional_handler_writes_is_committed_with_the_progress_of_its_subscription(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    outbox_db.execute("CREATE TABLE written (reader text, seq bigint)")

    def writing(reader: str) -> Router:
        router = Router()

        @router.on("x")
        async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
            await connection.execute("INSERT INTO written VALUES (%s, %s)", [reader, change.seq])
            if change.attempt < 2 and change.seq % 5 == 0:
                raise RuntimeError("once")

        return router

    seqs = [_publish(outbox_db, str(key)) for key in range(60)]
    async with (
        consuming(outbox, writing("search"), subscription="search", **_QUICK),
        consuming(outbox, writing("default"), **_QUICK),
    ):
        await eventually_async(_is(lambda: is_done(outbox_db, number) and settled(outbox_db)))
    for reader in ("search", "default"):
        rows = outbox_db.execute("SELECT seq FROM written WHERE reader = %s ORDER BY seq", [reader]).fetchall()
        assert [seq for (seq,) in rows] == seqs


async def test_a_large_batch_leaves_the_server_room_for_locks_and_is_committed_once_by_whoever_is_first(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    outbox_db.execute("CREATE TABLE written (seq bigint)")
    outbox_db.execute("SELECT count(publish_change('x', n::text, 'INSERT', '{}')) FROM generate_series(1, 500) AS n")
    router, locks = Router(), list[int]()

    @router.on("x", batch=500, linger=1)
    async def handle(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        await connection.cursor().executemany("INSERT INTO written VALUES (%s)", [[each.seq] for each in changes])
        cursor = await connection.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        )
        [(count,)] = await cursor.fetchall()
        locks.append(count)
        if len(locks) == 1:  # as another session that had none of its locks
            last = max(changes, key=lambda each: each.seq)
            outbox_db.execute(
                "INSERT INTO cdc_subscription_changes (seq, subscription, shard) VALUES (%s, %s, %s)",
                [last.seq, number, last.shard],
            )
            outbox_db.execute("INSERT INTO written VALUES (%s)", [last.seq])

    async with consuming(outbox, router, subscription="search"):
        await eventually_async(_is(lambda: is_done(outbox_db, number)))
    assert outbox_db.execute("SELECT count(*), count(DISTINCT seq) FROM written").fetchall() == [(500, 500)]
    assert len(locks) > 1
    assert max(locks) <= 100


async def test_nothing_is_begun_while_it_is_paused(outbox: str, outbox_db: psycopg.Connection) -> None:
    number = subscribe(outbox_db)
    (router, seen), (default, _) = _collecting(), _collecting()
    async with consuming(outbox, router, subscription="search") as app, consuming(outbox, default):
        first = _publish(outbox_db)
        await eventually_async(_is(lambda: seen == [first]))
        done(outbox, "subscription", "pause", "search", "--because", "reindexing")
        await eventually_async(_is(lambda: app.consumer.status.paused), what="the consumer has noticed")
        later = [_publish(outbox_db, str(key)) for key in range(10)]
        await eventually_async(_is(lambda: settled(outbox_db)))
        assert seen == [first]
        done(outbox, "subscription", "resume", "search")
        await eventually_async(_is(lambda: is_done(outbox_db, number)))
    assert sorted(seen) == [first, *later]


async def test_a_dropped_subscription_reads_nothing_and_writes_nothing(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    number = subscribe(outbox_db)
    subscribe(outbox_db, "other")
    router, seen = _collecting()
    async with consuming(outbox, router, subscription="search"):
        first = _publish(outbox_db)
        await eventually_async(_is(lambda: seen == [first]))
        Subscriptions("public").drop(outbox_db, "search")
        _publish(outbox_db)
        await eventually_async(_is(lambda: "waiting: the subscription was dropped" in caplog.text))
        assert seen == [first]
    assert kept(outbox_db, number) == 0


async def test_consumers_of_a_subscription_share_its_shards_and_nothing_else(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    (first, by_first), (second, by_second), (default, by_default) = _collecting(), _collecting(), _collecting()

    def owned(app: Any) -> float:
        return metric(app.metrics.registry, "cdc_shards_owned")

    async with (
        consuming(outbox, first, subscription="search") as one,
        consuming(outbox, second, subscription="search") as two,
        consuming(outbox, default) as of_default,
    ):
        await eventually_async(_is(lambda: owned(one) == owned(two) == 32 and owned(of_default) == 64))
        seqs = [_publish(outbox_db, str(key)) for key in range(200)]
        await eventually_async(_is(lambda: is_done(outbox_db, number) and settled(outbox_db)))
    assert sorted(by_first + by_second) == sorted(by_default) == seqs
    assert by_first
    assert by_second


async def test_one_slot_rings_for_all(outbox: str, outbox_db: psycopg.Connection) -> None:
    subscribe(outbox_db)
    (router, seen), (default, _) = _collecting(), _collecting()
    # Neither sweeps within the time of this test, so what is seen is seen by a wake-up.
    quiet: dict[str, Any] = {"slot_name": "rings_for_all", "sweep_interval": 3600, "poll_interval": 3600}
    async with consuming(outbox, default, **quiet) as streaming:
        await eventually_async(_is(lambda: metric(streaming.metrics.registry, "cdc_stream_connected") == 1))
        async with consuming(outbox, router, subscription="search", **quiet) as app:
            await eventually_async(_is(lambda: metric(app.metrics.registry, "cdc_shards_owned") == 64))
            await eventually_async(_is(lambda: streaming.consumer.notifications.relays_all))
            await eventually_async(_is(lambda: app.status.listening))
            seq = _publish(outbox_db)
            await eventually_async(_is(lambda: seen == [seq]))
            await eventually_async(_is(lambda: metric(app.metrics.registry, "cdc_wakeups_total", source="notify") == 1))


async def test_a_captured_truncate_is_a_barrier_of_its_type_in_each_subscription(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    tracking.track(outbox_db, "public", "orders", entity_type="order", truncate=Truncate.EVENT)
    number = subscribe(outbox_db)
    outbox_db.execute("INSERT INTO orders SELECT n FROM generate_series(1, 100) AS n")
    outbox_db.execute("TRUNCATE orders")
    outbox_db.execute("INSERT INTO orders SELECT n FROM generate_series(1, 100) AS n")
    [(barrier,)] = outbox_db.execute("SELECT seq FROM entity_changes WHERE operation = 'TRUNCATE'").fetchall()
    default, _ = _collecting("order")
    async with consuming(outbox, default):
        await eventually_async(_is(lambda: settled(outbox_db)))
        await eventually_async(_is(lambda: not outbox_db.execute("SELECT FROM cdc_barriers").fetchall()))
    router, ended, broken = Router(), list[int](), True

    @router.on("order", "TRUNCATE")
    @router.on("order")
    async def handle(change: cdc.Change) -> None:
        await OtherTasks()
        if broken and change.entity_id == "7":
            raise RuntimeError("not yet")
        ended.append(change.seq)

    store = SubscriptionStore("public", Subscriptions("public").named(outbox_db, "search"), 16, TypeFilter())
    async with consuming(outbox, router, subscription="search", **{**_QUICK, "max_attempts": 1_000}):
        await eventually_async(_is(lambda: len(ended) == 99), what="all before it but the one that fails")
        assert max(ended) < barrier
        assert states_of(outbox_db, number)[barrier] == "fresh"
        outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 hour' WHERE seq > %s", [barrier])
        figures = store.figures(outbox_db)
        assert figures.truncate_age_s < 3_000
        assert figures.oldest_ready_age_s < 3_000, "what stands behind it is not ready"
        outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 hour' WHERE seq = %s", [barrier])
        assert store.figures(outbox_db).truncate_age_s >= 3_600
        await eventually_async(_is(lambda: _passed(outbox_db, number, "7")), what="its position has passed what waits")
        assert await _barred(outbox, store, barrier), "by what waits, wherever the position is"
        broken = False
        await eventually_async(_is(lambda: is_done(outbox_db, number)))
        assert store.figures(outbox_db).truncate_age_s == 0
    assert len(ended) == 201
    assert ended.index(barrier) == 100
    assert max(ended[:100]) < barrier < min(ended[101:])


def _passed(db: psycopg.Connection, number: int, entity_id: str) -> bool:
    """Whether the position of its shard has passed the first change of the key."""
    asked = "SELECT p.seq >= n.seq FROM entity_changes AS n JOIN cdc_positions AS p ON p.shard = n.shard"
    asked += " WHERE p.subscription = %s AND n.entity_id = %s ORDER BY n.seq LIMIT 1"
    return db.execute(asked, [number, entity_id]).fetchone() == (True,)


async def _barred(dsn: str, store: SubscriptionStore, seq: int) -> bool:
    """Whether a read of the subscription is told that this fresh change must not start."""
    everything = Sweep({shard: Position(0, 0, 3) for shard in range(SHARDS)}, 1_000, 1)
    async with await connect_async(dsn, application_name="cdc: test", session=SubscriptionStore.session) as reader:
        read_changes(reader)
        page = await store.sweep(reader, everything)
    return any(row.barred for row in page.rows if row.change.seq == seq)


async def test_a_consumer_that_does_not_handle_what_the_subscription_names_is_refused_before_it_passes_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db, types=["x", "y"])
    wanted = [_publish(outbox_db, "1", "x"), _publish(outbox_db, "1", "y")]
    # An earlier version, and one whose handlers were not imported.
    for router in (_collecting("x")[0], Router()):
        with pytest.raises(UsageError, match="'y', but no handler wants"):
            async with consuming(outbox, router, subscription="search"):
                await eventually_async(_is(lambda: is_done(outbox_db, number)))
    router, seen = _collecting("x", "y")
    async with consuming(outbox, router, subscription="search"):
        await eventually_async(_is(lambda: is_done(outbox_db, number)))
    assert sorted(seen) == wanted
    subscribe(outbox_db, "audit")
    with pytest.raises(UsageError, match="takes every type, but no handler"):
        async with consuming(outbox, Router(), subscription="audit"):
            pass
    router, ignored = _collecting("x")[0], _collecting("x")[0]
    ignored.ignore("y")
    async with consuming(outbox, ignored, subscription="search"):
        pass
    async with consuming(outbox, router, subscription="search", unhandled="discard"):
        pass


async def test_what_a_subscription_cannot_do_is_refused(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, _ = _collecting()
    with pytest.raises(NotFoundError, match="no subscription search"):
        async with consuming(outbox, router, subscription="search"):
            pass
    subscribe(outbox_db)
    with pytest.raises(UsageError, match="same types"):
        async with consuming(outbox, router, subscription="search", only=("x",)):
            pass


async def test_a_change_that_cannot_be_read_is_a_dead_letter_of_its_subscription(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = subscribe(outbox_db)
    router, seen = _collecting()
    before = _publish(outbox_db, "1")
    # An operation of which this version knows nothing is refused by the driver.
    [(unknown,)] = outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, shard)"
        " VALUES ('x', 'MERGE', '2', hashtext('2') & 63) RETURNING seq"
    ).fetchall()
    after = _publish(outbox_db, "3")
    async with consuming(outbox, router, subscription="search"):
        await eventually_async(_is(lambda: is_done(outbox_db, number)))
    assert sorted(seen) == [before, after]
    assert states_of(outbox_db, number)[unknown] == "dead"
    assert states(outbox_db) == {"fresh": 3}
