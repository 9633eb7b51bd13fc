"""Connections lent to one handler after the other: each handler finds a connection without traces of the one before.

What is set on the Python object (factories, adapters, notice handlers ...) is undone between two calls, by ``as_new``.
What a session keeps on the server (settings, role, LISTEN, advisory locks, open cursors, temporary tables, prepared
statements) is removed by ``reset`` when the connection is given back: one message. DISCARD ALL would not do: after it
the statements of every transaction, ours and the handler's, would have to be prepared again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import psycopg
from psycopg import sql
from psycopg.abc import Dumper, Loader
from psycopg.adapt import AdaptersMap
from psycopg.rows import tuple_row
from psycopg.types import TypeInfo, TypesRegistry

from cdc.postgres.link import AsyncGuardedConnection, GuardedConnection
from cdc.postgres.script import Script

_RESET = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_catalog.pg_advisory_unlock_all();"
    " DISCARD TEMP; DISCARD SEQUENCES;"
    " SELECT name FROM pg_catalog.pg_prepared_statements"
    " WHERE pg_catalog.left(name, 5) OPERATOR(pg_catalog.<>) '_pg3_'"
)
"""The last statement lists what was prepared by others than the driver, which keeps track of its own."""
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


class Lent(_Lent, GuardedConnection):
    _cursors = psycopg.Cursor, psycopg.ServerCursor


class AsyncLent(_Lent, AsyncGuardedConnection):
    """``Lent`` for an event loop."""

    _cursors = psycopg.AsyncCursor, psycopg.AsyncServerCursor


def reset(connection: Lent | AsyncLent) -> Script[None]:
    """Called by a pool when the connection was given back."""
    connection.as_new()
    connection.renew_adapters()
    if connection.is_pooled:
        return
    cursor = yield connection.execute(_RESET, prepare=False)
    while cursor.nextset():
        pass
    for (name,) in (yield cursor.fetchall()):
        yield connection.execute(sql.SQL("DEALLOCATE {}").format(sql.Identifier(name)), prepare=False)
