"""How the transaction of a transactional handler ends: COMMIT, and in the same message what resets the session."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core import failpoints
from cdc.core.router import Router
from cdc.postgres import lent
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states

pytestmark = pytest.mark.server

_BOTH = pytest.mark.parametrize("in_thread", [False, True])


@pytest.fixture
def effects(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE effect (seq bigint, pid int, UNIQUE (seq) DEFERRABLE INITIALLY DEFERRED)")
    outbox_db.execute("CREATE SEQUENCE effect_seq")
    return outbox_db


def _publish(db: psycopg.Connection, count: int) -> None:
    db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, %s) AS n", [count])


def _all_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


def _handler(statement: str, *, in_thread: bool) -> Any:
    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute(statement.encode())

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute(statement.encode())

    return in_a_thread if in_thread else on_loop


@_BOTH
async def test_where_commit_fails_the_attempt_has_failed_and_its_session_is_as_new(
    in_thread: bool, outbox: str, effects: psycopg.Connection
) -> None:
    router = Router()
    twice = (
        "INSERT INTO effect SELECT 1, 1 / (SELECT 1 - count(*) FROM pg_locks"
        " WHERE locktype = 'advisory' AND pid = pg_backend_pid());"
        " SELECT pg_advisory_lock(4711)"
    )
    router.on("x", max_attempts=1, group=1)(_handler(twice, in_thread=in_thread))
    _publish(effects, 3)
    async with consuming(outbox, router, transactions=1):
        await _all_settled(effects)
    assert states(effects) == {"processed": 1, "dead": 2}
    errors = effects.execute("SELECT last_error FROM entity_changes WHERE NOT processed").fetchall()
    assert all(error.startswith("UniqueViolation") for (error,) in errors)
    assert effects.execute("SELECT count(*) FROM effect").fetchone() == (1,)


@_BOTH
@pytest.mark.parametrize(
    "reset",
    [b"SELECT 1 / 0", b"SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())"],
    ids=["fails", "ends the session"],
)
async def test_a_reset_that_fails_undoes_nothing_and_the_next_handler_gets_another_connection(
    *,
    in_thread: bool,
    reset: bytes,
    outbox: str,
    effects: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lent, "_RESET", reset)
    caplog.set_level(logging.INFO, "cdc")
    router = Router()
    insert = "INSERT INTO effect VALUES (nextval('effect_seq'), pg_backend_pid())"
    router.on("x", max_attempts=1, group=1)(_handler(insert, in_thread=in_thread))
    _publish(effects, 4)
    async with consuming(outbox, router, transactions=1) as app:
        await _all_settled(effects)
    assert states(effects) == {"processed": 4}
    assert effects.execute("SELECT count(DISTINCT pid) FROM effect").fetchone() == (4,)
    assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="processed") == 4
    assert "is read again" not in caplog.text, "it was known that they are committed"


async def test_a_statement_that_fails_after_the_mark_is_a_failed_attempt(
    outbox: str, effects: psycopg.Connection
) -> None:
    """Of a thread that the handler has left behind. The server answers such a COMMIT with ROLLBACK, and no error."""
    router, kept = Router(), list[psycopg.Connection]()

    @router.on("x", max_attempts=1, group=1)
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        kept.append(connection)

    def fail(point: str) -> None:
        if point == "run.before_commit":
            with contextlib.suppress(psycopg.Error):
                kept[-1].execute("SELECT 1 / 0")

    _publish(effects, 1)
    failpoints.install(fail)
    try:
        async with consuming(outbox, router, transactions=1) as app:
            await _all_settled(effects)
    finally:
        failpoints.install(None)
    assert states(effects) == {"dead": 1}
    assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="processed") == 0
    [(error,)] = effects.execute("SELECT last_error FROM entity_changes").fetchall()
    assert error.startswith("InFailedSqlTransaction: a statement failed after the mark")
