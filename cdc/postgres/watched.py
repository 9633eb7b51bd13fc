"""Connections on an event loop whose statements cost fewer steps than with psycopg's.

**Answers.** psycopg sets a timer for each wait, and registers the socket with the event loop for each. Here the event
loop watches the socket from one answer to the next (``runtime/sockets``), until something comes that nobody waits
for, such as the end of the link. One timer watches the limit of all answers, and looks at the link twice a second
meanwhile, as psycopg does ten times a second: an event that is missed costs half a second. Whatever is not the usual
case, an answer at once and nothing left to send, is left to psycopg.

**Statements** of our own. psycopg makes a cursor for each, looks up how each parameter is written and each column read,
and whether it is prepared. ``rows`` does that once for a statement.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Generator, Mapping
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.generators import execute
from psycopg.waiting import READY_R, WAIT_R

from cdc.postgres.link import AsyncGuardedConnection, close_silent, limited
from cdc.runtime.moving_timer import MovingTimer
from cdc.runtime.sockets import sockets_of
from cdc.runtime.turns import Turns

_PLACEHOLDER = re.compile(rb"%\((\w+)\)s|%%")
_COMMAND_OK, _TUPLES_OK, _BINARY = pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.Format.BINARY
_INTERVAL_S = 0.1
"""As psycopg's."""
_LOOK_S = 0.5
"""While an answer is waited for, the link is looked at this often whether or not the event loop has reported it. A
consumer that misses the end of its session goes on with shards that others have taken."""


