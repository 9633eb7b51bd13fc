"""A statement that is cancelled while the server is silent: the wait for its answer ends, and no other one."""

from __future__ import annotations

import asyncio
import contextlib

import psycopg
import pytest

from cdc.postgres.connect import connect_async
from tests.eventually import eventually_async
from tests.fix_proxy import Proxy

_SLEEPS = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
_SOON_S = 0.5


async def _sleeping(connection: psycopg.AsyncConnection, db: psycopg.Connection) -> asyncio.Task[object]:
    async def begun() -> bool:
        row = db.execute(_SLEEPS).fetchone()
        return row == (1,)

    task = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
    await eventually_async(begun, what="the statement runs")
    return task


@pytest.mark.parametrize("answer_limit_s", [None, 60.0])
async def test_a_cancelled_statement_that_a_silent_server_does_not_answer_costs_the_connection(
    answer_limit_s: float | None, database: str, db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(database)
    proxy.start()
    try:
        connection = await connect_async(proxy.dsn, application_name="cdc: test", answer_limit_s=answer_limit_s)
        connection.cancel_limit_s = _SOON_S
        task = await _sleeping(connection, db)
        proxy.swallow()
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=30)
        assert done
        with contextlib.suppress(asyncio.CancelledError, psycopg.OperationalError):
            await task
        assert connection.broken or connection.closed
        assert "query not terminated" not in caplog.text, "the driver's own limit is ten times as long"
        await connection.close()
    finally:
        proxy.stop()


async def test_a_cancelled_statement_that_is_answered_leaves_the_connection_to_the_next(
    database: str, db: psycopg.Connection
) -> None:
    connection = await connect_async(database, application_name="cdc: test")
    connection.cancel_limit_s = _SOON_S
    task = await _sleeping(connection, db)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cursor = await connection.execute("SELECT pg_sleep(1), 'answered'")  # longer than _SOON_S
    assert await cursor.fetchone() == ("", "answered")
    await connection.close()
