"""Connections lent to one handler after the other: each handler finds a connection without traces of the one before.

    begin ── statements of cdc and of the handlers ── commit, or roll_back ── reset

What is set on the Python object (factories, adapters, notice handlers ...) is undone between two calls, by ``as_new``.
What a session keeps on the server (settings, role, LISTEN, advisory locks, open cursors, temporary tables, prepared
statements) is removed at the end of the transaction, in one message with COMMIT or ROLLBACK. DISCARD ALL would not do:
after it the statements of every transaction, ours and the handler's, would have to be prepared again.

The server answers each statement of a message by itself. So a COMMIT that failed is not confused with what failed after
it: then the transaction is committed, and only the connection is of no more use.

psycopg's ``transaction()`` can send nothing with its COMMIT. Its nesting is kept here for it (``_num_transactions``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import psycopg
from psycopg.abc import Dumper, Loader
from psycopg.adapt import AdaptersMap
from psycopg.generators import fetch, fetch_many, send
from psycopg.pq import Escaping, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.rows import tuple_row
from psycopg.transaction import OutOfOrderTransactionNesting
from psycopg.types import TypeInfo, TypesRegistry

from cdc.postgres.link import AsyncGuardedConnection, GuardedConnection, cut
from cdc.postgres.script import Script
from cdc.postgres.watched import WatchedLink

_BEGIN = b"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE NOT DEFERRABLE"
"""Whatever the database's defaults: above read committed a change would fail because of concurrent writes."""
_COMMIT, _ROLLBACK = b"COMMIT", b"ROLLBACK"
_RESET = (
    b"CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_catalog.pg_advisory_unlock_all();"
    b" DISCARD TEMP; DISCARD SEQUENCES;"
    b" SELECT name FROM pg_catalog.pg_prepared_statements"
    b" WHERE pg_catalog.left(name, 5) OPERATOR(pg_catalog.<>) '_pg3_'"
)
"""The last statement lists what was prepared by others than the driver, which keeps track of its own."""
_RAN = {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK, ExecStatus.EMPTY_QUERY}
_OPEN = {TransactionStatus.INTRANS, TransactionStatus.INERROR}
_PREPARE_THRESHOLD, _PREPARED_MAX = 5, 100
"""psycopg's defaults."""


class _Types(TypesRegistry):
    """Reports whether anything has been registered."""

    is_changed = False

    def add(self, info: TypeInfo) -> None:
        self.is_changed = True
        super().add(info)

    def clear(self) -> None:
        self.is_changed = True
        super().clear()


class _Adapters(AdaptersMap):
    """The same. One object is reused: making one for each call would cost as much as many handlers."""

    types: _Types
    is_changed = False
    """Apart from ``types``."""

    def __init__(self, template: AdaptersMap) -> None:
        super().__init__(template)
        self.types = _Types(template.types)

    def register_dumper(self, cls: type | str | None, dumper: type[Dumper]) -> None:
        self.is_changed = True
        super().register_dumper(cls, dumper)

    def register_loader(self, oid: int | str, loader: type[Loader]) -> None:
        self.is_changed = True
        super().register_loader(oid, loader)


def _noted(name: str) -> Any:
    """A property of psycopg's connections. Whether it was set is noted."""
    of_driver: property = vars(psycopg.BaseConnection)[name]

    def note(connection: _Lent, value: int | None) -> None:
        connection.prepares_otherwise = True
        of_driver.__set__(connection, value)

    return property(of_driver.fget, note)


class _Lent(psycopg.BaseConnection[Any]):
    """What a handler may leave on a connection of either kind."""

    _cursors: ClassVar[tuple[Any, Any]]
    row_factory: Any
    cursor_factory: Any
    server_cursor_factory: Any

    is_pooled = False
    """True: a pooler gives each transaction another session, so no session is ours."""
    _adapters_now: _Adapters | None = None
    _callbacks: Sequence[tuple[Callable[[Any], None], Any]] = ()
    prepares_otherwise = False
    is_reset = True
    """It is as new, also on the server: no transaction has begun since."""

    @property
    def adapters(self) -> AdaptersMap:
        """Made from the program's adapters at the first access."""
        if self._adapters_now is None:
            self._adapters_now = _Adapters(psycopg.adapters)
        return self._adapters_now

    prepare_threshold = _noted("prepare_threshold")
    prepared_max = _noted("prepared_max")

    def add_notice_handler(self, callback: Any) -> None:
        self._added(self.remove_notice_handler, callback)
        super().add_notice_handler(callback)

    def add_notify_handler(self, callback: Any) -> None:
        self._added(self.remove_notify_handler, callback)
        super().add_notify_handler(callback)

    def as_new(self) -> None:
        """Cheap where a handler changed nothing: it is called after each change."""
        self.row_factory = tuple_row
        self.cursor_factory, self.server_cursor_factory = self._cursors
        if self.prepares_otherwise:
            self.prepare_threshold = None if self.is_pooled else _PREPARE_THRESHOLD
            self.prepared_max = _PREPARED_MAX
            self.prepares_otherwise = False
        adapters = self._adapters_now
        if adapters is not None and (adapters.is_changed or adapters.types.is_changed):
            self._adapters_now = None
        if self._callbacks:
            callbacks, self._callbacks = self._callbacks, ()
            for remove, callback in callbacks:
                with contextlib.suppress(ValueError):  # the handler has removed it already
                    remove(callback)

    def renew_adapters(self) -> None:
        """Adapters that the program registers later reach the next borrower of the connection."""
        self._adapters_now = None

    def _added(self, remove: Callable[[Any], None], callback: Any) -> None:
        self._callbacks = (*self._callbacks, (remove, callback))


