"""Where a shard's next owner begins to read: the floors that owners keep, on a real server."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

import cdc
from cdc.core.model import SHARDS, Dead, Outcome, Processed, Waiting, WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.router import Router
from cdc.core.shard_cursor import Position
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.outbox import INDEXED, Store
from cdc.postgres.shard_locks import ShardSession
from tests.bench.database import preload_unprocessed
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, slot_name

pytestmark = pytest.mark.server

_EVERY = frozenset(range(SHARDS))
_PUBLISH = "SELECT publish_change('order', %s)"


@pytest.fixture
async def session(outbox: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await connect_async(outbox, application_name="test", session=INDEXED) as connection:
        read_changes(connection)
        yield connection


@pytest.fixture
async def store(session: psycopg.AsyncConnection) -> Store:
    made = Store("public")
    await made.check(session)
    return made


@pytest.fixture
def writer(outbox: str) -> Iterator[psycopg.Connection]:
    """Its transactions end where the test says so."""
    with psycopg.connect(outbox) as connection:
        yield connection


async def floors(dsn: str) -> dict[int, int]:
    """As a new owner of every shard gets them."""
    session = await ShardSession.open(dsn, "public", uuid.uuid4(), INDEXED)
    try:
        return dict((await session.acquire(SHARDS)).floors)
    finally:
        await session.unregister()
        await session.close()


async def look(store: Store, session: psycopg.AsyncConnection, times: int = 3) -> None:
    """The first notes a candidate, the next one proves it."""
    for _ in range(times):
        await store.advance(session, _EVERY)


async def settle(store: Store, session: psycopg.AsyncConnection, outcome: Outcome, *numbers: int) -> None:
    """These of what is fresh."""
    page = await store.sweep(session, Sweep(dict.fromkeys(_EVERY, Position(0, 0, 3)), 10_000, 1))
    batch = [Settlement(row.change, outcome) for row in page.rows if not numbers or row.change.seq in numbers]
    assert (await store.settle(session, batch)).missed == 0


def publish(connection: psycopg.Connection, key: str = "1") -> WakeUp:
    [(seq,)] = connection.execute(_PUBLISH, [key]).fetchall()
    return WakeUp(*connection.execute("SELECT seq, shard FROM entity_changes WHERE seq = %s", [seq]).fetchall()[0])


async def test_a_new_owner_begins_behind_what_is_settled(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    assert await floors(outbox) == {}
    preload_unprocessed(outbox_db, 300)
    await settle(store, session, Processed())
    await look(store, session)
    assert await floors(outbox) == dict.fromkeys(_EVERY, 300)


async def test_what_is_fresh_stands_above_the_floor_of_its_shard_and_what_waits_or_is_dead_need_not(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    dead, waits, fresh, done = (publish(outbox_db, key) for key in ("a", "b", "c", "e"))
    assert len({each.shard for each in (dead, waits, fresh, done)}) == 4
    await settle(store, session, Dead("too large"), dead.seq)
    await settle(store, session, Waiting(3_600, "too early"), waits.seq)
    await settle(store, session, Processed(), done.seq)
    await look(store, session)
    found = await floors(outbox)
    assert {found[each.shard] for each in (dead, waits, done)} == {done.seq}
    assert found[fresh.shard] == fresh.seq - 1
    await settle(store, session, Processed(), fresh.seq)
    await look(store, session, 1)
    assert (await floors(outbox))[fresh.shard] == done.seq, "what is proved stays proved"


async def test_no_floor_passes_the_number_of_a_transaction_that_is_open(
    outbox: str, outbox_db: psycopg.Connection, writer: psycopg.Connection, store: Store,
    session: psycopg.AsyncConnection,
) -> None:  # fmt: skip
    late = publish(writer)
    for _ in range(5):
        publish(outbox_db)
        await settle(store, session, Processed())
        await look(store, session)
    assert (await floors(outbox)).get(late.shard, 0) < late.seq
    writer.commit()
    await look(store, session)
    assert (await floors(outbox))[late.shard] == late.seq - 1, "it is there now, and fresh"
    await settle(store, session, Processed())
    await look(store, session)
    assert (await floors(outbox))[late.shard] == late.seq + 5


async def test_transactions_that_overlap_for_ever_do_not_keep_it_from_moving(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    first = publish(outbox_db)
    await settle(store, session, Processed())
    with psycopg.connect(outbox) as one, psycopg.connect(outbox) as other:
        publish(one, "open")
        for ending, beginning in itertools.islice(itertools.cycle([(one, other), (other, one)]), 6):
            publish(beginning, "open")
            await look(store, session, 1)
            ending.rollback()
        assert (await floors(outbox))[first.shard] >= first.seq


async def test_under_an_old_snapshot_a_new_owner_walks_over_nothing_that_was_settled_before(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    """No vacuum may remove what the snapshot could still see: each entry of the index leads to a dead row."""
    preload_unprocessed(outbox_db, 2_000)
    with psycopg.connect(outbox) as dump:
        dump.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        dump.execute("SELECT count(*) FROM entity_changes")
        await settle(store, session, Processed())
        await look(store, session)
        kept = await floors(outbox)
        assert await entries_read(outbox, dict.fromkeys(_EVERY, 0)) >= 2_000
        assert await entries_read(outbox, kept) == 0


async def entries_read(dsn: str, start: dict[int, int]) -> int:
    """Of the index of fresh changes, by the first page of an owner."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        for name, value in INDEXED.items():
            await connection.execute("SELECT set_config(%s, %s, true)", [name, value])
        positions = {shard: Position(floor, floor, 3) for shard, floor in start.items()}
        assert not (await Store("public").sweep(connection, Sweep(positions, 10, 1))).rows
        read = "SELECT pg_stat_get_xact_tuples_returned('entity_changes_fresh'::regclass)"
        return int((await (await connection.execute(read)).fetchall())[0][0])


