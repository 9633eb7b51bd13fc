"""Retention in the consumer: one at a time, in small transactions, out of the way, and never what is not processed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import cdc
from cdc.core.router import Router
from cdc.engine import retention
from cdc.engine.retention import Pruning
from cdc.observability.metrics import Metrics
from cdc.postgres import migrations
from cdc.postgres.retention import Batch, PruneMark, Retention
from cdc.postgres.shard_locks import RETENTION, lock_class
from tests.commands_subscription import create, fail, finish
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states
from tests.fix_outbox import count, fill

_DAY_S = 86_400.0
_AT_ONCE_S = 0.02
"""Between two rounds."""


@contextlib.asynccontextmanager
async def removing(dsn: str, *, batch: int = 10) -> AsyncIterator[tuple[Metrics, asyncio.Task[None]]]:
    """Retention of a week, beside the test."""
    metrics = Metrics("cdc", Router())
    task = asyncio.create_task(
        Pruning(dsn, "public", 7 * _DAY_S, metrics.outbox, batch=batch, every_s=_AT_ONCE_S).run()
    )
    try:
        yield metrics, task
        assert not task.done() or task.cancelled(), "it never ends by itself"
    finally:
        task.cancel()
        await asyncio.wait([task])


def removed(metrics: Metrics) -> int:
    return int(metric(metrics.registry, "cdc_outbox_pruned_total"))


def _until(condition: Callable[[], bool], what: str, within_s: float = 30) -> Any:
    async def check() -> bool:
        return condition()

    return eventually_async(check, within_s=within_s, what=what)


@pytest.fixture
def log_of_removals(outbox_db: psycopg.Connection) -> Callable[[], list[tuple[int, str]]]:
    """(server process, transaction) of each row that was removed, in order."""
    outbox_db.execute(
        "CREATE TABLE removal (n bigint GENERATED ALWAYS AS IDENTITY, pid int, xid text);"
        "CREATE FUNCTION note_removal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.removal (pid, xid) VALUES (pg_backend_pid(), pg_current_xact_id()::text); RETURN NULL;"
        " END $$;"
        "CREATE TRIGGER t AFTER DELETE ON entity_changes FOR EACH ROW EXECUTE FUNCTION note_removal()"
    )
    return lambda: outbox_db.execute("SELECT pid, xid FROM removal ORDER BY n").fetchall()


async def test_old_processed_changes_go_and_dead_waiting_and_fresh_ones_of_any_age_stay(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    for state in ("dead", "paused", "waiting", "fresh"):
        fill(outbox_db, 3, state=state, days=1000)
    fill(outbox_db, 25, days=8)
    fill(outbox_db, 4, days=6)
    async with removing(outbox) as (metrics, _):
        await _until(lambda: removed(metrics) == 25, "25 removed, and counted after the commit")
    assert states(outbox_db) == {"dead": 6, "waiting": 3, "fresh": 3, "processed": 4}


async def test_one_removes_at_a_time_and_when_it_ends_another_goes_on(
    outbox: str, outbox_db: psycopg.Connection, log_of_removals: Callable[[], list[tuple[int, str]]]
) -> None:
    fill(outbox_db, 6_000)
    async with removing(outbox) as first, removing(outbox) as second:
        await _until(lambda: len(log_of_removals()) >= 50, "one has begun")
        (busy, its_task), (idle, _) = (first, second) if removed(first[0]) else (second, first)
        assert removed(idle) == 0
        its_task.cancel()
        await asyncio.wait([its_task])
        # So many, that it is in the middle of it however slowly this test looks; and few for the other one.
        outbox_db.execute("DELETE FROM entity_changes WHERE seq NOT IN (SELECT seq FROM entity_changes LIMIT 200)")
        assert count(outbox_db) > 0, "it was in the middle of it"
        await _until(lambda: count(outbox_db) == 0, "the other one removes the rest")
        assert removed(idle) > 0
        assert removed(busy) + removed(idle) <= 6_000
    sessions = [pid for pid, _ in log_of_removals() if pid != outbox_db.info.backend_pid]
    holders = 1 + sum(one != next_ for one, next_ in itertools.pairwise(sessions))
    assert holders == len(set(sessions)), "nobody removed while another one did"


async def test_no_transaction_removes_more_than_a_batch(
    outbox: str, outbox_db: psycopg.Connection, log_of_removals: Callable[[], list[tuple[int, str]]]
) -> None:
    fill(outbox_db, 45)
    async with removing(outbox):
        await _until(lambda: count(outbox_db) == 0, "all are removed")
    transactions = [xid for _, xid in log_of_removals()]
    assert sorted(transactions.count(xid) for xid in set(transactions)) == [5, 10, 10, 10, 10]


async def test_who_does_not_get_the_lock_removes_nothing(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 5)
    outbox_db.execute("SELECT pg_advisory_lock(%s, %s)", [lock_class("public"), RETENTION])
    tried = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc: retention'"
    async with removing(outbox):
        for _ in range(3):
            await _until(lambda: outbox_db.execute(tried).fetchone() != (0,), "it tries")
            await _until(lambda: outbox_db.execute(tried).fetchone() == (0,), "it leaves")
        assert count(outbox_db) == 5
        outbox_db.execute("SELECT pg_advisory_unlock(%s, %s)", [lock_class("public"), RETENTION])
        await _until(lambda: count(outbox_db) == 0, "it gets the lock")


async def test_each_batch_of_a_round_begins_where_the_one_before_ended(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days in (12, 11, 10, 9):
        fill(outbox_db, 10, days=days)
    asked: list[PruneMark | None] = []
    whole = Retention.prune_batch

    async def noted(self: Retention, *arguments: Any, since: PruneMark | None = None) -> Batch:
        asked.append(since)
        return await whole(self, *arguments, since=since)

    monkeypatch.setattr(Retention, "prune_batch", noted)
    async with removing(outbox):
        await _until(lambda: len(asked) > 5, "a second round")
    first_round, next_round = asked[:5], asked[5]
    assert first_round[0] is None
    moments = [each.at for each in first_round[1:] if each]
    assert moments == sorted(set(moments)), "each is later than the one before"
    assert len(moments) == 4
    assert next_round is None


async def test_a_lost_connection_is_logged_once_and_the_next_round_goes_on(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    fill(outbox_db, 2_000)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc: retention'"
    async with removing(outbox):
        await _until(lambda: count(outbox_db) < 2_000, "it has begun")
        await _until(lambda: bool(outbox_db.execute(end).fetchall()), "its session is ended")
        await _until(lambda: "retention does not remove" in caplog.text, "it says so")
        # Two hundred batches, and a pause of nine times its own after each: the busier the machine, the longer.
        await _until(lambda: count(outbox_db) == 0, "all are removed", within_s=240)
    assert caplog.text.count("retention does not remove old changes") == 1


@pytest.fixture
def role_without_delete(outbox_db: psycopg.Connection) -> Iterator[str]:
    outbox_db.execute("CREATE ROLE prune_tester LOGIN")
    outbox_db.execute("GRANT SELECT, UPDATE ON entity_changes TO prune_tester")
    yield "prune_tester"
    outbox_db.execute("DROP OWNED BY prune_tester; DROP ROLE prune_tester")


async def test_a_missing_right_is_one_warning_with_the_remedy_until_it_is_granted(
    outbox: str,
    outbox_db: psycopg.Connection,
    role_without_delete: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(outbox_db, 5)
    rounds: list[None] = []
    prune_batch = Retention.prune_batch

    async def counted(*arguments: Any, **named: Any) -> Batch:
        rounds.append(None)
        return await prune_batch(*arguments, **named)

    monkeypatch.setattr(Retention, "prune_batch", counted)
    async with removing(make_conninfo(outbox, user=role_without_delete)):
        await _until(lambda: len(rounds) > 3, "several rounds")
        assert count(outbox_db) == 5
        [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert 'GRANT DELETE ON "public"."entity_changes" TO' in line
        outbox_db.execute("GRANT DELETE ON entity_changes TO prune_tester")
        outbox_db.execute("GRANT SELECT ON cdc_subscriptions TO prune_tester")
        outbox_db.execute("GRANT SELECT, DELETE ON change_attempts TO prune_tester")
        await _until(lambda: count(outbox_db) == 0, "now it may")


async def test_what_a_subscription_keeps_does_not_keep_back_what_lies_behind_it(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round looks at a bounded part of it, and the next one goes on."""
    monkeypatch.setattr(retention, "_IN_VAIN_MAX", 2)
    fill(outbox_db, 95, days=10)
    fill(outbox_db, 20, days=8)
    number = create(outbox, "search", "--from", "beginning")
    finish(outbox_db, number)
    fail(outbox_db, number, *range(1, 96))
    async with removing(outbox) as (metrics, _):
        await _until(lambda: removed(metrics) == 20, "what is behind is removed")
        fill(outbox_db, 5, days=9)
        outbox_db.execute("DELETE FROM cdc_subscription_changes WHERE seq <= 3")
        outbox_db.execute("UPDATE cdc_positions SET seq = 1000")
        await _until(lambda: removed(metrics) == 28, "and a later round begins at the start again")
    assert count(outbox_db) == 92


