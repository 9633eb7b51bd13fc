"""A change goes when it is done everywhere, and leaves nothing behind; who is not done keeps it."""

from __future__ import annotations

from typing import Any

import psycopg

import cdc
from cdc.core.router import Router
from cdc.postgres.retention import LIMITS, Retention
from cdc.postgres.sql_files import load
from tests.commands import done
from tests.commands_outbox import data, publish
from tests.commands_subscription import create, progress
from tests.eventually import eventually_async
from tests.fix_consumer import consuming
from tests.fix_outbox import count, fill


def _handling(handled: set[int], *, dying: str = "") -> Router:
    router = Router()

    @router.on("order", max_attempts=1)
    async def handle(change: cdc.Change) -> None:
        if change.entity_id == dying:
            raise ValueError("no")
        handled.add(change.seq)

    return router


def _rows(db: psycopg.Connection) -> int:
    [(rows,)] = db.execute("SELECT count(*) FROM cdc_subscription_changes").fetchall()
    return int(rows)


async def test_a_change_goes_when_all_are_done_and_leaves_nothing_behind(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "search", "--from", "beginning")
    seqs = {publish(outbox_db, "order", f"{n % 7}") for n in range(50)}
    of_default, of_search = set[int](), set[int]()

    async def gone() -> bool:
        return count(outbox_db) == 0 and _rows(outbox_db) == 0

    async with (
        consuming(outbox, _handling(of_default), stream=False, retention="1s") as app,
        consuming(outbox, _handling(of_search), stream=False, subscription="search"),
    ):
        await eventually_async(_all(of_default, seqs), what="the default subscription is done")
        await eventually_async(_all(of_search, seqs), what="search is done")
        retention = Retention("public")

        async def prune() -> bool:
            list(retention.prune(outbox_db, 1e-6))
            return await gone()

        await eventually_async(prune, what="all are removed, and so is what search has noted")
        assert app.consumer.status.members == 1, "consumers of another subscription are none of this one"


async def test_a_paused_one_and_a_dead_letter_keep_what_they_need(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox, "search", "--from", "beginning")
    done(outbox, "subscription", "pause", "search")
    seqs = {publish(outbox_db, "order", f"{n}") for n in range(20)}
    of_default, of_search = set[int](), set[int]()

    def pruned() -> int:
        return sum(Retention("public").prune(outbox_db, 1e-6))

    async with (
        consuming(outbox, _handling(of_default), stream=False),
        consuming(outbox, _handling(of_search, dying="5"), stream=False, subscription="search"),
    ):
        await eventually_async(_all(of_default, seqs), what="the default subscription is done")

        async def marked() -> bool:
            return progress(outbox)["held_back"] == 20

        await eventually_async(marked, what="all are processed, and kept for search")
        assert pruned() == 0
        assert of_search == set()
        done(outbox, "subscription", "resume", "search")

        async def one_left() -> bool:
            pruned()
            return count(outbox_db) == 1

        await eventually_async(one_left, what="all but the dead letter are removed")
        [letter] = data(outbox, "list", "--subscription", "search")["changes"]
        assert (letter["entity_id"], letter["state"]) == ("5", "dead")
        assert data(outbox, "list")["changes"] == [], "it is none of the default subscription"
        done(outbox, "outbox", "discard", str(letter["seq"]), "--subscription", "search")

        async def none_left() -> bool:
            pruned()
            return count(outbox_db) == 0

        await eventually_async(none_left, what="the discarded one is removed, too")
    assert len(of_search) == 19


async def test_a_dead_letter_that_is_retried_is_handled(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox, "search", "--from", "beginning")
    seqs = {publish(outbox_db, "order", f"{n}") for n in range(3)}
    handled, works = set[int](), False
    router = Router()

    @router.on("order", max_attempts=1)
    async def handle(change: cdc.Change) -> None:
        if not works:
            raise ValueError("no")
        handled.add(change.seq)

    async with consuming(outbox, router, stream=False, subscription="search"):

        async def all_dead() -> bool:
            return progress(outbox)["dead"] == 3

        await eventually_async(all_dead, what="all are dead")
        works = True
        done(outbox, "outbox", "retry", "--all", "--yes", "--subscription", "search")
        await eventually_async(_all(handled, seqs), what="all are handled")

        async def clean() -> bool:
            return _rows(outbox_db) == 0

        await eventually_async(clean, what="nothing is left of them")


def test_a_subscription_that_is_made_between_two_statements_loses_nothing(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """The statement that knows no subscriptions removes nothing where there is one."""
    fill(outbox_db, 5, days=8)
    outbox_db.execute("UPDATE entity_changes SET processed_at = NULL WHERE seq = 5")
    create(outbox, "search", "--from", "beginning")
    asked = {"older_than_s": 1.0, "limit": 100, "since": None, "scan": 100}
    with outbox_db.transaction():
        outbox_db.execute(LIMITS)
        outbox_db.execute(load("retention.sql", "public")["prune"], asked)
    assert count(outbox_db) == 5


def _all(handled: set[int], seqs: set[int]) -> Any:
    async def check() -> bool:
        return handled == seqs

    return check
