"""Retention: processed changes go when asked, in batches; nothing else ever does."""

from __future__ import annotations

import json
import random
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

import cdc
from cdc.cli import cdc as root_command
from cdc.core.model import ChangeState
from cdc.core.router import Router
from cdc.postgres import migrations, retention
from cdc.postgres.retention import Retention
from cdc.postgres.sql_files import load
from tests.commands_subscription import create, data, fail, finish
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled
from tests.fix_outbox import count, fill

_DAY_S = 86_400.0


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(root_command, ["outbox", "prune", *arguments, "--dsn", dsn])


def test_prune_removes_what_was_processed_longer_ago_and_nothing_younger(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 30, days=8)
    fill(outbox_db, 5, days=6)
    result = run(outbox, "--older-than", "7d")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert "30 removed" in result.stderr
    assert count(outbox_db) == 5
    assert json.loads(run(outbox, "--older-than", "7d", "--json").stdout) == {"schema": 1, "pruned": 0}


@pytest.mark.parametrize("state", ["fresh", "waiting", "dead", "paused"])
def test_what_is_not_processed_is_never_removed_however_old(
    outbox: str, outbox_db: psycopg.Connection, state: str
) -> None:
    fill(outbox_db, 3, state=state, days=1000)
    assert run(outbox, "--older-than", "1s").exit_code == 0
    assert count(outbox_db) == 3


def test_the_states_above_are_all_there_are() -> None:
    assert {state.value for state in ChangeState} == {"fresh", "waiting", "dead", "processed"}


