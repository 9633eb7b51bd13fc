"""One replication connection: the only file that drives libpq itself (``psycopg.pq``, COPY_BOTH, START_REPLICATION).

psycopg has no replication interface. Its ``pq`` wrapper is public but undocumented, so the dependency is pinned to one
minor version, and no other module uses the wrapper. Every wait goes through the caller's ``SocketWait``, so that
stop() ends it, and every error is raised as a StreamError that is already classified. A session may be used by any
thread, one at a time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import psycopg
from psycopg import pq, sql

from cdc.core.errors import CdcError, ConnectError, StreamError
from cdc.core.lsn import Lsn
from cdc.core.stream_reason import Reason
from cdc.postgres.connect import Dsn, connect
from cdc.replication.protocol import LONGEST, Plugin, head
from cdc.replication.refusals import (
    ErrorContext,
    FoundSlot,
    Phase,
    ServerState,
    another_outbox,
    classify,
    classify_connect,
    in_recovery,
    message_too_long,
    server_ended,
)
from cdc.replication.slot_health import ABSENT_STANDBYS
from cdc.runtime.sockets import Sockets

_ROUSED = 64
"""Bytes: so many calls of rouse() are one."""
_TURN_S = 5.0
"""The thread reports that it is alive at least this often, whatever it waits for."""
_ANSWER_LIMIT_S = 60.0
"""For the answer to a command. CREATE waits for open write transactions one by one, each up to lock_timeout."""
_MANY = 32
"""Messages since the last read of the socket after which there may be more: libpq reads 16 kB at a time."""
_BYTES_AT_ONCE = 1 << 20
"""Messages of other applications may have any size: one read holds at most this much and one message."""
_TOO_LONG_TO_KEEP = 16 << 20
"""libpq holds a message whole and keeps the memory it needed: after a longer one the session begins again."""
_GOODBYE_LIMIT_S = 1.0
"""For the server to acknowledge the end, which shows that it has read our last status update."""
_REFUSAL_S = 3.0
"""A server that refuses answers at once. After a longer silence, asking it why would only double the wait."""

# The version decides which columns and settings exist.
_SLOT_QUERY = sql.SQL(
    "SELECT s.plugin, s.database, s.wal_status, s.confirmed_flush_lsn, s.temporary,"
    " pg_catalog.to_jsonb(s) OPERATOR(pg_catalog.->>) 'invalidation_reason',"
    " pg_catalog.to_jsonb(s) OPERATOR(pg_catalog.->>) 'failover', ({absent_standbys})"
    " FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = {slot}"
)
# The reader's command names what it reads. A role sees the commands of its own sessions only.
_READER_QUERY = sql.SQL(
    "SELECT a.query FROM pg_catalog.pg_stat_activity a JOIN pg_catalog.pg_replication_slots s ON s.active_pid = a.pid"
    " WHERE s.slot_name = {} AND pg_catalog.starts_with(a.query, 'START_REPLICATION')"
)
_RECOVERY_QUERY = sql.SQL("SELECT pg_catalog.pg_is_in_recovery()")
_PUBLICATION_QUERY = sql.SQL("SELECT oid FROM pg_catalog.pg_publication WHERE pubname = {}")
# Walsenders are counted in a view whose rows every role sees, if not their content. RDS has a role for the attribute.
_SERVER_QUERY = """
    SELECT current_setting('wal_level'),
           (SELECT rolsuper OR rolreplication FROM pg_catalog.pg_roles WHERE rolname = current_user)
             OR EXISTS (SELECT FROM pg_catalog.pg_roles
                         WHERE rolname = 'rds_replication' AND pg_has_role(current_user, oid, 'member')),
           (SELECT count(*) FROM pg_catalog.pg_stat_replication),
           current_setting('max_wal_senders')::int