class WatchedLink(AsyncGuardedConnection):
    """Whose answers are waited for as the head of this file says."""

    _watch: _SocketWatch | None = None

    async def wait(self, gen: Any, interval: float = _INTERVAL_S, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - psycopg's signature
        self._waits += 1
        if timeout is not None:
            rest: Any = limited(self, gen)
        else:
            try:
                state = next(gen)
                watch = self._watch
                if watch is None or watch.socket != self.pgconn.socket:
                    watch = self._watch_socket()
                answer = await watch.answer(gen, self.answer_limit_s) if state == WAIT_R else _Rest(gen, state)
                if type(answer) is not _Rest:
                    return answer
                rest = limited(self, answer)
            except StopIteration as ended:
                return ended.value
            except asyncio.CancelledError as interrupted:  # psycopg cancels the statement, and waits for its end
                rest = _Rest(limited(self, gen), interrupted)
            except _SilentError as silent:
                self.unwatch()
                raise close_silent(self, silent.waited_s) from None
            except OSError as error:
                self.unwatch()
                raise psycopg.OperationalError("connection socket closed") from error
            except BaseException:
                self.unwatch()
                raise
        self.unwatch()
        return await psycopg.AsyncConnection.wait(self, rest, interval, timeout)

    def _watch_socket(self) -> _SocketWatch:
        self.unwatch()
        self._watch = _SocketWatch(self.pgconn.socket)
        return self._watch

    async def close(self) -> None:
        self.unwatch()
        await super().close()

    def unwatch(self) -> None:
        """Until the next answer, whoever else waits for the socket may have it to itself."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None


class WatchedConnection(WatchedLink):
    """For statements of our own."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._turns = Turns()
        self.lock = self._turns  # type: ignore[assignment]  # asyncio's, which psycopg enters and leaves
        self._statements: dict[bytes, _Statement] = {}
        self._prepared_ever = 0

    async def rows(self, statement: bytes, parameters: Mapping[str, Any]) -> list[Any]:
        """The rows that a statement returns, as tuples. It names its parameters (``%(name)s``), and is prepared.

        For few statements, and autocommit: each is kept. What is registered with ``adapters`` later is not seen.
        """
        turns = self._turns
        if turns.taken:
            await turns.wait()
        turns.taken = True
        try:
            rows: list[Any] = await self.wait(self._rows(statement, parameters))
            return rows
        finally:
            turns.release()

    def _rows(self, text: bytes, parameters: Mapping[str, Any]) -> Generator[int, int, list[Any]]:
        link, statement = self.pgconn, self._statements.get(text)
        if statement is None:
            statement = self._statements[text] = _Statement(text, self)
        transformer = statement.transformer
        written = transformer.dump_sequence(list(map(parameters.__getitem__, statement.names)), statement.formats)
        types = transformer.types or ()
        name = statement.prepared.get(types)
        if name is None:
            self._prepared_ever += 1
            name = b"cdc_%d" % self._prepared_ever
            link.send_prepare(name, statement.text, types)
            for result in (yield from execute(link)):
                if result.status != _COMMAND_OK:
                    raise psycopg.errors.error_from_result(result, transformer.encoding)
            statement.prepared[types] = name
        link.send_query_prepared(name, written, transformer.formats, _BINARY)
        # There may be two: a commit may fail after its statement, and so may the session end.
        results = yield from execute(link)
        for result in results:
            if result.status != _TUPLES_OK:
                raise psycopg.errors.error_from_result(result, transformer.encoding)
        result = results[-1]
        # What is prepared returns columns of the same types each time, or is refused.
        transformer.set_pgresult(result, set_loaders=statement.loads is not name)
        statement.loads = name
        try:
            return transformer.load_rows(0, result.ntuples, tuple)
        finally:
            transformer.set_pgresult(None, set_loaders=False)

    def _deallocate(self, name: bytes | None) -> Generator[Any, Any, None]:
        """At ``None`` psycopg has the server forget all that is prepared: a transaction() was rolled back."""
        if name is None:
            self._statements.clear()
        yield from super()._deallocate(name)


class _Statement:
    """As the server reads it, and the names of its parameters.

    ``prepared``: its names on the server, by the types of the parameters; a number's type depends on its size.
    ``loads``: for the columns of which of these the loaders were looked up.
    """

    def __init__(self, text: bytes, connection: WatchedConnection) -> None:
        names: list[str] = []

        def placeholder(found: re.Match[bytes]) -> bytes:
            if found[1] is None:
                return b"%"
            name = found[1].decode()
            if name not in names:
                names.append(name)
            return b"$%d" % (1 + names.index(name))

        self.text = _PLACEHOLDER.sub(placeholder, text)
        self.names = names
        self.formats = [PyFormat.AUTO] * len(names)
        self.transformer = Transformer(connection)
        self.prepared: dict[tuple[int, ...], bytes] = {}
        self.loads: bytes | None = None


class _SilentError(Exception):
    def __init__(self, waited_s: float) -> None:
        super().__init__()
        self.waited_s = waited_s


class _Rest:
    """The rest of a generator that stands at ``at``: what it waits for, or an interruption of the wait."""

    def __init__(self, gen: Any, at: int | BaseException) -> None:
        self._gen = gen
        self._at: int | BaseException | None = at
        self.send = gen.send

    def __next__(self) -> Any:
        at, self._at = self._at, None
        if at is None:
            return next(self._gen)
        if isinstance(at, BaseException):
            raise at
        return at


class _SocketWatch:
    """Of one socket: resumes the generator that waits for an answer when something has arrived."""

    def __init__(self, socket: int) -> None:
        self.socket = socket
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets_of(self._loop)
        self._watched = False
        self._gen: Generator[int, int, Any] | None = None
        """None: nobody waits."""
        self._answer: asyncio.Future[Any] | None = None
        self._limit_s: float | None = None
        self._asked_at = 0.0
        self._timer = MovingTimer(self._look)

    def answer(self, gen: Generator[int, int, Any], limit_s: float | None) -> asyncio.Future[Any]:
        """What ``gen`` returns or raises; ``_Rest`` if it has to send. Fails with _SilentError beyond the limit."""
        loop = self._loop
        if not self._watched:
            self._sockets.watch(self.socket, self._arrived)
            self._watched = True
        self._asked_at, self._limit_s = loop.time(), limit_s
        self._timer.set(loop, _LOOK_S if limit_s is None or limit_s > _LOOK_S else limit_s)
        self._gen = gen
        self._answer = loop.create_future()
        return self._answer

    def end(self) -> None:
        """Whoever waits gets an error: the connection is closed."""
        self._timer.close()
        self._gen = None
        self._unwatch()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(psycopg.OperationalError("the connection is closed"))

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._sockets.unwatch(self.socket, self._arrived)

    def _arrived(self) -> None:
        gen, answer = self._gen, self._answer
        if gen is None or answer is None or answer.done():  # nobody reads it, and it would be reported for ever
            self._unwatch()
            return
        try:
            state = gen.send(READY_R)
        except StopIteration as ended:
            answer.set_result(ended.value)
        except Exception as error:  # noqa: BLE001 - raised where the answer is awaited
            answer.set_exception(error)
        else:
            if state == WAIT_R:
                return
            answer.set_result(_Rest(gen, state))
        self._gen = None

    def _look(self) -> None:
        """An answer may have come long ago."""
        if self._gen is None or self._answer is None or self._answer.done():
            return
        waited_s = self._loop.time() - self._asked_at
        if self._limit_s is not None and waited_s >= self._limit_s:
            self._answer.set_exception(_SilentError(waited_s))
            return
        self._arrived()
        if self._gen is not None:
            self._timer.set(self._loop, _LOOK_S)


def rows_of(connection: psycopg.AsyncConnection, statement: bytes, parameters: dict[str, Any]) -> Awaitable[list[Any]]:
    """The rows that one of our statements returns, on a connection of either kind."""
    if isinstance(connection, WatchedConnection):
        return connection.rows(statement, parameters)
    return _rows_of(connection, statement, parameters)


async def _rows_of(connection: psycopg.AsyncConnection, statement: bytes, parameters: dict[str, Any]) -> list[Any]:
    cursor = connection.cursor(binary=True)
    await cursor.execute(statement, parameters)
    return await cursor.fetchall()
