"""A handler whose statement crashes the server is found out, and costs the others no attempt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import cdc
from cdc.app.application import App
from cdc.core import lost_transactions
from cdc.core.router import Router
from cdc.engine import consumer, reconnecting
from cdc.postgres import migrations
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric, states
from tests.fix_db import new_server


@pytest.fixture
def crashing() -> Iterator[str]:
    """The DSN of an outbox on a server of the test's own, which handlers may crash."""
    with new_server() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            migrations.install(connection, "public")
        yield server.dsn()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_transactions, "_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(lost_transactions, "_PAUSE_MAX_S", 0.1)
    monkeypatch.setattr(reconnecting, "_PAUSE_MAX_S", 0.2)
    monkeypatch.setattr(consumer, "_POLL_SHARDS_S", 0.05)  # so soon a lost session is noticed


def _asked(dsn: str, query: str) -> list[Any]:
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            return connection.execute(query).fetchall()
    except psycopg.Error:  # the server is recovering
        return []


def _publish(dsn: str, *entity_ids: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT publish_change('x', id) FROM unnest(%s::text[]) AS id", [list(entity_ids)])


_SLOW_S = 0.3
"""Long enough to be under way when the server crashes."""
_END = {
    "crash": "SELECT pg_backend_pid()",
    "terminate": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cdc:%'",
}


def _end_session(dsn: str, how: str) -> None:
    """Over a connection of the handler's own."""
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(dsn, autocommit=True) as connection:
        pids = connection.execute(_END[how]).fetchall()
        if how == "crash":
            os.kill(pids[0][0], signal.SIGKILL)


class _Notice:
    """Of a lost session, by the consumer."""

    app: App

    def times(self) -> float:
        return metric(self.app.metrics.registry, "cdc_interruptions_total")


def _plain_router(kind: str, how: str, dsn: str, calls: Counter[str], notice: _Notice) -> Router:
    router = Router()

    async def on_loop(change: cdc.Change) -> None:
        calls[change.entity_id] += 1
        if change.entity_id == "bad":
            _end_session(dsn, how)
            await asyncio.Event().wait()  # it is cut off
        if change.entity_id != "quick":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SLOW_S):
                    await asyncio.Event().wait()

    async def batch(changes: list[cdc.Change]) -> None:
        for change in changes:
            await on_loop(change)

    def in_thread(change: cdc.Change) -> None:
        calls[change.entity_id] += 1
        if change.entity_id == "bad":
            before = notice.times()
            _end_session(dsn, how)
            eventually(lambda: notice.times() > before)
        elif change.entity_id != "quick":
            threading.Event().wait(_SLOW_S)

    match kind:
        case "on loop":
            router.on("x")(on_loop)
        case "in thread":
            router.on("x")(in_thread)
        case "batch":
            router.on("x", batch=10)(batch)
    return router


def _router(kind: str, calls: Counter[str]) -> Router:
    router = Router()

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        calls[change.entity_id] += 1
        if change.entity_id == "bad":
            os.kill(connection.info.backend_pid, signal.SIGKILL)
        if change.entity_id != "quick":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SLOW_S):
                    await asyncio.Event().wait()
        await connection.execute("SELECT 1")

    def in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        calls[change.entity_id] += 1
        if change.entity_id == "bad":
            os.kill(connection.info.backend_pid, signal.SIGKILL)
        if change.entity_id != "quick":
            threading.Event().wait(_SLOW_S)
        connection.execute("SELECT 1")

    async def batch(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        for change in changes:
            await on_loop(change, connection)

    match kind:
        case "on loop":
            router.on("x", group=1)(on_loop)
        case "in thread":
            router.on("x", group=1)(in_thread)
        case "group":
            router.on("x", group=10)(on_loop)
        case "batch":
            router.on("x", batch=10)(batch)
    return router


@pytest.mark.parametrize("kind", ["on loop", "in thread", "group", "batch"])
async def test_a_handler_that_crashes_the_server_does_so_ten_times_and_the_others_go_on(
    kind: str, crashing: str
) -> None:
    calls: Counter[str] = Counter()
    await _found_out(crashing, _router(kind, calls), calls, "the connection was lost while the handler")


@pytest.mark.parametrize("how", _END)
@pytest.mark.parametrize("kind", ["on loop", "in thread", "batch"])
async def test_a_handler_that_ends_the_consumers_session_over_another_connection_is_found_out_as_well(
    kind: str, how: str, crashing: str
) -> None:
    calls: Counter[str] = Counter()
    notice = _Notice()
    router = _plain_router(kind, how, crashing, calls, notice)
    await _found_out(crashing, router, calls, "the consumer's session was lost while the handler", notice)


async def _found_out(
    crashing: str, router: Router, calls: Counter[str], told: str, notice: _Notice | None = None
) -> None:
    _publish(crashing, "slow", "bad", "slow too")
    async with consuming(crashing, router, stream=False, poll_interval=1, transactions=4) as app:
        if notice:
            notice.app = app

        async def crashed_often() -> bool:
            return calls["bad"] >= lost_transactions.LOSSES_MAX // 2

        async def others_done() -> bool:
            done = _asked(crashing, "SELECT FROM entity_changes WHERE processed AND entity_id <> 'bad'")
            return len(done) == 3

        async def dead() -> bool:
            return bool(_asked(crashing, "SELECT FROM entity_changes WHERE dead_at IS NOT NULL"))

        await eventually_async(crashed_often, within_s=60)

        async def published() -> bool:
            try:
                _publish(crashing, "quick")
            except psycopg.Error:
                return False
            return True

        await eventually_async(published)
        await eventually_async(others_done)
        await eventually_async(dead, within_s=60)
    with psycopg.connect(crashing) as connection:
        assert states(connection) == {"dead": 1, "processed": 3}
        rows = connection.execute("SELECT entity_id, error_count, last_error FROM entity_changes").fetchall()
    [(_, _, text)] = [row for row in rows if row[0] == "bad"]
    assert text.startswith(told)
    assert "10 times in a row" in text
    assert {errors for entity_id, errors, _ in rows if entity_id != "bad"} == {0}
    assert calls["bad"] == lost_transactions.LOSSES_MAX
    assert max(calls["slow"], calls["slow too"]) <= lost_transactions.SESSIONS_MAX + 2  # shared, and alone
