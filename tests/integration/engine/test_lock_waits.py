"""What blocks for a moment delays marks, reads and shards; it repeats no handler and costs no attempt."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator

import psycopg
import pytest

import cdc
from cdc.contrib.demo.temp_server import TempServer
from cdc.core import lost_transactions
from cdc.core.errors import NotFoundError
from cdc.core.router import Router
from cdc.postgres import migrations
from tests import refusals
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states
from tests.refusals import MARKS, SHARDS, refusing
from tests.small_disk import SmallDisk

CODES = ["40001", "53100", "55P03", "57014"]
"""Serialization failure, full disk, lock, cancelled."""
OTHERS = ["40P01", "53200", "58030"]
"""Deadlock, memory, I/O."""
KINDS = ["on loop", "in thread", "group", "batch"]
_CHANGES = 500


class Calls:
    """Handlers that count their calls, wait for ``go``, and write an effect where they have a connection."""

    def __init__(self, kind: str = "plain") -> None:
        self.router = Router()
        self.counts = Counter[int]()
        self.go = asyncio.Event()

        async def plain(change: cdc.Change) -> None:
            self.counts[change.seq] += 1
            await self.go.wait()

        async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
            await connection.execute("INSERT INTO effects VALUES (%s)", [change.seq])
            self.counts[change.seq] += 1

        def in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
            connection.execute("INSERT INTO effects VALUES (%s)", [change.seq])
            self.counts[change.seq] += 1

        async def batch(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
            for change in changes:
                await on_loop(change, connection)

        match kind:
            case "plain":
                self.router.on("x")(plain)
            case "on loop":
                self.router.on("x", group=1)(on_loop)
            case "in thread":
                self.router.on("x", group=1)(in_thread)
            case "group":
                self.router.on("x", group=20)(on_loop)
            case "batch":
                self.router.on("x", batch=20)(batch)


@pytest.fixture
def db(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE effects (seq bigint NOT NULL)")
    refusals.install(outbox_db)
    return outbox_db


def _publish(db: psycopg.Connection, first: int, last: int) -> None:
    db.execute("SELECT publish_change('x', n::text) FROM generate_series(%s::int, %s::int) AS n", [first, last])


async def _until_settled(db: psycopg.Connection) -> None:
    async def done() -> bool:
        return settled(db)

    await eventually_async(done, what="every change processed or dead")


def _attempts(db: psycopg.Connection) -> int:
    [(most,)] = db.execute("SELECT max(error_count) FROM entity_changes").fetchall()
    return int(most)


def _effects(db: psycopg.Connection) -> Counter[int]:
    return Counter(seq for (seq,) in db.execute("SELECT seq FROM effects").fetchall())


@pytest.mark.parametrize("code", [*CODES, *OTHERS])
async def test_outcomes_are_kept_until_they_can_be_marked(
    code: str, outbox: str, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()
    calls.go.set()
    with refusing(db, MARKS, code):
        _publish(db, 1, _CHANGES)
        async with consuming(outbox, calls.router, max_attempts=1) as app:

            async def delayed() -> bool:
                return len(calls.counts) == _CHANGES and "are delayed" in caplog.text

            await eventually_async(delayed, what="all were handled, and their marks are delayed")
            assert f"refused for a while [{code}]" in caplog.text
            db.execute("DELETE FROM refused")
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert set(calls.counts.values()) == {1}
    assert states(db) == {"processed": _CHANGES}


@pytest.mark.parametrize(
    ("kind", "code"), [*(("on loop", code) for code in CODES + OTHERS), *((kind, "53100") for kind in KINDS[1:])]
)
async def test_what_a_transactional_handler_did_is_undone_and_done_again_without_an_attempt(
    code: str, kind: str, outbox: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark is refused, which is not its handler's doing."""
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.02)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.02)
    calls = Calls(kind)
    _publish(db, 1, 40)
    with refusing(db, MARKS, code):
        async with consuming(outbox, calls.router, max_attempts=1) as app:

            async def twice() -> bool:
                return max(calls.counts.values(), default=0) >= 2

            await eventually_async(twice, what="a change is tried again")
            db.execute("DELETE FROM refused")
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert states(db) == {"processed": 40}
    assert _attempts(db) == 0
    assert sorted(_effects(db).values()) == [1] * 40


