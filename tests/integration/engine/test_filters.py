"""Handlers that want only some of the changes of their type: what they leave out is processed without a call."""

from __future__ import annotations

from typing import Any

import psycopg
import pydantic
import pytest

import cdc
from cdc import testing
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, states
from tests.handler_kinds import KINDS, handler

_PUBLISH = """
SELECT publish_change('order', 'k' || n %% 3, 'UPDATE',
  new_data => jsonb_build_object('n', n, 'status', n / 2),
  old_data => jsonb_build_object('n', n - 1, 'status', (n - 1) / 2))
FROM generate_series(1, %s) AS n
"""

_PUBLISH_UPDATE = "SELECT publish_change('order', '1', 'UPDATE', old_data => %s, new_data => %s)"


def _declare(router: cdc.Router, kind: str, got: list[cdc.Change], **options: Any) -> None:
    batch = 7 if "batch" in kind else None
    router.on("order", "UPDATE", name="filters", batch=batch, **options)(handler(kind, got.extend))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_of_any_kind_gets_only_what_its_filter_wants_in_order_and_the_rest_is_processed(
    kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, got = cdc.Router(), list[cdc.Change]()
    _declare(router, kind, got, changed={"status"}, when=lambda change: change.new["n"] % 4 != 0)
    outbox_db.execute(_PUBLISH, [60])
    async with consuming(outbox, router) as app:

        async def done() -> bool:
            return states(outbox_db) == {"processed": 60}

        await eventually_async(done)
        count = app.metrics.registry
        assert metric(count, "cdc_changes_handled_total", handler="filters", outcome="filtered") == 45
        assert metric(count, "cdc_changes_handled_total", handler="filters", outcome="processed") == 15
    assert sorted(change.new["n"] for change in got) == [n for n in range(1, 61) if n % 4 == 2]
    for key in ("k0", "k1", "k2"):
        seqs = [change.seq for change in got if change.entity_id == key]
        assert seqs == sorted(seqs)
    notes = outbox_db.execute("SELECT DISTINCT last_error, error_count FROM entity_changes").fetchall()
    assert notes == [(None, 0)]


class _Order(pydantic.BaseModel):
    n: int
    status: int


@pytest.mark.parametrize("kind", KINDS)
async def test_a_filter_of_columns_comes_before_the_model_and_the_function_sees_the_model(
    kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, got = cdc.Router(), list[cdc.Change]()
    seen: list[Any] = []

    def when(change: cdc.Change) -> bool:
        seen.append(change.new)
        return change.changed == {"n", "status"}

    _declare(router, kind, got, changed={"status"}, when=when, model=_Order)
    unfit = '{"status": 1}'
    for old, new in (('{"n": 0, "status": 1}', '{"n": 1, "status": 1}'), (unfit, unfit)):
        outbox_db.execute(_PUBLISH_UPDATE, [old, new])
    outbox_db.execute(_PUBLISH_UPDATE, ['{"n": 0, "status": 1}', '{"n": 1, "status": 2}'])
    drained = await testing.drain(outbox, router)
    assert (drained.processed, drained.filtered, drained.dead) == (1, 2, 0)
    assert [change.new for change in got] == seen == [_Order(n=1, status=2)]
    assert got[0].changed == {"n", "status"}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_filter_that_raises_is_an_attempt_that_failed_and_holds_back_its_key_only(
    kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, got = cdc.Router(), list[cdc.Change]()
    errors: list[str] = []

    def when(change: cdc.Change) -> bool:
        if change.new["n"] == 3 and change.attempt < 3:
            raise LookupError(f"attempt {change.attempt}")
        return True

    router.on_error(lambda change, error: errors.append(str(error)))
    _declare(router, kind, got, when=when)
    outbox_db.execute(_PUBLISH, [9])
    drained = await testing.drain(outbox, router, max_attempts=3)
    assert (drained.processed, drained.retried, drained.dead) == (9, 2, 0)
    assert [change.new["n"] for change in got if change.entity_id == "k0"] == [3, 6, 9]
    assert errors == ["attempt 1", "attempt 2"]
    row = outbox_db.execute("SELECT error_count, last_error FROM entity_changes WHERE error_count > 0").fetchone()
    assert row is not None
    assert (row[0], row[1].splitlines()[0]) == (2, "LookupError: attempt 2")


async def test_a_filter_that_always_fails_makes_a_dead_letter(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, got = cdc.Router(), list[cdc.Change]()
    _declare(router, "at once", got, when=lambda change: change.new["no such column"])
    outbox_db.execute(_PUBLISH, [1])
    drained = await testing.drain(outbox, router, max_attempts=2, allow_dead=True)
    assert (drained.dead, drained.filtered, got) == (1, 0, [])
    assert drained.dead_letters[0].error_count == 2


@pytest.mark.parametrize("kind", ["batch", "transactional batch"])
async def test_what_is_filtered_behind_a_change_of_its_key_that_is_not_done_waits_behind_it(
    kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, batches = cdc.Router(), list[list[int]]()

    async def plain(changes: list[cdc.Change]) -> None:
        batches.append(sorted(change.new["n"] for change in changes))
        raise cdc.Retry(after=3_600)

    async def transactional(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        await plain(changes)

    handle = plain if kind == "batch" else transactional
    router.on("order", batch=7, when=lambda change: change.new["n"] <= 3)(handle)
    outbox_db.execute(_PUBLISH, [6])
    drained = await testing.drain(outbox, router)
    assert batches == [[1, 2, 3]]
    assert (drained.filtered, drained.waiting, drained.held) == (0, 3, 3)


@pytest.mark.parametrize("kind", ["at once", "transactional", "batch"])
async def test_a_filter_may_raise_what_a_handler_may(kind: str, outbox: str, outbox_db: psycopg.Connection) -> None:
    router, got = cdc.Router(), list[cdc.Change]()
    raised: dict[int, Exception] = {
        1: cdc.Discard("not this one"), 2: cdc.Snooze(0.1), 3: cdc.Reject("never"), 4: cdc.Unavailable(0.05),
    }  # fmt: skip

    def when(change: cdc.Change) -> bool:
        if not change.requeued and (error := raised.get(change.new["n"])):
            raise error
        return True

    _declare(router, kind, got, when=when, max_attempts=1)
    outbox_db.execute(_PUBLISH, [5])
    drained = await testing.drain(outbox, router, allow_dead=True)
    assert (drained.discarded, drained.snoozed, drained.dead, drained.processed) == (1, 1, 1, 3)
    assert sorted(change.new["n"] for change in got) == [2, 4, 5]
