"""Reads the replication slot and reports which changes are committed.

It is independent of handlers: it hands over what it reads, and confirms it at once. What comes in small pieces the
event loop reads itself, which saves a thread that wakes up for each of them, and wakes the loop. A thread does all
else: it connects, reads what is too much for one step, and reads and confirms whenever that is due. So a handler that
blocks the event loop cannot starve the keepalives, and hardly ever do the two want the session at the same time.

One attempt: connect (``connection``), prepare a readable slot (``slot_setup``), read until something ends it.
``refusals`` decides what ended it and what to do, ``lsn_tracker`` keeps positions and the clock of status updates,
``reconnect`` the pauses. A failure here costs latency and never a change: the outbox is swept meanwhile.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cdc.core import failpoints
from cdc.core.errors import ProtocolError, StreamError
from cdc.core.lsn import ZERO, Lsn
from cdc.core.model import PLUGINS, WakeUp, message_prefix, publication_name
from cdc.core.reconnect import ReconnectState
from cdc.core.stream_reason import Reason
from cdc.observability.snapshots import StreamStatus
from cdc.postgres.connect import Dsn
from cdc.replication import pgoutput, wal2json
from cdc.replication.batch import MessageBatch
from cdc.replication.connection import ReplicationSession, SocketWait, Stopped, open_session
from cdc.replication.lsn_tracker import LsnTracker, status_interval_s
from cdc.replication.protocol import Plugin, status_update
from cdc.replication.refusals import SlotPolicy, crash_guard, standbys_away
from cdc.replication.slot_setup import OpenedSlot, begin
from cdc.runtime.sockets import Sockets
from cdc.runtime.supervisor import Supervisor

log = logging.getLogger("cdc.stream")

_BATCH = 1000
"""Messages handed over at once, and read between two checks of the clock: a few milliseconds."""
_LOOK_AGAIN_S = 0.1
_LOOK_S = 1.0
"""The thread reads at least this often, whether or not the event loop does."""
_BROKEN_OFF = frozenset({Reason.PROTOCOL, Reason.PUBLICATION_MISSING, Reason.SLOT_LOST, Reason.NETWORK})
"""Ends of a stream that the WAL's content may have caused. NETWORK: a walsender that crashes gives no other reason."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """``wal_sender_timeout_s`` is set on the server for this connection: a frozen consumer keeps the slot that long.

    ``plugins``: names out of ``cdc.core.model.PLUGINS``, the preferred one first.
    """

    dsn: Dsn
    schema: str
    slot: str
    plugins: tuple[str, ...] = PLUGINS
    temporary: bool = False
    create_slot: bool = True
    recreate_slot: bool = True
    wal_sender_timeout_s: float = 15.0
    stall_limit_s: float = 30.0
    lock_timeout_s: float = 5.0
    application_name: str = "cdc: stream"

    @property
    def server_settings(self) -> dict[str, str]:
        """wal2json writes commit times in the session's time zone; UTC has a constant offset."""
        return {
            "wal_sender_timeout": f"{self.wal_sender_timeout_s * 1000:.0f}ms",
            "lock_timeout": f"{self.lock_timeout_s * 1000:.0f}ms",
            "timezone": "UTC",
        }


def plugins(schema: str) -> Mapping[str, Plugin]:
    """All of ``cdc.core.model.PLUGINS``, with wake-ups for the outbox in ``schema``."""
    prefix = message_prefix(schema)
    known = (wal2json.plugin(prefix), pgoutput.plugin(prefix, publication_name(schema)))
    return {plugin.name: plugin for plugin in known}


class StreamEvents(Protocol):
    """Called in the stream's thread or on the event loop, one after the other; must neither block nor raise."""

    def streaming(self) -> None:
        """The stream has started: earlier wake-ups may have been missed."""

    def notified(self, wakeups: Sequence[WakeUp], committed_at: float | None) -> None:
        """These are committed. ``committed_at``: the newest commit time among them, unix seconds, server's clock."""

    def interrupted(self, error: StreamError) -> None:
        """The stream has ended, or an attempt to start it was refused; the stream tries again."""


