"""Settles that move positions, and what other sessions do between their snapshot and their locks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from cdc.core.model import SHARDS, Change, Processed, Waiting
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import EVERYTHING
from cdc.postgres import subscription
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscription, Subscriptions
from tests.eventually import eventually_async

pytestmark = pytest.mark.server

_EVERY_SHARD = Sweep({shard: Position(0, 0, 3) for shard in range(SHARDS)}, 1_000, 1)
_PAUSE = 4_242
"""A lock that a settle waits for between its snapshot and the first position."""


class Owner:
    """A store whose process owns all shards, and the session that settles."""

    def __init__(self, made: Subscription, session: psycopg.AsyncConnection, db: psycopg.Connection) -> None:
        self.store = SubscriptionStore("public", made, 16, EVERYTHING)
        self.made, self.session, self.db = made, session, db

    def owns(self) -> None:
        self.db.execute(
            "UPDATE cdc_positions SET owner = %s WHERE subscription = %s", [self.store.process, self.made.number]
        )

    async def fresh(self) -> list[Change]:
        return [row.change for row in (await self.store.sweep(self.session, _EVERY_SHARD)).rows]

    async def due(self) -> list[Change]:
        return [row.change for row in (await self.store.due(self.session, range(SHARDS), 100)).rows]

    async def advance(self) -> None:
        await self.store.advance(self.session, range(SHARDS))

    async def settle(self, changes: Sequence[Change], outcome: Any = None, **options: Any) -> int:
        batch = [Settlement(change, outcome or Processed()) for change in changes]
        return (await self.store.settle(self.session, batch, **options)).missed

    def pauses(self) -> None:
        """Its next settles wait for a lock when they have their snapshot, before they look at a position."""
        text = self.store._statements["settle_moving"]  # noqa: SLF001
        begun = text.replace(
            b"WITH ours AS MATERIALIZED (",
            b"WITH pause AS MATERIALIZED (SELECT pg_advisory_xact_lock(%d)), ours AS MATERIALIZED (" % _PAUSE,
        ).replace(b"WHERE p.owner = ", b"WHERE (SELECT count(*) FROM pause) = 1 AND p.owner = ")
        assert begun.count(b"pause") == 2
        self.store._statements["settle_moving"] = begun  # noqa: SLF001


@pytest.fixture
async def owner(outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Owner]:
    monkeypatch.setattr(subscription, "MOVING_MIN", 1)
    made, _ = Subscriptions("public").create(outbox_db, "search", start="beginning")
    async with _session(outbox) as session:
        owner = Owner(made, session, outbox_db)
        owner.owns()
        yield owner


@asynccontextmanager
async def _session(dsn: str) -> AsyncIterator[psycopg.AsyncConnection]:
    session = await connect_async(
        dsn, application_name="cdc: test", session={**SubscriptionStore.session, "lock_timeout": "1s"}
    )
    read_changes(session)
    try:
        yield session
    finally:
        await session.close()


def _publish(db: psycopg.Connection, count: int, key: str = "k") -> None:
    for _ in range(count):
        db.execute("SELECT publish_change('x', %s)", [key])


async def _waits(db: psycopg.Connection, on: str = "advisory") -> None:
    """Until a session waits for a lock of this kind."""

    async def waits() -> bool:
        return bool(db.execute("SELECT FROM pg_locks WHERE NOT granted AND locktype = %s", [on]).fetchall())

    await eventually_async(waits, what=f"a session waits for a lock ({on})")


def _left(db: psycopg.Connection) -> list[Any]:
    """Rows that say done of what a position has passed: nothing will ever remove them."""
    return db.execute(
        "SELECT s.seq FROM cdc_subscription_changes AS s JOIN cdc_positions AS p USING (subscription, shard)"
        " WHERE s.seq <= p.seq AND s.next_attempt_at IS NULL AND s.dead_at IS NULL"
    ).fetchall()


async def test_a_retry_marked_between_the_snapshot_and_the_lock_leaves_no_row(
    owner: Owner, outbox: str, outbox_db: psycopg.Connection
) -> None:
    """One consumer: its transactional handler marks a retry while its session settles what is behind it."""
    _publish(outbox_db, 3)
    first, second, third = await owner.fresh()
    await owner.advance()
    assert await owner.settle([first], Waiting(0.0, "RuntimeError", summary="RuntimeError")) == 0
    [retried] = await owner.due()
    owner.pauses()
    outbox_db.execute("SELECT pg_advisory_lock(%s)", [_PAUSE])
    settling = asyncio.create_task(owner.settle([second, third]))
    await _waits(outbox_db)
    with psycopg.connect(outbox) as handler:
        [(xid,)] = handler.execute(*owner.store.take([retried], retried)).fetchall()
        assert len(handler.execute(*owner.store.mark([retried], xid)).fetchall()) == 1
    outbox_db.execute("SELECT pg_advisory_unlock(%s)", [_PAUSE])
    assert await settling == 0
    for _ in range(3):
        await owner.advance()
    assert _left(outbox_db) == []


async def test_what_a_former_owner_has_passed_meanwhile_is_not_counted_again(
    owner: Owner, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 3)
    changes = await owner.fresh()
    await owner.advance()
    owner.pauses()
    outbox_db.execute("SELECT pg_advisory_lock(%s)", [_PAUSE])
    settling = asyncio.create_task(owner.settle(changes))
    await _waits(outbox_db)
    former = SubscriptionStore("public", owner.made, 16, EVERYTHING)
    async with _session(outbox) as session:
        assert (await former.settle(session, [Settlement(changes[0], Processed())])).missed == 0
        await former.advance(session, range(SHARDS))
    outbox_db.execute("SELECT pg_advisory_unlock(%s)", [_PAUSE])
    assert await settling == 1, "the former owner was first"
    for _ in range(3):
        await owner.advance()
    assert _left(outbox_db) == []


async def test_a_row_that_says_done_and_is_locked_is_not_waited_for(
    owner: Owner, outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
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
    for _ in range(3):
        await owner.advance()
    assert _left(outbox_db) == []


async def test_a_mark_of_several_shards_and_a_larger_settle_do_not_wait_for_each_other(
    owner: Owner, outbox: str, outbox_db: psycopg.Connection
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
            assert await owner.settle([first], Waiting(0.0, "RuntimeError", summary="RuntimeError")) == 0
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
    owner: Owner, outbox_db: psycopg.Connection
) -> None:
    """Of what is passed, a row of another session counts as that of who was first."""
    _publish(outbox_db, 4)
    changes = await owner.fresh()
    await owner.advance()
    other = Owner(owner.made, owner.session, outbox_db)
    assert await other.settle([changes[1]], Waiting(60.0, "RuntimeError", summary="RuntimeError")) == 0
    assert await other.settle([changes[2]]) == 0
    assert await owner.settle(changes) == 2
    assert outbox_db.execute("SELECT seq, next_attempt_at > now() FROM cdc_subscription_changes").fetchall() == [
        (changes[1].seq, True)
    ]
