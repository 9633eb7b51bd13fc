"""Reads figures from the database for metrics and page, on a connection and a thread of its own, every few seconds.

Never inside a scrape: the scrape interval must not decide how often the database is queried, and a slow database must
not make the consumer look dead. Each reading has a time limit, and figures that cannot be read are removed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import psycopg

from cdc.core.errors import CdcError
from cdc.core.model import ChangeState
from cdc.core.pauses import Pauses
from cdc.core.type_filter import TypeFilter
from cdc.diagnostics.status import Outbox, Readings, SlotReading, summarize
from cdc.observability.largest_types import LargestTypes
from cdc.observability.snapshots import (
    OutboxStatus,
    PollerStatus,
    SlotStatus,
    SubscriptionsStatus,
    SubscriptionStatus,
    TypeStatus,
)
from cdc.postgres.admin import OutboxAdmin, TypeStats
from cdc.postgres.connect import Dsn, connect
from cdc.postgres.due import DueChanges
from cdc.postgres.loaders import read_anything
from cdc.postgres.outbox import Store
from cdc.postgres.pages import Figures
from cdc.postgres.subscriptions import SubscriptionProgress
from cdc.replication import slots
from cdc.replication.slot_health import SlotReport, assess
from cdc.runtime.supervisor import Supervisor

log = logging.getLogger("cdc.stats_poller")

_EVERY_S = 15.0
_RESTS_MAX_S = 300.0
"""Between two readings of figures of who has nothing to do."""
_STATEMENT_TIMEOUT = "5s"
_ANSWER_LIMIT_S = 10.0
_WAITING_POLLS_MAX = 4
"""While a slot waits for standbys, which may be back in a moment."""
_REPORTED_MAX = 1_000
"""Types that were warned of: they come from the data."""
_SUBSCRIPTIONS_MAX = 100
"""Subscriptions that figures are shown of, each a value of a label: those that are the furthest behind."""
_REST = 50
"""Figures of types, what else the page shows, and those of subscriptions are read again after so many times as long as
they took: at most 2 % of a connection each."""


class StatsPoller:
    """Call ``start`` once and ``stop`` once. ``slot``: None if no slot is used or read.

    ``pauses``: what is paused now, and ``oldest_ready_age_s`` reads how old the oldest of the rest is.
    ``asked``: the types that the settings name, if the handlers handle fewer of them.
    ``types``: reads the figures of each entity type, and what else the page shows. ``subscriptions``: reads the figures
    of those that this consumer tells of. ``standbys_away``: called when the slot has sent nothing for about a minute,
    because it is one for failover and standbys are away. ``state``: the same while nothing changes, which spares the
    figures of who has nothing to do, for a time; None: it may change.
    """

    def __init__(
        self,
        dsn: Dsn,
        *,
        store: Store,
        due: DueChanges,
        pauses: Callable[[], Pauses] = Pauses,
        oldest_ready_age_s: Callable[[psycopg.Connection, Pauses], float] = lambda _, __: 0.0,
        slot: str | None,
        asked: TypeFilter | None = None,
        types: OutboxAdmin | None = None,
        subscriptions: Callable[[psycopg.Connection], list[SubscriptionProgress] | None] | None = None,
        standbys_away: Callable[[], None] = lambda: None,
        state: Callable[[], object] = lambda: None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor or Supervisor()
        self._session = _Session(dsn, store.session)
        self._due_later = due
        self._figures = _Figures(store, pauses, oldest_ready_age_s)
        self._unhandled = _UnhandledTypes(store, asked) if asked is not None else None
        self._slot = _WatchedSlot(slot, standbys_away) if slot is not None else None
        self._types = _WatchedTypes(types, due) if types else None
        self._subscriptions = _WatchedSubscriptions(subscriptions) if subscriptions else None
        self.rest = _Idleness(state)
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._kept, name="cdc-collector", daemon=True)
        self._failing: set[str] = set()
        # Replaced whole by this thread, read by any.
        self.status = PollerStatus()
        self.readings = Readings()

    def start(self) -> None:
        self._thread.start()

    def poll_now(self, *, everything: bool = False) -> None:
        """Poll at once, as something has changed; from any thread. ``everything``: also what is read less often."""
        self.rest.end()
        if everything:
            if self._types is not None:
                self._types.next_at = 0.0
            if self._subscriptions is not None:
                self._subscriptions.next_at = 0.0
        self._due.set()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        self._due.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _kept(self) -> None:
        try:
            self._supervisor.keep_here("collector", self._run, self._stopping)
        finally:
            self._session.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.status = replace(self.status, last_iteration_at=time.monotonic())
            self._due.clear()
            if self.rest.goes_on(self.status.outbox):
                self._due.wait(_EVERY_S)
                continue
            self._collect("outbox", self._outbox, partial(self._show_outbox, None))
            if self._slot is not None:
                self._collect("slot", self._read_slot, partial(self._show_slot, None))
            if self._subscriptions is not None and time.monotonic() >= self._subscriptions.next_at:
                self._collect("subscriptions", self._read_subscriptions, partial(self._show_subscriptions, None))
            if self._types is not None and time.monotonic() >= self._types.next_at:
                self._collect("entity types", self._read_types, partial(self._show_types, None))
            self._due.wait(_EVERY_S)

    def _collect(self, name: str, read: Callable[[psycopg.Connection], None], forget: Callable[[], None]) -> None:
        try:
            read(self._session.open())
            self._failing.discard(name)
        except (CdcError, psycopg.Error, OSError) as error:
            forget()
            if name not in self._failing:
                log.warning("no figures of the %s: %s", name, type(error).__name__)
            self._failing.add(name)
            if isinstance(error, psycopg.OperationalError):
                self._session.close()

    def _outbox(self, connection: psycopg.Connection) -> None:
        figures = self._figures.read(connection)
        due_later = self._due_later.count(connection)
        self._show_outbox(
            OutboxStatus(
                changes={
                    ChangeState.FRESH: figures.fresh,
                    ChangeState.WAITING: figures.waiting,
                    ChangeState.DEAD: figures.dead,
                },
                oldest_ready_age_s=figures.oldest_ready_age_s,
                table_bytes=figures.table_bytes,
                dead_tuples=figures.dead_tuples,
                blocked_keys=figures.blocked_keys,
                notify_queue_usage=figures.notify_queue_usage,
                truncate_age_s=figures.truncate_age_s,
                dead_age_s=figures.dead_age_s,
                unhandled=self._unhandled.count(connection) if self._unhandled else 0,
                due_later=due_later.count if due_later else None,
            )
        )

    def _show_outbox(self, outbox: OutboxStatus | None) -> None:
        success = {**self.status.success, "outbox": outbox is not None}
        self.status = replace(self.status, outbox=outbox, success=success)

    def _read_slot(self, connection: psycopg.Connection) -> None:
        assert self._slot
        self._show_slot(self._slot.read(connection, self.readings.slot))

    def _show_slot(self, reading: SlotReading | None) -> None:
        assert self._slot
        slot = _slot_status(reading.slot) if reading else None
        success = {**self.status.success, "slot": slot is not None}
        self.status = replace(self.status, slot=slot, slot_waits_for_standbys=self._slot.waits, success=success)
        self.readings = replace(self.readings, slot=reading)

    def _read_subscriptions(self, connection: psycopg.Connection) -> None:
        assert self._subscriptions
        found = self._subscriptions.read(connection)
        if found is None:  # not to be seen by this role, which is no failure
            self.status = replace(self.status, subscriptions=None)
        else:
            self._show_subscriptions(found)

    def _show_subscriptions(self, subscriptions: SubscriptionsStatus | None) -> None:
        success = {**self.status.success, "subscriptions": subscriptions is not None}
        self.status = replace(self.status, subscriptions=subscriptions, success=success)

    def _read_types(self, connection: psycopg.Connection) -> None:
        assert self._types
        self._show_types(self._types.read(connection))

    def _show_types(self, outbox: Outbox | None) -> None:
        assert self._types
        self.status = replace(self.status, types=self._types.shown(outbox) if outbox else ())
        self.readings = replace(self.readings, outbox=(time.monotonic(), outbox) if outbox else None)


class _Idleness:
    """While nothing is read, since nothing is fresh, nothing waits, and the state is as it was."""

    def __init__(self, state: Callable[[], object]) -> None:
        self._state = state
        self._then: object = None
        self._until = 0.0
        self.on = False
        """From any thread."""

    def end(self) -> None:
        self._until = 0.0

    def goes_on(self, outbox: OutboxStatus | None) -> bool:
        """``outbox``: as it was read last. Not: it is read now."""
        state, now = self._state(), time.monotonic()
        idle = outbox is not None and not (outbox.changes[ChangeState.FRESH] or outbox.changes[ChangeState.WAITING])
        self.on = idle and state is not None and state == self._then and now < self._until
        if not self.on:
            self._then, self._until = state, now + _RESTS_MAX_S
        return self.on


class _Session:
    """The connection, made when it is needed."""

    def __init__(self, dsn: Dsn, settings: Mapping[str, str]) -> None:
        self._dsn = dsn
        self._settings = settings
        self._connection: psycopg.Connection | None = None

    def open(self) -> psycopg.Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(
                self._dsn,
                application_name="cdc: collector",
                session={**self._settings, "statement_timeout": _STATEMENT_TIMEOUT},
                answer_limit_s=_ANSWER_LIMIT_S,
            )
            read_anything(self._connection)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
        self._connection = None


class _Figures:
    """Those of the store. But what is paused could not run: it is no backlog."""

    def __init__(
        self,
        store: Store,
        pauses: Callable[[], Pauses],
        oldest_ready_age_s: Callable[[psycopg.Connection, Pauses], float],
    ) -> None:
        self._store = store
        self._pauses = pauses
        self._oldest_ready_age_s = oldest_ready_age_s

    def read(self, connection: psycopg.Connection) -> Figures:
        figures = self._store.figures(connection)
        if not (pauses := self._pauses()):
            return figures
        return replace(figures, oldest_ready_age_s=self._oldest_ready_age_s(connection, pauses))


class _UnhandledTypes:
    """Types that the settings name, and that no handler handles."""

    def __init__(self, store: Store, asked: TypeFilter) -> None:
        self._store = store
        self._asked = asked
        self._reported: set[str] = set()

    def count(self, connection: psycopg.Connection) -> int:
        """How many fresh changes are of such types. Each type is logged once."""
        unhandled = {name: count for name, count in self._store.outside(connection).items() if self._asked.has(name)}
        for name in list(unhandled.keys() - self._reported)[: max(0, _REPORTED_MAX - len(self._reported))]:
            self._reported.add(name)
            log.warning(
                "changes of the type %s wait, and no handler here wants them: write one, router.ignore(%r) to discard"
                " them, or --except to say that another consumer handles them", name, name,
            )  # fmt: skip
        return sum(unhandled.values())


class _WatchedSlot:
    """``standbys_away``: called once each time that the slot waits for them for too long."""

    def __init__(self, name: str, standbys_away: Callable[[], None]) -> None:
        self._name = name
        self._standbys_away = standbys_away
        self._waiting_polls = 0

    @property
    def waits(self) -> bool:
        return self._waiting_polls >= _WAITING_POLLS_MAX

    def read(self, connection: psycopg.Connection, before: SlotReading | None) -> SlotReading:
        found = slots.snapshot(connection, self._name)
        self._waiting_polls = self._waiting_polls + 1 if found and found.waits_for_standbys else 0
        if found and self._waiting_polls == _WAITING_POLLS_MAX:
            health = assess(found)
            log.warning("the slot %s is %s; %s", found.name, health.sentence, health.remedy)
            self._standbys_away()
        return SlotReading(time.monotonic(), self._name, found, before.slot if before else None)


def _slot_status(slot: SlotReport | None) -> SlotStatus:
    if slot is None:
        return SlotStatus(present=False)
    return SlotStatus(
        present=True,
        active=slot.active,
        wal_status=slot.wal_status,
        retained_wal_bytes=slot.retained_wal_bytes,
        confirmed_lag_bytes=slot.confirmed_lag_bytes,
        safe_wal_bytes=slot.safe_wal_bytes,
        catalog_xmin_age=slot.catalog_xmin_age,
        spilled_bytes=slot.spilled_bytes,
    )


class _WatchedTypes:
    """``next_at``: when they are to be read again."""

    def __init__(self, admin: OutboxAdmin, due: DueChanges) -> None:
        self._admin = admin
        self._due = due
        self._largest = LargestTypes()
        self.next_at = 0.0

    def read(self, connection: psycopg.Connection) -> Outbox:
        began = time.monotonic()
        try:
            return summarize(connection, self._admin, self._due)
        finally:
            self.next_at = time.monotonic() + _REST * (time.monotonic() - began)

    def shown(self, outbox: Outbox) -> tuple[TypeStatus, ...]:
        """Those that are values of a label."""
        return self._largest.of(map(_type_status, outbox.stats.types))


def _type_status(each: TypeStats) -> TypeStatus:
    counts = {ChangeState.FRESH: each.fresh, ChangeState.WAITING: each.waiting, ChangeState.DEAD: each.dead}
    return TypeStatus(each.entity_type, counts, each.oldest_ready_age_s or 0.0)


class _WatchedSubscriptions:
    """``next_at``: when they are to be read again."""

    def __init__(self, read: Callable[[psycopg.Connection], list[SubscriptionProgress] | None]) -> None:
        self._read = read
        self.next_at = 0.0

    def read(self, connection: psycopg.Connection) -> SubscriptionsStatus | None:
        """None: this role may not see them."""
        began = time.monotonic()
        try:
            found = self._read(connection)
        finally:
            self.next_at = time.monotonic() + _REST * (time.monotonic() - began)
        return None if found is None else _subscriptions_status(found)


def _subscriptions_status(found: Sequence[SubscriptionProgress]) -> SubscriptionsStatus:
    furthest = sorted(found, key=lambda each: (each.held_back, each.behind, each.dead), reverse=True)
    return SubscriptionsStatus(
        count=len(found),
        known=tuple(
            SubscriptionStatus(
                name=each.subscription.name,
                changes={
                    ChangeState.FRESH: each.behind,
                    ChangeState.WAITING: each.waiting,
                    ChangeState.DEAD: each.dead,
                },
                oldest_age_s=each.oldest_age_s or 0.0,
                held_back=each.held_back,
                paused=each.paused is not None,
                consumers=each.consumers,
            )
            for each in furthest[:_SUBSCRIPTIONS_MAX]
        ),
    )