class Stream:
    """start() once, stop() once; in between it recovers by itself. ``exposed``: the slot must not be read now.

    ``sockets``: of the event loop that reads what comes in small pieces; without one the thread reads everything.
    """

    def __init__(
        self,
        settings: StreamSettings,
        events: StreamEvents,
        supervisor: Supervisor | None = None,
        *,
        exposed: Callable[[], bool] = lambda: False,
        sockets: Sockets | None = None,
    ) -> None:
        self._exposed = exposed
        self._sockets = sockets
        self._supervisor = supervisor or Supervisor()
        self._settings = settings
        self._plugins = plugins(settings.schema)
        self._report = _Report(events)
        self._waiting = SocketWait()
        self._thread = threading.Thread(target=self._run, name="cdc-stream", daemon=True)
        self._attempts = ReconnectState(settings.stall_limit_s)
        self._reached = 0
        self._waits_for_standbys = threading.Event()
        self._from_end = True

    @property
    def status(self) -> StreamStatus:
        return replace(
            self._report.status,
            loop_last_iteration=self._waiting.turned_at,
            stall_limit_s=self._attempts.stall_limit_s,
        )

    def start(self) -> None:
        self._waiting.open()
        self._thread.start()

    def waits_for_standbys(self) -> None:
        """The slot delivers nothing because standbys are away: inspect it again. Callable from any thread."""
        self._waits_for_standbys.set()

    def stop(self, timeout_s: float) -> bool:
        """Confirm, disconnect, end the thread. False if it has not ended in time: connecting cannot be interrupted."""
        if self._thread.ident is None:
            return True
        self._waiting.stop()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause_s = 0.0
        try:
            while True:
                began = time.monotonic()
                try:
                    self._waiting.until(began + pause_s)
                    pause_s = self._round()
                except Stopped:
                    return
                except BaseException as error:  # noqa: BLE001 - the thread survives every error
                    pause_s = self._supervisor.failed("stream", began, error)
        finally:
            self._waiting.close()
            self._report.stopped()

    def _round(self) -> float:
        """Stream once. Returns the seconds to pause."""
        self._waiting.until(0.0)
        while self._exposed():
            self._waiting.until(time.monotonic() + _LOOK_AGAIN_S)
        error = self._attempt()
        self._report.interrupted(error)
        standby = error.reason == Reason.SLOT_BUSY
        return self._attempts.pause_s(random.random(), permanent=error.permanent, standby=standby)  # noqa: S311 - jitter

    def _attempt(self) -> StreamError:
        """Stream until something ends it; returns its cause."""
        reader, began = None, time.monotonic()
        try:
            with self._open() as session:
                opened = begin(session, self._plugins, self._wanted())
                if opened.recreated:  # the new slot starts after the place where earlier streams ended
                    self._attempts = replace(self._attempts, dead_ends=0)
                reader = self._reader(session, opened.plugin)
                self._report.started(self._settings.slot, opened)
                try:
                    reader.read()
                finally:
                    self._from_end = session.flooded
        except StreamError as error:
            ended = error
            self._from_end = self._from_end or error.reason == Reason.CRASH_GUARD
        except ProtocolError as error:
            ended = StreamError(
                str(error), reason=Reason.PROTOCOL.value, hint="it is skipped; a sweep finds the change"
            )
        except Stopped:
            raise
        except BaseException as error:  # noqa: BLE001 - the thread survives every error
            self._supervisor.failed("stream", began, error)
            ended = StreamError(type(error).__name__, reason=Reason.PROTOCOL.value, hint="this is a bug; see the log")
        return self._learn(ended, reader)

    def _open(self) -> ReplicationSession:
        settings = self._settings
        return open_session(
            settings.dsn,
            self._waiting,
            application_name=settings.application_name,
            settings=settings.server_settings,
            slot=settings.slot,
        )

    def _wanted(self) -> SlotPolicy:
        settings = self._settings
        may_recreate = settings.create_slot and settings.recreate_slot
        return SlotPolicy(
            settings.plugins,
            temporary=settings.temporary,
            may_create=settings.create_slot,
            may_recreate=may_recreate,
            # A slot that may not be recreated is still tried: an operator may have fixed what breaks its stream.
            stuck=may_recreate and self._attempts.stuck,
            from_end=self._from_end,
        )

    def _reader(self, session: ReplicationSession, plugin: Plugin) -> _MessageReader:
        return _MessageReader(
            session,
            self._report,
            plugin,
            interval_s=status_interval_s(self._settings.wal_sender_timeout_s),
            stall_limit_s=self._attempts.stall_limit_s,
            waits_for_standbys=self._waits_for_standbys,
            exposed=self._exposed,
            sockets=self._sockets,
            rouse=self._waiting.rouse,
        )

    def _learn(self, ended: StreamError, reader: _MessageReader | None) -> StreamError:
        """The cause of the end; or, if every attempt ends at the same place and the slot may not be recreated, that."""
        received = reader.progress.received if reader else 0
        self._attempts = self._attempts.after(
            stalled=ended.reason == Reason.STALLED,
            advanced=received > self._reached,
            talked_s=reader.talked_s if reader else 0.0,
            broken_off=reader is not None and ended.reason in _BROKEN_OFF,
        )
        self._reached = max(self._reached, received)
        policy = self._wanted()
        if not self._attempts.stuck or policy.may_recreate or reader is None:
            return ended
        return StreamError(
            f"the stream of the slot {self._settings.slot} ends at the same place at every start: {ended}",
            reason=Reason.SLOT_STUCK.value,
            hint=f"nothing is lost with it: cdc slot recreate {self._settings.slot}",
            permanent=True,
        )


