"""What is asked often reads little, on a table of a million processed changes and by statistics of an empty queue.

Counted, not timed: what each statement took from the table and from its indexes. Of every statement of outbox.sql
the plan is looked at besides, the generic one that the consumer's sessions use.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import psycopg
import pytest
from psycopg import sql

from cdc.core.model import SHARDS, ChangeState, Processed, WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Position
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.bulk import Wanted
from cdc.postgres.outbox import INDEXED, Store
from cdc.postgres.pages import Settled
from cdc.postgres.retention import Retention
from cdc.postgres.search import Search
from cdc.postgres.sql_files import load
from tests.bench.database import preload_unprocessed
from tests.changes import change

T = TypeVar("T")
_DAY_S = 86_400.0
_READ = """
SELECT c.relname, pg_stat_get_xact_numscans(c.oid), pg_stat_get_xact_tuples_returned(c.oid)
FROM pg_class AS c
WHERE c.oid = 'entity_changes'::regclass
   OR c.oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'entity_changes'::regclass)
"""
_SET = "SELECT set_config(name, value, true) FROM unnest(%s::text[], %s::text[]) AS setting(name, value)"
_FRESH = (
    "SELECT seq, shard FROM entity_changes WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL"
    " ORDER BY seq DESC LIMIT 100"
)


Reader = dict[str, tuple[int, int]]
"""(scans, rows) of the table, where it was read whole, and of each of its indexes."""


async def reading(dsn: str, work: Callable[[psycopg.AsyncConnection], Awaitable[object]]) -> Reader:
    """What it reads on a session like the consumer's; what it writes is rolled back."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.execute(_SET, [list(INDEXED), list(INDEXED.values())])
        await work(connection)
        found = await (await connection.execute(_READ)).fetchall()
        await connection.rollback()
    return {name: (scans, rows) for name, scans, rows in found}


def reading_sync(dsn: str, work: Callable[[psycopg.Connection], T]) -> tuple[T, Reader]:
    """As ``reading``, and what it returned."""
    with psycopg.connect(dsn) as connection:
        connection.execute(_SET, [list(INDEXED), list(INDEXED.values())])
        result = work(connection)
        found = connection.execute(_READ).fetchall()
        connection.rollback()
    return result, {name: (scans, rows) for name, scans, rows in found}


def rows(reads: Reader) -> int:
    assert reads["entity_changes"][0] == 0, "the table is never read whole"
    return sum(number for _, number in reads.values())


@pytest.fixture
def wakeups(large_outbox: str) -> list[WakeUp]:
    """A hundred fresh changes, of as many keys."""
    with psycopg.connect(large_outbox) as connection:
        return [WakeUp(*row) for row in connection.execute(_FRESH).fetchall()]


async def test_a_fetch_probes_once_for_each_change_and_once_for_what_might_hold_it_back(
    large_outbox: str, wakeups: list[WakeUp]
) -> None:
    found = await reading(large_outbox, lambda connection: Store("public").fetch(connection, wakeups))
    assert found["entity_changes_fresh"] == (100, 100)
    assert found["entity_changes_holding_back"][0] <= 101
    assert rows(found) < 300


async def test_a_settle_probes_once_for_each_of_its_changes(large_outbox: str, wakeups: list[WakeUp]) -> None:
    batch = [Settlement(change(wakeup.seq, shard=wakeup.shard), Processed()) for wakeup in wakeups]
    settled: list[Settled] = []

    async def settle(connection: psycopg.AsyncConnection) -> None:
        settled.append(await Store("public").settle(connection, batch))

    found = await reading(large_outbox, settle)
    assert [each.missed for each in settled] == [0]
    assert rows(found) < 300


async def test_a_sweep_reads_its_page_and_what_might_hold_it_back(large_outbox: str) -> None:
    start = {shard: Position(floor=0, cursor=0, since=3) for shard in range(SHARDS)}
    found = await reading(large_outbox, lambda connection: Store("public").sweep(connection, Sweep(start, 5, 1)))
    assert found["entity_changes_fresh"] == (SHARDS, 5 * SHARDS)
    assert rows(found) < 1_000


async def test_a_look_for_retries_that_are_due_does_not_walk_what_waits(large_outbox: str) -> None:
    found = await reading(large_outbox, lambda connection: Store("public").due(connection, range(SHARDS), 1_000))
    assert rows(found) < 10


