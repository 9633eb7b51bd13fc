"""Handlers that take many changes at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import cdc
from cdc import testing
from cdc.core.errors import UsageError
from cdc.core.router import Router
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, states

pytestmark = pytest.mark.server


def _publish(db: psycopg.Connection, count: int, keys: int, entity_type: str = "x") -> None:
    db.execute(
        "SELECT publish_change(%s, 'k' || n %% %s, 'INSERT', jsonb_build_object('n', n))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, keys, count],
    )


def _all_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


def _assert_order(batches: list[list[cdc.Change]]) -> None:
    handled: dict[str, list[int]] = defaultdict(list)
    for batch in batches:
        for change in batch:
            handled[change.entity_id].append(change.seq)
    for key, seqs in handled.items():
        assert seqs == sorted(seqs), key


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_batch_holds_up_to_so_many_changes_in_seq_order_within_each_key(
    in_thread: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, batches = Router(), []

    async def on_loop(changes: list[cdc.Change]) -> None:
        batches.append(changes)

    def in_a_thread(changes: list[cdc.Change]) -> None:
        batches.append(changes)

    router.on("x", batch=20)(in_a_thread if in_thread else on_loop)
    router.on("y")(lambda change: None)
    _publish(outbox_db, 200, 7)
    _publish(outbox_db, 50, 7, "y")
    await testing.drain(outbox, router)
    assert states(outbox_db) == {"processed": 250}
    assert sum(map(len, batches)) == 200
    assert max(map(len, batches)) == 20
    assert {change.entity_type for batch in batches for change in batch} == {"x"}
    _assert_order(batches)


async def test_never_are_two_batches_of_one_key_at_work_at_a_time(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, batches = Router(), []
    running: set[str] = set()

    @router.on("x", batch=5)
    async def handle(changes: list[cdc.Change]) -> None:
        keys = {change.entity_id for change in changes}
        assert not running & keys
        running.update(keys)
        await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=0.002)
        running.difference_update(keys)
        batches.append(changes)

    _publish(outbox_db, 200, 13)
    await testing.drain(outbox, router)
    assert outbox_db.execute("SELECT max(error_count) FROM entity_changes").fetchone() == (0,)
    _assert_order(batches)


async def test_a_batch_that_is_not_full_lingers_for_more(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, sizes = Router(), []

    @router.on("x", batch=4, linger=10)
    async def handle(changes: list[cdc.Change]) -> None:
        sizes.append(len(changes))

    async with consuming(outbox, router, drain_time=30) as app:
        _publish(outbox_db, 1, 1)

        async def one_waits() -> bool:
            return app.status.consumer.running == 1

        await eventually_async(one_waits)
        # Of other keys: what follows one of the batch joins it only if it is read together with others.
        _publish(outbox_db, 3, 4)
        await _all_settled(outbox_db)
    assert sizes == [4]


async def test_what_is_called_together_has_no_more_than_four_megabytes_of_documents(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, sizes, all_there = Router(), list[int](), asyncio.Event()

    @router.on("x", batch=50)
    async def handle(changes: list[cdc.Change]) -> None:
        await all_there.wait()
        sizes.append(sum(change.size for change in changes))

    async with consuming(outbox, router, concurrency=1, drain_time=30) as app:
        _publish(outbox_db, 1, 1)
        outbox_db.execute(
            "SELECT publish_change('x', 'large ' || n, 'INSERT', jsonb_build_object('text', repeat('x', 600000)))"
            " FROM generate_series(1, 20) AS n"
        )

        async def they_wait() -> bool:
            return app.status.consumer.running + app.status.consumer.queued == 21

        await eventually_async(they_wait)
        all_there.set()
        await _all_settled(outbox_db)
    assert max(sizes) <= 4 << 20
    assert sum(sizes) > 20 * 600_000
    assert max(sizes) > 6 * 600_000, "as many as there is room for"


async def test_a_batch_can_fail_some_of_its_changes_and_the_rest_is_done(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), []

    @router.on("x", batch=10)
    async def handle(changes: list[cdc.Change]) -> None:
        calls.append([change.seq for change in changes])
        errors: dict[cdc.Change, Any] = {}
        for change in changes:
            match change.new["n"]:
                case 2:
                    errors[change] = ValueError("two")
                case 4:
                    errors[change] = "four"
                case 6 if change.attempt == 1:
                    errors[change] = cdc.Retry(after=0)
                case 8:
                    errors[change] = cdc.Discard("eight")
                case 10:
                    errors[change] = cdc.Reject("ten")
        if errors:
            raise cdc.Failed(errors)

    _publish(outbox_db, 10, 10)
    await testing.drain(outbox, router, allow_dead=True)
    assert states(outbox_db) == {"processed": 7, "dead": 3}
    rows = outbox_db.execute("SELECT seq, last_error FROM entity_changes WHERE last_error IS NOT NULL").fetchall()
    assert dict(rows) == {
        2: "ValueError: two",
        4: "four",
        6: "the handler asked for another try",
        8: "discarded: eight",
        10: "rejected: ten",
    }
    assert outbox_db.execute("SELECT error_count FROM entity_changes WHERE seq = 10").fetchone() == (1,)
    assert sorted(seq for call in calls for seq in call if seq % 2) == [1, 3, 5, 7, 9], "done once"


async def test_a_batch_that_is_rejected_is_rejected_as_a_whole(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, sizes = Router(), []

    @router.on("x", batch=10)
    async def handle(changes: list[cdc.Change]) -> None:
        sizes.append(len(changes))
        raise cdc.Reject("none of it")

    _publish(outbox_db, 10, 10)
    async with consuming(outbox, router):
        await _all_settled(outbox_db)
    assert states(outbox_db) == {"dead": 10}
    assert sum(sizes) == 10, "each was tried once"


async def test_one_poisonous_change_does_not_take_its_batch_along(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, alone = Router(), []

    @router.on("x", batch=50)
    async def handle(changes: list[cdc.Change]) -> None:
        if len(changes) == 1:
            alone.append((changes[0].entity_id, changes[0].seq))
        if any(change.new["n"] == 7 for change in changes):
            raise ValueError("poison")

    _publish(outbox_db, 50, 10)
    await testing.drain(outbox, router, allow_dead=True, max_attempts=3)
    assert states(outbox_db) == {"processed": 49, "dead": 1}
    assert outbox_db.execute("SELECT seq, error_count FROM entity_changes WHERE error_count > 0").fetchall() == [(7, 3)]
    of_its_key = [seq for key, seq in alone if key == "k7"]
    assert of_its_key == sorted(of_its_key), "its successors waited for it"


async def test_a_transactional_batch_marks_what_it_did_in_its_own_transaction_and_not_what_failed(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()
    outbox_db.execute("CREATE TABLE effect (seq bigint PRIMARY KEY)")

    @router.on("x", batch=25, max_attempts=1)
    async def handle(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        bad = {change: "no" for change in changes if change.new["n"] % 10 == 0}
        async with connection.cursor() as cursor:
            await cursor.executemany(
                "INSERT INTO effect VALUES (%s)", [[change.seq] for change in changes if change not in bad]
            )
        if bad:
            raise cdc.Failed(bad)

    _publish(outbox_db, 100, 9)
    await testing.drain(outbox, router, allow_dead=True)
    assert states(outbox_db) == {"processed": 90, "dead": 10}
    assert outbox_db.execute(
        "SELECT count(*) FROM effect JOIN entity_changes AS c USING (seq) WHERE effect.xmin = c.xmin"
    ).fetchone() == (90,)


class Numbered(BaseModel):
    n: int


async def test_a_row_that_does_not_fit_the_model_leaves_the_batch_and_the_others_are_handled(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, seen = Router(), list[Any]()

    @router.on("x", model=Numbered, batch=10)
    async def handle(changes: list[cdc.Change]) -> None:
        seen.extend(change.new.n for change in changes)

    _publish(outbox_db, 3, 3)
    outbox_db.execute("SELECT publish_change('x', 'k', 'INSERT', '{\"n\": \"none\"}')")
    await testing.drain(outbox, router, allow_dead=True)
    assert sorted(seen) == [1, 2, 3]
    assert states(outbox_db) == {"processed": 3, "dead": 1}


def test_options_of_batches_that_cannot_work_are_refused_where_they_are_declared() -> None:
    router = Router()
    with pytest.raises(UsageError, match="batch=10 and no parameter named changes"):
        router.on("x", batch=10)(lambda change: None)
    with pytest.raises(UsageError, match="batch=0"):
        router.on("x", batch=0)
    with pytest.raises(UsageError, match="linger=-1"):
        router.on("x", linger=-1)