class _Report:
    """What the stream reports: its status, its events, its log. Written by one thread at a time."""

    def __init__(self, events: StreamEvents) -> None:
        self._events = events
        self._connected = self._stopped = False
        self._last_byte: float | None = None
        self._messages = self._keepalives = self._bytes = 0
        self._received = 0
        self._confirmed = ZERO
        self._trouble: StreamError | None = None
        self._opened: OpenedSlot | None = None
        self._recreated = 0

    @property
    def status(self) -> StreamStatus:
        """Built at each read: the stream's thread turns far more often than its status is read."""
        trouble = self._trouble
        return StreamStatus(
            connected=self._connected,
            stopped=self._stopped,
            last_byte_monotonic=self._last_byte,
            messages=self._messages,
            keepalives=self._keepalives,
            bytes=self._bytes,
            received_lsn=Lsn(self._received),
            confirmed_lsn=self._confirmed,
            plugin=self._opened.plugin.name if self._opened else None,
            recreated=self._recreated,
            reason=trouble.reason if trouble else None,
            hint=trouble.hint if trouble else None,
        )

    def started(self, slot: str, opened: OpenedSlot) -> None:
        if opened.instead and (self._opened is None or self._opened.plugin is not opened.plugin):
            log.warning("using %s: %s; %s", opened.plugin.name, opened.instead, opened.instead.hint)
        log.info("streaming the slot %s (%s)", slot, opened.plugin.name)
        self._opened = opened
        self._recreated += opened.recreated
        self._connected, self._trouble, self._last_byte = True, None, time.monotonic()
        self._events.streaming()

    def read(self, batch: MessageBatch, received: int, now: float) -> None:
        """Called before anything of the batch is confirmed. ``received``: the highest position of the session."""
        self._last_byte = now
        self._messages += batch.messages
        self._keepalives += batch.keepalives
        self._bytes += batch.bytes
        if received > self._received:
            self._received = received
        if batch.wakeups:
            self._events.notified(batch.wakeups, batch.committed_at)

    def confirmed(self, position: Lsn) -> None:
        self._confirmed = position

    def interrupted(self, error: StreamError) -> None:
        if self._trouble is None or error.reason != self._trouble.reason:
            # Once for each reason, not for each attempt. A standby consumer is no cause for a warning.
            level = logging.INFO if error.reason in (Reason.SLOT_BUSY, Reason.CRASH_GUARD) else logging.WARNING
            log.log(level, "not streaming (%s): %s; %s", error.reason, error, error.hint or "it is tried again")
        self._connected, self._trouble = False, error
        self._events.interrupted(error)

    def stopped(self) -> None:
        log.info("the stream has stopped")
        self._connected, self._stopped = False, True


