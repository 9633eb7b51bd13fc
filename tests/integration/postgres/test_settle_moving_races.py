"""Settles that move positions, and what other sessions do between their snapshot and their locks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import psycopg
import pytest

from cdc.core.model import Change, Waiting
from cdc.postgres import subscription
from cdc.postgres.subscriptions import Subscriptions
from tests.eventually import eventually_async
from tests.subscription_reader import SubscriptionReader, left_behind, reading

pytestmark = pytest.mark.server

_PAUSE = 4_242
"""A lock that a settle waits for between its snapshot and the first position."""
_FAILED = Waiting(0.0, "RuntimeError", summary="RuntimeError")


@pytest.fixture
async def owner(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SubscriptionReader]:
    monkeypatch.setattr(subscription, "MOVING_MIN", 1)
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    async with reading(outbox, outbox_db, made) as owner:
        owner.owns()
        yield owner


@asynccontextmanager
async def _begun(owner: SubscriptionReader, changes: Sequence[Change]) -> AsyncIterator[asyncio.Task[int]]:
    """A settle of these that has its snapshot, and looks at no position before the block ends."""
    statements = owner.store._statements  # noqa: SLF001 - there is no other way between a snapshot and a lock
    text = statements["settle_moving"]
    paused = text.replace(
        b"WITH ours AS MATERIALIZED (",
        b"WITH pause AS MATERIALIZED (SELECT pg_advisory_xact_lock(%d)), ours AS MATERIALIZED (" % _PAUSE,
    ).replace(b"AND p.owner = ", b"AND (SELECT count(*) FROM pause) = 1 AND p.owner = ")
    assert paused.count(b"pause") == 2
    statements["settle_moving"] = paused
    owner.db.execute("SELECT pg_advisory_lock(%s)", [_PAUSE])
    settling = asyncio.create_task(owner.settle(changes))
    await _waits(owner.db)
    yield settling
    owner.db.execute("SELECT pg_advisory_unlock(%s)", [_PAUSE])


async def _waits(db: psycopg.Connection, on: str = "advisory") -> None:
    """Until a session of this database waits for a lock of this kind."""

    async def waits() -> bool:
        found = db.execute(
            "SELECT FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)"
            " WHERE NOT l.granted AND l.locktype = %s AND a.datname = current_database()",
            [on],
        )
        return bool(found.fetchall())

    await eventually_async(waits, what=f"a session waits for a lock ({on})")


async def _nothing_is_left(owner: SubscriptionReader) -> bool:
    """After the looks that come next."""
    for _ in range(3):
        await owner.advance()
    return left_behind(owner.db) == []


def _publish(db: psycopg.Connection, count: int, key: str = "k") -> None:
    for _ in range(count):
        db.execute("SELECT publish_change('x', %s)", [key])


async def test_a_retry_marked_between_the_snapshot_and_the_lock_leaves_no_row(
    owner: SubscriptionReader, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """One consumer: its transactional handler marks a retry while its session settles what is behind it."""
    _publish(outbox_db, 3)
    first, second, third = await owner.fresh()
    await owner.advance()
    assert await owner.settle([first], _FAILED) == 0
    [retried] = await owner.due()
    async with _begun(owner, [second, third]) as settling:
        with psycopg.connect(outbox) as handler:
            [(xid,)] = handler.execute(*owner.store.take([retried], retried)).fetchall()
            assert len(handler.execute(*owner.store.mark([retried], xid)).fetchall()) == 1
    assert await settling == 0
    assert await _nothing_is_left(owner)


async def test_what_a_former_owner_has_passed_meanwhile_is_not_counted_again(
    owner: SubscriptionReader, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 3)
    changes = await owner.fresh()
    await owner.advance()
    async with _begun(owner, changes) as settling, reading(outbox, outbox_db, owner.made) as former:
        assert await former.settle([changes[0]]) == 0
        await former.advance()
    assert await settling == 1, "the former owner was first"
    assert await _nothing_is_left(owner)


async def test_a_row_that_says_done_and_is_locked_is_not_waited_for(
    owner: SubscriptionReader, outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of another change. A settle that does not move positions does not wait for it."""
    _publish(outbox_db, 3)
    first, second, third = await owner.fresh()
    await owner.advance()
    with monkeypatch.context() as patched:
        patched.setattr(subscription, "MOVING_MIN", 2)
        assert await owner.settle([second]) == 0
    with psycopg.connect(outbox) as locker:
        locker.execute("SELECT FROM cdc_subscription_changes WHERE seq = %s FOR UPDATE", [second.seq])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await owner.settle([first, third])
        assert await owner.settle([first, third], around_locks=True) == 0
    assert await _nothing_is_left(owner)


async def test_a_mark_of_several_shards_and_a_larger_settle_do_not_wait_for_each_other(
    owner: SubscriptionReader, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """A former owner's handler has the change that is settled here as failed, and one of a shard that moves."""
    low, high = _keys(outbox_db)
    _publish(outbox_db, 1, low)
    _publish(outbox_db, 2, high)
    first, second, third = await owner.fresh()
    assert first.shard < second.shard
    await owner.advance()
    loop = asyncio.get_running_loop()
    with psycopg.connect(outbox) as handler:
        [(xid,), _] = handler.execute(*owner.store.take([first, third], first)).fetchall()
        async with owner.session.transaction():
            assert await owner.settle([second]) == 0
            marking = loop.run_in_executor(
                None, lambda: handler.execute(*owner.store.mark([first, third], xid)).fetchall()
            )
            await _waits(outbox_db, "transactionid")
            assert await owner.settle([first], _FAILED) == 0
        marked = await marking
    assert sorted(at is not None for at, _ in marked) == [False, True], "one was settled meanwhile"


def _keys(db: psycopg.Connection) -> tuple[str, str]:
    """Of two shards, in their order."""
    [(low,), (high,)] = db.execute(
        "SELECT min(n::text) FROM generate_series(1, 1000) AS n WHERE hashtext(n::text) & 63 IN (3, 9)"
        " GROUP BY hashtext(n::text) & 63 ORDER BY hashtext(n::text) & 63"
    ).fetchall()
    return low, high


async def test_a_change_that_is_given_and_waits_behind_another_session_is_met_once(
    owner: SubscriptionReader, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Of what is passed, a row of another session counts as that of who was first."""
    _publish(outbox_db, 4)
    changes = await owner.fresh()
    await owner.advance()
    async with reading(outbox, outbox_db, owner.made) as other:
        assert await other.settle([changes[1]], replace(_FAILED, delay_s=60.0)) == 0
        assert await other.settle([changes[2]]) == 0
    assert await owner.settle(changes) == 2
    assert outbox_db.execute("SELECT seq, next_attempt_at > now() FROM cdc_subscription_changes").fetchall() == [
        (changes[1].seq, True)
    ]
