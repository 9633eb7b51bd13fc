"""Each statement of a subscription goes through indexes, in the order in which it reads: also by statistics of an empty
queue, and with the generic plan that its sessions use."""

from __future__ import annotations

import re

import psycopg
import pytest
from psycopg import sql

from cdc.postgres.admin import Filter
from cdc.postgres.subscription import SubscriptionStore, coalesced_statements, statements
from cdc.postgres.subscription_admin import SubscriptionAdmin
from cdc.postgres.subscriptions import Subscriptions

pytestmark = pytest.mark.server

_PLACEHOLDER = re.compile(rb"%\((\w+)\)s|%%")
_READS = (
    "fetch", "fetch_some", "sweep", "sweep_some", "read_keys", "advance", "settle_moving", "figures", "coalesced ask",
)  # fmt: skip
"""What walks changes: two halves, merged."""
STATEMENTS = {
    **statements("public"),
    **{f"coalesced {name}": text for name, text in coalesced_statements("public").items()},
}
_OTHERS = (
    "due", "next_due", "settle_processed", "settle_others", "locked", "start", "unstart", "suspect", "refuse", "take",
    "mark", "coalesced settle", "coalesced mark",
)  # fmt: skip


def _numbered(statement: bytes) -> tuple[bytes, int]:
    """With $1, $2, ... in place of the names of its parameters, and how many there are."""
    names: list[bytes] = []

    def number(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            return b"%"
        if match[1] not in names:
            names.append(match[1])
        return b"$%d" % (names.index(match[1]) + 1)

    return _PLACEHOLDER.sub(number, statement), len(names)


@pytest.fixture
def queue(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """Its tables are analysed while the queue is empty and the history is not."""
    Subscriptions("public").create(outbox_db, "search", start="beginning")
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, shard, processed, processed_at)"
        " SELECT 'x', 'INSERT', n::text, (hashtext(n::text) & 63)::smallint, true, now()"
        " FROM generate_series(1, 20000) AS n"
    )
    outbox_db.execute("ANALYZE")
    for name, value in SubscriptionStore.session.items():
        outbox_db.execute("SELECT set_config(%s, %s, false)", [name, value])
    return outbox_db


def _plan(db: psycopg.Connection, statement: bytes) -> str:
    text, count = _numbered(statement)
    db.execute(b"PREPARE asked AS " + text)
    nulls = sql.SQL(", ").join([sql.NULL] * count)
    lines = db.execute(sql.SQL("EXPLAIN EXECUTE asked({})").format(nulls)).fetchall()
    db.execute("DEALLOCATE asked")
    return "\n".join(line for (line,) in lines)


def test_what_reads_changes_merges_its_two_halves_and_walks_nothing_else(queue: psycopg.Connection) -> None:
    for name in _READS:
        plan = _plan(queue, STATEMENTS[name])
        for dear in ("Seq Scan", "Materialize", "Hash Join", "Bitmap", "Merge Join"):
            assert dear not in plan, f"{name}: {plan}"
        # Both by shard and number: an index without a condition is walked as a whole.
        for scan in re.findall(r"(?:entity_changes_fresh|entity_changes_settled) on .*\n\s+(.*)", plan):
            assert scan.startswith("Index Cond: ((shard = "), f"{name}: {plan}"
        for scan in re.findall(r"cdc_subscription_changes_pkey on .*\n\s+(.*)", plan):
            assert "(seq " in scan, f"{name}: {plan}"
    for name in ("sweep", "sweep_some", "read_keys", "advance", "settle_moving", "figures"):
        assert "Merge Append" in _plan(queue, STATEMENTS[name]), name


def test_what_settles_probes_for_each_change(queue: psycopg.Connection) -> None:
    for name in _OTHERS:
        plan = _plan(queue, STATEMENTS[name])
        for dear in ("Seq Scan", "Materialize", "Hash Join", "Bitmap", "Merge Join"):
            assert dear not in plan, f"{name}: {plan}"
        for scan in re.findall(r"cdc_subscription_changes_pkey on .*\n\s+(.*)", plan):
            assert "(seq = " in scan, f"{name}: {plan}"


def test_what_an_operator_sees_is_not_looked_for_among_all_that_is_done(queue: psycopg.Connection) -> None:
    """What holds back a key is probed for once for each change that is looked at."""
    queue.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, shard)"
        " SELECT 'x', 'INSERT', n::text, (n % 64)::smallint FROM generate_series(1, 640) AS n"
    )
    [search] = Subscriptions("public").all(queue)
    queue.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard)"
        " SELECT seq, %s, shard FROM entity_changes WHERE processed",
        [search.number],
    )
    admin = SubscriptionAdmin("public", search)
    for read in (admin.stats, lambda db: admin.find(db, "blocked", Filter(), 10)):
        with queue.transaction():
            before = _read(queue)
            read(queue)
            rows = _read(queue) - before
        assert rows <= 20_640, f"{rows} rows, where 20,640 changes are looked at"


def _read(db: psycopg.Connection) -> int:
    [(rows,)] = db.execute(
        "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables"
        " WHERE relname = 'cdc_subscription_changes'"
    )
    return int(rows)
