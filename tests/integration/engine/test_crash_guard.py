"""What a consumer does differently after one that died: attempts are counted before they are made."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.router import Router
from cdc.engine import crash_guard
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states

_CRASHED = "the consumer's process ended while this change's handler ran"


@pytest.fixture
def dead_for_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of these tests comes back: do not wait for it."""
    monkeypatch.setattr(crash_guard, "GRACE_S", 0.0)


def _publish(db: psycopg.Connection, count: int, keys: int | None = None) -> None:
    db.execute("SELECT publish_change('x', (n %% %s)::text) FROM generate_series(1, %s) AS n", [keys or count, count])


def _as_if_the_owner_had_died(db: psycopg.Connection) -> uuid.UUID:
    """What a killed consumer leaves behind: its name on every shard."""
    owner = uuid.uuid4()
    db.execute("INSERT INTO cdc_shards (shard, owner) SELECT n, %s FROM generate_series(0, 63) AS n", [owner])
    return owner


def _was_running(db: psycopg.Connection, owner: uuid.UUID, *seqs: int) -> None:
    db.execute("UPDATE entity_changes SET started_by = %s WHERE seq = ANY (%s)", [owner, list(seqs)])


def _is(condition: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
    async def ask() -> Any:
        return condition()

    return ask


async def _until_settled(db: psycopg.Connection) -> None:
    await eventually_async(_is(lambda: settled(db)), what="every change processed or dead")


def _marks(db: psycopg.Connection) -> int:
    [(count,)] = db.execute("SELECT count(started_by) FROM entity_changes").fetchall()
    return int(count)


def _end_session(db: psycopg.Connection) -> None:
    db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'cdc: shards' AND datname = current_database()"
    )


async def test_in_peace_nothing_is_written_down_and_nothing_is_left_behind(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()
    router.on("x")(lambda change: None)
    _publish(outbox_db, 50)
    for _ in range(2):
        async with consuming(outbox, router):
            await _until_settled(outbox_db)
            owned = outbox_db.execute("SELECT count(*), count(DISTINCT owner) FROM cdc_shards").fetchone()
            assert owned == (64, 1)
        assert outbox_db.execute("SELECT count(*) FROM cdc_shards").fetchone() == (0,)
        _publish(outbox_db, 50)
    assert _marks(outbox_db) == 0


@pytest.mark.parametrize("kind", ["async", "sync", "transactional", "batch"])
async def test_after_a_death_a_start_is_written_down_before_the_handler_runs(
    kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, seen = Router(), list[tuple[int, bool]]()

    def look(changes: list[cdc.Change]) -> None:
        with psycopg.connect(outbox) as other:  # another session's view: what is committed
            seqs = [change.seq for change in changes]
            rows = other.execute(
                "SELECT seq, started_by IS NOT NULL FROM entity_changes WHERE seq = ANY (%s)", [seqs]
            ).fetchall()
        seen.extend(rows)

    async def on_loop(change: cdc.Change) -> None:
        look([change])

    async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        look([change])

    async def batch(changes: list[cdc.Change]) -> None:
        look(changes)

    kinds: dict[str, Callable[..., Any]] = {
        "async": on_loop, "sync": lambda change: look([change]), "transactional": transactional, "batch": batch,
    }  # fmt: skip
    router.on("x")(kinds[kind])
    _as_if_the_owner_had_died(outbox_db)
    _publish(outbox_db, 40, 7)
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
        first, seen[:] = list(seen), []
        _publish(outbox_db, 40, 7)  # since the takeover: nobody can have been running it
        await _until_settled(outbox_db)
    assert sorted(first) == [(seq, True) for seq in range(1, 41)]
    assert sorted(seen) == [(seq, False) for seq in range(41, 81)]
    assert outbox_db.execute("SELECT sum(error_count) FROM entity_changes").fetchone() == (0,)


@pytest.mark.usefixtures("dead_for_certain")
async def test_a_suspect_loses_an_attempt_and_no_other_suspect_runs_beside_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, running, together = Router(), set[int](), list[set[int]]()
    attempts = dict[int, tuple[int, bool]]()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        running.add(change.seq)
        attempts[change.seq] = (change.attempt, change.crashed)
        for _ in range(20):
            together.append(set(running))
            await asyncio.to_thread(int)  # gives every other handler the time to begin
        running.remove(change.seq)

    _publish(outbox_db, 30)
    suspects = {3, 9, 27}
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), *suspects)
    async with consuming(outbox, router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="crash") == 3
    assert states(outbox_db) == {"processed": 30}
    assert all(len(them & suspects) <= 1 for them in together), "suspects ran side by side"
    assert {seq for seq, attempt in attempts.items() if attempt == (2, True)} == suspects
    assert {attempt for seq, attempt in attempts.items() if seq not in suspects} == {(1, False)}
    counted = outbox_db.execute("SELECT seq, last_error FROM entity_changes WHERE error_count = 1").fetchall()
    assert sorted(counted) == [(seq, _CRASHED) for seq in sorted(suspects)]


