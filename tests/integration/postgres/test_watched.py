"""Connections for our own statements: fewer steps than with a cursor, and the same answers."""

from __future__ import annotations

import asyncio
import os
import select
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvloop
from psycopg import errors
from psycopg.pq import TransactionStatus

from cdc.postgres import watched
from cdc.postgres.connect import connect_async
from cdc.postgres.link import cut
from cdc.postgres.watched import WatchedConnection
from cdc.runtime.sockets import Sockets
from tests.eventually import eventually, eventually_async

_SESSION = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
_SYNC = b"S\0\0\0\4"
"""A message that a server that is busy does not read."""


async def _connected(database: str) -> WatchedConnection:
    return await connect_async(database, application_name="cdc: test")


@pytest.mark.parametrize("number", [0, -1, 40_000, 3_000_000_000, -(1 << 63)])
async def test_rows_are_those_of_a_cursor_whatever_the_size_of_a_number(database: str, number: int) -> None:
    statement = b"SELECT %(number)s::int8, '100 %%', %(id)s::uuid, %(number)s::text, NULL, %(texts)s::text[]"
    parameters = {"number": number, "id": uuid.uuid4(), "texts": ["a", "b"], "and": "one that it does not name"}
    async with await _connected(database) as connection:
        for _ in range(2):
            rows = await connection.rows(statement, parameters)
            cursor = await connection.cursor(binary=True).execute(statement, parameters)
            assert rows == await cursor.fetchall()


async def test_numbers_of_many_sizes_follow_one_another(database: str) -> None:
    async with await _connected(database) as connection:
        for number in (1, 1 << 40, 2, 1 << 20, 1 << 40, 3):
            assert await connection.rows(b"SELECT %(n)s::int8 + 1", {"n": number}) == [(number + 1,)]
            assert await connection.rows(b"SELECT %(n)s::int8 + 2", {"n": number}) == [(number + 2,)]


async def test_a_column_may_have_another_type_for_a_parameter_of_another_type(database: str) -> None:
    async with await _connected(database) as connection:
        for parameter in (1, 1 << 40, "one", 2, "two", 1 << 40):
            [(found, again)] = await connection.rows(b"SELECT %(p)s, 7", {"p": parameter})
            assert (found, again) == (parameter, 7)


async def test_a_refused_statement_raises_the_servers_error_and_the_next_one_works(database: str) -> None:
    async with await _connected(database) as connection:
        for _ in range(2):
            with pytest.raises(errors.DivisionByZero):
                await connection.rows(b"SELECT 1 / %(n)s::int", {"n": 0})
            with pytest.raises(errors.UndefinedTable):
                await connection.rows(b"SELECT * FROM no_such_table", {})
        assert await connection.rows(b"SELECT 1 / %(n)s::int", {"n": 1}) == [(1,)]


async def test_an_answer_that_the_event_loop_does_not_report_is_found_all_the_same(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await _connected(database) as connection:
        monkeypatch.setattr(Sockets, "watch", lambda *_: None)
        assert await connection.rows(b"SELECT 2", {}) == [(2,)]


async def test_what_nobody_waits_for_does_not_keep_the_event_loop_busy(
    database: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await _connected(database) as connection:
        unwatched = asyncio.Event()
        unwatch = Sockets.unwatch

        def noted(*arguments: Any) -> None:
            unwatch(*arguments)
            unwatched.set()

        monkeypatch.setattr(Sockets, "unwatch", noted)
        await connection.rows(b"SELECT 1", {})
        db.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
        async with asyncio.timeout(20):
            await unwatched.wait()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_session_that_ends_with_an_error_of_its_socket_is_told_at_once(
    database: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], Any]
) -> None:
    """It ends with something unread. The last words come first, and uvloop reports nothing after such an event."""
    monkeypatch.setattr(watched, "_LOOK_S", 60.0)

    async def ended() -> None:
        async with await _connected(database) as connection:
            answer = asyncio.create_task(connection.rows(b"SELECT 1 FROM pg_sleep(60)", {}))
            pid = connection.info.backend_pid

            async def sleeps() -> bool:
                return db.execute(_SESSION, [pid]).fetchall() == [("PgSleep",)]

            await eventually_async(sleeps, what="it sleeps")
            os.write(connection.pgconn.socket, _SYNC)
            db.execute("SELECT pg_terminate_backend(%s)", [pid])
            # The loop stands still, so that it gets the last words and the error as one event.
            link = select.poll()
            link.register(connection.pgconn.socket)
            eventually(lambda: link.poll(0)[0][1] & select.POLLERR, what="the session has ended")
            with pytest.raises(errors.AdminShutdown):
                await asyncio.wait_for(answer, 10.0)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ended())


