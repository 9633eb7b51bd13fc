"""A row is in exactly one state, whatever its columns hold: processed, else dead, else waiting, else fresh."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql

import cdc
from cdc.core.model import ChangeState
from cdc.core.router import Router
from cdc.core.type_filter import TypeFilter
from cdc.postgres import migrations
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.outbox import INDEXED, Store
from cdc.postgres.retention import Retention
from tests.commands import done
from tests.commands_outbox import data, numbers, run
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric


class Columns(NamedTuple):
    processed: bool
    processed_at: str | None
    next_attempt_at: str | None
    dead_at: str | None

    @property
    def state(self) -> ChangeState:
        if self.processed:
            return ChangeState.PROCESSED
        if self.dead_at:
            return ChangeState.DEAD
        return ChangeState.WAITING if self.next_attempt_at else ChangeState.FRESH

    @property
    def holds(self) -> bool:
        """It holds back its key."""
        return self.state is ChangeState.WAITING or (
            self.state is ChangeState.DEAD and self.next_attempt_at == "infinity"
        )

    @property
    def due(self) -> bool:
        return self.state is ChangeState.FRESH or (
            self.state is ChangeState.WAITING and self.next_attempt_at in ("-infinity", _AGO)
        )


_AGO, _LATER = "now() - 2 days", "now() + 1 hour"
_EVERY = [
    Columns(*each)
    for each in itertools.product(
        (False, True), (None, _AGO), (None, "-infinity", _AGO, _LATER, "infinity"), (None, _AGO, "infinity")
    )
]
_INSERT = """
INSERT INTO entity_changes
  (table_name, operation, entity_id, entity_type, changed_at, processed, processed_at, next_attempt_at, dead_at,
   error_count)
