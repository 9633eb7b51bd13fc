"""A look shows another text of the shares whenever a poll of the shards would answer something else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import psycopg
import pytest

from cdc.core.pauses import Pause
from cdc.postgres.controls import Controls
from cdc.postgres.shard_locks import DEFAULT, ShardSession
from cdc.postgres.shared_look import SharedLook
from cdc.postgres.subscriptions import Subscriptions
from tests.eventually import eventually_async
from tests.subscriptions import subscribe


class _Looker:
    """Looks at the default subscription and at one more."""

    def __init__(self, dsn: str, db: psycopg.Connection, connection: psycopg.AsyncConnection) -> None:
        self.dsn = dsn
        self.db = db
        self.number = subscribe(db)
        self._connection = connection
        self._look = SharedLook("public")

    async def shares(self) -> dict[int, str]:
        seen = await self._look.look(self._connection, [DEFAULT, self.number])
        assert seen is not None
        return dict(seen.shares)

    async def changed_in(self, before: dict[int, str]) -> set[int]:
        now = await self.shares()
        return {number for number, shares in now.items() if shares != before[number]}

    @contextlib.asynccontextmanager
    async def member(self, subscription: int | None = None) -> AsyncIterator[ShardSession]:
        number = self.number if subscription is None else subscription
        session = await ShardSession.open(self.dsn, "public", uuid4(), {}, number)
        try:
            yield session
        finally:
            await session.close()

    async def gone(self, session: ShardSession) -> None:
        """The server has ended it, and its locks with it."""
        pid = session.connection.info.backend_pid
        self.db.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


@pytest.fixture
async def looker(outbox: str, outbox_db: psycopg.Connection) -> AsyncIterator[_Looker]:
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
        yield _Looker(outbox, outbox_db, connection)


async def test_the_shares_are_the_same_while_nothing_changes(looker: _Looker) -> None:
    async with looker.member() as one:
        await one.acquire(3)
        before = await looker.shares()
        looker.db.execute("SELECT publish_change('x', '1')")
        assert await looker.changed_in(before) == set()


async def test_a_session_that_has_ended_is_seen_by_others_and_by_its_owner(looker: _Looker) -> None:
    async with looker.member() as one:
        before = await looker.shares()
        assert not one.has_server_message
        await looker.gone(one)
        assert await looker.changed_in(before) == {DEFAULT, looker.number}

        async def noticed() -> bool:
            return one.has_server_message

        await eventually_async(noticed, what="its owner need not ask")


async def test_another_one_in_the_place_of_one_that_has_ended_is_not_taken_for_it(looker: _Looker) -> None:
    async with looker.member() as one:
        before = await looker.shares()
        await looker.gone(one)
        async with looker.member():
            assert await looker.changed_in(before) == {looker.number}


async def test_a_shard_that_is_taken_or_given_back_is_seen(looker: _Looker) -> None:
    async with looker.member() as one:
        before = await looker.shares()
        [shard] = (await one.acquire(1)).shards
        taken = await looker.shares()
        assert taken[looker.number] != before[looker.number]
        await one.release([shard])
        assert await looker.shares() == before


async def test_who_leads_sees_consumers_of_other_subscriptions_come_and_go(looker: _Looker) -> None:
    async with looker.member(DEFAULT):
        before = await looker.shares()
        async with looker.member():
            assert await looker.changed_in(before) == {DEFAULT, looker.number}


def _drop(looker: _Looker) -> set[int]:
    Subscriptions("public").drop(looker.db, "search")
    return {looker.number}


def _pause(looker: _Looker) -> set[int]:
    Controls("public").pause(looker.db, Pause(0, because="reindexing", set_by="me"))
    return {DEFAULT, looker.number}


@pytest.mark.parametrize("happens", [_drop, _pause])
async def test_a_drop_and_a_pause_are_seen(looker: _Looker, happens: Callable[[_Looker], set[int]]) -> None:
    before = await looker.shares()
    assert await looker.changed_in(before) == set()
    expected = happens(looker)
    assert await looker.changed_in(before) == expected


async def test_a_pause_that_is_over_is_seen(looker: _Looker) -> None:
    before = await looker.shares()
    _pause(looker)
    paused = await looker.shares()
    looker.db.execute("UPDATE cdc_controls SET until = now()")
    assert paused != before == await looker.shares()