async def test_to_close_a_connection_whose_socket_is_another_ones_by_now_leaves_that_one_alone(
    database: str, request: pytest.FixtureRequest
) -> None:
    """libpq closes a socket when it meets an error, and the next connection gets its number."""
    before = await _connected(database)
    await before.rows(b"SELECT 1", {})
    number = before.pgconn.socket
    below = [os.open(os.devnull, os.O_RDONLY)]  # no lower number is free
    while below[-1] < number:
        below.append(os.open(os.devnull, os.O_RDONLY))
    for each in below:
        request.addfinalizer(partial(os.close, each))
    cut(before)
    async with await _connected(database) as connection:
        assert connection.pgconn.socket == number
        waiting = asyncio.create_task(connection.rows(b"SELECT 1 FROM pg_sleep(0.2)", {}))
        await asyncio.wait([waiting], timeout=0.05)
        await before.close()
        async with asyncio.timeout(20):
            assert await waiting == [(1,)]
            assert await connection.rows(b"SELECT 2", {}) == [(2,)]


async def test_the_end_of_the_link_leaves_no_number_of_it_open(database: str, db: psycopg.Connection) -> None:
    """The server would not see the end of a link that somebody still has."""
    before = _sockets()
    connection = await _connected(database)
    await connection.rows(b"SELECT 1", {})
    db.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        await connection.rows(b"SELECT 1", {})
    assert _sockets() == before
    await connection.close()
    async with await _connected(database) as another:
        await another.rows(b"SELECT 1", {})
    assert _sockets() == before


def _sockets() -> int:
    """Those that this process has open."""
    links = [number.readlink() for number in Path("/proc/self/fd").iterdir() if number.is_symlink()]
    return sum(str(link).startswith("socket") for link in links)


async def test_the_end_of_the_link_while_nobody_waits_is_told_with_the_next_statement(
    database: str, db: psycopg.Connection
) -> None:
    async with await _connected(database) as connection:
        await connection.rows(b"SELECT 1", {})
        db.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            await connection.rows(b"SELECT 1", {})


async def test_a_wait_that_is_cancelled_cancels_its_statement_and_the_connection_goes_on(database: str) -> None:
    async with await _connected(database) as connection:
        asked = asyncio.create_task(connection.rows(b"SELECT pg_sleep(60)", {}))

        async def runs() -> bool:
            return connection.info.transaction_status is psycopg.pq.TransactionStatus.ACTIVE

        await eventually_async(runs)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await connection.rows(b"SELECT 1", {}) == [(1,)]


async def test_the_end_of_the_link_ends_the_wait_and_the_sockets_number_is_free_for_another(
    database: str, db: psycopg.Connection
) -> None:
    connection = await _connected(database)
    asked = asyncio.create_task(connection.rows(b"SELECT pg_sleep(60)", {}))
    await eventually_async(_asleep(db))
    db.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        await asked
    await connection.close()
    async with await _connected(database) as next_one:
        assert await next_one.rows(b"SELECT 1", {}) == [(1,)]


def _asleep(db: psycopg.Connection) -> Callable[[], Any]:
    async def asleep() -> bool:
        row = db.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").fetchone()
        return row == (1,)

    return asleep


async def test_an_error_that_comes_after_the_statement_is_the_servers(database: str, db: psycopg.Connection) -> None:
    """The server has answered the statement already when its transaction, which it is alone in, cannot be committed."""
    db.execute("CREATE TABLE late (id int PRIMARY KEY, after int REFERENCES late DEFERRABLE INITIALLY DEFERRED)")
    async with await _connected(database) as connection:
        for _ in range(2):
            with pytest.raises(errors.ForeignKeyViolation):
                await connection.rows(b"INSERT INTO public.late VALUES (1, %(after)s) RETURNING id", {"after": 2})
        assert await connection.rows(b"INSERT INTO public.late VALUES (1, %(after)s) RETURNING id", {"after": 1}) == [
            (1,)
        ]


async def test_what_a_rolled_back_transaction_makes_the_driver_forget_is_prepared_again(database: str) -> None:
    async with await _connected(database) as connection:
        for _ in range(8):  # psycopg prepares a statement when it has come often enough
            await connection.execute("SELECT 1")
        assert await connection.rows(b"SELECT %(n)s::int", {"n": 1}) == [(1,)]
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                raise ZeroDivisionError
        await connection.execute("SELECT 1")
        assert await connection.rows(b"SELECT %(n)s::int", {"n": 2}) == [(2,)]


async def test_whoever_waits_is_told_that_the_connection_was_closed(database: str) -> None:
    connection = await _connected(database)
    waiting = asyncio.create_task(connection.rows(b"SELECT pg_sleep(300)", {}))

    async def waits() -> bool:
        return connection.pgconn.transaction_status == TransactionStatus.ACTIVE

    await eventually_async(waits, what="it waits for the answer")
    await connection.close()
    with pytest.raises(psycopg.OperationalError, match="closed"):
        await waiting