SELECT 'x', 'INSERT', %s, 'x', now() - interval '3 days', %s, {}, {}, {}, 3
RETURNING seq
"""


def _moment(word: str | None) -> str:
    if word is None:
        return "NULL::timestamptz"
    if not word.startswith("now"):
        return f"'{word}'::timestamptz"
    now, sign, amount = word.split(" ", 2)
    return f"{now} {sign} interval '{amount}'"


@pytest.fixture
def rows(outbox_db: psycopg.Connection) -> dict[int, Columns]:
    """A row of each combination, of a key of its own, by number."""
    found = dict[int, Columns]()
    for n, columns in enumerate(_EVERY):
        statement = _INSERT.format(*map(_moment, columns[1:]))
        [(seq,)] = outbox_db.execute(statement.encode(), [f"{n}", columns.processed]).fetchall()
        found[seq] = columns
    return found


def _with(rows: dict[int, Columns], state: ChangeState) -> list[int]:
    return sorted(seq for seq, columns in rows.items() if columns.state is state)


def test_each_reader_finds_each_row_in_one_state(
    outbox: str, outbox_db: psycopg.Connection, rows: dict[int, Columns]
) -> None:
    held = sum(columns.holds for columns in rows.values())
    expected = {state: len(_with(rows, state)) for state in ChangeState}
    assert sum(expected.values()) == len(_EVERY)

    for state in ChangeState:
        assert sorted(numbers(outbox, "--state", str(state), "--limit", "100")) == _with(rows, state)
    for seq, columns in rows.items():
        shown = data(outbox, "show", str(seq))["change"]
        pauses = columns.state is ChangeState.DEAD and columns.holds
        assert (shown["state"], shown["pauses_key"]) == (columns.state, pauses)
    [of_type] = data(outbox, "stats")["types"]
    assert {state: of_type[state] for state in ("fresh", "waiting", "dead")} == {
        str(state): expected[state] for state in (ChangeState.FRESH, ChangeState.WAITING, ChangeState.DEAD)
    }
    with psycopg.connect(outbox, options=" ".join(f"-c {name}={value}" for name, value in INDEXED.items())) as reader:
        for store in (Store("public"), Store("public", scope=TypeFilter(("x",), True))):
            figures = store.figures(reader)
            counted = (figures.fresh, figures.waiting, figures.dead, figures.blocked_keys)
            assert counted == (*(expected[s] for s in (ChangeState.FRESH, ChangeState.WAITING, ChangeState.DEAD)), held)
    [(pending, failed)] = outbox_db.execute("SELECT pending, failed FROM action_processing_dashboard").fetchall()
    assert pending == expected[ChangeState.FRESH] + expected[ChangeState.WAITING]
    # In this table each has three errors.
    assert failed == len(_EVERY) - expected[ChangeState.PROCESSED]


def test_the_views_count_each_once_also_without_a_time(outbox_db: psycopg.Connection, rows: dict[int, Columns]) -> None:
    outbox_db.execute("UPDATE entity_changes SET changed_at = now(), processed_at = processed_at + interval '2 days'")
    processed = len(_with(rows, ChangeState.PROCESSED))
    dashboard = "SELECT processed_today FROM action_processing_dashboard"
    assert outbox_db.execute(dashboard).fetchall() == [(processed,)]
    history = "SELECT count(*), count(DISTINCT id), count(*) FILTER (WHERE processed) FROM recent_action_history"
    assert outbox_db.execute(history).fetchall() == [(len(_EVERY), len(_EVERY), processed)]


def test_the_average_leaves_out_what_has_no_time_of_its_own(outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("SELECT publish_change('x', '1'), publish_change('x', '2')")
    outbox_db.execute("UPDATE entity_changes SET processed = true, changed_at = date_trunc('day', now())")
    outbox_db.execute("UPDATE entity_changes SET processed_at = changed_at + interval '3 s' WHERE entity_id = '1'")
    dashboard = "SELECT processed_today, avg_processing_seconds FROM action_processing_dashboard"
    assert outbox_db.execute(dashboard).fetchall() == [(2, 3)]
    outbox_db.execute("UPDATE entity_changes SET processed_at = NULL")
    assert outbox_db.execute(dashboard).fetchall() == [(2, None)]


@pytest.mark.parametrize("column", ["changed_at", "processed_at"])
@pytest.mark.parametrize("value", ["infinity", "-infinity"])
@pytest.mark.parametrize("processed", [True, False])
def test_an_infinite_time_breaks_no_reader(
    outbox: str, outbox_db: psycopg.Connection, column: str, value: str, processed: bool
) -> None:
    outbox_db.execute("SELECT publish_change('x', '1'), publish_change('x', '1')")
    outbox_db.execute("UPDATE entity_changes SET processed = %s, processed_at = now()", [processed])
    change = sql.SQL("UPDATE entity_changes SET {} = %s WHERE seq = 1").format(sql.Identifier(column))
    outbox_db.execute(change, [value])
    outbox_db.execute("SELECT * FROM action_processing_dashboard").fetchall()
    history = outbox_db.execute("SELECT * FROM recent_action_history").fetchall()
    seen = column == "processed_at" and (value == "infinity" or not processed)
    assert len(history) == 1 + seen
    admin = OutboxAdmin("public")
    assert sum(each.fresh for each in admin.stats(outbox_db).types) == (0 if processed else 2)
    assert (admin.pace(outbox_db).per_s > 0) == processed
    for store in (Store("public"), Store("public", scope=TypeFilter(("x",), True))):
        assert 0 <= store.figures(outbox_db).oldest_ready_age_s < 3600
    list(Retention("public").prune(outbox_db, 3600.0))


@pytest.mark.parametrize("column", ["changed_at", "processed_at", "dead_at", "next_attempt_at"])
@pytest.mark.parametrize("value", ["infinity", "-infinity", "0044-03-15 BC", "20000-01-01"])
@pytest.mark.parametrize("processed", [True, False])
def test_an_operator_sees_a_change_whose_time_python_does_not_have(
    outbox: str, outbox_db: psycopg.Connection, column: str, value: str, processed: bool
) -> None:
    outbox_db.execute("SELECT publish_change('x', '1')")
    outbox_db.execute("UPDATE entity_changes SET processed = %s", [processed])
    change = sql.SQL("UPDATE entity_changes SET {} = %s").format(sql.Identifier(column))
    outbox_db.execute(change, [value])
    [(state, name)] = outbox_db.execute(
        "SELECT CASE WHEN processed THEN 'processed' WHEN dead_at IS NOT NULL THEN 'dead'"
        " WHEN next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END, id::text FROM entity_changes"
    ).fetchall()
    [found] = json.loads(done(outbox, "outbox", "list", "--state", state, "--json"))["changes"]
    assert (found["id"], found[column]) == (name, None)
    assert name in done(outbox, "outbox", "show", name)
    done(outbox, "status", "--json")


async def test_what_is_fresh_or_due_is_handled_once_and_nothing_else_and_each_key_goes_on_or_waits(
    outbox: str, outbox_db: psycopg.Connection, rows: dict[int, Columns]
) -> None:
    publish = "SELECT seq, publish_change('x', entity_id) FROM entity_changes WHERE seq = ANY (%s)"
    followers: dict[int, int] = dict(outbox_db.execute(publish, [list(rows)]).fetchall())
    router, calls = Router(), Counter[int]()

    @router.on("*")
    async def any_type(change: cdc.Change) -> None:
        calls[change.seq] += 1
        if change.entity_id == "last" and change.attempt < 3:
            raise cdc.Retry(after=0.1)

    due = {seq for seq, columns in rows.items() if columns.due}
    free = {followers[seq] for seq, columns in rows.items() if not columns.holds or columns.due}
    async with consuming(outbox, router, sweep_interval=0.5, poll_interval=0.05) as app:

        async def handled() -> bool:
            return set(calls) >= due | free

        await eventually_async(handled, what="all that may run")
        # The read that finds this one due again also finds what is still due of the others.
        [(last,)] = outbox_db.execute("SELECT publish_change('x', 'last')").fetchall()

        async def looked_again() -> bool:
            return calls[last] == 3

        await eventually_async(looked_again, what="two more reads of what is due")
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert calls == dict.fromkeys(due | free, 1) | {last: 3}


@pytest.mark.parametrize("state", ["dead", "waiting"])
@pytest.mark.parametrize("decision", ["retry", "discard"])
def test_a_decision_about_all_of_a_state_is_about_these_and_no_others(
    outbox: str, outbox_db: psycopg.Connection, rows: dict[int, Columns], state: str, decision: str
) -> None:
    before: dict[int, str] = dict(outbox_db.execute("SELECT seq, xmin::text FROM entity_changes").fetchall())
    result = run(outbox, decision, "--all", "--state", state, "--yes")
    assert result.exit_code == 0, result.output
    after: dict[int, str] = dict(outbox_db.execute("SELECT seq, xmin::text FROM entity_changes").fetchall())
    meant = _with(rows, ChangeState(state))
    assert sorted(seq for seq in before if before[seq] != after[seq]) == meant
    now_in = "waiting" if decision == "retry" else "processed"
    assert set(meant) <= set(numbers(outbox, "--state", now_in, "--limit", "100"))


def test_each_is_decided_about_by_its_number_as_its_state_allows(outbox: str, rows: dict[int, Columns]) -> None:
    for seq, columns in rows.items():
        allowed = columns.state in (ChangeState.DEAD, ChangeState.WAITING)
        assert (run(outbox, "retry", str(seq)).exit_code == 0) == allowed
        if allowed:
            assert numbers(outbox, "--state", "waiting", "--key", data(outbox, "show", str(seq))["change"]["entity_id"])
            assert run(outbox, "discard", str(seq)).exit_code == 0
            assert data(outbox, "show", str(seq))["change"]["state"] == "processed"


def test_the_processed_are_replayed_and_removed_and_no_others(
    outbox: str, outbox_db: psycopg.Connection, rows: dict[int, Columns]
) -> None:
    processed = _with(rows, ChangeState.PROCESSED)
    result = run(outbox, "replay", "--type", "x", "--yes")
    assert result.exit_code == 0, result.output
    replayed = "SELECT c.seq FROM entity_changes AS r JOIN entity_changes AS c ON c.id = r.replay_of ORDER BY 1"
    assert [seq for (seq,) in outbox_db.execute(replayed).fetchall()] == processed
    assert run(outbox, "prune", "--older-than", "30d").exit_code == 0
    assert {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes").fetchall()} >= set(rows)
    assert run(outbox, "prune", "--older-than", "1d").exit_code == 0
    left = {seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes").fetchall()}
    assert left & set(rows) == set(rows) - set(processed)


def test_the_documented_function_gives_attempts_to_what_is_dead_and_to_nothing_else(
    outbox: str, outbox_db: psycopg.Connection, rows: dict[int, Columns]
) -> None:
    dead, waiting = _with(rows, ChangeState.DEAD), _with(rows, ChangeState.WAITING)
    assert outbox_db.execute("SELECT * FROM reprocess_failed_actions()").fetchall() == [(len(dead),)]
    assert sorted(numbers(outbox, "--state", "waiting", "--limit", "100")) == sorted(dead + waiting)


@pytest.mark.parametrize("done", ["processed = true", "processed = true, processed_at = now()"])
def test_a_mark_by_hand_ends_a_change_and_what_is_unmarked_is_what_it_was(
    outbox: str, outbox_db: psycopg.Connection, rows: dict[int, Columns], done: str
) -> None:
    outbox_db.execute(f"UPDATE entity_changes SET {done}".encode())
    assert len(numbers(outbox, "--state", "processed", "--limit", "100")) == len(rows)
    for state in ("fresh", "waiting", "dead"):
        assert numbers(outbox, "--state", state) == []
    outbox_db.execute("UPDATE entity_changes SET processed = false")
    unmarked = {seq: columns._replace(processed=False) for seq, columns in rows.items()}
    for state in ChangeState:
        assert sorted(numbers(outbox, "--state", str(state), "--limit", "100")) == _with(unmarked, state)


@pytest.mark.parametrize("command", ["install", "upgrade"])
def test_an_outbox_with_the_constraints_and_indexes_of_before_is_upgraded_in_place(
    outbox_db: psycopg.Connection, command: str
) -> None:
    outbox_db.execute(_AS_IT_WAS.encode())
    before = outbox_db.execute("SELECT entity_changes::text FROM entity_changes ORDER BY seq").fetchall()
    getattr(migrations, command)(outbox_db, "public")
    assert migrations.verify(outbox_db, "public") == []
    assert outbox_db.execute("SELECT entity_changes::text FROM entity_changes ORDER BY seq").fetchall() == before
    outbox_db.execute("UPDATE entity_changes SET processed = true, operation = 'MERGE'")
    names = "SELECT count(*) FROM pg_indexes WHERE indexname = ANY ('{entity_changes_due,entity_changes_dead}')"
    assert outbox_db.execute(names.encode()).fetchone() == (0,)


_AS_IT_WAS = """
DELETE FROM cdc_migrations WHERE version >= 11;
DROP INDEX entity_changes_failed, entity_changes_waiting, entity_changes_holding_back;
CREATE INDEX entity_changes_due ON entity_changes (next_attempt_at) WHERE next_attempt_at < 'infinity';
CREATE INDEX entity_changes_dead ON entity_changes (dead_at) WHERE dead_at IS NOT NULL;
CREATE INDEX entity_changes_waiting
  ON entity_changes (pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0), next_attempt_at)
  WHERE next_attempt_at IS NOT NULL AND dead_at IS NULL;
