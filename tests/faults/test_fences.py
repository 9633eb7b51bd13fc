"""A transactional change starts only when all before it in its key are marked, in a batch and in a group as well.

Its own mark does not queue behind theirs: a crash in between would leave it marked, and them to run after it.
"""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import cdc
from cdc.core.router import Router
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, states

_OPTIONS: dict[str, Any] = {"transactions": 1, "concurrency": 1, "backoff_base": 0.01, "backoff_cap": 0.05}


class Numbered(BaseModel):
    n: int


def _write(db: psycopg.Connection, count: int, first: Any = 1) -> None:
    """Changes of one key; ``first`` is what the first of them says that it is."""
    db.execute("SELECT publish_change('x', 'k', 'INSERT', jsonb_build_object('n', %s::text))", [str(first)])
    db.execute(
        "SELECT publish_change('x', 'k', 'INSERT', jsonb_build_object('n', n)) FROM generate_series(2, %s) AS n",
        [count],
    )


async def _work_off(outbox: str, db: psycopg.Connection, router: Router) -> None:
    async with consuming(outbox, router, **_OPTIONS):

        async def check() -> bool:
            return settled(db)

        await eventually_async(check, what="every change processed or dead")


def _unsettled_before(db: psycopg.Connection, seq: int) -> list[int]:
    rows = db.execute(
        "SELECT seq FROM entity_changes WHERE seq < %s AND NOT processed AND dead_at IS NULL ORDER BY 1", [seq]
    ).fetchall()
    return [seq for (seq,) in rows]


@pytest.mark.promise("G3")
@pytest.mark.parametrize("error", [cdc.Discard("nothing to do"), ValueError("no")], ids=["discarded", "dead"])
async def test_what_a_batch_could_not_do_at_once_is_done_one_by_one_each_after_the_mark_of_the_one_before(
    error: Exception, outbox: str, outbox_db: psycopg.Connection
) -> None:
    too_early: list[tuple[int, list[int]]] = []
    router = Router()

    @router.on("x", batch=10, max_attempts=1)
    async def handle(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        if len(changes) > 1:
            raise RuntimeError("one of them is to blame")
        if early := _unsettled_before(outbox_db, changes[0].seq):
            too_early.append((changes[0].seq, early))
        if changes[0].seq % 2:
            raise error

    _write(outbox_db, 6)
    await _work_off(outbox, outbox_db, router)
    assert too_early == []


@pytest.mark.promise("G3")
@pytest.mark.parametrize("transactional", [False, True])
async def test_a_misfit_that_pauses_its_key_holds_back_the_rest_of_its_batch_too(
    transactional: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    handled: list[int] = []
    router = Router()

    async def handle(changes: list[cdc.Change]) -> None:
        handled.extend(change.seq for change in changes)

    async def handle_with(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        handled.extend(change.seq for change in changes)

    chosen: Any = handle_with if transactional else handle
    router.on("x", model=Numbered, batch=10, dead="pause")(chosen)
    router.on("y")(lambda change: None)
    _write(outbox_db, 5, first="one")
    outbox_db.execute("SELECT publish_change('y', 'k')")
    async with consuming(outbox, router, **_OPTIONS):

        async def done() -> bool:
            return states(outbox_db) == {"dead": 1, "fresh": 4, "processed": 1}

        await eventually_async(done, within_s=5, what=f"all but the misfit wait; {states(outbox_db)}")
    assert handled == []
