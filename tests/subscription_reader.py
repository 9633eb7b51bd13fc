"""A consumer of a subscription by hand: its statements one by one, on one session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import psycopg

from cdc.core.model import SHARDS, Change, Outcome, Processed
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Position
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscription

EVERY_SHARD = Sweep({shard: Position(0, 0, 3) for shard in range(SHARDS)}, 1_000, 1)
"""From the beginning; one page has all that a test writes."""


class SubscriptionReader(NamedTuple):
    """``db``: a connection beside it, for what the test asks."""

    db: psycopg.Connection
    session: psycopg.AsyncConnection
    store: SubscriptionStore
    made: Subscription

    def owns(self) -> None:
        """It has all shards."""
        self.db.execute(
            "UPDATE cdc_positions SET owner = %s WHERE subscription = %s", [self.store.process, self.made.number]
        )

    async def fresh(self) -> list[Change]:
        rows = (await self.store.sweep(self.session, EVERY_SHARD)).rows
        return sorted((row.change for row in rows), key=lambda change: change.seq)

    async def due(self) -> list[Change]:
        return [row.change for row in (await self.store.due(self.session, range(SHARDS), 100)).rows]

    async def settle(self, changes: Iterable[Change], outcome: Outcome | None = None, **options: Any) -> int:
        """As processed, unless said otherwise. Returns how many another session had settled."""
        batch = [Settlement(change, outcome or Processed()) for change in changes]
        return (await self.store.settle(self.session, batch, **options)).missed

    async def advance(self) -> None:
        await self.store.advance(self.session, range(SHARDS))

    def positions(self) -> dict[int, int]:
        """By shard."""
        rows = self.db.execute("SELECT shard, seq FROM cdc_positions WHERE subscription = %s", [self.made.number])
        return dict(rows.fetchall())


@asynccontextmanager
async def reading(
    dsn: str, db: psycopg.Connection, made: Subscription, scope: TypeFilter = EVERYTHING
) -> AsyncIterator[SubscriptionReader]:
    session = await connect_async(
        dsn, application_name="cdc: test", session={**SubscriptionStore.session, "lock_timeout": "1s"}
    )
    read_changes(session)
    try:
        yield SubscriptionReader(db, session, SubscriptionStore("public", made, 16, scope), made)
    finally:
        await session.close()


def left_behind(db: psycopg.Connection) -> list[Any]:
    """Rows that say done of what a position has passed: nothing will ever remove them."""
    return db.execute(
        "SELECT s.seq FROM cdc_subscription_changes AS s JOIN cdc_positions AS p USING (subscription, shard)"
        " WHERE s.seq <= p.seq AND s.next_attempt_at IS NULL AND s.dead_at IS NULL"
    ).fetchall()