class Answers(NamedTuple):
    """To the statements of a message. ``rest`` is None if the link ended before the last of them."""

    first: PGresult
    rest: Sequence[PGresult] | None


class Lent(_Lent, GuardedConnection):
    _cursors = psycopg.Cursor, psycopg.ServerCursor

    def exchange(self, message: bytes) -> Answers:
        """Send a message, without a cursor of the handler's making. Raises psycopg.Error if nothing is answered."""
        with self.lock:
            return cast("Answers", self.wait(_answers(self.pgconn, message)))


class AsyncLent(_Lent, WatchedLink):
    """``Lent`` for an event loop."""

    _cursors = psycopg.AsyncCursor, psycopg.AsyncServerCursor

    async def wait(self, gen: Any, *arguments: Any, **named: Any) -> Any:
        """Left to psycopg: the pieces of a COPY, a stream or a pipeline, between which others have their turn; and what
        names an interval, as it is resumed without an event.
        """
        link = self.pgconn
        if arguments or named or link.transaction_status == TransactionStatus.ACTIVE or link.pipeline_status:
            self.unwatch()
            return await AsyncGuardedConnection.wait(self, gen, *arguments, **named)
        return await super().wait(gen, *arguments, **named)

    async def exchange(self, message: bytes) -> Answers:
        async with self.lock:
            return cast("Answers", await self.wait(_answers(self.pgconn, message)))


def begin(connection: Lent | AsyncLent) -> Script[None]:
    """Begin the transaction of a borrower, who cannot end it by the driver's methods."""
    connection.is_reset = False
    _raise_for((yield connection.exchange(_BEGIN)).first)
    connection._num_transactions = 1  # noqa: SLF001 - as psycopg's transaction() does


def commit(connection: Lent | AsyncLent) -> Script[None]:
    """Commit, and remove what the session has kept.

    Raises psycopg.Error if the transaction is not committed, or if that is unknown: then the connection is closed. A
    connection that is committed and cannot be reset is closed, which raises nothing.
    """
    nested, connection._num_transactions = connection._num_transactions, 0  # noqa: SLF001 - as ``begin``
    if nested != 1:
        raise OutOfOrderTransactionNesting("a transaction() of the handler is still open")
    answers: Answers = yield connection.exchange(_with_reset(connection, _COMMIT))
    _raise_for(answers.first)
    if answers.first.command_status != _COMMIT:
        raise psycopg.errors.InFailedSqlTransaction("a statement failed after the mark, and so COMMIT rolled it back")
    yield from _finish(connection, answers)
    if not connection.is_reset:
        cut(connection)


def roll_back(connection: Lent | AsyncLent) -> Script[None]:
    """Roll back, and remove what the session has kept. Raises nothing: ``reset`` closes what cannot be used."""
    connection._num_transactions = 0  # noqa: SLF001 - as ``begin``
    connection._prepared.clear()  # noqa: SLF001 - as psycopg's transaction() does
    if connection.pgconn.transaction_status in _OPEN:
        with contextlib.suppress(psycopg.Error):
            yield from _finish(connection, (yield connection.exchange(_with_reset(connection, _ROLLBACK))))


def reset(connection: Lent | AsyncLent) -> Script[None]:
    """Make the connection as new before it is given back, or close it. After ``commit`` it is as new."""
    try:
        if not connection.is_reset and connection.pgconn.transaction_status == TransactionStatus.IDLE:
            with contextlib.suppress(psycopg.Error):
                yield from _finish(connection, (yield connection.exchange(_with_reset(connection, b""))))
    finally:
        if not connection.is_reset:
            cut(connection)


def _with_reset(connection: Lent | AsyncLent, verb: bytes) -> bytes:
    return verb if connection.is_pooled else b"%b; %b" % (verb, _RESET)


def _finish(connection: Lent | AsyncLent, answers: Answers) -> Script[None]:
    """Deallocate what the last statement of ``_RESET`` has listed. If all of both has run, the connection is as new."""
    if answers.rest is None or any(answer.status not in _RAN for answer in (answers.first, *answers.rest)):
        return
    if answers.rest and (left := answers.rest[-1]).ntuples:
        names = [left.get_value(row, 0) or b"" for row in range(left.ntuples)]
        escape = Escaping(connection.pgconn).escape_identifier
        with contextlib.suppress(psycopg.Error):
            message = b"; ".join(b"DEALLOCATE %b" % escape(name) for name in names)
            yield from _finish(connection, (yield connection.exchange(message)))
        return
    connection.as_new()
    connection.renew_adapters()
    connection.is_reset = True


def _answers(pgconn: PGconn, message: bytes) -> Generator[Any, Any, Answers]:
    """For psycopg's ``wait``."""
    pgconn.send_query(message)
    yield from send(pgconn)
    first = yield from fetch(pgconn)
    if first is None:
        raise psycopg.InternalError("the server has not answered")
    try:
        return Answers(first, (yield from fetch_many(pgconn)))
    except psycopg.OperationalError:
        return Answers(first, None)


def _raise_for(result: PGresult) -> None:
    if result.status not in _RAN:
        raise psycopg.errors.error_from_result(result)
