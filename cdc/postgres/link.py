"""Connections whose answers have a time limit.

A proxy that has lost its way to the server keeps the link to us open and acknowledges what we send: TCP, and so
libpq's keepalives, see no fault. Only the missing answer shows it. So each answer may have a limit,
``answer_limit_s``; beyond it the connection is closed. The proxy then closes its other end, and the server releases
the session's locks. A limit must be longer than the ``statement_timeout`` of its session: a live server has answered by
then, if only with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg

from cdc.runtime.forks import not_for_children

_T = TypeVar("_T")


class SilentLinkError(psycopg.OperationalError):
    """The server has not answered within the limit; the connection is closed."""


class GuardedConnection(psycopg.Connection[Any]):
    """``answer_limit_s``: for each answer from now on; None: no limit."""

    answer_limit_s: float | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        not_for_children(self)

    def wait(self, gen: Any, *arguments: Any, **named: Any) -> Any:
        return super().wait(limited(self, gen), *arguments, **named)


class AsyncGuardedConnection(psycopg.AsyncConnection[Any]):
    """``GuardedConnection`` for an event loop. The answer to a statement that is cancelled always has a limit."""

    answer_limit_s: float | None = None
    cancel_limit_s = 2.0
    """For a statement to end after a cancel request, when no task waits for its answer."""
    _waits = 0
    """Number of answers awaited so far."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        not_for_children(self)

    def wait(self, gen: Any, *arguments: Any, **named: Any) -> Coroutine[Any, Any, Any]:
        self._waits += 1
        return super().wait(limited(self, gen), *arguments, **named)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - psycopg's signature
        """psycopg calls it when the task that awaits an answer is cancelled, and then waits for the answer."""
        asyncio.get_running_loop().call_later(self.cancel_limit_s, self._unanswered, self._waits)
        await super().cancel_safe(timeout=min(timeout, self.cancel_limit_s))

    def _unanswered(self, waits: int) -> None:
        """End the wait for an answer that was cancelled, if it still goes on: what waits reads the end of the link.

        To close the connection would not do: its socket's number may be another's before the event loop forgets it.
        """
        if self._waits == waits and self.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as link:
                link.shutdown(socket.SHUT_RDWR)


@contextmanager
def unlimited(connection: GuardedConnection | AsyncGuardedConnection) -> Iterator[None]:
    """For the application's statements, which may take any time."""
    limit_s, connection.answer_limit_s = connection.answer_limit_s, None
    try:
        yield
    finally:
        connection.answer_limit_s = limit_s


def cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Close it at once; the server notices the end of the link."""
    connection.pgconn.finish()


def close_silent(connection: GuardedConnection | AsyncGuardedConnection, waited_s: float) -> SilentLinkError:
    """Close it. Returns what to raise."""
    name = connection.info.parameter_status("application_name")
    connection.pgconn.finish()
    return SilentLinkError(f"the server has not answered {name!r} for {waited_s:.0f} s; the connection is closed")


def limited(connection: GuardedConnection | AsyncGuardedConnection, gen: Any) -> Any:
    """``gen`` of psycopg, which ends when the connection's limit has passed."""
    return gen if connection.answer_limit_s is None else _limited(connection, gen, connection.answer_limit_s)


def _limited(
    connection: GuardedConnection | AsyncGuardedConnection, waits: Generator[Any, Any, _T], limit_s: float
) -> Generator[Any, Any, _T]:
    """psycopg resumes this generator at each event, and ten times a second without one."""
    began = time.monotonic()
    due = began + limit_s
    try:
        ready = yield next(waits)
        while time.monotonic() < due:
            ready = yield waits.send(ready)
    except StopIteration as ended:
        value: _T = ended.value
        return value
    raise close_silent(connection, time.monotonic() - began)