class _MessageReader:
    """One session, from START to its end. ``rouse`` ends the thread's wait while the event loop reads."""

    def __init__(
        self,
        session: ReplicationSession,
        report: _Report,
        plugin: Plugin,
        *,
        interval_s: float,
        stall_limit_s: float,
        waits_for_standbys: threading.Event,
        exposed: Callable[[], bool],
        sockets: Sockets | None,
        rouse: Callable[[], None],
    ) -> None:
        waits_for_standbys.clear()
        self._exposed = exposed
        self._waits_for_standbys = waits_for_standbys
        self._session = session
        self._report = report
        self._plugin = plugin
        self._stall_limit_s = stall_limit_s
        self._sockets = sockets
        self._rouse = rouse
        self._reading = threading.Lock()
        self._ended: BaseException | None = None
        """What has ended the stream."""
        self._lent = False
        """To the event loop, which reads what comes."""
        self._began = self._last_byte = time.monotonic()
        self.progress = LsnTracker(interval_s=interval_s, now=self._began)

    @property
    def talked_s(self) -> float:
        return self._last_byte - self._began

    def read(self) -> None:
        """Read until stop() (Stopped), or until something ends the stream (StreamError, ProtocolError).

        In the stream's thread. It also reads when the event loop should have: that may be blocked.
        """
        try:
            while True:
                with self._reading:
                    if self._ended is not None:
                        raise self._ended
                    deadline = self._bear_until(self._step())
                    if self._sockets is not None:
                        self._lend(self._sockets, to_loop=self._session.idle)
                self._session.wait(min(deadline, time.monotonic() + _LOOK_S), elsewhere=self._lent)
        except (Stopped, ProtocolError):
            self._take_back()
            self._confirm(time.monotonic())
            self._session.goodbye()
            raise
        finally:
            self._take_back()

    def _take_back(self) -> None:
        """The event loop does not read any more."""
        with self._reading:
            self._ended = self._ended or Stopped()
            if self._sockets is not None:
                self._lend(self._sockets, to_loop=False)

    def _lend(self, sockets: Sockets, *, to_loop: bool) -> None:
        if self._lent is not to_loop:
            self._lent = to_loop
            self._session.watched(sockets, self._readable, begin=to_loop)

    def _readable(self) -> None:
        """On the event loop. What ends the stream is raised in the thread, which also goes on where more has come."""
        if not self._reading.acquire(blocking=False):
            return  # the thread reads; if that leaves anything, this is called again
        try:
            if self._ended is not None:
                return
            try:
                self._step()
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread
                self._ended = error
            if self._ended is not None or not self._session.idle:
                assert self._sockets is not None
                self._lend(self._sockets, to_loop=False)
                self._rouse()
        finally:
            self._reading.release()

    def _step(self) -> float:
        """Read what has come, and confirm it if that is due. Returns the time."""
        received = self._session.receive(_BATCH)
        now = time.monotonic()
        if received:
            self._last_byte = now
            batch = MessageBatch()
            try:
                batch.read(received, self._plugin)
            finally:
                # Also counts the messages read before one that cannot be decoded.
                self.progress.receive(batch.highest, reply_requested=batch.reply_requested)
                self._report.read(batch, self.progress.received, now)
        if self._waits_for_standbys.is_set():
            raise standbys_away(self._session.names)
        if self._exposed():
            raise crash_guard(self._session.names)
        if now >= self.progress.next_status_at:
            self._confirm(now)
        return now

    def _confirm(self, now: float) -> None:
        failpoints.here("stream.before_confirm")
        confirmed = self.progress.confirm(now)
        self._session.send(status_update(confirmed, unix_s=time.time(), ping=True))
        failpoints.here("stream.after_confirm")
        self._report.confirmed(confirmed)

    def _bear_until(self, now: float) -> float:
        given_up_at = self._last_byte + self._stall_limit_s
        if now >= given_up_at:
            raise StreamError(
                f"the server has sent nothing for {self._stall_limit_s:.0f} s, though each status update asks it to",
                reason=Reason.STALLED.value,
                hint="a dead link, or a server decoding a huge transaction; it is tried again with a longer limit",
            )
        return min(given_up_at, self.progress.next_status_at)
