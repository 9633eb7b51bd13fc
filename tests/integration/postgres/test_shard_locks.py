"""Whoever may connect may take the locks by which consumers know each other; who may mark no change has no share."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.diagnostics.inspect_outbox import shard_holders
from cdc.postgres.shard_locks import lock_class, members
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric

NOBODY = "claims_to_be_a_consumer"


@pytest.fixture
def nobodys(outbox: str, outbox_db: psycopg.Connection) -> Iterator[str]:
    """The DSN of a role that may connect, and nothing else; it calls itself a consumer."""
    name = sql.Identifier(NOBODY)
    outbox_db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
    yield make_conninfo(outbox, user=NOBODY, application_name="cdc: shards")
    outbox_db.execute(sql.SQL("DROP ROLE {}").format(name))


async def test_members_that_may_mark_nothing_take_no_share_of_the_work(
    outbox: str, outbox_db: psycopg.Connection, nobodys: str
) -> None:
    handled: list[str] = []
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        handled.append(change.entity_id)

    claimants = [psycopg.connect(nobodys, autocommit=True) for _ in range(3)]
    try:
        for each in claimants:
            each.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class("public"), SHARDS])
        async with consuming(outbox, router, stream=False, poll_interval=0.1) as app:
            outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 300) AS n")

            async def all_handled() -> bool:
                return len(handled) == 300 and metric(app.metrics.registry, "cdc_shards_owned") == SHARDS

            await eventually_async(all_handled, what="all shards are its own")
            assert metric(app.metrics.registry, "cdc_members") == 1
            assert len(members(outbox_db, "public")) == 1
            seen = shard_holders(outbox_db, "public")
            assert (seen.consumers, seen.held) == (1, SHARDS)
            assert [pid for pid, _, _ in seen.strangers] == sorted(each.info.backend_pid for each in claimants)
            assert all(NOBODY in named for _, named, _ in seen.strangers)
    finally:
        for each in claimants:
            each.close()


async def test_shards_that_a_stranger_holds_are_missed_and_it_is_named(
    outbox: str, outbox_db: psycopg.Connection, nobodys: str
) -> None:
    with psycopg.connect(nobodys, autocommit=True) as stranger:
        stranger.execute(
            "SELECT pg_advisory_lock(%s, shard) FROM generate_series(0, 9) AS shard", [lock_class("public")]
        )
        async with consuming(outbox, Router(), stream=False) as app:

            async def the_rest() -> bool:
                return metric(app.metrics.registry, "cdc_shards_owned") == SHARDS - 10

            await eventually_async(the_rest, what="it owns what it can")
            [(pid, named, count)] = shard_holders(outbox_db, "public").strangers
            assert (pid, count) == (stranger.info.backend_pid, 10)
            assert NOBODY in named