@pytest.mark.usefixtures("dead_for_certain")
async def test_while_a_suspect_runs_nothing_starts_on_which_its_crash_would_be_blamed(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls, go_on = Router(), list[int](), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.crashed:
            await go_on.wait()

    _publish(outbox_db, 1)
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), 1)
    async with consuming(outbox, router, poll_interval=0.1) as app:
        await eventually_async(_is(lambda: calls == [1]))
        with outbox_db.transaction():
            _publish(outbox_db, 2, 3)  # the former owner may have been running these
            outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 hour' WHERE seq > 1")
        await eventually_async(_is(lambda: app.status.consumer.running == 3), what="they have been read")
        outbox_db.execute("SELECT publish_change('x', 'later')")
        await eventually_async(_is(lambda: states(outbox_db).get("processed") == 1), what="what came later is done")
        assert calls == [1, 4]
        go_on.set()
        await _until_settled(outbox_db)
    assert sorted(calls) == [1, 2, 3, 4]


@pytest.mark.usefixtures("dead_for_certain")
@pytest.mark.parametrize("orphaned", [True, False])
async def test_the_attempt_that_killed_a_process_is_counted_before_the_next_one_is_made(
    orphaned: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Also where the former owner's name is on no shard any more; else it could kill for ever."""
    router, seen = Router(), list[tuple[Any, ...]]()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.extend(outbox_db.execute("SELECT started_by <> %s, error_count FROM entity_changes", [owner]).fetchall())

    _publish(outbox_db, 1)
    owner = _as_if_the_owner_had_died(outbox_db) if orphaned else uuid.uuid4()
    _was_running(outbox_db, owner, 1)
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
    assert seen == [(True, 1)]


@pytest.mark.usefixtures("dead_for_certain")
async def test_a_suspect_waits_until_the_outcome_of_the_one_before_is_in_the_table(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Else the end of the process would be counted against both."""
    router, calls = Router(), list[int]()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if len(calls) == 1:
            holder.execute("SELECT FROM entity_changes WHERE seq = %s FOR UPDATE", [change.seq])

    _publish(outbox_db, 2)
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), 1, 2)
    with psycopg.connect(outbox) as holder:
        async with consuming(outbox, router, stream=False) as app:
            delayed = _is(lambda: metric(app.metrics.registry, "cdc_settle_delayed_total") > 1)
            await eventually_async(delayed, what="its outcome cannot be written")
            assert len(calls) == 1
            holder.rollback()
            await _until_settled(outbox_db)
    assert sorted(calls) == [1, 2]


@pytest.mark.usefixtures("dead_for_certain")
@pytest.mark.parametrize("dead", ["skip", "pause"])
async def test_when_every_attempt_ended_with_its_process_the_change_is_dead_and_its_handler_is_not_called(
    dead: Any, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), []

    @router.on("x", max_attempts=2, dead=dead)
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)

    _publish(outbox_db, 2, 1)
    outbox_db.execute("UPDATE entity_changes SET error_count = 1 WHERE seq = 1")
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), 1)
    async with consuming(outbox, router):
        expected = {"dead": 1, "processed": 1} if dead == "skip" else {"dead": 1, "fresh": 1}
        await eventually_async(_is(lambda: states(outbox_db) == expected))
    assert calls == ([2] if dead == "skip" else [])
    [(count, error)] = outbox_db.execute("SELECT error_count, last_error FROM entity_changes WHERE seq = 1").fetchall()
    assert count == 2
    assert "process ended while the handler" in error
    assert "2 times" in error


async def test_what_a_stop_cuts_off_is_no_suspect(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, started = Router(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        started.set()
        await asyncio.Event().wait()

    _as_if_the_owner_had_died(outbox_db)
    _publish(outbox_db, 1)
    async with consuming(outbox, router, drain_time=0.01):
        await started.wait()
        assert _marks(outbox_db) == 1
    assert _marks(outbox_db) == 0
    assert outbox_db.execute("SELECT count(*) FROM cdc_shards").fetchone() == (0,)


async def test_a_lost_session_is_no_death(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, calls, started = Router(), list[tuple[int, bool]](), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append((change.attempt, change.crashed))
        if len(calls) == 1:
            started.set()
            await asyncio.Event().wait()

    _as_if_the_owner_had_died(outbox_db)
    _publish(outbox_db, 1)
    async with consuming(outbox, router):
        await started.wait()
        assert _marks(outbox_db) == 1
        _end_session(outbox_db)
        await _until_settled(outbox_db)
    assert calls == [(1, False), (1, False)]
    assert outbox_db.execute("SELECT error_count, last_error FROM entity_changes").fetchone() == (0, None)


@pytest.mark.parametrize("failures", [0, 2])
@pytest.mark.parametrize("next_attempt_at", [None, "-infinity"])
async def test_a_process_that_only_lost_its_session_has_time_to_say_that_it_lives(
    failures: int, next_attempt_at: str | None, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls, other = Router(), list[tuple[int, bool]](), asyncio.Event()

    @router.on("x", max_attempts=3)
    async def handle(change: cdc.Change) -> None:
        if change.seq == 3:
            other.set()
        elif change.seq == 1:
            calls.append((change.attempt, change.crashed))

    _publish(outbox_db, 2)
    outbox_db.execute(
        "UPDATE entity_changes SET error_count = %s, next_attempt_at = %s WHERE seq = 1", [failures, next_attempt_at]
    )
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), 1)
    async with consuming(outbox, router, sweep_interval=3600, poll_interval=3600):
        await eventually_async(_is(lambda: states(outbox_db).get("processed") == 1))
        outbox_db.execute("SELECT publish_change('x', '3')")
        await other.wait()  # its shards are taken over, and what it had was read a while ago
        outbox_db.execute("UPDATE entity_changes SET started_by = NULL WHERE seq = 1 AND NOT processed")
        await _until_settled(outbox_db)
    assert calls == [(failures + 1, False)]
    assert states(outbox_db) == {"processed": 3}


@pytest.mark.usefixtures("dead_for_certain")
async def test_a_suspect_is_none_any_more_if_that_is_said_while_it_waits_for_its_turn(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), list[tuple[int, int, bool]]()
    first, go_on = asyncio.Event(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append((change.seq, change.attempt, change.crashed))
        if not first.is_set():
            first.set()
            await go_on.wait()

    _publish(outbox_db, 2)
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), 1, 2)
    async with consuming(outbox, router):
        await first.wait()
        [(alone, _, _)] = calls
        outbox_db.execute("UPDATE entity_changes SET started_by = NULL WHERE seq <> %s", [alone])
        go_on.set()
        await _until_settled(outbox_db)
    assert calls == [(alone, 2, True), (3 - alone, 1, False)]


async def test_a_handler_in_a_thread_that_goes_on_without_its_session_does_not_keep_the_consumer_from_a_new_one(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, started, end = Router(), threading.Event(), threading.Event()

    @router.on("x")
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        started.set()
        end.wait()

    @router.on("y")
    async def another(change: cdc.Change) -> None: ...

    _as_if_the_owner_had_died(outbox_db)
    _publish(outbox_db, 1)
    async with consuming(outbox, router):
        await eventually_async(_is(started.is_set))
        _end_session(outbox_db)
        outbox_db.execute("SELECT publish_change('y', '1')")
        await eventually_async(
            _is(lambda: states(outbox_db) == {"fresh": 1, "processed": 1}), within_s=8, what="the other is handled"
        )
        end.set()
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"processed": 2}


@pytest.mark.usefixtures("dead_for_certain")
async def test_what_kills_its_process_alone_gets_three_attempts_however_many_others_have(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), []

    @router.on("x", max_attempts=20)
    async def handle(change: cdc.Change) -> None:
        calls.append((change.seq, change.attempt))

    _publish(outbox_db, 4)
    _was_running(outbox_db, _as_if_the_owner_had_died(outbox_db), 1, 2, 3)
    crashed = "UPDATE entity_changes SET error_count = %s, last_error = %s WHERE seq = %s"
    outbox_db.execute(crashed, [3, _CRASHED, 1])  # three starts were counted, and the last of them was made alone
    outbox_db.execute(crashed, [1, _CRASHED, 2])
    outbox_db.execute(crashed, [7, "ValueError: no", 3])  # it failed by itself, and may only have run beside
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
    assert sorted(calls) == [(2, 3), (3, 9), (4, 1)]
    assert states(outbox_db) == {"dead": 1, "processed": 3}