def test_the_figures_of_the_collector_read_little_though_a_long_queue_is_held_back(large_outbox: str) -> None:
    figures, found = reading_sync(large_outbox, Store("public").figures)
    assert (figures.fresh, figures.waiting, figures.dead) == (8_000, 2_001, 1_000)
    assert figures.oldest_ready_age_s > 0
    assert found["entity_changes_holding_back"][0] < 1_000, (
        "of the 5,000 that are held back a few hundred are looked at"
    )
    assert rows(found) < 20_000


def test_a_change_is_found_by_its_number_without_a_walk_over_the_fresh_ones(
    large_outbox: str, wakeups: list[WakeUp]
) -> None:
    named, found = reading_sync(large_outbox, lambda connection: OutboxAdmin("public").show(connection, wakeups[0].seq))
    assert named.seq == wakeups[0].seq
    assert found["entity_changes_fresh"] == (SHARDS, 1)


async def test_a_batch_of_retention_walks_no_more_than_it_removes(large_outbox: str) -> None:
    found = await reading(
        large_outbox, lambda connection: Retention("public").prune_batch(connection, 20 * _DAY_S, 100)
    )
    assert found["entity_changes_processed"] == (1, 100)
    assert rows(found) == 100


@pytest.mark.parametrize("view", ["action_processing_dashboard", "recent_action_history"])
def test_the_views_read_the_indexes_and_not_the_history(large_outbox: str, view: str) -> None:
    explain = sql.SQL("EXPLAIN SELECT * FROM {} LIMIT 20").format(sql.Identifier(view))
    with psycopg.connect(large_outbox) as connection:
        plan = "\n".join(line for (line,) in connection.execute(explain))
    assert "Seq Scan" not in plan, plan
    assert "entity_changes_processed" in plan


def test_the_oldest_that_could_run_is_looked_for_among_the_first_of_each_shard(outbox_db: psycopg.Connection) -> None:
    def age_s() -> float:
        return Store("public").figures(outbox_db).oldest_ready_age_s

    preload_unprocessed(outbox_db, 1, wait="1 hour", key="stuck")
    preload_unprocessed(outbox_db, 400, key="stuck")
    assert age_s() == 0, "nothing could run"
    [(shard,)] = outbox_db.execute("SELECT DISTINCT shard FROM entity_changes").fetchall()
    preload_unprocessed(outbox_db, 1_000)
    outbox_db.execute("DELETE FROM entity_changes WHERE shard <> %s", [shard])
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 minute' WHERE entity_id <> 'stuck'")
    assert 60 <= age_s() < 120, "the first that nothing holds back stands behind 400 that are"
    preload_unprocessed(outbox_db, 1, wait="1 hour", key="key 1")
    outbox_db.execute(
        "UPDATE entity_changes SET changed_at = now() - interval '1 hour' WHERE entity_id = 'stuck'"
        " AND next_attempt_at IS NULL"
    )
    assert 60 <= age_s() < 120, "what is held back does not count, however old"


# --- plans ---------------------------------------------------------------------------------------------------------

_STATEMENTS = {
    **load("outbox.sql", "public"),
    **{f"floors {name}": text for name, text in load("kept_floors.sql", "public").items()},
    **{f"coalesced {name}": text for name, text in load("coalesced.sql", "public").items()},
}
_NO_TABLE = {
    "cause": "sets a setting", "coalesced indexed": "sets settings", "check": "LIMIT 0",
    "missing_rights": "asks the catalog", "filtered": "asks the catalog", "floors drawn": "asks the sequence",
}  # fmt: skip
_INDEXES = {
    "floors move": {"fresh"},
    "chains": {"pkey"},
    "coalesced ask": {"pkey", "fresh", "holding_back"},
    "coalesced locked": {"pkey", "fresh"},
    "coalesced mark": {"pkey", "fresh"},
    "coalesced settle": {"pkey", "fresh"},
    "due": {"waiting", "pkey", "holding_back"},
    "fetch": {"fresh", "holding_back"},
    "fetch_one": {"fresh", "holding_back"},
    "fetch_some": {"fresh", "holding_back"},
    "figures": {"fresh", "holding_back", "failed", "waiting", "pkey"},
    "figures_some": {"fresh", "holding_back", "waiting", "failed", "pkey"},
    "lock": {"pkey"},
    "mark": {"pkey"},
    "marked_since": {"processed", "holding_back"},
    "next_due": {"waiting"},
    "outside": {"fresh"},
    "read_keys": {"fresh", "holding_back"},
    "settle_others": {"pkey"},
    "settle_processed": {"fresh"},
    "start": {"pkey"},
    "sweep": {"fresh", "holding_back"},
    "sweep_some": {"fresh", "holding_back"},
    "suspect": {"pkey"},
    "take": {"pkey"},
    "there": {"pkey"},
    "unstart": {"pkey"},
}
"""Statement to the indexes of entity_changes that it reads; the rows that it has found it may touch by their place."""

