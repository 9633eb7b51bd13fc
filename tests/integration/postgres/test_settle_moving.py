"""A settle of many changes moves the positions of a subscription itself, and leaves no row for what they pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

import psycopg
import pytest

from cdc.core.model import SHARDS, Change, Processed, Waiting
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.postgres import subscription
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.subscription import MOVING_MIN, SubscriptionStore
from cdc.postgres.subscriptions import Subscriptions
from tests.subscriptions import kept, states_of

pytestmark = pytest.mark.server

_CHANGES = 2 * MOVING_MIN
_EVERY_SHARD = Sweep({shard: Position(0, 0, 3) for shard in range(SHARDS)}, 1_000, 1)


class Reader(NamedTuple):
    """A consumer of the subscription ``search``, which owns its shards, on one session."""

    db: psycopg.Connection
    session: psycopg.AsyncConnection
    store: SubscriptionStore
    number: int

    async def fresh(self) -> list[Change]:
        rows = (await self.store.sweep(self.session, _EVERY_SHARD)).rows
        return sorted((row.change for row in rows), key=lambda change: change.seq)

    async def settle(self, changes: Iterable[Change]) -> int:
        """Returns how many another session had settled."""
        batch = [Settlement(change, Processed()) for change in changes]
        return (await self.store.settle(self.session, batch)).missed

    async def advance(self) -> None:
        await self.store.advance(self.session, range(SHARDS))

    def positions(self) -> dict[int, int]:
        rows = self.db.execute("SELECT shard, seq FROM cdc_positions WHERE subscription = %s", [self.number])
        return dict(rows.fetchall())


@pytest.fixture
async def reader(outbox: str, outbox_db: psycopg.Connection) -> AsyncIterator[Reader]:
    """With changes of every shard, and a candidate at the last of them that is proved."""
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    publish(outbox_db, _CHANGES)
    async for each in _reader(outbox, outbox_db, made, EVERYTHING):
        await each.advance()
        yield each


async def _reader(dsn: str, db: psycopg.Connection, made: Any, scope: TypeFilter) -> AsyncIterator[Reader]:
    store = SubscriptionStore("public", made, 16, scope)
    db.execute("UPDATE cdc_positions SET owner = %s WHERE subscription = %s", [store.process, made.number])
    session = await connect_async(dsn, application_name="cdc: test", session=SubscriptionStore.session)
    read_changes(session)
    try:
        yield Reader(db, session, store, made.number)
    finally:
        await session.close()


def publish(db: psycopg.Connection, count: int, entity_type: str = "order") -> None:
    db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, count])


def last_of_each_shard(changes: Sequence[Change]) -> dict[int, int]:
    return {change.shard: change.seq for change in changes}


async def test_what_the_positions_pass_leaves_no_row_now_or_later(reader: Reader) -> None:
    changes = await reader.fresh()
    assert len(changes) == _CHANGES
    assert await reader.settle(changes) == 0
    assert kept(reader.db, reader.number) == 0
    passed = reader.positions()
    assert all(passed[shard] == seq for shard, seq in last_of_each_shard(changes).items())
    assert await reader.fresh() == []
    assert await reader.settle(changes) == len(changes), "who comes second has lost"


async def test_a_change_that_is_still_to_be_done_keeps_the_position_and_what_is_behind_it_has_a_row(
    reader: Reader,
) -> None:
    changes = await reader.fresh()
    open_ = changes[0]
    behind = [change for change in changes[1:] if change.shard == open_.shard]
    assert await reader.settle(changes[1:]) == 0
    assert reader.positions()[open_.shard] == open_.seq - 1
    assert kept(reader.db, reader.number) == len(behind) > 0
    assert [change.seq for change in await reader.fresh()] == [open_.seq]


async def test_the_settle_that_closes_a_gap_takes_the_rows_behind_it_away(reader: Reader) -> None:
    changes = await reader.fresh()
    await reader.settle(changes[1:])
    publish(reader.db, _CHANGES)
    assert await reader.settle(await reader.fresh()) == 0
    left = reader.db.execute("SELECT min(seq) FROM cdc_subscription_changes").fetchall()
    assert left > [(changes[-1].seq,)], "of what is not proved yet"
    assert reader.positions()[changes[0].shard] == last_of_each_shard(changes)[changes[0].shard]


async def test_what_is_done_behind_an_open_change_stays_done_while_other_shards_pass_its_number(
    reader: Reader,
) -> None:
    changes = await reader.fresh()
    *_, open_, done = (change for change in changes if change.shard == changes[0].shard)
    await reader.settle([done])
    assert await reader.settle([change for change in changes if change not in (open_, done)]) == 0
    assert reader.positions()[open_.shard] < open_.seq
    assert max(reader.positions().values()) > done.seq
    assert [change.seq for change in await reader.fresh()] == [open_.seq]


async def test_a_position_moves_no_further_than_it_is_proved(outbox: str, reader: Reader) -> None:
    """A writer with a lower number is still open: what it commits is found."""
    await reader.settle(await reader.fresh())
    with psycopg.connect(outbox) as writing:
        publish(writing, SHARDS, "late")
        publish(reader.db, _CHANGES)
        await reader.advance()
        before = reader.positions()
        changes = await reader.fresh()
        assert await reader.settle(changes) == 0
        assert reader.positions() == before
        assert kept(reader.db, reader.number) == len(changes)
    assert [change.entity_type for change in await reader.fresh()] == ["late"] * SHARDS


async def test_few_changes_move_nothing(reader: Reader) -> None:
    before = reader.positions()
    assert await reader.settle((await reader.fresh())[: MOVING_MIN - 1]) == 0
    assert reader.positions() == before
    assert kept(reader.db, reader.number) == MOVING_MIN - 1


async def test_a_session_that_does_not_own_the_shards_moves_nothing(reader: Reader) -> None:
    reader.db.execute("UPDATE cdc_positions SET owner = gen_random_uuid() WHERE shard %% 2 = 0", [])
    before = reader.positions()
    changes = await reader.fresh()
    assert await reader.settle(changes) == 0
    after = reader.positions()
    assert {shard for shard in after if after[shard] > before[shard]} == {
        change.shard for change in changes if change.shard % 2
    }
    assert kept(reader.db, reader.number) == sum(change.shard % 2 == 0 for change in changes)


async def test_a_position_that_a_transactional_handler_has_locked_is_not_waited_for(
    outbox: str, reader: Reader
) -> None:
    changes = await reader.fresh()
    marked = changes[0]
    with psycopg.connect(outbox) as handler:
        [(xid,)] = handler.execute(*reader.store.take([marked], marked)).fetchall()
        handler.execute(*reader.store.mark([marked], xid))
        await reader.session.execute("SET lock_timeout = '5s'")
        assert await reader.settle(changes[1:]) == 0
        handler.commit()
    assert {change.shard for change in changes} - {marked.shard} == {
        shard for shard, seq in reader.positions().items() if seq
    }
    assert await reader.fresh() == []


async def test_what_another_session_has_settled_is_counted_as_missed_and_leaves_nothing_behind(
    reader: Reader,
) -> None:
    changes = await reader.fresh()
    done, retried = changes[0], changes[1]
    reader.db.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard) VALUES (%s, %s, %s)",
        [done.seq, reader.number, done.shard],
    )
    await reader.store.settle(reader.session, [Settlement(retried, Waiting(3_600.0, "no", summary="no"))])
    assert await reader.settle(changes) == 2
    assert kept(reader.db, reader.number) == 1
    assert [seq for seq, state in states_of(reader.db, reader.number).items() if state == "waiting"] == [retried.seq]
    assert all(reader.positions()[shard] == seq for shard, seq in last_of_each_shard(changes).items())


async def test_what_waits_below_its_position_is_missed_once(reader: Reader) -> None:
    *changes, retried = await reader.fresh()
    await reader.store.settle(reader.session, [Settlement(retried, Waiting(3_600.0, "no", summary="no"))])
    await reader.settle(changes)
    await reader.advance()
    assert reader.positions()[retried.shard] == retried.seq
    publish(reader.db, _CHANGES)
    await reader.advance()
    assert await reader.settle([retried, *await reader.fresh()]) == 1
    assert states_of(reader.db, reader.number)[retried.seq] == "waiting"


async def test_a_start_that_was_recorded_is_gone_with_its_settle(reader: Reader) -> None:
    changes = await reader.fresh()
    first, second = changes[:2]
    assert await reader.store.start(reader.session, [first, second], ["work", "work"]) == {first.id, second.id}
    assert await reader.settle([*changes[:1], *changes[2:]]) == 0
    assert reader.positions()[second.shard] == second.seq - 1, "the other start keeps its position below it"
    assert await reader.settle([second, *changes[2:]]) == len(changes) - 2
    assert states_of(reader.db, reader.number)[second.seq] == "done"


async def test_changes_of_other_types_are_passed(outbox: str, outbox_db: psycopg.Connection) -> None:
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    for _ in range(2):
        publish(outbox_db, _CHANGES, "other")
        publish(outbox_db, _CHANGES, "order")
    async for reader in _reader(outbox, outbox_db, made, TypeFilter(("order",), True)):
        await reader.advance()
        changes = [change for change in await reader.fresh() if change.entity_type == "order"]
        assert await reader.settle(changes) == 0
        assert kept(outbox_db, made.number) == 0
        assert all(reader.positions()[shard] == seq for shard, seq in last_of_each_shard(changes).items())


async def test_where_more_rows_lie_between_the_positions_than_are_looked_at_each_change_gets_one(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "_BETWEEN_MAX", 5)
    changes = await reader.fresh()
    for change in changes[:6]:
        await reader.store.settle(reader.session, [Settlement(change, Waiting(3_600.0, "no", summary="no"))])
    before = reader.positions()
    assert await reader.settle(changes[6:]) == 0
    assert reader.positions() == before
    assert kept(reader.db, reader.number) == len(changes)
    publish(reader.db, _CHANGES)
    await reader.settle(await reader.fresh())
    assert reader.positions() == before, "and the next one does not try"
    await reader.advance()
    assert kept(reader.db, reader.number) == _CHANGES + 6, "what was settled since, and what waits"


async def test_versions_of_positions_do_not_pile_up_behind_an_old_snapshot(outbox: str, reader: Reader) -> None:
    """What is settled meanwhile gets rows, and positions move as often as they do anyway."""
    pages = "SELECT pg_relation_size('cdc_positions') / current_setting('block_size')::int"
    with psycopg.connect(outbox) as dump:
        dump.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        dump.execute("SELECT count(*) FROM entity_changes")
        moved = []
        for _ in range(60):
            publish(reader.db, _CHANGES)
            await reader.advance()
            before = reader.positions()
            assert await reader.settle(await reader.fresh()) == 0
            moved.append(reader.positions() != before)
        assert moved[0]
        assert not any(moved[-20:])
        [(size,)] = reader.db.execute(pages).fetchall()
    assert size < 200
