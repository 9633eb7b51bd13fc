"""A settle of many changes moves the positions of a subscription itself, and leaves no row for what they pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import psycopg
import pytest

from cdc.core.model import SHARDS, Change, Waiting
from cdc.core.type_filter import TypeFilter
from cdc.postgres import subscription
from cdc.postgres.subscription import MOVING_MIN
from cdc.postgres.subscriptions import Subscriptions
from tests.subscription_reader import SubscriptionReader, reading
from tests.subscriptions import kept, states_of

pytestmark = pytest.mark.server

_CHANGES = 2 * MOVING_MIN
_FAILED = Waiting(3_600.0, "no", summary="no")


@pytest.fixture
async def reader(outbox: str, outbox_db: psycopg.Connection) -> AsyncIterator[SubscriptionReader]:
    """With changes of every shard, and a candidate at the last of them that is proved."""
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    publish(outbox_db, _CHANGES)
    async with reading(outbox, outbox_db, made) as reader:
        reader.owns()
        await reader.advance()
        yield reader


def publish(db: psycopg.Connection, count: int, entity_type: str = "order") -> None:
    db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, count])


def last_of_each_shard(changes: Sequence[Change]) -> dict[int, int]:
    return {change.shard: change.seq for change in changes}


async def test_what_the_positions_pass_leaves_no_row_now_or_later(reader: SubscriptionReader) -> None:
    changes = await reader.fresh()
    assert len(changes) == _CHANGES
    assert await reader.settle(changes) == 0
    assert kept(reader.db, reader.made.number) == 0
    passed = reader.positions()
    assert all(passed[shard] == seq for shard, seq in last_of_each_shard(changes).items())
    assert await reader.fresh() == []
    assert await reader.settle(changes) == len(changes), "who comes second has lost"


async def test_a_change_that_is_still_to_be_done_keeps_the_position_and_what_is_behind_it_has_a_row(
    reader: SubscriptionReader,
) -> None:
    changes = await reader.fresh()
    open_ = changes[0]
    behind = [change for change in changes[1:] if change.shard == open_.shard]
    assert await reader.settle(changes[1:]) == 0
    assert reader.positions()[open_.shard] == open_.seq - 1
    assert kept(reader.db, reader.made.number) == len(behind) > 0
    assert [change.seq for change in await reader.fresh()] == [open_.seq]


async def test_the_settle_that_closes_a_gap_takes_the_rows_behind_it_away(reader: SubscriptionReader) -> None:
    changes = await reader.fresh()
    await reader.settle(changes[1:])
    publish(reader.db, _CHANGES)
    assert await reader.settle(await reader.fresh()) == 0
    left = reader.db.execute("SELECT min(seq) FROM cdc_subscription_changes").fetchall()
    assert left > [(changes[-1].seq,)], "of what is not proved yet"
    assert reader.positions()[changes[0].shard] == last_of_each_shard(changes)[changes[0].shard]


async def test_what_is_done_behind_an_open_change_stays_done_while_other_shards_pass_its_number(
    reader: SubscriptionReader,
) -> None:
    changes = await reader.fresh()
    *_, open_, done = (change for change in changes if change.shard == changes[0].shard)
    await reader.settle([done])
    assert await reader.settle([change for change in changes if change not in (open_, done)]) == 0
    assert reader.positions()[open_.shard] < open_.seq
    assert max(reader.positions().values()) > done.seq
    assert [change.seq for change in await reader.fresh()] == [open_.seq]


async def test_a_position_moves_no_further_than_it_is_proved(outbox: str, reader: SubscriptionReader) -> None:
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
        assert kept(reader.db, reader.made.number) == len(changes)
    assert [change.entity_type for change in await reader.fresh()] == ["late"] * SHARDS


async def test_few_changes_move_nothing(reader: SubscriptionReader) -> None:
    before = reader.positions()
    assert await reader.settle((await reader.fresh())[: MOVING_MIN - 1]) == 0
    assert reader.positions() == before
    assert kept(reader.db, reader.made.number) == MOVING_MIN - 1


async def test_a_session_that_does_not_own_the_shards_moves_nothing(reader: SubscriptionReader) -> None:
    reader.db.execute("UPDATE cdc_positions SET owner = gen_random_uuid() WHERE shard %% 2 = 0", [])
    before = reader.positions()
    changes = await reader.fresh()
    assert await reader.settle(changes) == 0
    after = reader.positions()
    assert {shard for shard in after if after[shard] > before[shard]} == {
        change.shard for change in changes if change.shard % 2
    }
    assert kept(reader.db, reader.made.number) == sum(change.shard % 2 == 0 for change in changes)


async def test_a_position_that_a_transactional_handler_has_locked_is_not_waited_for(
    outbox: str, reader: SubscriptionReader
) -> None:
    changes = await reader.fresh()
    marked = changes[0]
    with psycopg.connect(outbox) as handler:
        [(xid,)] = handler.execute(*reader.store.take([marked], marked)).fetchall()
        handler.execute(*reader.store.mark([marked], xid))
        assert await reader.settle(changes[1:]) == 0
        handler.commit()
    assert {change.shard for change in changes} - {marked.shard} == {
        shard for shard, seq in reader.positions().items() if seq
    }
    assert await reader.fresh() == []


async def test_what_another_session_has_settled_is_counted_as_missed_and_leaves_nothing_behind(
    reader: SubscriptionReader,
) -> None:
    changes = await reader.fresh()
    done, retried = changes[0], changes[1]
    reader.db.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard) VALUES (%s, %s, %s)",
        [done.seq, reader.made.number, done.shard],
    )
    await reader.settle([retried], _FAILED)
    assert await reader.settle(changes) == 2
    assert kept(reader.db, reader.made.number) == 1
    assert [seq for seq, state in states_of(reader.db, reader.made.number).items() if state == "waiting"] == [
        retried.seq
    ]
    assert all(reader.positions()[shard] == seq for shard, seq in last_of_each_shard(changes).items())


async def test_what_waits_below_its_position_is_missed_once(reader: SubscriptionReader) -> None:
    *changes, retried = await reader.fresh()
    await reader.settle([retried], _FAILED)
    await reader.settle(changes)
    await reader.advance()
    assert reader.positions()[retried.shard] == retried.seq
    publish(reader.db, _CHANGES)
    await reader.advance()
    assert await reader.settle([retried, *await reader.fresh()]) == 1
    assert states_of(reader.db, reader.made.number)[retried.seq] == "waiting"


async def test_a_start_that_was_recorded_is_gone_with_its_settle(reader: SubscriptionReader) -> None:
    changes = await reader.fresh()
    first, second = changes[:2]
    assert await reader.store.start(reader.session, [first, second], ["work", "work"]) == {first.id, second.id}
    assert await reader.settle([*changes[:1], *changes[2:]]) == 0
    assert reader.positions()[second.shard] == second.seq - 1, "the other start keeps its position below it"
    assert await reader.settle([second, *changes[2:]]) == len(changes) - 2
    assert states_of(reader.db, reader.made.number)[second.seq] == "done"


async def test_changes_of_other_types_are_passed(outbox: str, outbox_db: psycopg.Connection) -> None:
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    for _ in range(2):
        publish(outbox_db, _CHANGES, "other")
        publish(outbox_db, _CHANGES, "order")
    async with reading(outbox, outbox_db, made, TypeFilter(("order",), True)) as reader:
        reader.owns()
        await reader.advance()
        changes = [change for change in await reader.fresh() if change.entity_type == "order"]
        assert await reader.settle(changes) == 0
        assert kept(outbox_db, made.number) == 0
        assert all(reader.positions()[shard] == seq for shard, seq in last_of_each_shard(changes).items())


async def test_where_more_rows_lie_between_the_positions_than_are_looked_at_each_change_gets_one(
    reader: SubscriptionReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "_BETWEEN_MAX", 5)
    changes = await reader.fresh()
    for change in changes[:6]:
        await reader.settle([change], _FAILED)
    before = reader.positions()
    assert await reader.settle(changes[6:]) == 0
    assert reader.positions() == before
    assert kept(reader.db, reader.made.number) == len(changes)
    publish(reader.db, _CHANGES)
    await reader.settle(await reader.fresh())
    assert reader.positions() == before, "and the next one does not try"
    await reader.advance()
    assert kept(reader.db, reader.made.number) == _CHANGES + 6, "what was settled since, and what waits"


async def test_versions_of_positions_do_not_pile_up_behind_an_old_snapshot(
    outbox: str, reader: SubscriptionReader
) -> None:
    """What is settled meanwhile gets rows, and positions move as often as they do anyway."""
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
