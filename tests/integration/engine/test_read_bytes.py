"""Whatever the rows are like, a read returns a page of bytes and one change at most, and tells what it left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import fields
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.admission import Row
from cdc.core.deferred_keys import KeyRead
from cdc.core.model import SHARDS, WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.router import Router
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.postgres.loaders import read_changes
from cdc.postgres.outbox import INDEXED, Store
from cdc.postgres.pages import Place
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states

_BYTES = 100_000
_ROW = 50_000
_ROWS = 12
_SET = "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS setting(name, value)"
_LARGE = {
    "letters": "(SELECT to_jsonb(string_agg(md5(random()::text || i), '')) FROM generate_series(1, 1563) AS i)",
    "compressible": "to_jsonb(repeat('a', 50000))",
    "escapes": "to_jsonb(repeat(E'\\x01', 8400))",
    "digits": "to_jsonb('1e50000'::numeric)",
}
_SOME = TypeFilter(("x",), include=True)

Read = Callable[[Store, psycopg.AsyncConnection, Sequence[WakeUp]], Awaitable[tuple[list[Row], set[int]]]]
"""Returns what was read, and the numbers of what was said to be left for the next page."""


async def _fetch(store: Store, reader: psycopg.AsyncConnection, there: Sequence[WakeUp]) -> tuple[list[Row], set[int]]:
    page = await store.fetch(reader, there)
    return page.rows, {seq for seq, _ in page.cut}


async def _sweep(store: Store, reader: psycopg.AsyncConnection, there: Sequence[WakeUp]) -> tuple[list[Row], set[int]]:
    start = {shard: Position(floor=0, cursor=0, since=3) for shard in range(SHARDS)}
    page = await store.sweep(reader, Sweep(start, _ROWS, 1, scope=store.scope))
    assert page.scanned is not None
    ends = {shard: page.scanned.get(shard) for _, shard in there}
    left = {seq for seq, shard in there if (end := ends[shard]) is None or (end.more and seq > end.seq)}
    assert all(end is None or end.more or end.seq for end in ends.values())
    return page.rows, left


async def _resume(store: Store, reader: psycopg.AsyncConnection, there: Sequence[WakeUp]) -> tuple[list[Row], set[int]]:
    shards = {f"{n}": shard for n, (_, shard) in enumerate(there)}
    key_reads = [KeyRead(("x", key), shard, 0) for key, shard in shards.items()]
    found = await store.read_keys(reader, key_reads, 5)
    rows = [row for each in found.values() for row in each.rows]
    numbers = {f"{n}": seq for n, (seq, _) in enumerate(there)}
    return rows, {numbers[resume.key[1]] for resume, each in found.items() if each.cut}


async def _due(store: Store, reader: psycopg.AsyncConnection, there: Sequence[WakeUp]) -> tuple[list[Row], set[int]]:
    found = await store.due(reader, range(SHARDS), 1_000)
    read = {row.change.seq for row in found.rows}
    return found.rows, {seq for seq, _ in there if found.more and seq not in read}


async def _marked(store: Store, reader: psycopg.AsyncConnection, there: Sequence[WakeUp]) -> tuple[list[Row], set[int]]:
    [(beginning,)] = await (await reader.execute("SELECT now() - interval '1 hour'")).fetchall()
    found = await store.marked_since(reader, Place(beginning), 1_000)
    read = {change.seq for change, _ in found.marks}
    return [Row(change) for change, _ in found.marks], {seq for seq, _ in there if found.go_on and seq not in read}


_READS: dict[str, tuple[Read, TypeFilter, str | None]] = {
    "fetch": (_fetch, EVERYTHING, None),
    "fetch of some types": (_fetch, _SOME, None),
    "sweep": (_sweep, EVERYTHING, None),
    "sweep of some types": (_sweep, _SOME, None),
    "keys read on": (_resume, EVERYTHING, None),
    "due": (_due, EVERYTHING, "UPDATE entity_changes SET next_attempt_at = now()"),
    "marked": (_marked, EVERYTHING, "UPDATE entity_changes SET processed = true, processed_at = now()"),
    "marked of some types": (_marked, _SOME, "UPDATE entity_changes SET processed = true, processed_at = now()"),
}


@pytest.fixture
async def reader(outbox: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
        await connection.execute(_SET, [list(INDEXED), list(INDEXED.values())])
        read_changes(connection)
        yield connection


def _write(db: psycopg.Connection, document: str) -> list[WakeUp]:
    """As many changes, each of its own key."""
    for n in range(_ROWS):
        db.execute(f"SELECT publish_change('x', '{n}', 'INSERT', jsonb_build_object('a', {document}))".encode())
    return [WakeUp(*row) for row in db.execute("SELECT seq, shard FROM entity_changes ORDER BY seq").fetchall()]


@pytest.mark.parametrize("document", _LARGE)
@pytest.mark.parametrize("name", _READS)
async def test_a_read_ends_at_a_page_of_bytes_and_returns_what_it_left(
    outbox_db: psycopg.Connection, reader: psycopg.AsyncConnection, name: str, document: str
) -> None:
    read, scope, prepare = _READS[name]
    there = _write(outbox_db, _LARGE[document])
    if prepare:
        outbox_db.execute(prepare.encode())
    store = Store("public", scope=scope, page_bytes=_BYTES)
    rows, left = await read(store, reader, there)
    assert all(row.change.size >= _ROW for row in rows)
    assert _BYTES <= sum(row.change.size for row in rows) < _BYTES + 1.1 * _ROW
    assert {row.change.seq for row in rows} | left == {seq for seq, _ in there}
    assert not {row.change.seq for row in rows} & left


def _content(row: Row) -> tuple[Any, ...]:
    """All of it, its documents parsed."""
    return (*(getattr(row.change, field.name) for field in fields(row.change)), row.blocked)


async def test_a_change_is_read_alone_as_it_is_read_among_others(
    outbox_db: psycopg.Connection, reader: psycopg.AsyncConnection
) -> None:
    store, there = Store("public"), _write(outbox_db, "repeat('x', 10)")
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now() WHERE seq = %s", [there[0].seq])
    among = await store.fetch(reader, there)
    alone = [await store.fetch(reader, [wakeup]) for wakeup in there]
    assert alone[0].rows == []
    assert [list(map(_content, page.rows)) for page in alone[1:]] == [[_content(row)] for row in among.rows]
    assert {page.snapshot for page in alone} == {among.snapshot}


@pytest.mark.parametrize("name", _READS)
async def test_a_change_that_is_larger_than_a_page_is_read_alone(
    outbox_db: psycopg.Connection, reader: psycopg.AsyncConnection, name: str
) -> None:
    read, scope, prepare = _READS[name]
    there = _write(outbox_db, _LARGE["compressible"])
    if prepare:
        outbox_db.execute(prepare.encode())
    store = Store("public", scope=scope, page_bytes=1_000)
    rows, left = await read(store, reader, there)
    assert len(rows) == 1
    assert len(left) == _ROWS - 1


async def test_ids_and_types_weigh_too(outbox_db: psycopg.Connection, reader: psycopg.AsyncConnection) -> None:
    # By hand: the functions that capture cut them.
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id)"
        " SELECT repeat('é', 15000), 'INSERT', repeat('a', 20000) || n FROM generate_series(1, %s::int) AS n", [_ROWS],
    )  # fmt: skip
    store = Store("public", page_bytes=_BYTES)
    start = {shard: Position(floor=0, cursor=0, since=3) for shard in range(SHARDS)}
    assert len((await store.sweep(reader, Sweep(start, _ROWS, 1))).rows) == 2


async def test_what_waits_behind_changes_in_hand_is_read(
    outbox_db: psycopg.Connection, reader: psycopg.AsyncConnection
) -> None:
    there = _write(outbox_db, _LARGE["compressible"])
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now() - make_interval(secs => 100 - seq)")
    store = Store("public", page_bytes=1_000)
    in_window = [seq for seq, _ in there[:5]]
    found = await store.due(reader, range(SHARDS), 1_000, in_window=in_window)
    assert [row.change.seq for row in found.rows] == [there[5].seq]
    assert found.more


async def test_marks_of_one_moment_are_each_read_once_page_after_page(
    outbox_db: psycopg.Connection, reader: psycopg.AsyncConnection
) -> None:
    there = _write(outbox_db, _LARGE["compressible"])
    outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now()")
    [(beginning,)] = outbox_db.execute("SELECT now() - interval '1 hour'").fetchall()
    store, at, seen = Store("public", page_bytes=_BYTES), Place(beginning), list[int]()
    while at is not None:
        found = await store.marked_since(reader, at, 1_000)
        seen += [change.seq for change, _ in found.marks]
        at = found.go_on
    assert sorted(seen) == [seq for seq, _ in there]


@pytest.mark.parametrize("stream", [True, False])
async def test_changes_larger_than_pages_are_handled_once_and_in_order(
    outbox: str, outbox_db: psycopg.Connection, stream: bool
) -> None:
    router, handled = Router(), defaultdict[str, list[Any]](list)

    @router.on("x")
    async def note(change: cdc.Change) -> None:
        if change.attempt == 1 and change.new["n"] % 7 == 0:
            raise cdc.Retry(after=0.02)
        handled[change.entity_id].append(change.new["n"])

    def write(first: int) -> None:
        outbox_db.execute(
            "SELECT publish_change('x', (n %% 5)::text, 'INSERT', jsonb_build_object('n', n, 'a', repeat('a', 400000)))"
            " FROM generate_series(%s::int, %s::int) AS n", [first, first + 39],
        )  # fmt: skip

    write(0)
    async with consuming(outbox, router, stream=stream, window_bytes=1 << 20, poll_interval=0.05) as app:

        async def done() -> bool:
            return settled(outbox_db)

        await eventually_async(done, within_s=60, what="what was there is handled")
        write(40)
        write(80)
        await eventually_async(done, within_s=60, what="what had a wake-up is handled")
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
    assert states(outbox_db) == {"processed": 120}
    assert handled == {str(key): list(range(key, 120, 5)) for key in range(5)}