async def test_outboxes_of_one_database_do_not_wait_for_each_other(outbox: str, outbox_db: psycopg.Connection) -> None:
    migrations.install(outbox_db, "other")
    fill(outbox_db, 5)
    outbox_db.execute("SELECT pg_advisory_lock(%s, %s)", [lock_class("other"), RETENTION])
    async with removing(outbox):
        await _until(lambda: count(outbox_db) == 0, "the other outbox's lock is another one")


# --- in the consumer -----------------------------------------------------------------------------------------------


async def test_a_consumer_removes_only_with_the_setting_retention(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 3)
    connected = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc: retention'"
    router = Router()
    async with consuming(outbox, router, unhandled="discard") as app:
        outbox_db.execute("SELECT publish_change('x', '1')")
        await _until(lambda: settled(outbox_db), "the change is done")
        await _until(lambda: app.status.listening, "what runs beside it has started")
        assert outbox_db.execute(connected).fetchone() == (0,)
    assert count(outbox_db) == 4
    async with consuming(outbox, router, retention="7d") as app:
        await _until(lambda: count(outbox_db) == 1, "the old ones are removed")
        await _until(lambda: removed(app.metrics) == 3, "and counted")


async def test_it_removes_while_its_consumer_is_at_work_and_the_work_goes_on(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 5_000)
    fill(outbox_db, 20, state="dead")
    router, handled = Router(), list[int]()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        handled.append(change.seq)

    async with consuming(outbox, router, retention="7d"):
        for n in range(20):
            outbox_db.execute("SELECT publish_change('x', (%s + n)::text) FROM generate_series(1, 100) AS n", [n])
        await _until(lambda: settled(outbox_db), "every change is settled")
        await _until(lambda: count(outbox_db) == 2_020, "the old ones are removed")
    assert len(handled) == len(set(handled)) == 2_000
    assert states(outbox_db) == {"processed": 2_000, "dead": 20}


async def test_a_stop_does_not_wait_for_a_pause(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BUSY_SHARE", 1e-6)
    monkeypatch.setattr("cdc.app.application.Pruning", lambda *arguments: Pruning(*arguments, batch=10))
    fill(outbox_db, 30)
    async with asyncio.timeout(retention.PAUSE_MAX_S / 2):
        async with consuming(outbox, Router(), retention="7d"):
            await _until(lambda: count(outbox_db) == 20, "the pause after the first batch")
    assert count(outbox_db) == 20