def test_a_dry_run_counts_and_removes_nothing(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(outbox_db, 30)
    assert "30 would be removed" in run(outbox, "--older-than", "7d", "--dry-run").stderr
    found = json.loads(run(outbox, "--older-than", "7d", "--dry-run", "--json").stdout)
    assert found == {"schema": 1, "prunable": 30, "complete": True}
    monkeypatch.setattr(retention, "COUNT_BOUND", 10)
    assert "10 or more would be removed" in run(outbox, "--older-than", "7d", "--dry-run").stderr
    assert count(outbox_db) == 30


def test_each_batch_is_committed_by_itself(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 25)
    with psycopg.connect(outbox, autocommit=True) as pruning:
        batches = Retention("public").prune(pruning, 7 * _DAY_S, limit=10)
        left = [(next(batches), count(outbox_db)), (next(batches), count(outbox_db))]
        assert left == [(10, 15), (10, 5)]
        assert list(batches) == [5]
    assert count(outbox_db) == 0


def test_many_that_were_processed_at_one_moment_are_all_removed(outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 25)
    assert outbox_db.execute("SELECT count(DISTINCT processed_at) FROM entity_changes").fetchone() == (1,)
    assert list(Retention("public").prune(outbox_db, _DAY_S, limit=10)) == [10, 10, 5]


def test_progress_is_shown_while_it_takes_long(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.cli.bulk._PROGRESS_EVERY_S", -1.0)
    fill(outbox_db, 2 * retention.BATCH + 1)
    assert f"removed {retention.BATCH:,} so far" in run(outbox, "--older-than", "7d").stderr


def test_a_locked_row_is_left_for_the_next_round_without_waiting(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 10)
    with psycopg.connect(outbox) as reading:
        reading.execute("SELECT FROM entity_changes ORDER BY seq LIMIT 1 FOR UPDATE")
        assert list(Retention("public").prune(outbox_db, _DAY_S)) == [9]
    assert list(Retention("public").prune(outbox_db, _DAY_S)) == [1]


async def test_a_batch_for_the_consumer_says_how_many_it_removed(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 15)
    fill(outbox_db, 1, state="dead")
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
        removed = [(await Retention("public").prune_batch(connection, 7 * _DAY_S, 10)).removed for _ in range(3)]
        [(limit,)] = await (await connection.execute("SHOW enable_sort")).fetchall()
    assert removed == [10, 5, 0]
    assert limit == "on", "the batch's settings end with it"
    assert count(outbox_db) == 1


@pytest.mark.parametrize("arguments", [(), ("--older-than", "soon"), ("--older-than", "0d")])
def test_an_age_is_needed(outbox: str, arguments: tuple[str, ...]) -> None:
    assert run(outbox, *arguments).exit_code == 2


def test_another_schemas_history_is_its_own(database: str, db: psycopg.Connection) -> None:
    migrations.install(db, "other")
    migrations.install(db, "public")
    fill(db, 3)
    assert "0 removed" in run(database, "--older-than", "7d", "--schema", "other").stderr
    assert count(db) == 3


def test_a_batch_reads_a_small_part_of_a_large_table(outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 50_000)
    outbox_db.execute("VACUUM ANALYZE entity_changes")
    [(pages,)] = outbox_db.execute("SELECT relpages FROM pg_class WHERE oid = 'entity_changes'::regclass").fetchall()
    for statement, bound in (("prune", 100), ("prunable", 100)):
        parameters = {
            "older_than_s": _DAY_S,
            "limit": bound,
            "since": None,
            "place": None,
            "bound": bound,
            "scan": bound,
        }
        with outbox_db.transaction():
            outbox_db.execute(retention.LIMITS)
            [([found],)] = outbox_db.execute(
                b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + load("retention.sql", "public")[statement], parameters
            ).fetchall()
        assert '"Seq Scan"' not in json.dumps(found)
        assert "entity_changes_processed" in json.dumps(found)
        touched = found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"]
        assert touched < pages


async def test_pruning_while_a_consumer_runs_removes_processed_changes_only(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, handled = Router(), set()
    chance = random.Random(7)
    bad = {f"k{n}" for n in range(5)}

    @router.on("x", max_attempts=2)
    async def handle(change: cdc.Change) -> None:
        if change.entity_id in bad or chance.random() < 0.1:
            raise ValueError("no")
        handled.add(change.seq)

    published: list[int] = []
    pruned = 0
    async with (
        consuming(outbox, router, backoff_base=0.01, backoff_cap=0.02),
        await psycopg.AsyncConnection.connect(outbox, autocommit=True) as pruning,
    ):
        for n in range(600):
            [(seq,)] = outbox_db.execute("SELECT publish_change('x', %s)", [f"k{n % 50}"]).fetchall()
            published.append(seq)
            if n % 20 == 0:
                pruned += (await Retention("public").prune_batch(pruning, 1e-6, 1000)).removed
        await eventually_async(_until_settled(outbox_db), what="every change settled")
        pruned += (await Retention("public").prune_batch(pruning, 1e-6, 1000)).removed
    left = {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes WHERE dead_at IS NOT NULL")}
    assert count(outbox_db) == len(left), "what is left is dead"
    assert pruned == len(published) - len(left)
    assert handled == set(published) - left, "nothing was removed before it was handled"


def _until_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return check


# --- beside subscriptions ------------------------------------------------------------------------------------------


def test_what_a_subscription_is_not_done_with_stays_and_goes_when_it_is(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 30, days=8)
    search = create(outbox, "search", "--from", "beginning")
    billing = create(outbox, "billing", "--from", "beginning")
    assert pruned(outbox) == 0
    finish(outbox_db, search)
    assert pruned(outbox) == 0, "the other one is not done"
    finish(outbox_db, billing)
    fail(outbox_db, billing, 1)
    fail(outbox_db, billing, 2, dead=True)
    fail(outbox_db, search, 3, pauses=True)
    assert pruned(outbox) == 27, "but what waits or is dead"
    assert [seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes ORDER BY 1")] == [1, 2, 3]
    outbox_db.execute("DELETE FROM cdc_subscription_changes WHERE seq = 1")
    assert pruned(outbox) == 1


def test_what_is_done_ahead_of_the_position_stays(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 3, days=8)
    number = create(outbox, "search", "--from", "beginning")
    ahead = "INSERT INTO cdc_subscription_changes (seq, subscription, shard) SELECT seq, %s, shard FROM entity_changes"
    outbox_db.execute(ahead, [number])
    assert pruned(outbox) == 0


def test_a_drop_frees_what_was_kept(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 30, days=8)
    create(outbox, "search", "--from", "beginning")
    assert pruned(outbox) == 0
    assert data(outbox, "drop", "search", "--yes")
    assert pruned(outbox) == 30


def test_who_keeps_back_how_much_is_named(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 30, days=8)
    create(outbox, "search", "--from", "beginning")
    create(outbox, "billing")
    result = run(outbox, "--older-than", "7d")
    assert "0 removed" in result.stderr
    assert "search is not done with 30 that are processed" in result.stderr
    assert "billing" not in result.stderr
    found = json.loads(run(outbox, "--older-than", "7d", "--dry-run", "--json").stdout)
    assert (found["prunable"], found["held_back"]) == (0, {"search": 30})


def test_many_that_are_kept_do_not_keep_back_what_may_go(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one moment, and before what may go."""
    fill(outbox_db, 50, days=10)
    fill(outbox_db, 20, days=8)
    outbox_db.execute("UPDATE entity_changes SET processed_at = NULL WHERE seq IN (50, 70)")
    number = create(outbox, "search", "--from", "beginning")
    finish(outbox_db, number)
    fail(outbox_db, number, *range(1, 51))
    assert list(Retention("public").prune(outbox_db, 7 * _DAY_S, limit=7)) != []
    assert count(outbox_db) == 50
    assert outbox_db.execute("SELECT max(seq) FROM entity_changes").fetchone() == (50,)


def test_a_dry_run_counts_what_no_subscription_keeps(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 30, days=8)
    number = create(outbox, "search", "--from", "beginning")
    finish(outbox_db, number)
    fail(outbox_db, number, 4)
    assert json.loads(run(outbox, "--older-than", "7d", "--dry-run", "--json").stdout)["prunable"] == 29


def test_changes_of_a_shard_that_nobody_has_go(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 1, days=8)
    create(outbox, "search", "--from", "beginning")
    outbox_db.execute("UPDATE entity_changes SET shard = 77")
    assert pruned(outbox) == 1


def test_a_batch_beside_subscriptions_reads_a_small_part_of_a_large_table(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Also by the statistics of tables that were empty."""
    for name in ("a", "b", "c"):
        finish(outbox_db, create(outbox, name, "--from", "beginning"))
    outbox_db.execute("VACUUM ANALYZE")
    fill(outbox_db, 50_000)
    number = create(outbox, "d")
    fail(outbox_db, number, *range(1, 20_001))
    [(pages,)] = outbox_db.execute("SELECT pg_relation_size('entity_changes') / 8192").fetchall()
    for statement in ("prune_shared", "prunable_shared"):
        parameters = {"older_than_s": _DAY_S, "limit": 100, "since": None, "place": None, "bound": 100, "scan": 100}
        with outbox_db.transaction():
            outbox_db.execute(retention.LIMITS)
            [([found],)] = outbox_db.execute(
                b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + load("retention.sql", "public")[statement], parameters
            ).fetchall()
        plan = json.dumps(found)
        assert "entity_changes_processed" in plan
        assert '"Seq Scan"' not in plan
        touched = found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"]
        assert touched < 100 * 20 + pages / 4


def pruned(dsn: str) -> int:
    found = json.loads(run(dsn, "--older-than", "7d", "--json").stdout)
    return int(found["pruned"])