async def test_floors_that_are_far_behind_move_in_strides_until_they_are_there(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    """A stride is what is walked at once, where no vacuum has come by: nothing is settled meanwhile."""
    outbox_db.execute("SELECT setval('entity_changes_seq_seq', 200000)")
    await look(store, session, 2)
    assert 0 < (await floors(outbox))[0] < 200_000
    for _ in range(200):
        await look(store, session, 1)
    assert set((await floors(outbox)).values()) == {200_000}


async def test_floors_of_before_the_numbers_started_over_count_for_nothing(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    preload_unprocessed(outbox_db, 200)
    await settle(store, session, Processed())
    await look(store, session)
    outbox_db.execute("TRUNCATE entity_changes RESTART IDENTITY")
    assert await floors(outbox) == {}
    again = publish(outbox_db)
    assert again.seq == 1
    assert await floors(outbox) == {}
    await look(store, session)
    assert (await floors(outbox))[again.shard] == 0
    await settle(store, session, Processed())
    await look(store, session)
    assert set((await floors(outbox)).values()) == {1}


async def test_a_floor_that_another_owner_has_moved_meanwhile_stays(
    outbox: str, outbox_db: psycopg.Connection, store: Store, session: psycopg.AsyncConnection
) -> None:
    first = publish(outbox_db)
    await settle(store, session, Processed())
    await look(store, session)
    outbox_db.execute("SELECT setval('entity_changes_seq_seq', 100)")
    outbox_db.execute("UPDATE cdc_positions SET seq = 50 WHERE subscription = 0")
    await store.advance(session, _EVERY)
    assert (await floors(outbox))[first.shard] == 50


async def test_a_consumer_keeps_its_floors_and_the_next_one_handles_what_comes_and_what_was_made_fresh_by_hand(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, handled = Router(), list[str]()

    @router.on("order")
    async def handle(change: cdc.Change) -> None:
        handled.append(change.entity_id)

    first = publish(outbox_db, "first")

    async def kept() -> bool:
        found = outbox_db.execute("SELECT coalesce(min(seq), 0) FROM cdc_positions WHERE subscription = 0").fetchall()
        return bool(found[0][0] >= first.seq)

    async with consuming(outbox, router, slot_name=slot_name()):
        await eventually_async(kept, within_s=90, what="its floors are kept")
    publish(outbox_db, "second")
    outbox_db.execute("UPDATE entity_changes SET processed = false, processed_at = NULL WHERE seq = %s", [first.seq])

    async def all_settled() -> bool:
        return settled(outbox_db)

    async with consuming(outbox, router, slot_name=slot_name()):
        outbox_db.execute("NOTIFY entity_change, ''")
        await eventually_async(all_settled, within_s=120, what="both are handled")
    assert sorted(handled) == ["first", "first", "second"]
