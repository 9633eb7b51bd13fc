"""Handlers with a connection: their writes and the mark of the change commit together, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

import cdc
from cdc.core import lost_transactions
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.engine import reconnecting, settler
from cdc.engine.dispatcher import Dispatcher
from cdc.postgres.shard_locks import lock_class
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states

pytestmark = pytest.mark.server

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}


@pytest.fixture
def effects(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE effect (seq bigint, attempt int)")
    return outbox_db


def _publish(db: psycopg.Connection, count: int = 1, keys: int = 1, entity_type: str = "x") -> None:
    db.execute(
        "SELECT publish_change(%s, (n %% %s)::text) FROM generate_series(1, %s) AS n", [entity_type, keys, count]
    )


def _effects(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    return db.execute("SELECT seq, attempt FROM effect ORDER BY seq").fetchall()


def _all_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


async def _write(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    await connection.execute("INSERT INTO effect VALUES (%s, %s)", [change.seq, change.attempt])


def _write_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
    connection.execute("INSERT INTO effect VALUES (%s, %s)", [change.seq, change.attempt])


@pytest.mark.parametrize("handler", [_write, _write_in_thread])
async def test_what_a_handler_writes_commits_with_the_mark_of_its_change(
    handler: Any, outbox: str, effects: psycopg.Connection
) -> None:
    router = Router()
    router.on("x")(handler)
    _publish(effects, 60, 7)
    async with consuming(outbox, router) as app:
        await _all_settled(effects)
    # The table knows before the consumer does: a thread has committed, and is on its way back.
    assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="processed") == 60
    assert metric(app.metrics.registry, "cdc_settle_changes_count") == 0, "nothing is left to settle"
    assert states(effects) == {"processed": 60}
    assert len(_effects(effects)) == 60
    # In one transaction: row and mark carry the same id.
    assert effects.execute(
        "SELECT count(*) FROM effect JOIN entity_changes AS c USING (seq) WHERE effect.xmin = c.xmin"
    ).fetchone() == (60,)


@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_a_failed_attempt_wrote_is_rolled_back(
    in_thread: bool, outbox: str, effects: psycopg.Connection
) -> None:
    router = Router()

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await _write(change, connection)
        if change.attempt < 3:
            raise ValueError("no")

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        _write_in_thread(change, connection)
        if change.attempt < 3:
            raise ValueError("no")

    router.on("x")(in_a_thread if in_thread else on_loop)
    _publish(effects)
    async with consuming(outbox, router, **_QUICK):
        await _all_settled(effects)
    assert _effects(effects) == [(1, 3)]
    [(count, error)] = effects.execute("SELECT error_count, last_error FROM entity_changes").fetchall()
    assert (count, error.split("\n")[0]) == (2, "ValueError: no")


async def test_for_a_handler_that_commits_or_rolls_back_by_itself_the_error_says_so(
    outbox: str, effects: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        match change.entity_id:
            case "0":
                await connection.commit()
            case "1":
                await connection.rollback()
            case "2":
                await connection.set_autocommit(False)
            case "3":
                await connection.execute("COMMIT")
            case "4":
                await connection.execute("ROLLBACK")
            case "5":
                await connection.execute("COMMIT")
                await connection.execute("BEGIN")
            case "6":
                await connection.transaction().__aenter__()

    _publish(effects, 7, 7)
    async with consuming(outbox, router):
        await _all_settled(effects)
    assert states(effects) == {"dead": 7}
    told: dict[str, str] = dict(effects.execute("SELECT entity_id, last_error FROM entity_changes").fetchall())
    assert "commit() forbidden" in told["0"]
    assert "rollback() forbidden" in told["1"]
    assert "ProgrammingError" in told["2"]
    for key in "345":
        assert "ended the transaction it was given" in told[key], key
    assert "OutOfOrderTransactionNesting" in told["6"]


async def test_a_database_error_that_the_handler_swallows_fails_the_attempt(
    outbox: str, effects: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await _write(change, connection)
        with contextlib.suppress(psycopg.Error):
            await connection.execute("SELECT 1 / 0")

    _publish(effects)
    async with consuming(outbox, router):
        await _all_settled(effects)
    assert states(effects) == {"dead": 1}
    assert _effects(effects) == []
    assert "InFailedSqlTransaction" in effects.execute("SELECT last_error FROM entity_changes").fetchone()[0]


async def test_retry_and_discard_roll_back_what_was_written(outbox: str, effects: psycopg.Connection) -> None:
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await _write(change, connection)
        if change.entity_id == "0":
            raise cdc.Discard("not for us")
        if change.attempt == 1:
            raise cdc.Retry(after=0)

    _publish(effects, 2, 2)
    async with consuming(outbox, router):
        await _all_settled(effects)
    assert states(effects) == {"processed": 2}
    assert [attempt for _, attempt in _effects(effects)] == [2]


async def test_two_consumers_that_both_believe_they_own_a_change_run_it_once(
    outbox: str, effects: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cdc.consumer")
    router, waiting, go_on = Router(), asyncio.Event(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await _write(change, connection)
        waiting.set()
        await go_on.wait()

    second = Router()
    second.on("x")(_write)
    _publish(effects, 3)
    async with consuming(outbox, router):
        await waiting.wait()
        # Its locks go, as if the server had lost it, and its transaction is still open. A consumer does nothing of the
        # kind by itself, so a step of it is taken away.
        [(pid,)] = effects.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc: shards' AND datname = current_database()"
        ).fetchall()
        monkeypatch.setattr(Dispatcher, "session_lost", _nothing)
        # Nor does it come back, or it would get half of the shards.
        monkeypatch.setattr(reconnecting, "next_pause_s", lambda before_s, worked_s: 600.0)
        effects.execute("SELECT pg_terminate_backend(%s)", [pid])
        async with consuming(outbox, second) as other:

            async def owns_all() -> bool:
                return not other.consumer.notifications.is_sharing

            await eventually_async(owns_all)

            async def knocked() -> bool:
                return "another session has the change" in caplog.text

            await eventually_async(knocked)
            assert _effects(effects) == [], "the row is still being handled elsewhere, which never means done"
            go_on.set()
            await _all_settled(effects)
    assert states(effects) == {"processed": 3}
    assert len(_effects(effects)) == 3


async def _nothing(_self: Dispatcher) -> None: ...


@pytest.mark.parametrize(
    "decision",
    [
        "processed = true, processed_at = now()",
        "dead_at = now()",
        "next_attempt_at = now() + '1 hour'",
        "error_count = 1",
    ],
    ids=["processed", "dead", "put off", "another attempt"],
)
@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_another_session_has_decided_after_it_was_read_is_not_called(
    in_thread: bool, decision: LiteralString, outbox: str, effects: psycopg.Connection
) -> None:
    calls, go_on = list[tuple[int, int]](), threading.Event()
    router = Router()

    def call(change: cdc.Change) -> None:
        calls.append((change.seq, change.attempt))
        assert len(calls) > 1 or go_on.wait(20)

    @router.on("x")
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        call(change)

    @router.on("y")
    async def handle_on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await asyncio.to_thread(call, change)

    _publish(effects, 2, 2, "x" if in_thread else "y")
    async with consuming(outbox, router, transactions=1, poll_interval=3600, sweep_interval=3600) as app:

        async def second_waits() -> bool:
            return len(calls) == 1 and app.status.consumer.running + app.status.consumer.queued == 2

        await eventually_async(second_waits, what="the first is called, and the second waits for its connection")
        [(first, _)] = calls
        effects.execute(sql.SQL("UPDATE entity_changes SET {} WHERE seq = {}").format(sql.SQL(decision), 3 - first))
        before = effects.execute("SELECT * FROM entity_changes WHERE seq = %s", [3 - first]).fetchall()
        go_on.set()

        async def first_done() -> bool:
            [(done,)] = effects.execute("SELECT processed FROM entity_changes WHERE seq = %s", [first]).fetchall()
            return bool(done) and (decision != "error_count = 1" or settled(effects))

        await eventually_async(first_done)
    if decision == "error_count = 1":
        assert calls == [(first, 1), (3 - first, 2)], "read again"
    else:
        assert calls == [(first, 1)]
        assert effects.execute("SELECT * FROM entity_changes WHERE seq = %s", [3 - first]).fetchall() == before


async def test_when_its_connection_dies_the_change_runs_again_and_no_attempt_is_counted(
    outbox: str, effects: psycopg.Connection
) -> None:
    router, running = Router(), asyncio.Event()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await _write(change, connection)
        if not running.is_set():
            running.set()
            await connection.execute("SELECT pg_sleep(20)")

    _publish(effects)
    async with consuming(outbox, router):
        await running.wait()

        async def ended() -> bool:
            return bool(
                effects.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'cdc: handlers' AND wait_event = 'PgSleep'"
                    " AND datname = current_database()"
                ).fetchall()
            )

        await eventually_async(ended)
        await _all_settled(effects)
    assert _effects(effects) == [(1, 1)]
    assert effects.execute("SELECT error_count FROM entity_changes").fetchone() == (0,)


async def test_a_transactional_change_waits_until_the_plain_ones_before_it_are_settled_and_that_is_at_once(
    outbox: str, effects: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash could leave the later one marked and the earlier one to run again."""
    monkeypatch.setattr(settler, "_PAUSE_S", 60.0)
    router, seen = Router(), []

    @router.on("x", "UPDATE")
    async def plain(change: cdc.Change) -> None: ...

    @router.on("x", "INSERT")
    async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        cursor = await connection.execute(
            "SELECT count(*) FROM entity_changes WHERE seq < %s AND NOT processed", [change.seq]
        )
        seen.append(await cursor.fetchone())

    for _ in range(10):
        effects.execute("SELECT publish_change('x', 'k', 'UPDATE'), publish_change('x', 'k', 'INSERT')")
    async with consuming(outbox, router):
        await _all_settled(effects)
    assert seen == [(0,)] * 10