"""


class Stopped(Exception):  # noqa: N818 - not an error: stop() was called, and the thread unwinds
    pass


class SocketWait:
    """Every wait of the stream's thread. stop() ends it; rouse() ends one that may be ``roused``.

    ``turned_at``: when the thread last came here, on the monotonic clock. It does so regularly while it is alive.
    """

    def __init__(self) -> None:
        self.turned_at = 0.0
        self._asked = threading.Event()
        self._poll = select.poll()
        self._link: int | None = None
        self._wanted = 0

    def open(self) -> Self:
        """Before the first wait: what is made and never runs holds no socket."""
        self._rouse, self._roused = socket.socketpair()
        self._poll.register(self._roused, select.POLLIN)
        return self

    def stop(self) -> None:
        self._asked.set()
        self.rouse()

    def rouse(self) -> None:
        with contextlib.suppress(OSError):  # the thread has ended, and has closed it
            self._rouse.send(b"\0")

    def until(self, deadline: float, link: int | None = None, *, write: bool = False, roused: bool = False) -> bool:
        """True when ``link`` is readable (or, with ``write``, writable); False at the deadline, and when ``roused``."""
        wanted = select.POLLIN | select.POLLOUT if write else select.POLLIN
        if link != self._link or wanted != self._wanted:
            self._watch(link, wanted)
        while True:
            self.turned_at = now = time.monotonic()
            if self._asked.is_set():
                raise Stopped
            left = deadline - now
            for number, _ in self._poll.poll(max(0.0, min(left, _TURN_S)) * 1000):
                if number == link:
                    return True
                if not self._asked.is_set():
                    self._roused.recv(_ROUSED)
                    left = 0.0 if roused else left
            if left <= 0:
                return False

    def _watch(self, link: int | None, wanted: int) -> None:
        if self._link is not None:
            self._poll.unregister(self._link)
        if link is not None:
            self._poll.register(link, wanted)
        self._link, self._wanted = link, wanted

    def close(self) -> None:
        self._rouse.close()
        self._roused.close()


class ReplicationSession:
    """A replication connection and one slot. Closed at the end of the ``with`` block, whatever its state.

    A refused command leaves it usable, but drops a temporary slot that it has created.
    """

    def __init__(self, connection: psycopg.Connection, waiting: SocketWait, *, slot: str) -> None:
        info = connection.info
        self.names = ErrorContext(slot=slot, plugin="", database=info.dbname, role=info.user)
        self._connection = connection
        self._link = connection.pgconn
        self._link.nonblocking = 1
        self._socket = self._link.socket
        self._waiting = waiting
        self._asking = False
        self._unsent = False
        self._at_end = False
        """The server has ended the stream. Why comes after that, and may have to be waited for."""
        self._over: StreamError | None = None
        self._drained = False
        """libpq holds no whole message."""
        self.idle = False
        """Nothing is to be done before the socket is readable."""
        self.flooded = False
        """A message that took too much memory has ended it; the next session begins after that message."""

    def __enter__(self) -> ReplicationSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._asking:
            # Closing does not end a waiting CREATE_REPLICATION_SLOT: its backend and half-made slot would stay.
            with contextlib.suppress(psycopg.Error):
                self._connection.cancel_safe(timeout=_GOODBYE_LIMIT_S)
        self._connection.close()

    # Commands: before the stream has started

    def look(self) -> FoundSlot | None:
        rows = self._command(
            _SLOT_QUERY.format(slot=sql.Literal(self.names.slot), absent_standbys=sql.SQL(ABSENT_STANDBYS)), Phase.START
        )
        if not rows:
            return None
        plugin, database, wal_status, confirmed, temporary, lost_by, failover, held_by = rows[0]
        return FoundSlot(
            plugin,
            database,
            wal_status,
            Lsn.parse(confirmed) if confirmed else None,
            temporary=temporary == "t",
            lost_by=lost_by or "",
            failover=failover == "true",
            held_by=held_by or "",
        )

    def refuse_a_standby(self) -> None:
        """From 16 on a standby decodes, but it creates a slot only when its primary writes, and cannot mark changes."""
        if self._command(_RECOVERY_QUERY, Phase.START)[0] == ["t"]:
            raise in_recovery(self.names)

    def server_end(self) -> Lsn:
        """The end of the WAL that the server has flushed."""
        _, _, end, _ = self._command(sql.SQL("IDENTIFY_SYSTEM"), Phase.START)[0]
        return Lsn.parse(end or "0/0")

    def publish_nothing(self, publication: str) -> None:
        """Create a publication of that name if it is missing. An existing one may publish rows: they are ignored."""
        self.names = replace(self.names, publication=publication)
        if not self._command(_PUBLICATION_QUERY.format(sql.Literal(publication)), Phase.PUBLISH):
            create = sql.SQL("CREATE PUBLICATION {}").format(sql.Identifier(publication))
            self._command(create, Phase.PUBLISH)

    def create(self, plugin: Plugin, *, temporary: bool, failover: bool = False) -> None:
        self.names = replace(self.names, plugin=plugin.name)
        # Without this option the walsender stays in a transaction that holds back vacuum everywhere.
        create = sql.SQL("CREATE_REPLICATION_SLOT {} {} LOGICAL {} {}")
        kind = sql.SQL("TEMPORARY" if temporary else "")
        snapshot = sql.SQL("(SNAPSHOT 'nothing', FAILOVER true)" if failover else "NOEXPORT_SNAPSHOT")
        names = sql.Identifier(self.names.slot), kind, sql.Identifier(plugin.name), snapshot
        self._command(create.format(*names), Phase.CREATE)

    def end_failover(self) -> None:
        """Turn off failover for the slot; all else of it stays."""
        alter = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER false)")
        self._command(alter.format(sql.Identifier(self.names.slot)), Phase.CREATE)

    def drop(self) -> None:
        drop = sql.SQL("DROP_REPLICATION_SLOT {}")
        self._command(drop.format(sql.Identifier(self.names.slot)), Phase.CREATE)

    def start(self, plugin: Plugin, position: Lsn) -> None:
        """Start at ``position``, or at the confirmed one if that is later.

        ``position`` is one of ``server_end``: a server takes any, but delivers nothing from one ahead of its WAL.
        """
        self.names = replace(self.names, plugin=plugin.name)
        options = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), _option_value(value)) for name, value in plugin.options
        )
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({})")
        try:
            self._command(start.format(sql.Identifier(self.names.slot), sql.SQL(str(position)), options), Phase.START)
        except StreamError as refused:
            if refused.reason == Reason.SLOT_BUSY and self._read_for_others(plugin):
                raise another_outbox(self.names) from None
            raise

    def _read_for_others(self, plugin: Plugin) -> bool:
        """Whether the reader's command names another outbox; False where it is not visible, or is cut off."""
        ours = _option_value(dict(plugin.options)[plugin.outbox]).as_string(self._connection)
        rows = self._command(_READER_QUERY.format(sql.Literal(self.names.slot)), Phase.START)
        return any(query.endswith(")") and ours not in query for [query] in rows if query)

    def _command(self, command: sql.Composable, during: Phase) -> list[list[str | None]]:
        """The rows of the answer. Simple protocol: a replication connection takes no bound parameters."""
        rows: list[list[str | None]] = []
        with self._link_errors():
            self._asking = True
            self._link.send_query(command.as_bytes(self._connection))
            deadline = time.monotonic() + _ANSWER_LIMIT_S
            while (result := self._result(deadline)) is not None and result.status != pq.ExecStatus.COPY_BOTH:
                if result.status == pq.ExecStatus.FATAL_ERROR:
                    self._asking = False
                    refusal = self._refusal(result, during)
                    self._drain(deadline)
                    raise refusal
                rows += _rows(result)
            self._asking = False
        return rows

    def _result(self, deadline: float) -> pq.abc.PGresult | None:
        while (unsent := self._link.flush()) or self._link.is_busy():
            if not self._waiting.until(deadline, self._socket, write=bool(unsent)):
                raise StreamError("the server does not answer", reason=Reason.STALLED.value)
            self._link.consume_input()
        return self._link.get_result()

    def _drain(self, deadline: float) -> None:
        """Read to the end of an answer: the next command must wait for it. A refusal may also end the link."""
        with contextlib.suppress(psycopg.OperationalError):
            while self._result(deadline) is not None:
                pass

    def _refusal(self, result: pq.abc.PGresult, during: Phase) -> StreamError:
        sqlstate = result.error_field(pq.DiagnosticField.SQLSTATE)
        function = result.error_field(pq.DiagnosticField.SOURCE_FUNCTION)
        return classify(_text(sqlstate), _text(function), during, self.names)

    @contextlib.contextmanager
    def _link_errors(self) -> Iterator[None]:
        """Errors raised by libpq carry no SQLSTATE: the link is dead, timed out or cut."""
        try:
            yield
        except psycopg.OperationalError as error:
            raise classify(None, None, Phase.STREAM, self.names) from error

    # The stream: after start()

    def receive(self, most: int) -> list[memoryview]:
        """The messages received, at most ``most``. If the stream has ended after them, the next call raises that.

        It also sends what is left. It does not wait, but after the end of the stream, for the reason. Of a message that
        is too long to be ours only the head is kept (``protocol.head``).
        """
        messages: list[memoryview] = []
        get_copy_data, keep = self._link.get_copy_data, messages.append
        looked_again_at = bytes_ = 0
        self._drained = self.idle = False
        if self._at_end or self._over is not None:
            self._over = self._over or self._why_ended()
            raise self._over
        # Runs once for every few messages: a context manager made of a generator would cost more than all else here.
        try:
            self._link.consume_input()
            if self._unsent:
                self._unsent = self._link.flush() != 0
            for _ in range(most):
                size, data = get_copy_data(1)
                if size > 0:
                    keep(data if size <= LONGEST else head(data))
                    bytes_ += size
                    if bytes_ >= _BYTES_AT_ONCE:
                        if size > _TOO_LONG_TO_KEEP:
                            self.flooded = True
                            self._over = message_too_long(size, self.names)
                        break
                elif size == 0 and len(messages) - looked_again_at >= _MANY:
                    looked_again_at = len(messages)
                    self._link.consume_input()
                else:
                    self._drained = size == 0
                    self._at_end = size < 0
                    self.idle = size == 0 and not self._unsent
                    break
        except psycopg.OperationalError as error:
            self._over = classify(None, None, Phase.STREAM, self.names)
            self._over.__cause__ = error
        return messages

    def watched(self, sockets: Sockets, readable: Callable[[], None], *, begin: bool) -> None:
        """Have ``sockets`` call ``readable``, or end that."""
        (sockets.watch if begin else sockets.unwatch)(self._socket, readable)

    def wait(self, deadline: float, *, elsewhere: bool = False) -> None:
        """Wait until there is more to receive, or the deadline. Raises the error that has ended the stream.

        ``elsewhere``: another thread waits for that. ``SocketWait.rouse`` ends the wait.
        """
        if self._over is not None:
            raise self._over
        if elsewhere:
            self._waiting.until(deadline, roused=True)
        else:
            self._waiting.until(deadline if self._drained else 0.0, self._socket, write=self._unsent)

    def send(self, message: bytes) -> None:
        if self._over is not None:
            raise self._over
        if self._at_end:
            return  # nobody reads it; the next ``receive`` says why
        with self._link_errors():
            self._link.put_copy_data(message)
            self._unsent = self._link.flush() != 0
        self.idle = self.idle and not self._unsent

    def goodbye(self) -> None:
        """End the stream, and briefly await the server's acknowledgement. Unread messages will be sent again."""
        with contextlib.suppress(psycopg.OperationalError):
            self._link.put_copy_end()
            self._link.flush()
            deadline = time.monotonic() + _GOODBYE_LIMIT_S
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            while (size := self._link.get_copy_data(1)[0]) >= 0 and time.monotonic() < deadline:
                if size == 0:
                    poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
                    self._link.consume_input()

    def _why_ended(self) -> StreamError:
        """The server has ended the stream; its error, if any, comes as a separate result."""
        deadline = time.monotonic() + _GOODBYE_LIMIT_S
        try:
            while (result := self._result(deadline)) is not None and result.status != pq.ExecStatus.COPY_BOTH:
                if result.status == pq.ExecStatus.FATAL_ERROR:
                    return self._refusal(result, Phase.STREAM)
        except (psycopg.OperationalError, StreamError):
            return classify(None, None, Phase.STREAM, self.names)
        return server_ended(self.names)