CREATE INDEX entity_changes_holding_back
  ON entity_changes (
    pg_catalog.hashtextextended(entity_id, pg_catalog.hashtextextended(coalesce(entity_type, table_name), 0)), seq
  )
  WHERE next_attempt_at IS NOT NULL;
DROP TRIGGER fill_shard ON entity_changes;
DROP FUNCTION fill_shard();
ALTER TABLE entity_changes DROP COLUMN shard;
ALTER TABLE entity_changes
  ADD COLUMN shard smallint GENERATED ALWAYS AS ((pg_catalog.hashtext(entity_id) & 63)::smallint) STORED;
CREATE INDEX entity_changes_fresh ON entity_changes (shard, seq)
  WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL;
ALTER TABLE entity_changes
  ADD CONSTRAINT entity_changes_state_check CHECK (
    CASE
      WHEN processed THEN processed_at IS NOT NULL AND coalesce(next_attempt_at, dead_at) IS NULL
      ELSE (next_attempt_at < 'infinity') = (dead_at IS NULL)
    END
  ),
  ADD CONSTRAINT entity_changes_operation_check CHECK (operation = ANY ('{INSERT,UPDATE,DELETE}'));
INSERT INTO entity_changes (table_name, operation, entity_id)
  SELECT 'x', 'INSERT', n::text FROM generate_series(1, 5) AS n;
UPDATE entity_changes SET processed = true, processed_at = now() WHERE seq = 2;
UPDATE entity_changes SET next_attempt_at = now() WHERE seq = 3;
UPDATE entity_changes SET dead_at = now() WHERE seq = 4;
UPDATE entity_changes SET dead_at = now(), next_attempt_at = 'infinity' WHERE seq = 5;
"""


def test_a_row_that_is_written_without_a_shard_is_in_that_of_its_key(outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 200) AS n")
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id) SELECT 'x', 'INSERT', n::text"
        " FROM generate_series(1, 200) AS n"
    )
    shards = "SELECT count(DISTINCT shard) FROM entity_changes GROUP BY entity_id HAVING count(*) = 2"
    assert outbox_db.execute(shards).fetchall() == [(1,)] * 200