async def test_what_keeps_blocking_a_transactional_handler_comes_to_count_as_attempts(
    outbox: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler can be to blame as well: it may leave no time or no room for the mark."""
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.001)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.001)
    router, calls = Router(), Counter[int]()

    @router.on("x", max_attempts=2)
    async def slow(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        calls[change.seq] += 1
        await connection.execute("INSERT INTO refused VALUES ('entity_changes', '57014')")

    _publish(db, 1, 1)
    async with consuming(outbox, router, backoff_base=0.01):
        await _until_settled(db)
    assert states(db) == {"dead": 1}
    assert list(calls.values()) == [2 * lost_transactions.LOSSES_MAX]
    assert _attempts(db) == 2


async def test_a_cancelled_read_is_made_again_and_what_runs_goes_on(
    outbox: str, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()
    _publish(db, 1, 5)
    async with consuming(outbox, calls.router) as app:

        async def run() -> bool:
            return len(calls.counts) == 5

        await eventually_async(run, what="handlers run")
        with psycopg.connect(outbox) as other:
            other.execute("LOCK TABLE entity_changes IN ACCESS EXCLUSIVE MODE")
            app.consumer.sweep_now()

            async def cancelled() -> bool:
                db.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND application_name = 'cdc: reader' AND state = 'active'"
                )
                return "reading changes is delayed: canceling statement" in caplog.text

            await eventually_async(cancelled, what="a read was cancelled, and the log says so")
            assert app.status.consumer.unread_s > 0
        _publish(db, 6, 10)

        async def read_again() -> bool:
            return len(calls.counts) == 10 and app.status.consumer.unread_s == 0

        await eventually_async(read_again, what="changes are read again")
        calls.go.set()
        await _until_settled(db)
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert set(calls.counts.values()) == {1}


@pytest.mark.parametrize("code", CODES)
async def test_shards_are_taken_and_given_once_nothing_blocks_it_and_what_runs_goes_on(
    code: str, outbox: str, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    calls, others = Calls(), Calls()
    with refusing(db, SHARDS, code):
        async with consuming(outbox, calls.router, stream=False) as app:

            async def told() -> bool:
                return f"the check of the shards is delayed: refused for a while [{code}]" in caplog.text

            await eventually_async(told, what="the log says what delays taking")
            db.execute("DELETE FROM refused")

            async def taken() -> bool:
                return app.status.consumer.owned_shards == 64

            await eventually_async(taken, what="all shards are taken")
            _publish(db, 1, 100)

            async def busy() -> bool:
                return len(calls.counts) > 30

            await eventually_async(busy, what="handlers run")
            caplog.clear()
            db.execute("INSERT INTO refused VALUES ('cdc_shards', %s)", [code])
            async with consuming(outbox, others.router, stream=False) as other:
                calls.go.set()
                others.go.set()
                await eventually_async(told, what="the log says what delays giving")
                db.execute("DELETE FROM refused")

                async def halves() -> bool:
                    return app.status.consumer.owned_shards == other.status.consumer.owned_shards == 32

                await eventually_async(halves, what="each has half of the shards")
                await _until_settled(db)
                for each in (app, other):
                    assert metric(each.metrics.registry, "cdc_interruptions_total") == 0
    assert set((calls.counts + others.counts).values()) == {1}


@pytest.fixture
def small_disk() -> Iterator[tuple[str, SmallDisk]]:
    """The DSN of an outbox on a disk of its own."""
    try:
        running = TempServer(durable=False)
    except NotFoundError as missing:
        if os.environ.get("CDC_REQUIRE_PG"):
            raise
        pytest.skip(str(missing))
    with running as server:
        try:
            made = SmallDisk(server).__enter__()
        except OSError as refused:
            pytest.skip(f"nothing can be mounted here: {refused}")
        try:
            with psycopg.connect(server.dsn(), autocommit=True) as db:
                migrations.install(db, "public")
                db.execute("CREATE TABLE effects (seq bigint NOT NULL)")
                made.move_outbox(db)
            yield server.dsn(), made
        finally:
            server.stop("immediate")
            made.__exit__(None, None, None)


async def test_a_full_disk_delays_marks_and_no_handler_is_called_again(
    small_disk: tuple[str, SmallDisk], caplog: pytest.LogCaptureFixture
) -> None:
    dsn, disk = small_disk
    calls = Calls()
    calls.go.set()
    with psycopg.connect(dsn, autocommit=True) as db:
        _publish(db, 1, _CHANGES)
        disk.fill()
        async with consuming(dsn, calls.router, max_attempts=1) as app:

            async def delayed() -> bool:
                return len(calls.counts) == _CHANGES and "are delayed" in caplog.text

            await eventually_async(delayed, what="all were handled, and their marks are delayed")
            assert "No space left on device [53100]" in caplog.text
            disk.free()
            await _until_settled(db)
            assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
        assert states(db) == {"processed": _CHANGES}
    assert set(calls.counts.values()) == {1}


@pytest.mark.parametrize("kind", ["in thread", "batch"])
async def test_a_full_disk_costs_a_transactional_handler_no_attempt(
    kind: str, small_disk: tuple[str, SmallDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.05)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.05)
    dsn, disk = small_disk
    calls = Calls(kind)
    with psycopg.connect(dsn, autocommit=True) as db:
        _publish(db, 1, _CHANGES)
        disk.fill()
        async with consuming(dsn, calls.router, max_attempts=1):

            async def twice() -> bool:
                return max(calls.counts.values(), default=0) >= 2

            await eventually_async(twice, what="a change is tried again")
            disk.free()
            await _until_settled(db)
        assert states(db) == {"processed": _CHANGES}
        assert _attempts(db) == 0
        assert sorted(_effects(db).values()) == [1] * _CHANGES