def open_session(
    dsn: Dsn, waiting: SocketWait, *, application_name: str, settings: dict[str, str], slot: str
) -> ReplicationSession:
    """Connect for replication. ``settings`` are the server's, for this connection."""
    began = time.monotonic()
    try:
        connection = connect(
            dsn,
            application_name=application_name,
            session=settings,
            replication="database",
            # Such a connection refuses prepared statements, which psycopg makes by default.
            prepare_threshold=None,
        )
    except ConnectError as error:
        look = _query_server(dsn, application_name) if time.monotonic() - began < _REFUSAL_S else None
        names = ErrorContext(slot=slot, plugin="", database="", role=look[1] if look else "")
        raise classify_connect(look[0] if look else None, str(error), error.hint, names) from None
    except CdcError as error:
        raise StreamError(str(error), reason=Reason.NETWORK.value, hint=error.hint, permanent=True) from None
    return ReplicationSession(connection, waiting, slot=slot)


def _query_server(dsn: Dsn, application_name: str) -> tuple[ServerState, str] | None:
    """The server's state over an ordinary connection, and its role; None where that connection is refused as well."""
    with contextlib.suppress(CdcError, psycopg.Error), connect(dsn, application_name=application_name) as connection:
        row = connection.execute(_SERVER_QUERY).fetchone()
        return (ServerState(*row), connection.info.user) if row else None
    return None


def _option_value(value: str) -> sql.SQL:
    """Not sql.Literal: it writes a backslash as E'', which the grammar of replication commands does not know."""
    return sql.SQL("'" + value.replace("'", "''") + "'")


def _rows(result: pq.abc.PGresult) -> list[list[str | None]]:
    columns = range(result.nfields)
    return [[_text(result.get_value(row, column)) for column in columns] for row in range(result.ntuples)]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")
