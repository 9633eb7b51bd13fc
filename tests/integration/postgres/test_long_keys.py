"""Keys and types of any length are ordered, tried again, listed and given another chance, beside innocent ones."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.postgres import migrations
from cdc.postgres.outbox import FIRST_TYPE, TYPES_MAX, Store
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled
from tests.integration.postgres.test_large_history import reading, rows

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}
_INDEXES_AS_THEY_WERE = """
DROP INDEX entity_changes_waiting, entity_changes_holding_back;
CREATE INDEX entity_changes_due_by_type ON entity_changes ((coalesce(entity_type, table_name)), next_attempt_at)
  WHERE next_attempt_at < 'infinity';
CREATE INDEX entity_changes_holding ON entity_changes ((coalesce(entity_type, table_name)), entity_id, seq)
  WHERE next_attempt_at IS NOT NULL;
DELETE FROM cdc_migrations WHERE version >= 5;
"""


def _long(length: int = 20_000) -> str:
    """Beyond what a B-tree takes, also compressed."""
    return "".join(random.Random(length).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=length))


def _publish(db: psycopg.Connection, entity_type: str, entity_id: str) -> int:
    [(seq,)] = db.execute("SELECT publish_change(%s, %s)", [entity_type, entity_id]).fetchall()
    return int(seq)


@pytest.mark.parametrize("key", [("bad", _long()), (_long(), "1")], ids=["long key", "long type"])
async def test_what_has_a_long_key_is_tried_again_in_its_order_and_other_changes_are_marked(
    outbox: str, outbox_db: psycopg.Connection, key: tuple[str, str]
) -> None:
    router, calls = Router(), list[int]()

    @router.on("good")
    async def good(change: cdc.Change) -> None:
        calls.append(change.seq)

    @router.on("*")
    async def other(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.attempt < 3 and change.seq == first:
            raise RuntimeError

    first, second = _publish(outbox_db, *key), _publish(outbox_db, *key)
    innocents = [_publish(outbox_db, "good", str(n)) for n in range(5)]

    async def done() -> bool:
        return settled(outbox_db)

    async with consuming(outbox, router, **_QUICK):
        await eventually_async(done, what="every change processed or dead")
    assert Counter(calls) == {first: 3, second: 1} | dict.fromkeys(innocents, 1)
    assert calls.index(second) > max(n for n, seq in enumerate(calls) if seq == first), "the order of the key"


def test_dead_letters_with_long_keys_are_listed_shown_and_requeued_like_others(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seqs = [_publish(outbox_db, *key) for key in (("bad", _long()), (_long(), "1"), ("bad", "1"))]

    def kill() -> None:
        outbox_db.execute("UPDATE entity_changes SET dead_at = now(), next_attempt_at = NULL, error_count = 3")

    def waiting() -> int:
        [(count,)] = outbox_db.execute(
            "SELECT count(*) FROM entity_changes WHERE next_attempt_at IS NOT NULL"
        ).fetchall()
        return int(count)

    kill()
    found = json.loads(done(outbox, "outbox", "list", "--json"))["changes"]
    assert sorted(each["seq"] for each in found) == seqs
    done(outbox, "outbox", "show", str(seqs[0]))
    done(outbox, "outbox", "retry", "--all", "--yes")
    assert waiting() == 3
    kill()
    assert outbox_db.execute("SELECT * FROM reprocess_failed_actions()").fetchall() == [(3,)]
    assert waiting() == 3
    kill()
    done(outbox, "outbox", "retry", *map(str, seqs[:2]))
    done(outbox, "outbox", "discard", *map(str, seqs))
    assert waiting() == 0


@pytest.mark.parametrize("command", ["install", "upgrade"])
def test_an_outbox_with_the_indexes_of_before_is_upgraded_in_place(
    outbox: str, outbox_db: psycopg.Connection, command: str
) -> None:
    _publish(outbox_db, "x", "1")
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now()")
    outbox_db.execute(_INDEXES_AS_THEY_WERE)
    getattr(migrations, command)(outbox_db, "public")
    assert migrations.verify(outbox_db, "public") == []
    outbox_db.execute("UPDATE entity_changes SET entity_id = %s", [_long()])
    names = {
        name for (name,) in outbox_db.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'entity_changes'")
    }
    assert not names & {"entity_changes_holding", "entity_changes_due_by_type"}


async def test_a_look_for_what_is_due_goes_through_so_many_types_and_the_next_ones_through_the_rest(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """By the statistics of an hour when nothing waited."""
    outbox_db.execute("ALTER TABLE entity_changes SET (autovacuum_enabled = off)")
    outbox_db.execute("VACUUM ANALYZE entity_changes")
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type, next_attempt_at)"
        " SELECT 't', 'INSERT', n::text, 'type ' || n, now() + n * interval '1 s' - interval '1000 s'"
        " FROM generate_series(1, 2500) AS n"
    )
    store, seen, least, start = Store("public"), set[str](), list[float](), FIRST_TYPE
    looks = 0

    async def look(connection: psycopg.AsyncConnection) -> None:
        nonlocal start
        found = await store.due(connection, range(SHARDS), 5_000, start=start)
        assert not seen & {row.change.entity_type for row in found.rows}
        seen.update(row.change.entity_type for row in found.rows)
        least.extend([found.next_due_s] if found.next_due_s else [])
        start = FIRST_TYPE if found.go_on is None else found.go_on

    while looks == 0 or start != FIRST_TYPE:
        read = await reading(outbox, look)
        looks += 1
        assert rows(read) < 7 * TYPES_MAX, "each type is a probe or two, not a walk over what waits"
    assert looks == 3
    assert len(seen) >= 1_000
    assert min(least) <= 2
