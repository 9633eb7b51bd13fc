"""What a handler's author and an operator may rely on, with one consumer on a real server."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb
from pydantic import BaseModel

import cdc
from cdc.contrib.demo.temp_server import free_port
from cdc.core.router import Router
from cdc.observability.snapshots import Role
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, slot_name, states

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}


def _until_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


def _publish(db: psycopg.Connection, entity_type: str, entity_id: str = "1", **new: Any) -> int:
    """Capture a change by hand; returns its seq."""
    [(seq,)] = db.execute(
        "SELECT publish_change(%s, %s, 'INSERT', %s)", [entity_type, entity_id, Jsonb(new)]
    ).fetchall()
    return int(seq)


def _row(db: psycopg.Connection, seq: int) -> dict[str, Any]:
    with db.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute("SELECT * FROM entity_changes WHERE seq = %s", [seq]).fetchone()
    assert found is not None
    return found


def _said(row: dict[str, Any]) -> str:
    """Class and text of its error, without the frames below."""
    return str(row["last_error"]).split("\n  ")[0]


async def test_a_committed_row_reaches_its_handler_through_the_slot_and_is_marked_processed(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE note (id int PRIMARY KEY, body text)")
    outbox_db.execute(
        "CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON note"
        " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    router, seen = Router(), []

    @router.on("note")
    async def handle(change: cdc.Change) -> None:
        seen.append(change)

    async with consuming(outbox, router, sweep_interval=3600) as app:
        await eventually_async(_streaming(app))
        outbox_db.execute("INSERT INTO note VALUES (1, 'a')")
        outbox_db.execute("UPDATE note SET body = 'b'")
        outbox_db.execute("DELETE FROM note")
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == 3
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="sweep") == 0
    assert [(c.operation, c.old, c.new) for c in seen] == [
        ("INSERT", None, {"id": 1, "body": "a"}),
        ("UPDATE", {"id": 1, "body": "a"}, {"id": 1, "body": "b"}),
        ("DELETE", {"id": 1, "body": "b"}, None),
    ]
    row = _row(outbox_db, seen[0].seq)
    assert (row["processed"], row["error_count"], row["last_error"]) == (True, 0, None)
    assert row["processed_at"] >= row["changed_at"]
    first = seen[0]
    assert (first.id, first.entity_type, first.entity_id, first.table, first.attempt) == (
        row["id"], "note", "1", "note", 1,
    )  # fmt: skip


async def test_a_change_is_frozen(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, errors = Router(), []

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change) -> None:
        change.new = {}  # type: ignore[misc]

    @router.on_error
    def failed(change: cdc.Change, error: BaseException) -> None:
        errors.append(type(error).__name__)

    seq = _publish(outbox_db, "x")
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
        await eventually_async(_is(lambda: errors == ["FrozenInstanceError"]))
    assert _row(outbox_db, seq)["dead_at"] is not None


async def test_a_sync_handler_runs_in_a_thread_of_its_own(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, threads = Router(), []

    @router.on("x")
    def handle(change: cdc.Change) -> None:
        threads.append(threading.current_thread())

    _publish(outbox_db, "x")
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
    assert threads[0] is not threading.main_thread()


class Task(BaseModel):
    id: int
    title: str


async def test_a_row_that_fits_the_model_arrives_as_an_instance_and_one_that_does_not_is_dead_at_once(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, seen = Router(), []

    @router.on("task", model=Task, max_attempts=5)
    async def handle(change: cdc.Change) -> None:
        seen.append(change.new)

    bad = _publish(outbox_db, "task", "1", id="secret-value", title=None)
    good = _publish(outbox_db, "task", "1", id=1, title="t")
    async with consuming(outbox, router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="validation") == 1
    assert seen == [Task(id=1, title="t")]
    assert _row(outbox_db, good)["processed"]
    dead = _row(outbox_db, bad)
    assert dead["dead_at"] is not None
    assert dead["error_count"] == 1
    assert "id: Input should be a valid integer" in dead["last_error"]
    assert "title: Input should be a valid string" in dead["last_error"]
    assert "secret-value" not in dead["last_error"]
    assert "secret-value" not in caplog.text


@pytest.mark.parametrize("model", [None, dict])
async def test_a_number_longer_than_python_reads_fails_its_own_change_only(
    outbox: str, outbox_db: psycopg.Connection, model: object
) -> None:
    router = Router()

    @router.on("x", model=model)
    async def handle(change: cdc.Change) -> None:
        assert change.new

    outbox_db.execute("SELECT publish_change('x', '1', new_data => ('[' || repeat('1', 5000) || ']')::jsonb)")
    outbox_db.execute("SELECT publish_change('x', '2', new_data => '{\"n\": 1}')")
    async with consuming(outbox, router, **_QUICK):
        await _until_settled(outbox_db)
    states = "SELECT entity_id, processed, dead_at IS NOT NULL, last_error FROM entity_changes ORDER BY seq"
    long, other = outbox_db.execute(states.encode()).fetchall()
    assert long[:3] == ("1", False, True)
    assert long[3].startswith("'new' cannot be read by Python: ValueError")
    assert other == ("2", True, False, None)


async def test_a_handler_that_fails_twice_and_then_succeeds_processes_the_change(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, attempts = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        attempts.append(change.attempt)
        if change.attempt < 3:
            raise ValueError("not yet")

    seq = _publish(outbox_db, "x")
    async with consuming(outbox, router, **_QUICK) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="retried") == 2
    row = _row(outbox_db, seq)
    assert attempts == [1, 2, 3]
    assert (row["processed"], row["error_count"], _said(row)) == (True, 2, "ValueError: not yet")


async def test_a_handler_that_always_fails_leaves_a_dead_letter_after_three_attempts_and_its_key_goes_on(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.new["bad"]:
            raise RuntimeError("never")

    bad = _publish(outbox_db, "x", "k", bad=True)
    good = _publish(outbox_db, "x", "k", bad=False)
    async with consuming(outbox, router, **_QUICK):
        await _until_settled(outbox_db)
    assert calls == [bad, bad, bad, good]
    row = _row(outbox_db, bad)
    assert (row["processed"], row["error_count"], _said(row)) == (False, 3, "RuntimeError: never")
    assert row["dead_at"] is not None


async def test_a_waiting_retry_holds_back_its_own_key_and_nothing_else(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), []
    open_up = asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append((change.entity_id, change.seq))
        if change.entity_id == "held" and not open_up.is_set():
            raise cdc.Retry(after=0.05)

    first = _publish(outbox_db, "x", "held")
    async with consuming(outbox, router, max_attempts=10_000) as app:
        await eventually_async(_is(lambda: len(calls) > 1))
        behind = [_publish(outbox_db, "x", "held") for _ in range(5)]
        others = [_publish(outbox_db, "x", f"free{n}") for n in range(20)]
        await eventually_async(_is(lambda: {seq for _, seq in calls} >= set(others)))
        assert {seq for key, seq in calls if key == "held"} == {first}
        open_up.set()
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="retry") > 1
    held = [seq for key, seq in calls if key == "held"]
    assert held[-5:] == behind
    assert set(held[:-5]) == {first}


async def test_a_discarded_change_is_processed_with_the_reason_and_no_error(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x")
    def handle(change: cdc.Change) -> None:
        raise cdc.Discard("not for us")

    seq = _publish(outbox_db, "x")
    async with consuming(outbox, router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="discarded") == 1
    row = _row(outbox_db, seq)
    assert (row["processed"], row["error_count"], row["last_error"]) == (True, 0, "discarded: not for us")


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_rejected_change_is_a_dead_letter_at_once_and_its_reason_is_in_no_log(
    transactional: bool, outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router = Router()
    outbox_db.execute("CREATE TABLE effect (seq bigint)")

    async def plain(change: cdc.Change) -> None:
        raise cdc.Reject("no such user Ada")

    async def writes(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO effect VALUES (%s)", [change.seq])
        raise cdc.Reject("no such user Ada")

    router.on("x")(writes if transactional else plain)
    seq = _publish(outbox_db, "x")
    async with consuming(outbox, router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="dead") == 1
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="rejected") == 1
    row = _row(outbox_db, seq)
    assert row["dead_at"] is not None
    assert (row["processed"], row["error_count"], row["last_error"]) == (False, 1, "rejected: no such user Ada")
    assert outbox_db.execute("SELECT FROM effect").fetchall() == [], "what it wrote is rolled back"
    assert "rejected it" in caplog.text
    assert "Ada" not in caplog.text


async def test_an_operation_that_no_handler_of_the_type_names_is_marked_processed_and_counted_as_skipped(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq, router = _publish(outbox_db, "x"), Router()
    router.on("x", "DELETE")(lambda change: None)
    async with consuming(outbox, router) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="skipped") == 1
    assert _row(outbox_db, seq)["processed"]


async def test_an_async_handler_that_hangs_is_cut_off_at_its_time_limit(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x", timeout=0.05, max_attempts=2)
    async def handle(change: cdc.Change) -> None:
        await asyncio.Event().wait()

    seq = _publish(outbox_db, "x")
    async with consuming(outbox, router, **_QUICK) as app:
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="timeout") == 2
    row = _row(outbox_db, seq)
    assert (row["error_count"], row["last_error"]) == (2, "took longer than 0.05 s")


async def test_a_sync_handler_that_overruns_is_reported_and_holds_its_key_until_it_returns(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, calls = Router(), []
    release = threading.Event()

    @router.on("x", timeout=0.05)
    def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.entity_id == "slow":
            release.wait(30)

    slow = _publish(outbox_db, "x", "slow")
    behind = _publish(outbox_db, "x", "slow")
    other = _publish(outbox_db, "x", "other")
    async with consuming(outbox, router) as app:
        await eventually_async(_is(lambda: "is still running after 0.05 s" in caplog.text))
        await eventually_async(_is(lambda: _row(outbox_db, other)["processed"]))
        assert set(calls) == {slow, other}
        release.set()
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_handler_errors_total", kind="timeout") == 1
    assert calls[-1] == behind
    assert _row(outbox_db, slow)["error_count"] == 0


async def test_hooks_hear_of_processed_and_failed_changes_and_their_own_failures_disturb_nothing(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, heard = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        if change.attempt == 1:
            raise KeyError("once")

    @router.on_processed
    async def processed(change: cdc.Change) -> None:
        heard.append(("processed", change.attempt))
        raise RuntimeError("hook")

    @router.on_error
    def failed(change: cdc.Change, error: BaseException) -> None:
        heard.append((type(error).__name__, change.attempt))
        raise SystemExit(1)

    _publish(outbox_db, "x")
    async with consuming(outbox, router, **_QUICK):
        await _until_settled(outbox_db)
        await eventually_async(_is(lambda: len(heard) == 2))
        await eventually_async(_is(lambda: caplog.text.count("the work goes on") == 2))
    assert heard == [("KeyError", 1), ("processed", 2)]


async def test_whatever_a_handler_raises_is_the_failure_of_that_change_alone(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change) -> None:
        match change.entity_id:
            case "exit":
                raise SystemExit(3)
            case "cancelled":
                raise asyncio.CancelledError
            case "timeout":
                raise TimeoutError("the handler's own")
            case "nul":
                raise ValueError("a\0b \ud800")
            case "long":
                raise ValueError("x" * 1_000_000)

    @router.on("y", max_attempts=1)
    def in_thread(change: cdc.Change) -> None:
        raise {"stop": StopIteration, "exit": SystemExit}.get(change.entity_id, GeneratorExit)

    seqs = {key: _publish(outbox_db, "x", key) for key in ("exit", "cancelled", "timeout", "nul", "long", "fine")}
    seqs |= {f"y-{key}": _publish(outbox_db, "y", key) for key in ("stop", "exit", "generator")}
    async with consuming(outbox, router):
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"dead": 8, "processed": 1}
    assert _said(_row(outbox_db, seqs["timeout"])) == "TimeoutError: the handler's own"
    assert _row(outbox_db, seqs["nul"])["last_error"].startswith("ValueError: a\\0b")
    assert len(_said(_row(outbox_db, seqs["long"]))) <= 2_000


async def test_a_thousand_changes_of_fifty_keys_from_eight_writers_are_handled_in_seq_order_per_key(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE account (id int PRIMARY KEY, n int DEFAULT 0)")
    outbox_db.execute("INSERT INTO account SELECT generate_series(1, 50)")
    outbox_db.execute("CREATE TRIGGER t AFTER UPDATE ON account FOR EACH ROW EXECUTE FUNCTION capture_entity_change()")
    router = Router()
    handled: dict[str, list[int]] = defaultdict(list)
    running: set[str] = set()
    overlapping: list[str] = []  # kept, not asserted there: what a handler raises is only a failed attempt
    dice = random.Random(1)

    @router.on("account")
    async def handle(change: cdc.Change) -> None:
        if change.entity_id in running:
            overlapping.append(change.entity_id)
        running.add(change.entity_id)
        await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=dice.random() * 0.002)
        running.discard(change.entity_id)
        handled[change.entity_id].append(change.seq)
        if dice.random() < 0.05 and change.attempt == 1:
            handled[change.entity_id].pop()
            raise RuntimeError("again")

    async def write(seed: int) -> None:
        own = random.Random(seed)
        async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
            for _ in range(125):
                await connection.execute("UPDATE account SET n = n + 1 WHERE id = %s", [own.randint(1, 50)])

    async with consuming(outbox, router, **_QUICK):
        await asyncio.gather(*(write(seed) for seed in range(8)))
        await _until_settled(outbox_db)
    assert overlapping == [], "two changes of one key at a time"
    assert states(outbox_db) == {"processed": 1000}
    assert sum(map(len, handled.values())) == 1000
    for key, seqs in handled.items():
        assert seqs == sorted(seqs), f"key {key}"


async def test_a_row_inserted_by_hand_is_found_by_the_sweep_and_a_notify_makes_it_at_once(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, seen = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.append(change.entity_id)

    insert = (
        "INSERT INTO entity_changes (table_name, entity_type, entity_id, operation) VALUES ('t', 'x', %s, 'INSERT')"
    )
    async with consuming(outbox, router, sweep_interval=3600) as app:
        await eventually_async(_streaming(app))
        await eventually_async(_is(lambda: app.status.listening))
        with outbox_db.transaction():
            outbox_db.execute(insert, ["noted"])
            outbox_db.execute("""NOTIFY entity_change, '{"table": "t", "operation": "INSERT"}'""")
        await _until_settled(outbox_db)
    async with consuming(outbox, router, sweep_interval=0.05):
        outbox_db.execute(insert, ["swept"])
        await _until_settled(outbox_db)
    assert seen == ["noted", "swept"]


async def test_requeued_dead_letters_run_again_at_once(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, calls = Router(), []
    fixed = asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.attempt)
        if not fixed.is_set():
            raise RuntimeError("broken")

    _publish(outbox_db, "x")
    async with consuming(outbox, router, sweep_interval=3600, **_QUICK) as app:
        await _until_settled(outbox_db)
        await eventually_async(_is(lambda: app.status.listening))
        fixed.set()
        assert outbox_db.execute("SELECT requeued_count FROM reprocess_failed_actions()").fetchall() == [(1,)]
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"processed": 1}
    assert calls == [1, 2, 3, 1]


async def test_a_change_whose_commit_hangs_is_found_within_milliseconds_of_its_release_without_a_sweep(
    outbox: str, outbox_db: psycopg.Connection, admin_dsn: str
) -> None:
    """The walsender sends the wake-up at the flush of the commit; the row is visible after the standby has answered."""
    router, handled_at = Router(), []
    loop = asyncio.get_running_loop()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        handled_at.append(loop.time())

    delays = []
    async with (
        consuming(outbox, router, sweep_interval=3600) as app,
        await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as admin,
        await psycopg.AsyncConnection.connect(outbox, autocommit=True) as writer,
    ):
        await admin.execute("SET synchronous_commit = local")
        await eventually_async(_streaming(app))
        for _ in range(3):
            commit = await _hanging_commit(admin, writer)
            await eventually_async(_is(lambda: app.status.consumer.uncommitted_wakeups > 0))
            before = len(handled_at)
            await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            released = loop.time()
            await admin.execute("SELECT pg_reload_conf()")
            await commit
            await eventually_async(_is(lambda before=before: len(handled_at) == before + 1))
            delays.append(handled_at[-1] - released)
        await _until_settled(outbox_db)
        assert metric(app.metrics.registry, "cdc_visibility_retries_total", result="found") >= 3
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="sweep") == 0
    assert min(delays) < 0.1


async def _hanging_commit(
    admin: psycopg.AsyncConnection, writer: psycopg.AsyncConnection
) -> asyncio.Task[psycopg.AsyncCursor]:
    """Publishes until a commit hangs: some moments pass before every process of the server knows the setting."""
    await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody_here'")
    await admin.execute("SELECT pg_reload_conf()")
    pid = writer.info.backend_pid
    while True:
        commit = asyncio.create_task(writer.execute("SELECT publish_change('x', '1')"))

        async def decided(commit: asyncio.Task[psycopg.AsyncCursor] = commit) -> bool:
            found = await admin.execute("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", [pid])
            return commit.done() or await found.fetchone() == ("SyncRep",)

        await eventually_async(decided)
        if not commit.done():
            return commit


async def test_a_stop_does_not_wait_for_ever_for_a_settle_that_hangs(
    outbox: str, outbox_db: psycopg.Connection, admin_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    router, handled = Router(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        handled.set()

    async with (
        await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as admin,
        await psycopg.AsyncConnection.connect(outbox, autocommit=True) as writer,
    ):
        await admin.execute("SET synchronous_commit = local")
        outbox_db.execute("SET synchronous_commit = local")
        try:
            async with consuming(outbox, router, drain_time=0.2) as app:
                await eventually_async(_streaming(app))
                commit = await _hanging_commit(admin, writer)
                _publish(outbox_db, "x", "local")
                await handled.wait()
            assert "could not be settled" in caplog.text
        finally:
            await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await admin.execute("SELECT pg_reload_conf()")
        await commit


async def test_without_a_schema_the_consumer_waits_for_it_and_says_so(
    database: str, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    from cdc.postgres import migrations

    router, seen = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.append(change.seq)

    async with consuming(database, router) as app:
        await eventually_async(_is(lambda: "there is no table" in caplog.text))
        assert "cdc db install" in caplog.text
        assert not all(check.ok for check in app.readiness())
        migrations.install(db, "public")
        _publish(db, "x")
        await _until_settled(db)
        assert all(check.ok for check in app.readiness())
    assert seen


async def test_an_outbox_works_in_a_schema_of_any_name(database: str, db: psycopg.Connection) -> None:
    from cdc.postgres import migrations

    name = 'off by 50% "(s)"; %(seqs)s é'
    migrations.install(db, name)
    router, seen = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        seen.append(change.attempt)
        if change.attempt == 1:
            raise cdc.Retry(after=0)

    async with consuming(database, router, schema=name, **_QUICK) as app:
        await eventually_async(_streaming(app))
        db.execute(sql.SQL("SELECT {}('x', '1')").format(sql.Identifier(name, "publish_change")))
        processed = sql.SQL("SELECT count(*) FROM {} WHERE processed").format(sql.Identifier(name, "entity_changes"))
        await eventually_async(_is(lambda: db.execute(processed).fetchone() == (1,)))
        figures = app.metrics.registry
        await eventually_async(_is(lambda: metric(figures, "cdc_collector_success", collector="outbox") == 1))
    assert seen == [1, 2]


async def test_the_library_call_drains_when_it_is_cancelled(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = Router()
    running, go_on = asyncio.Event(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        running.set()
        await go_on.wait()

    _publish(outbox_db, "x")
    work = asyncio.create_task(cdc.run(outbox, router, slot_name="test_library"))
    await running.wait()
    work.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert states(outbox_db) == {"processed": 1}


async def test_a_setting_that_does_not_exist_is_refused_by_the_library_call(outbox: str) -> None:
    with pytest.raises(cdc.CdcError, match="'concurency' is not a setting"):
        await cdc.run(outbox, Router(), concurency=5)


async def test_handlers_running_at_a_stop_get_their_time_and_what_is_cut_off_is_no_error_of_the_change(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    router = Router()
    running: set[str] = set()
    finish = asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        running.add(change.entity_id)
        await (finish if change.entity_id == "quick" else asyncio.Event()).wait()

    quick, never, queued = (_publish(outbox_db, "x", key) for key in ("quick", "never", "never"))
    async with consuming(outbox, router, drain_time=0.3) as app:
        await eventually_async(_is(lambda: running == {"quick", "never"}))
        app.consumer.stop()
        finish.set()
        await eventually_async(_is(lambda: "1 handlers were cut off" in caplog.text))
    assert _row(outbox_db, quick)["processed"]
    for seq in (never, queued):
        row = _row(outbox_db, seq)
        assert (row["processed"], row["error_count"], row["last_error"], row["next_attempt_at"]) == (
            False, 0, None, None,
        )  # fmt: skip


def _is(condition: Any) -> Any:
    async def check() -> Any:
        return condition()

    return check


def _streaming(app: Any) -> Any:
    """The stream is connected and every shard is read by number."""
    return _is(lambda: app.status.role is Role.STREAMING and app.status.consumer.live_shards == 64)


async def test_metrics_and_health_answer_from_a_thread_of_their_own_while_a_handler_blocks_the_event_loop(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, blocking, release = Router(), threading.Event(), threading.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        blocking.set()
        release.wait(20)

    port = free_port()

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()

    def ask() -> tuple[tuple[int, str], ...]:
        try:
            blocking.wait(20)
            return get("/metrics"), get("/livez"), get("/readyz")
        finally:
            release.set()

    slot = slot_name()
    async with consuming(outbox, router, http_port=port, slot_name=slot) as app:
        await eventually_async(_streaming(app))
        registry = app.metrics.registry
        await eventually_async(_is(lambda: metric(registry, "cdc_slot_present") == 1))
        _publish(outbox_db, "x")
        (_, text), (alive, _), (ready, checks) = await asyncio.to_thread(ask)
        await _until_settled(outbox_db)
    assert (alive, ready) == (200, 200), checks
    for sample in (
        f'cdc_stream_connected{{slot="{slot}"}} 1.0',
        'cdc_role{role="streaming"} 1.0',
        'cdc_wakeups_total{source="wal"} 1.0',
        'cdc_outbox_changes{state="fresh"}',
        "cdc_outbox_oldest_ready_age_seconds",
        f'cdc_slot_confirmed_lag_bytes{{slot="{slot}"}}',
        f'cdc_slot_retained_wal_bytes{{slot="{slot}"}}',
        "cdc_shards_owned 64.0",
    ):
        assert sample in text, sample


async def test_a_role_that_may_not_settle_is_refused_before_any_handler_runs(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, calls = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)

    role = slot_name()
    outbox_db.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN").format(psycopg.sql.Identifier(role)))
    try:
        _publish(outbox_db, "x")
        async with consuming(make_conninfo(outbox, user=role), router):
            await eventually_async(_is(lambda: "may not read" in caplog.text))
            outbox_db.execute(
                psycopg.sql.SQL("GRANT SELECT, UPDATE (processed, processed_at) ON entity_changes TO {}").format(
                    psycopg.sql.Identifier(role)
                )
            )
            await eventually_async(_is(lambda: "no UPDATE (next_attempt_at, dead_at, error_count" in caplog.text))
            assert calls == []
            outbox_db.execute(
                psycopg.sql.SQL(
                    "GRANT UPDATE ON entity_changes TO {0}; GRANT SELECT, INSERT, UPDATE, DELETE ON cdc_shards TO {0};"
                    "GRANT SELECT, UPDATE, DELETE ON cdc_barriers TO {0}; GRANT EXECUTE ON FUNCTION barred TO {0};"
                    "GRANT SELECT, INSERT, DELETE ON change_attempts TO {0};"
                    "GRANT SELECT, INSERT, UPDATE ON cdc_positions TO {0};"
                    "GRANT SELECT ON SEQUENCE entity_changes_seq_seq TO {0}"
                ).format(psycopg.sql.Identifier(role))
            )
            await _until_settled(outbox_db)
            await eventually_async(_is(lambda: "no_replication_role" in caplog.text))
        assert len(calls) == 1
    finally:
        outbox_db.execute(psycopg.sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(psycopg.sql.Identifier(role)))


async def test_what_was_written_while_the_stream_was_away_is_found_by_a_sweep_at_once_when_it_is_back(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, seen = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.append(change.seq)

    slot = slot_name()
    async with consuming(outbox, router, slot_name=slot, sweep_interval=3600, poll_interval=3600) as app:
        await eventually_async(_streaming(app))
        # A new slot begins at the end of the WAL: for what was committed before it no wake-up comes.
        outbox_db.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [slot]
        )
        drop = (
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s AND NOT active"
        )
        await eventually_async(_is(lambda: outbox_db.execute(drop, [slot]).rowcount == 1))
        seqs = [_publish(outbox_db, "x", str(n)) for n in range(3)]
        await _until_settled(outbox_db)
    assert sorted(seen) == seqs
