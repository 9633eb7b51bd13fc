"""What async handlers may do on a connection that is lent to them: all of psycopg's ways to wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from cdc.postgres.lent import AsyncLent
from tests.eventually import eventually

pytestmark = pytest.mark.server

_ROWS = 300_000


@pytest.fixture
async def lent(database: str) -> AsyncIterator[AsyncLent]:
    async with await AsyncLent.connect(database) as connection:
        yield connection


async def _one(connection: AsyncLent) -> int:
    [(number,)] = await (await connection.execute("SELECT %s::int", [1])).fetchall()
    return int(number)


@contextmanager
def _turns() -> Iterator[list[int]]:
    """How often the event loop has come to something else meanwhile."""
    loop, turns = asyncio.get_running_loop(), [0]

    def take() -> None:
        if turns[0] >= 0:
            turns[0] += 1
            loop.call_soon(take)

    loop.call_soon(take)
    try:
        yield turns
    finally:
        turns[0] = -1


async def test_rows_come_by_a_stream_a_server_cursor_and_many_at_once(lent: AsyncLent) -> None:
    assert await _one(lent) == 1
    assert [n async for (n,) in lent.cursor().stream("SELECT generate_series(1, 1000)")] == list(range(1, 1001))
    assert await _one(lent) == 1
    async with lent.cursor("named") as cursor:
        await cursor.execute("SELECT generate_series(1, 1000)")
        assert len(await cursor.fetchmany(700)) == 700
        assert len(await cursor.fetchall()) == 300
    await lent.execute("CREATE TEMPORARY TABLE taken (n int)")
    await lent.cursor().executemany("INSERT INTO taken VALUES (%s)", [(n,) for n in range(500)])
    async with lent.pipeline():
        cursors = [await lent.execute("SELECT count(*) + %s FROM taken", [n]) for n in range(50)]
        assert [(await cursor.fetchall())[0][0] for cursor in cursors] == list(range(500, 550))
    assert await _one(lent) == 1


async def test_a_large_statement_is_sent_and_a_large_answer_is_read(lent: AsyncLent) -> None:
    text = "x" * 20_000_000
    [(sent,)] = await (await lent.execute("SELECT %s::text", [text])).fetchall()
    assert sent == text
    assert await _one(lent) == 1


async def test_other_tasks_have_their_turn_while_much_is_copied(lent: AsyncLent) -> None:
    await lent.execute("CREATE TEMPORARY TABLE taken (n int)")
    with _turns() as turns:
        async with lent.cursor().copy("COPY taken FROM STDIN") as copy:
            for n in range(_ROWS):
                await copy.write_row([n])
        written, turns[0] = turns[0], 0
        async with lent.cursor().copy("COPY taken TO STDOUT") as copy:
            assert len([row async for row in copy.rows()]) == _ROWS
        read, turns[0] = turns[0], 0
        async with lent.pipeline():
            for _ in range(20_000):
                await lent.execute("SELECT 1")
        piped = turns[0]
    assert min(written, read, piped) >= 3
    assert await _one(lent) == 1


async def test_a_wait_for_notifications_ends_in_time(lent: AsyncLent, db: psycopg.Connection) -> None:
    await lent.set_autocommit(True)
    await lent.execute("LISTEN news")
    began = time.monotonic()
    assert [notify async for notify in lent.notifies(timeout=0.3)] == []
    assert time.monotonic() - began < 5
    db.execute("NOTIFY news, 'one'")
    assert [notify.payload async for notify in lent.notifies(timeout=5, stop_after=1)] == ["one"]
    assert await _one(lent) == 1


async def test_a_statement_that_takes_too_long_is_cancelled_and_the_connection_goes_on(lent: AsyncLent) -> None:
    await lent.set_autocommit(True)
    assert await _one(lent) == 1
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await lent.execute("SELECT pg_sleep(60)")
    assert time.monotonic() - began < 30
    assert await _one(lent) == 1


async def test_two_tasks_take_turns_on_it(lent: AsyncLent) -> None:
    assert await asyncio.gather(*(_one(lent) for _ in range(20))) == [1] * 20


async def test_the_end_of_its_session_is_an_error_of_the_next_statement(
    lent: AsyncLent, db: psycopg.Connection
) -> None:
    assert await _one(lent) == 1
    await lent.commit()
    db.execute("SELECT pg_terminate_backend(%s)", [lent.info.backend_pid])
    there = "SELECT FROM pg_stat_activity WHERE pid = %s"
    eventually(lambda: not db.execute(there, [lent.info.backend_pid]).fetchall(), what="the session has ended")
    with pytest.raises(psycopg.OperationalError):
        await _one(lent)
    assert lent.broken