Plan = dict[str, Any]


def plan_of(connection: psycopg.Connection, statement: bytes) -> Plan:
    """As it is for any parameters. Nothing is executed."""
    names: list[str] = []

    def numbered(found: re.Match[str]) -> str:
        if found[1] not in names:
            names.append(found[1])
        return f"${names.index(found[1]) + 1}"

    text = re.sub(r"%\((\w+)\)s", numbered, statement.decode()).replace("%%", "%")
    connection.execute(_SET, [list(INDEXED), list(INDEXED.values())])
    connection.execute(sql.SQL("PREPARE looked_at AS ") + sql.SQL(text))
    nothing = sql.SQL("({})").format(sql.SQL(", ").join([sql.NULL] * len(names))) if names else sql.SQL("")
    [(plan,)] = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE looked_at") + nothing).fetchall()
    return dict(plan[0]["Plan"])


def walk(node: Plan, above: tuple[Plan, ...] = ()) -> Iterator[tuple[Plan, tuple[Plan, ...]]]:
    """Each node, with those above it that its rows go to, the nearest first. Those of a sub-plan stay in it."""
    yield node, above
    for child in node.get("Plans", ()):
        inside = child.get("Parent Relationship") in {"SubPlan", "InitPlan"}
        yield from walk(child, () if inside else (node, *above))


def reads_changes(node: Plan) -> bool:
    return node.get("Relation Name") == "entity_changes" and "Scan" in node["Node Type"]


def finds_one(node: Plan) -> bool:
    """By the primary key or the row's place."""
    return node["Node Type"] == "Tid Scan" or re.search(r"\bid = ", node.get("Index Cond", "")) is not None


def sorted_unbounded(plan: Plan) -> list[str]:
    """Sorts of changes that no LIMIT bounds: it stands between the scan and the sort, or each row is looked up."""
    found = []
    for node, above in walk(plan):
        if reads_changes(node) and not finds_one(node):
            for upper in above:
                if upper["Node Type"] == "Limit":
                    break
                if upper["Node Type"] in {"Sort", "Incremental Sort"}:
                    found.append(f"{node.get('Index Name')} under a sort by {upper['Sort Key']}")
    return found


@pytest.fixture
def connection(large_outbox: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(large_outbox) as opened:
        yield opened
        opened.rollback()


def test_every_statement_is_looked_at() -> None:
    assert set(_INDEXES) == set(_STATEMENTS) - set(_NO_TABLE)


@pytest.mark.parametrize("name", _INDEXES)
def test_it_goes_through_its_indexes_and_sorts_no_backlog(connection: psycopg.Connection, name: str) -> None:
    plan = plan_of(connection, _STATEMENTS[name])
    scans = [node for node, _ in walk(plan) if reads_changes(node)]
    assert {node["Node Type"] for node in scans} <= {"Index Scan", "Index Only Scan", "Tid Scan"}, plan
    assert {node["Index Name"] for node in scans if "Index Name" in node} == {
        f"entity_changes_{index}" for index in _INDEXES[name]
    }
    assert sorted_unbounded(plan) == []


@pytest.mark.parametrize("state", list(ChangeState))
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(entity_type="nothing"), Wanted(text="nothing")])
def test_a_page_of_a_search_looks_at_a_bounded_number(large_outbox: str, state: ChangeState, wanted: Wanted) -> None:
    """However many there are, and however rare what is looked for: from its end the next page goes on."""
    page, reads = reading_sync(large_outbox, lambda link: Search("public").page(link, state, wanted, 50))
    assert rows(reads) <= 20_000 + 300
    assert page.next is not None or state in (ChangeState.WAITING, ChangeState.DEAD)
    if page.next is not None:
        behind = page.next
        _, reads = reading_sync(
            large_outbox, lambda link: Search("public").page(link, state, wanted, 50, behind=behind)
        )
        assert rows(reads) <= 20_000 + 300
