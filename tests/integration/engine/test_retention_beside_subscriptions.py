"""A change goes when it is done everywhere, and leaves nothing behind; who is not done keeps it."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.core.type_filter import EVERYTHING
from cdc.postgres.connect import connect_async
from cdc.postgres.retention import LIMITS, Retention
from cdc.postgres.sql_files import load
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscriptions import Subscriptions
from tests.commands import done
from tests.commands_outbox import data, process, publish
from tests.commands_subscription import create, fail, finish, progress, taken
from tests.eventually import eventually_async
from tests.fix_consumer import consuming
from tests.fix_outbox import count, fill
from tests.subscriptions import kept, states_of


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


# --- by hand, or by an earlier version -----------------------------------------------------------------------------


def test_what_one_needs_is_not_removed_by_a_delete_that_knows_of_no_subscription(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    first, second, third = (publish(outbox_db, "order", "a") for _ in range(3))
    process(outbox_db, first, second, third)
    outbox_db.execute("DELETE FROM entity_changes WHERE seq = %s", [first])  # nobody else reads it
    number, other = create(outbox, "search", "--from", "beginning"), create(outbox, "billing", "--from", "beginning")
    finish(outbox_db, other)
    # As retention does before it knew of subscriptions.
    by_others = "WITH old AS (SELECT ctid FROM entity_changes WHERE processed LIMIT 10) DELETE FROM entity_changes"
    by_others += " WHERE ctid IN (SELECT ctid FROM old)"
    for statement in (by_others, "DELETE FROM entity_changes"):
        with pytest.raises(psycopg.errors.RestrictViolation, match="the subscription search is not done with it"):
            outbox_db.execute(statement.encode())
    finish(outbox_db, number)
    fail(outbox_db, other, second, dead=True)
    with pytest.raises(psycopg.errors.RestrictViolation, match=f"the change {second} is not .* subscription billing"):
        outbox_db.execute("DELETE FROM entity_changes")
    assert outbox_db.execute("DELETE FROM entity_changes WHERE seq = %s", [third]).rowcount == 1
    done(outbox, "subscription", "drop", "billing", "--yes")
    assert outbox_db.execute("DELETE FROM entity_changes").rowcount == 1


def test_a_delete_is_refused_for_the_one_that_a_change_is_for_and_for_no_other(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    search, behind = create(outbox, "search", "--from", "beginning"), create(outbox, "behind", "--from", "beginning")
    process(outbox_db, original := publish(outbox_db, "order", "a"))
    finish(outbox_db, search)
    data(outbox, "replay", str(original), "--subscription", "search")
    delete = "DELETE FROM entity_changes WHERE replay_of IS NOT NULL"
    with pytest.raises(psycopg.errors.RestrictViolation, match="the subscription search"):
        outbox_db.execute(delete)
    finish(outbox_db, search)
    assert outbox_db.execute(delete).rowcount == 1, "the one that is behind has nothing to do with it"
    assert taken(outbox_db, behind) == [original]


async def test_what_is_discarded_while_its_position_passes_leaves_nothing_behind(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = create(outbox, "search", "--from", "beginning")
    seq = publish(outbox_db, "order", "a")
    fail(outbox_db, number, seq, dead=True)
    store = SubscriptionStore("public", Subscriptions("public").named(outbox_db, "search"), 16, EVERYTHING)
    # The discard has seen the position when it writes, and writes when the position has moved.
    outbox_db.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $$;"
        "CREATE TRIGGER wait BEFORE UPDATE ON cdc_subscription_changes FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    session = await connect_async(outbox, application_name="cdc: test", session=SubscriptionStore.session)
    try:
        await store.advance(session, range(SHARDS))
        outbox_db.execute("SELECT pg_advisory_lock(7)")
        discarding = asyncio.create_task(
            asyncio.to_thread(done, outbox, "outbox", "discard", str(seq), "--subscription", "search")
        )

        async def waits() -> bool:
            [(count,)] = outbox_db.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            ).fetchall()
            return bool(count)

        await eventually_async(waits, what="the discard is in the middle")
        await store.advance(session, range(SHARDS))
        outbox_db.execute("SELECT pg_advisory_unlock(7)")
        await discarding
        for _ in range(2):
            await store.advance(session, range(SHARDS))
    finally:
        await session.close()
    assert states_of(outbox_db, number) == {seq: "done"}
    assert kept(outbox_db, number) == 0
