"""A handler says that it is too early for a change: it waits, holds back its key, and no attempt is counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import cdc
from cdc import testing
from cdc.cli import cdc as root_command
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric
from tests.handler_kinds import KINDS, handler

_PUBLISH = """
SELECT publish_change('order', 'k' || n %% 2, new_data => jsonb_build_object('n', n)) FROM generate_series(1, %s) AS n
"""
_ROWS = "SELECT error_count, last_error, error_summary FROM entity_changes WHERE last_error IS NOT NULL"


def _declare(router: cdc.Router, kind: str, handle: Callable[[cdc.Change], None]) -> None:
    def named_as_failed(changes: Sequence[cdc.Change]) -> None:
        for change in changes:
            try:
                handle(change)
            except cdc.Snooze as snooze:
                if "batch" in kind:
                    raise cdc.Failed({change: snooze}) from snooze
                raise

    function = handler(kind, named_as_failed, "INSERT INTO effect VALUES (%s) ON CONFLICT DO NOTHING")
    router.on("order", name="early", max_attempts=1, batch=1 if "batch" in kind else None)(function)


@pytest.fixture
def effect(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE effect (seq bigint PRIMARY KEY)")
    return outbox_db


@pytest.mark.parametrize("kind", KINDS)
async def test_a_snoozed_change_is_called_again_before_the_others_of_its_key_however_often_that_is(
    kind: str, outbox: str, effect: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, handled, attempts = cdc.Router(), list[int](), list[int]()
    errors: list[BaseException] = []

    def handle(change: cdc.Change) -> None:
        if change.new["n"] == 3 and len(attempts) < 4:
            attempts.append(change.attempt)
            raise cdc.Snooze(timedelta(milliseconds=1), f"not ready: {change.new['n']}")
        handled.append(change.new["n"])

    router.on_error(lambda change, error: errors.append(error))
    _declare(router, kind, handle)
    effect.execute(_PUBLISH, [8])
    with caplog.at_level(logging.INFO, "cdc.handlers"):
        drained = await testing.drain(outbox, router)
    assert (drained.processed, drained.snoozed, drained.retried, drained.dead) == (8, 4, 0, 0)
    assert [n for n in handled if n % 2] == [1, 3, 5, 7]
    assert handled.index(8) < handled.index(3), "no other key waits"
    assert attempts == [1, 1, 1, 1]
    assert errors == []
    assert effect.execute(_ROWS).fetchall() == [(0, "snoozed: not ready: 3", "snoozed")]
    if "transactional" in kind:
        assert effect.execute("SELECT count(*) FROM effect").fetchone() == (8,)
    assert caplog.text.count("handler early: snoozed change") == 4
    assert "not ready" not in caplog.text


async def test_a_batch_that_snoozes_does_so_for_all_its_changes_and_none_counts_as_failed(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = cdc.Router(), list[int]()

    @router.on("order", batch=10, max_attempts=1)
    async def early(changes: list[cdc.Change]) -> None:
        calls.append(len(changes))
        if len(calls) == 1:
            raise cdc.Snooze(0.1)

    outbox_db.execute(_PUBLISH, [2])
    drained = await testing.drain(outbox, router)
    assert (drained.processed, drained.snoozed, drained.retried) == (2, 2, 0)
    assert outbox_db.execute(_ROWS).fetchall() == [(0, "snoozed", "snoozed")] * 2


async def test_what_is_snoozed_for_long_waits_for_an_operator_to_see_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()

    @router.on("order")
    async def early(change: cdc.Change) -> None:
        raise cdc.Snooze(after=3_600)

    outbox_db.execute(_PUBLISH, [3])
    async with consuming(outbox, router) as app:

        async def snoozed() -> bool:
            return metric(app.metrics.registry, "cdc_changes_handled_total", outcome="snoozed") == 2

        await eventually_async(snoozed)
        assert metric(app.metrics.registry, "cdc_handler_errors_total") == 0

        async def written() -> bool:
            found = outbox_db.execute("SELECT count(*) FROM entity_changes WHERE next_attempt_at > now() + '50 min'")
            return found.fetchone() == (2,)

        await eventually_async(written)
    drained = await testing.drain(outbox, router)
    assert (drained.waiting, drained.held, drained.snoozed) == (2, 1, 0)


@pytest.mark.parametrize(
    "after",
    [0, -1, float("inf"), float("nan"), timedelta(0), "5", None, True, Decimal("NaN"), Decimal("sNaN"), 10**400],
)
def test_a_snooze_that_makes_no_sense_is_refused_where_it_is_raised(after: Any) -> None:
    with pytest.raises(ValueError, match=r"Snooze\(after=.*above 0"):
        cdc.Snooze(after)


async def test_an_operator_sees_that_a_change_is_snoozed_and_why(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = cdc.Router()

    @router.on("order")
    async def early(change: cdc.Change) -> None:
        raise cdc.Snooze(3_600, "paid within the hour?")

    outbox_db.execute(_PUBLISH, [1])
    await testing.drain(outbox, router)
    for command in (["show", "1"], ["list"]):
        said = await asyncio.to_thread(CliRunner().invoke, root_command, ["outbox", *command, "--dsn", outbox])
        assert "waiting" in said.output
        assert "snoozed: paid within the hour?" in said.output
