"""Transactional handlers: what the handler writes and the mark of its change commit together, or not at all.

    BEGIN ── lock the row ── handler(change, connection) ── mark the row ── COMMIT

The row is locked with FOR UPDATE SKIP LOCKED, unprocessed and as it was read, so that its effects happen once even if
two consumers believe they own the shard. If no row is locked, another session has it or had it, which never means that
it is done. Then, and when the connection dies (the answer to a COMMIT may be lost with it), only the table knows what
became of the change: ``AskTheTableError`` makes its key be read again.

Several changes may share a transaction: the calls follow each other in it, and the marks are one statement. If one of
them fails, nothing of any is committed, and the caller runs them one by one.

The handler's writes to tracked tables are caused by its change: the setting ``cdc.cause`` tells the capture trigger.
If several changes share a transaction it is set again for each only if the handler is known to write there
(``causes``). If it turns out to write, as the trigger reports in ``cdc.captured``, they are undone and called again.

Connections come from pools that open them as they are needed: one for async handlers, one for those in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from cdc.core import failpoints
from cdc.core.latest import Latest
from cdc.core.model import Change
from cdc.core.router import Handler
from cdc.core.sqlstate import passes
from cdc.observability.snapshots import PoolStatus
from cdc.postgres.connect import SERVER_TCP, Dsn, lent_arguments
from cdc.postgres.lent import AsyncLent, Lent, begin, commit, reset, roll_back
from cdc.postgres.link import cut
from cdc.postgres.outbox import Store
from cdc.postgres.script import Script, run, run_async

_CONNECTION_LIMIT_S = 10.0
_ANSWER_LIMIT_S = 30.0
"""For each answer to a statement of cdc; the handler's have its own time limit."""
_TAKE_AGAIN_S = 1.0
"""If the row cannot be locked for a moment."""
_NO_CONNECTION = "no connection for a transactional handler"
_SESSION: Mapping[str, str] = {
    **SERVER_TCP,  # a vanished host must not hold the lock on its row
    "idle_in_transaction_session_timeout": "0",  # the handler's own time limit holds, from BEGIN on
}


Errors = Mapping[int, BaseException]
"""By seq, the errors of the changes that failed, while others of the batch are done."""


class Ran(NamedTuple):
    """How the calls for some changes ended.

    ``errors``: of changes that failed by themselves, by seq. ``at``: when the others were marked, by the database's
    clock; None: there were none, or they are marked later. ``captured``: the handler's writes were captured.
    ``calls_s``: how long the calls took, in seconds, without their transaction.
    """

    errors: Errors
    at: datetime | None = None
    captured: bool = False
    calls_s: float = 0.0


class AskTheTableError(Exception):
    """The attempt's outcome is unknown, or another session has the change: read the table after ``pause_s``."""

    def __init__(self, why: str, pause_s: float = 0.1) -> None:
        super().__init__(why)
        self.pause_s = pause_s


class LostTransactionError(AskTheTableError):
    """Another session or the server ended the transaction while the handler ran: not counted, up to a bound.

    ``cause``: what the driver or the server said.
    """

    def __init__(self, why: str = "the connection was lost", cause: psycopg.Error | None = None) -> None:
        super().__init__(why)
        self.cause = cause or psycopg.OperationalError()


class BlockedError(LostTransactionError):
    """A temporary obstacle: another transaction, a lock, a full disk, a statement of cdc that was cancelled.

    If it does not end, it is a failed attempt like any other.
    """


class EndedTransactionError(Exception):
    """The handler ended the transaction that is not its own."""

    def __init__(self) -> None:
        super().__init__("the handler ended the transaction it was given; leave COMMIT and ROLLBACK to the consumer")


class MixedCausesError(Exception):
    """One of several changes wrote to a captured table, and ``cdc.cause`` did not say which one."""