async def test_a_dead_letter_that_pauses_its_key_holds_it_until_somebody_has_decided(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls, fixed = Router(), [], asyncio.Event()

    @router.on("x", max_attempts=1, dead="pause")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.seq == 1 and not fixed.is_set():
            raise ValueError("no")

    _publish(outbox_db, 4)
    _publish(outbox_db, 2, 2)  # of two keys, "0" and "1"; everything above is "0"
    async with consuming(outbox, router) as app:

        async def the_other_key_is_done() -> bool:
            return states(outbox_db) == {"dead": 1, "processed": 1, "fresh": 4}

        await eventually_async(the_other_key_is_done)
        assert sorted(calls) == [1, 5]

        async def listens() -> bool:
            return app.status.listening

        await eventually_async(listens)
        fixed.set()
        outbox_db.execute("SELECT reprocess_failed_actions(p_max_errors => 1)")
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"processed": 6}
    assert [seq for seq in calls if seq != 5][1:] == [1, 2, 3, 4, 6]


async def _close(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    await connection.close()


async def _terminate(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def _close_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
    connection.close()


def _terminate_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
    connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")


async def _terminate_batch(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
    if any(change.entity_id == "bad" for change in changes):
        await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize("lose", [_close, _terminate, _close_in_thread, _terminate_in_thread, _terminate_batch])
async def test_a_handler_that_loses_its_connection_is_called_ten_times_and_costs_no_other_change(
    lose: Any, outbox: str, effects: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.05)
    router, calls = Router(), 0

    if asyncio.iscoroutinefunction(lose) and lose is not _terminate_batch:

        @router.on("x")
        async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
            nonlocal calls
            if change.entity_id == "bad":
                calls += 1
                await lose(change, connection)

    elif lose is _terminate_batch:

        @router.on("x", batch=20)
        async def batch(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
            nonlocal calls
            calls += any(change.entity_id == "bad" for change in changes)
            await lose(changes, connection)

    else:

        @router.on("x")
        def in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
            nonlocal calls
            if change.entity_id == "bad":
                calls += 1
                lose(change, connection)

    effects.execute(
        "SELECT publish_change('x', CASE n WHEN 5 THEN 'bad' ELSE n::text END) FROM generate_series(1, 20) AS n"
    )
    async with consuming(outbox, router):
        await _all_settled(effects)
    assert states(effects) == {"dead": 1, "processed": 19}
    assert calls == lost_transactions.LOSSES_MAX
    [(errors, text)] = effects.execute(
        "SELECT error_count, last_error FROM entity_changes WHERE dead_at IS NOT NULL"
    ).fetchall()
    assert errors == 1
    assert text.startswith("the connection was lost while the handler")
    assert "10 times in a row" in text
    assert effects.execute("SELECT sum(error_count) FROM entity_changes WHERE processed").fetchone() == (0,)


@pytest.mark.parametrize("in_thread", [False, True])
async def test_connections_that_died_in_the_pool_are_no_losses_of_the_next_change(
    in_thread: bool, outbox: str, effects: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.001)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.01)
    count = lost_transactions.LOSSES_MAX + 2
    router, together, meeting = Router(), asyncio.Barrier(count), threading.Barrier(count)

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        if change.entity_id != "alone":
            await together.wait()
        await _write(change, connection)

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        if change.entity_id != "alone":
            meeting.wait()
        _write_in_thread(change, connection)

    router.on("x", group=1)(in_a_thread if in_thread else on_loop)
    _publish(effects, count, count)
    async with consuming(outbox, router, transactions=count, concurrency=count, threads=count):
        await _all_settled(effects)
        ended = effects.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'cdc: handlers' AND datname = current_database()"
        ).fetchall()
        assert len(ended) == count
        effects.execute("SELECT publish_change('x', 'alone')")
        await _all_settled(effects)
    assert states(effects) == {"processed": count + 1}


async def test_a_deadlock_with_another_transaction_counts_as_no_attempt(
    outbox: str, effects: psycopg.Connection
) -> None:
    router, calls = Router(), 0

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            await connection.execute("DO $$ BEGIN RAISE 'as the server says it' USING ERRCODE = '40P01'; END $$")
        await _write(change, connection)

    _publish(effects)
    async with consuming(outbox, router):
        await _all_settled(effects)
    assert _effects(effects) == [(1, 1)]
    assert calls == 4


async def test_deadlocks_that_do_not_end_are_failed_attempts(
    outbox: str, effects: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.001)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.01)
    router = Router()

    @router.on("x", max_attempts=2)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("DO $$ BEGIN RAISE 'as the server says it' USING ERRCODE = '40001'; END $$")

    _publish(effects)
    async with consuming(outbox, router, **_QUICK):
        await _all_settled(effects)
    [(errors, text)] = effects.execute("SELECT error_count, last_error FROM entity_changes").fetchall()
    assert errors == 2
    assert text.startswith("SerializationFailure: as the server says it")


async def test_a_thread_that_got_its_connection_after_the_session_was_lost_calls_nothing(
    admin_dsn: str, outbox: str, effects: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be cut off, and whoever has the shard by then may be at work on an earlier change of the key."""
    caplog.set_level("INFO", logger="cdc.consumer")
    router, calls = Router(), 0

    @router.on("x")
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        nonlocal calls
        calls += 1

    shut = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    name = sql.Identifier(effects.info.dbname)
    async with consuming(outbox, router, stream=False) as app:

        async def begun() -> bool:
            return app.status.consumer.owned_shards == SHARDS

        await eventually_async(begun)
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(shut.format(name, sql.Literal(False)))
            _publish(effects)

            async def waits() -> bool:
                return "error connecting in" in caplog.text

            await eventually_async(waits, what="a thread waits for its connection")
            effects.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'cdc: shards' AND datname = current_database()"
            )
            effects.execute(
                "SELECT pg_advisory_lock(%s, shard) FROM generate_series(0, %s) AS shard",
                [lock_class("public"), SHARDS - 1],
            )

            async def lost() -> bool:
                return app.status.consumer.owned_shards == 0

            await eventually_async(lost)
            admin.execute(shut.format(name, sql.Literal(True)))

        async def given_up() -> bool:
            return calls > 0 or "session was lost before the call" in caplog.text

        await eventually_async(given_up, what="the thread has its connection")
        assert calls == 0
        effects.execute("SELECT pg_advisory_unlock_all()")
        await _all_settled(effects)
    assert calls == 1
