"""An application that answers more, or otherwise, than HTTP has in mind: raw bytes, on a socket of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, settled, states
from tests.fix_memory import megabytes

Speaking = Callable[[asyncio.StreamWriter], Awaitable[None]]
_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05, "timeout": 5, "max_attempts": 3}
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@contextlib.asynccontextmanager
async def speaking(speak: Speaking) -> AsyncIterator[str]:
    """Says this to each request, then closes."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            await speak(writer)
            await writer.drain()
        writer.close()
        tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/changes"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _outcome(outbox: str, db: psycopg.Connection, speak: Speaking) -> dict[str, int]:
    db.execute("SELECT publish_change('x', '1')")
    async with speaking(speak) as url, consuming(outbox, None, deliver_to=url, **_QUICK):

        async def done() -> bool:
            return settled(db)

        await eventually_async(done, what="processed or dead")
    return states(db)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\n\r\na body all the same",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok and more than that",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 9_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 " + b"fine" * 3_000 + b"\r\nContent-Length: 0\r\n\r\n",
        _INTERIM + _OK,
        _INTERIM + b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + _OK,
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.1 202 Accepted\r\n\r\n",
    ],
)
async def test_who_answers_2xx_has_taken_it_whatever_follows(
    outbox: str, outbox_db: psycopg.Connection, answer: bytes
) -> None:
    async def speak(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    assert await _outcome(outbox, outbox_db, speak) == {"processed": 1}


async def test_an_answer_that_comes_byte_by_byte_is_one(outbox: str, outbox_db: psycopg.Connection) -> None:
    async def speak(writer: asyncio.StreamWriter) -> None:
        for place in range(len(_INTERIM + _OK)):
            writer.write((_INTERIM + _OK)[place : place + 1])
            await writer.drain()

    assert await _outcome(outbox, outbox_db, speak) == {"processed": 1}


@pytest.mark.parametrize(
    ("piece", "enough"),
    [
        (_INTERIM * 1_000, 100_000_000),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 1_000, 100_000_000),
        (b"HTTP/1.1 200 " + b"a" * 10_000, 100_000_000),
        (b"X: y\r\n" * 1_000, 100_000_000),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000, 100_000_000),
    ],
)
async def test_what_is_said_before_the_answer_ends(
    outbox: str, outbox_db: psycopg.Connection, piece: bytes, enough: int
) -> None:
    said = 0

    async def speak(writer: asyncio.StreamWriter) -> None:
        nonlocal said
        while said < enough:
            writer.write(piece)
            await writer.drain()
            said += len(piece)

    assert await _outcome(outbox, outbox_db, speak) == {"dead": 1}
    assert said < enough / 2


async def test_endless_interim_answers_take_neither_the_memory_nor_the_loop(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, processes: list[Process]
) -> None:
    async def speak(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(_INTERIM * 1_000)
            await writer.drain()

    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 40) n")
    async with speaking(speak) as url:
        process = Process(outbox, tmp_path / "log", deliver_to=url, options=("--no-stream",), **_QUICK)
        processes.append(process)

        def done() -> bool:
            return states(outbox_db) == {"dead": 40}

        await asyncio.to_thread(eventually, done, what="all of them are given up")
        assert megabytes(process.process.pid) < 150