class Transactions:
    """``size``: connections of each kind. Made on the event loop; ``open`` before, ``close`` after use.

    ``pooled``: the DSN leads to a pooler, so no session setting is used that a transaction cannot set.
    """

    def __init__(self, dsn: Dsn, store: Store, size: int, handlers: Iterable[Handler], *, pooled: bool = False) -> None:
        self._store = store
        self._kinds = {handler.is_async for handler in handlers if handler.transactional}
        arguments = partial(lent_arguments, dsn, application_name="cdc: handlers", session={} if pooled else _SESSION)

        def configure(connection: AsyncLent | Lent) -> None:
            connection.answer_limit_s, connection.is_pooled = _ANSWER_LIMIT_S, pooled

        async def configure_async(connection: AsyncLent) -> None:
            configure(connection)

        self._async: AsyncConnectionPool[AsyncLent] = AsyncConnectionPool(
            "", connection_class=AsyncLent, kwargs=arguments, min_size=0, max_size=size, open=False,
            timeout=_CONNECTION_LIMIT_S, configure=configure_async,
        )  # fmt: skip
        self._sync: ConnectionPool[Lent] = ConnectionPool(
            "", connection_class=Lent, kwargs=arguments, min_size=0, max_size=size, open=False,
            timeout=_CONNECTION_LIMIT_S, configure=configure,
        )  # fmt: skip

    async def open(self) -> None:
        if True in self._kinds:
            await self._async.open()
        if False in self._kinds:
            self._sync.open()

    async def close(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` for a connection that is being opened, and not for one that a handler has."""
        await asyncio.gather(self._async.close(timeout_s), asyncio.to_thread(self._sync.close, timeout_s))

    @property
    def status(self) -> Mapping[str, PoolStatus]:
        """By kind; from any thread."""
        return {"async": _status(self._async.get_stats()), "sync": _status(self._sync.get_stats())}

    async def run(
        self,
        changes: Sequence[Change],
        calls: Sequence[Callable[[psycopg.AsyncConnection], Awaitable[Errors]]],
        *,
        causes: bool,
        latest: Latest | None = None,
    ) -> Ran:
        """Run an async handler: one call for all the changes, which returns those that failed, or one for each of them.

        ``causes``: each of several calls is set as the cause of what it writes. Raises MixedCausesError if that would
        have been needed. ``latest``: what the call for the only change stands for; all of that is marked.
        """
        attempt = _Attempt(self._store, changes, calls, causes=causes, latest=latest)
        try:
            connection = await self._async.getconn()
        except PoolTimeout as error:
            raise AskTheTableError(_NO_CONNECTION) from error
        try:
            return await run_async(attempt.script(connection))
        finally:
            try:
                if not connection.is_reset:
                    await run_async(reset(connection))
            finally:
                await self._async.putconn(connection)

    def run_in_thread(
        self,
        changes: Sequence[Change],
        calls: Sequence[Callable[[psycopg.Connection], Errors]],
        *,
        causes: bool,
        latest: Latest | None = None,
        owned: Callable[[], bool],
    ) -> Ran:
        """``run`` for a handler that is not async; called in its thread, where nothing can cut it off.

        ``owned``: whether this consumer still owns the changes. It may have waited long for a connection.
        """
        attempt = _Attempt(self._store, changes, calls, causes=causes, latest=latest, owned=owned)
        try:
            connection = self._sync.getconn()
        except PoolTimeout as error:
            raise AskTheTableError(_NO_CONNECTION) from error
        try:
            return run(attempt.script(connection))
        finally:
            try:
                if not connection.is_reset:
                    run(reset(connection))
            finally:
                self._sync.putconn(connection)


class _Attempt:
    """The statements on a connection from BEGIN to COMMIT, and how far they have come."""

    def __init__(
        self,
        store: Store,
        changes: Sequence[Change],
        calls: Sequence[Callable[[Any], Any]],
        *,
        causes: bool,
        latest: Latest | None = None,
        owned: Callable[[], bool] | None = None,
    ) -> None:
        self._store = store
        self._changes = changes
        self._calls = calls
        self._causes = causes
        self._latest = latest if latest and latest.later else None
        self._owned = owned
        self._taken = self._calling = False

    def script(self, connection: AsyncLent | Lent) -> Script[Ran]:
        """Raises AskTheTableError, EndedTransactionError, MixedCausesError, and what the driver or a call raises."""
        store, changes, calls, owned = self._store, self._changes, self._calls, self._owned
        errors: Errors = {}
        try:
            yield from begin(connection)
            cause = self._latest.change if self._latest else _first_cause(changes, calls)
            cursor = yield connection.execute(*store.take(changes, cause))
            xid = _taken(changes, (yield cursor.fetchall()))
            self._taken = True
            failpoints.here("run.after_take")
            began = time.monotonic()
            for number, call in enumerate(calls):
                if owned is not None:
                    _check(owned)
                if number:
                    failpoints.here("run.between_calls")
                    if self._causes:
                        yield connection.execute(*store.cause(changes[number]))
                self._calling, connection.answer_limit_s = True, None
                try:  # ``unlimited`` costs as much as the rest of this loop
                    errors = yield call(connection)
                finally:
                    connection.answer_limit_s = _ANSWER_LIMIT_S
                self._calling = False
                connection.as_new()
                _alone_only(errors, calls)
            calls_s = time.monotonic() - began
            failpoints.here("run.before_mark")
            if self._latest:
                ran = yield from self._mark_all(connection, self._latest, errors, xid)
            else:
                done = [change for change in changes if change.seq not in errors]
                cursor = yield connection.execute(*store.mark(done, xid), binary=True)
                ran = _marked(done, errors, (yield cursor.fetchall()), named=self._causes or len(calls) == 1)
            failpoints.here("run.before_commit")
            yield from commit(connection)
        except BaseException as error:
            yield from roll_back(connection)
            if isinstance(error, psycopg.Error):
                raise self._fate(connection, error) from error
            raise
        failpoints.here("run.after_commit")
        return ran._replace(calls_s=calls_s)

    def _mark_all(self, connection: AsyncLent | Lent, latest: Latest, errors: Errors, xid: str) -> Script[Ran]:
        """Mark the change and those that its call stood for, at the end of the transaction."""
        yield connection.execute(self._store.coalesced.indexed)
        cursor = yield connection.execute(*self._store.coalesced.mark(self._changes[0], latest, xid), binary=True)
        found = yield cursor.fetchall()
        if not found:
            raise EndedTransactionError
        [(marked, at, captured)] = found
        if marked != latest.change.coalesced:
            raise AskTheTableError("another session has processed one of the changes that the call stood for", 0.0)
        return Ran(errors, at, bool(captured))

    def _fate(self, connection: AsyncLent | Lent, error: psycopg.Error) -> Exception:
        """The handler's own error, or that another session or the server ended the transaction, maybe during COMMIT.

        If no row was locked, no call had begun: a connection may have died in the pool, and no change is the cause.
        If no call is under way the statement was cdc's own, and a temporary obstacle to it is no failed
        attempt.
        """
        if connection.broken or connection.closed:
            if not self._taken:
                return AskTheTableError("the connection had been lost before the call")
            return LostTransactionError("the connection was lost", error)
        if isinstance(error, psycopg.errors.InvalidSqlStatementName):
            cut(connection)  # the driver believes that statements which a DEALLOCATE ALL removed are still prepared
            return LostTransactionError("what was prepared on the connection is gone, and so it was closed", error)
        if isinstance(error, psycopg.errors.SerializationFailure | psycopg.errors.DeadlockDetected):
            return BlockedError("another transaction blocked it", error)
        if not self._calling and passes(error.sqlstate):
            why = f"{error.diag.message_primary} [{error.sqlstate}]"
            return BlockedError(why, error) if self._taken else AskTheTableError(why, _TAKE_AGAIN_S)
        return error


def _first_cause(changes: Sequence[Change], calls: Sequence[object]) -> Change:
    """The cause of what one call for many changes writes is the deepest, so that no loop hides in a batch."""
    return changes[0] if len(calls) > 1 else max(changes, key=lambda change: change.depth)


def _check(owned: Callable[[], bool]) -> None:
    if not owned():
        raise AskTheTableError("the consumer's session was lost before the call")


def _alone_only(errors: Errors, calls: Sequence[object]) -> None:
    """``Failed`` from one of several calls rolls back that call's writes, and with them those of the others."""
    if errors and len(calls) > 1:
        raise next(iter(errors.values()))


def _taken(changes: Sequence[Change], rows: Sequence[tuple[object, ...]]) -> str:
    if len(rows) < len(changes):
        raise AskTheTableError("another session has the change")
    return str(rows[0][0])


def _marked(done: Sequence[Change], errors: Errors, rows: Sequence[tuple[object, ...]], *, named: bool) -> Ran:
    if len(rows) != len(done):
        raise EndedTransactionError
    if not rows:
        return Ran(errors)
    if any(at is None for at, _ in rows):
        raise AskTheTableError("another session has processed the change", 0.0)
    at, captured = rows[0]
    assert isinstance(at, datetime)
    if captured and not named:
        raise MixedCausesError
    return Ran(errors, at, bool(captured))


def _status(pool: Mapping[str, int]) -> PoolStatus:
    idle = pool["pool_available"]
    return PoolStatus(busy=pool["pool_size"] - idle, idle=idle, waiting=pool["requests_waiting"])
