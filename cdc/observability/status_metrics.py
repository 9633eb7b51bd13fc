"""Metrics that are taken from snapshots, at each scrape: states; the events are in ``metrics``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cdc.core.circuit_breaker import BreakerState
from cdc.core.model import SHARDS, ChangeState
from cdc.observability.metrics import UNAVAILABLE
from cdc.observability.snapshots import (
    ConsumerStatus,
    OutboxStatus,
    PollerStatus,
    ProcessStatus,
    Role,
    StreamStatus,
    SubscriptionsStatus,
    TypeStatus,
)

OUTBOX_STATES = (ChangeState.FRESH, ChangeState.WAITING, ChangeState.DEAD)
PAUSE_SCOPES = ("everything", "type", "handler", "key")
WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")

_Family = GaugeMetricFamily | CounterMetricFamily
_Sample = tuple[str, tuple[str, ...], float | None]
"""Name, label values, value; None: it has no value at present."""


def _gauge(name: str, text: str, *labels: str) -> Callable[[], _Family]:
    return partial(GaugeMetricFamily, name, text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> Callable[[], _Family]:
    return partial(CounterMetricFamily, name, text, labels=labels)  # the client appends _total


_FAMILIES = (
    _gauge(
        "cdc_role",
        "1 for the role of this consumer: streaming reads the slot, standby is woken by the one that does,"
        " sweeping reads the table at intervals as nobody streams, observing is shadow mode.",
        "role",
    ),
    _gauge(
        "cdc_loop_last_iteration_timestamp_seconds",
        "When each loop of this process last began an iteration, in seconds of the epoch. Older than 2"
        " minutes: the loop is stuck, mostly in an async handler that blocks.",
        "loop",
    ),
    _gauge(
        "cdc_collector_success",
        "1 if the last reading of these figures from the database worked, 0 if not. At 0 the metrics of"
        " that name are missing; the log says why.",
        "collector",
    ),
    _gauge(
        "cdc_stream_connected",
        "1 while this process reads the slot. One consumer of a slot does; with 0 everywhere, changes are"
        " found by sweeping.",
        "slot",
    ),
    _gauge(
        "cdc_stream_unavailable",
        "Why this process does not read the slot; 1 for the reason that holds. Reasons other than disabled,"
        " slot_busy and network do not end by themselves: see cdc doctor.",
        "reason",
    ),
    _gauge(
        "cdc_stream_last_byte_timestamp_seconds",
        "When the server last sent a byte on the replication connection, keepalives included, in seconds of"
        " the epoch. While connected, more than 90 s ago is a dead link.",
        "slot",
    ),
    _counter(
        "cdc_stream_messages",
        "Messages read from the replication connection: changes of the outbox, and keepalives.",
        "slot",
        "kind",
    ),
    _counter("cdc_stream_received_bytes", "Bytes read from the replication connection.", "slot"),
    _counter(
        "cdc_stream_slot_recreations",
        "Replication slots that this process has created again, because the old one was lost or could not be"
        " read. It costs latency, and no change.",
        "slot",
    ),
    _gauge(
        "cdc_wakeup_queue_length",
        "Numbers of changes that were announced and wait to be read from the table, in this process.",
    ),
    _gauge(
        "cdc_window_changes",
        "Changes in the memory of this process: running in a handler, queued for one, or settling, which is"
        " waiting to be marked.",
        "state",
    ),
    _gauge(
        "cdc_window_capacity",
        "Changes that the memory of this process may hold (the setting window). Whatever is beyond it waits"
        " in the table.",
    ),
    _gauge(
        "cdc_window_throttled_types",
        "Entity types that have a backlog and as much of this process's memory as one type may take, so"
        " that others have room.",
    ),
    _gauge(
        "cdc_paused",
        "Pauses in force, by what they are about: everything, a type, a handler or a key. cdc controls says"
        " whose and why; cdc resume ends them.",
        "scope",
        "name",
    ),
    _gauge(
        "cdc_limit_leased",
        "What this consumer has leased of a handler's limit over all consumers: permits, each for one call,"
        " and slots, each for one call that runs.",
        "handler",
        "what",
    ),
    _gauge(
        "cdc_limit_put_off_keys",
        "Keys whose next change waits in the table because its handler is at its limit, as far as this"
        " consumer has read.",
        "handler",
    ),
    _gauge(
        "cdc_limit_waiting_seconds",
        "For how long a handler, or a key of its limit, has had work and made no call because of its limit."
        " cdc limits list says what it is.",
        "handler",
    ),
    _gauge(
        "cdc_pause_age_seconds",
        "Age of the oldest pause that has no end; 0 if there is none. cdc controls says whose it is; cdc"
        " resume ends it.",
    ),
    _gauge("cdc_shards", "Shards of the outbox, into which keys are divided: 64; 0 in shadow mode, which owns none."),
    _gauge(
        "cdc_shards_owned",
        "Shards that this consumer owns, and whose changes it handles. Over all consumers of a database the"
        " sum is cdc_shards; fewer wait for an owner.",
    ),
    _gauge("cdc_members", "Consumers that are alive and share the shards, as this one counts them in the database."),
    _gauge(
        "cdc_transaction_connections",
        "Connections of this process to the database for handlers that write in a transaction, by kind of"
        " handler, busy or idle.",
        "kind",
        "state",
    ),
    _gauge(
        "cdc_transaction_waiting",
        "Transactional handlers that wait for a connection to the database. More than 0 for long: raise the"
        " setting transactions.",
        "kind",
    ),
    _gauge(
        "cdc_handler_breaker",
        "State of a handler's circuit breaker; 1 for the state it is in. open: what the handler needs is"
        " away, so it rests; half_open: one call tries whether it is back.",
        "handler",
        "state",
    ),
    _gauge("cdc_slot_present", "1 if the replication slot exists on the server.", "slot"),
    _gauge("cdc_slot_active", "1 if a session reads the replication slot, of whatever consumer.", "slot"),
    _gauge(
        "cdc_slot_wal_status",
        "Whether the server still has the WAL that the replication slot needs; 1 for the state it is in."
        " unreserved: about to be lost; lost: create it again.",
        "slot",
        "wal_status",
    ),
    _gauge(
        "cdc_slot_retained_wal_bytes",
        "WAL that the server keeps on its disk for the replication slot. It grows while nobody reads the"
        " slot, or a write transaction stays open.",
        "slot",
    ),
    _gauge(
        "cdc_slot_confirmed_lag_bytes",
        "WAL written since the position that the reader of the replication slot has confirmed.",
        "slot",
    ),
    _gauge(
        "cdc_slot_safe_wal_bytes",
        "WAL that may still be written before the server drops what the replication slot needs"
        " (max_slot_wal_keep_size).",
        "slot",
    ),
    _gauge(
        "cdc_slot_catalog_xmin_age_transactions",
        "How many transactions ago the replication slot began to hold back vacuum of the system catalogs.",
        "slot",
    ),
    _counter(
        "cdc_slot_spilled_bytes",
        "Bytes of large transactions that the server has written to disk while decoding for the replication"
        " slot: above logical_decoding_work_mem.",
        "slot",
    ),
    _gauge(
        "cdc_outbox_changes",
        "Changes in entity_changes that are not processed: fresh, not tried yet; waiting for their next"
        " attempt; dead, for an operator's decision. Counts end at 10001, which means more.",
        "state",
    ),
    _gauge(
        "cdc_outbox_type_changes",
        "As cdc_outbox_changes, by entity type: the 20 with the most by name, the sum of the others as"
        " other. Counts end at 200 fresh changes a shard, 10000 of each other state.",
        "entity_type",
        "state",
    ),
    _gauge(
        "cdc_outbox_type_oldest_ready_age_seconds",
        "Age of the oldest change of an entity type that could run now, also of one that is paused; 0 if there is none."
        " The types are those of cdc_outbox_type_changes.",
        "entity_type",
    ),
    _gauge(
        "cdc_outbox_oldest_ready_age_seconds",
        "Age of the oldest change in entity_changes that could run now and does not; 0 if there is none."
        " Not among them: what is paused, or waits behind another.",
    ),
    _gauge(
        "cdc_outbox_truncate_age_seconds",
        "For how long a captured TRUNCATE or change of columns has held back later changes of its type; 0"
        " if none does. cdc doctor says what it waits for.",
    ),
    _gauge(
        "cdc_outbox_dead_age_seconds",
        "For how long the oldest dead letter has waited for a decision, cdc outbox retry or discard; 0 if"
        " there is none.",
    ),
    _gauge("cdc_outbox_table_bytes", "Size of the table entity_changes on disk, with its indexes and TOAST."),
    _gauge(
        "cdc_outbox_dead_tuples",
        "Row versions in entity_changes that vacuum has not removed yet, as the server estimates. Rising"
        " for hours: something holds vacuum back.",
    ),
    _gauge(
        "cdc_outbox_blocked_keys",
        "Keys whose later changes wait behind one that waits for its next attempt, or behind a dead letter"
        " that pauses its key. Counts end at 10001.",
    ),
    _gauge(
        "cdc_outbox_unhandled_changes",
        "Fresh changes of types that no handler of this consumer wants, so that they stay. Write a handler,"
        " router.ignore() the type, or leave it to another consumer.",
    ),
    _gauge(
        "cdc_outbox_due_later_changes",
        "Events published for a later time, which are no changes yet. Counts end at 10001.",
    ),
    _gauge("cdc_subscriptions", "Subscriptions of the outbox beside the default one."),
    _gauge(
        "cdc_subscription_changes",
        "Changes that a subscription has not done: fresh, not tried yet in it; waiting for their next"
        " attempt; dead. Counts end at a bound, so there may be more.",
        "subscription",
        "state",
    ),
    _gauge(
        "cdc_subscription_oldest_age_seconds",
        "Age of the oldest fresh change of a subscription; 0 if there is none.",
        "subscription",
    ),
    _gauge(
        "cdc_subscription_held_back_changes",
        "Processed changes that retention may not remove yet, because this subscription has not done them."
        " Counts end at a bound.",
        "subscription",
    ),
    _gauge(
        "cdc_subscription_paused",
        "1 while the whole subscription is paused: cdc resume --subscription NAME ends it.",
        "subscription",
    ),
    _gauge(
        "cdc_subscription_consumers",
        "Live consumers of a subscription. At 0 its changes wait, and retention keeps them.",
        "subscription",
    ),
    _gauge(
        "cdc_notify_queue_usage_ratio",
        "How full the server's queue of notifications is, from 0 to 1. When it is full, commits that notify"
        " fail; a session that listens in an open transaction fills it.",
    ),
)
_DELIVERY = _gauge(
    "cdc_delivery_up",
    "1 while the application or the broker that changes are delivered to is there, 0 while changes wait for it.",
)


class StatusMetrics(Collector):
    """``slot``: the configured name. ``read`` is called at each scrape, in its thread.

    ``delivery``: the handler that delivers over HTTP; without one there is no metric of it. ``names``: the types and
    handlers that the program declares; others are paused under the name "other", as anybody may type any name.
    """

    def __init__(
        self,
        slot: str,
        read: Callable[[], ProcessStatus],
        *,
        delivery: str | None = None,
        names: Collection[str] = (),
    ) -> None:
        self._slot = slot
        self._read = read
        self._delivery = delivery
        self._names = names
        self._families = _FAMILIES if delivery is None else (*_FAMILIES, _DELIVERY)

    def describe(self) -> list[_Family]:
        return [family() for family in self._families]

    def collect(self) -> Iterable[Metric]:
        families = {family.name: family for family in self.describe()}
        for name, labels, value in self._samples(self._read()):
            if value is not None:
                families[name].add_metric(labels, value)
        return families.values()

    def _samples(self, status: ProcessStatus) -> Iterator[_Sample]:
        # A wall clock may be set at any time, so the loops use the monotonic one.
        epoch_s = time.time() - time.monotonic()
        yield from _states("cdc_role", Role, status.role)
        yield from _states("cdc_stream_unavailable", UNAVAILABLE, status.not_streaming)
        yield from _of_loops(status, epoch_s)
        yield from _of_stream(self._slot, status.stream or StreamStatus(), epoch_s)
        yield from _of_consumer(status.consumer)
        yield from _of_pauses(status.consumer, self._names, time.monotonic())
        yield from _of_limits(status.consumer)
        yield from _of_handlers(status)
        yield from _of_slot(self._slot, status.poller)
        if status.poller.outbox:
            yield from _of_outbox(status.poller.outbox)
        yield from _of_types(status.poller.types)
        if status.poller.subscriptions:
            yield from _of_subscriptions(status.poller.subscriptions)
        if self._delivery is not None:
            breaker = status.breakers.get(self._delivery)
            yield "cdc_delivery_up", (), not (breaker and breaker.rests)


def _states(name: str, states: Iterable[str], current: str | None, *labels: str) -> Iterator[_Sample]:
    for state in states:
        yield name, (*labels, state), state == current


def _of_loops(status: ProcessStatus, epoch_s: float) -> Iterator[_Sample]:
    last_iteration: dict[str, float | None] = dict(status.consumer.last_iteration)
    last_iteration["stream"] = status.stream.loop_last_iteration or None if status.stream else None
    last_iteration["collector"] = status.poller.last_iteration_at
    for loop, at in last_iteration.items():
        yield "cdc_loop_last_iteration_timestamp_seconds", (loop,), None if at is None else at + epoch_s
    for reading, success in status.poller.success.items():
        yield "cdc_collector_success", (reading,), success


def _of_stream(slot: str, stream: StreamStatus, epoch_s: float) -> Iterator[_Sample]:
    last_byte = stream.last_byte_monotonic
    yield "cdc_stream_connected", (slot,), stream.connected
    yield "cdc_stream_last_byte_timestamp_seconds", (slot,), None if last_byte is None else last_byte + epoch_s
    yield "cdc_stream_messages", (slot, "change"), stream.messages
    yield "cdc_stream_messages", (slot, "keepalive"), stream.keepalives
    yield "cdc_stream_received_bytes", (slot,), stream.bytes
    yield "cdc_stream_slot_recreations", (slot,), stream.recreated


def _of_consumer(consumer: ConsumerStatus) -> Iterator[_Sample]:
    yield "cdc_wakeup_queue_length", (), consumer.waiting_wakeups
    yield "cdc_window_changes", ("running",), consumer.running
    yield "cdc_window_changes", ("queued",), consumer.queued
    yield "cdc_window_changes", ("settling",), consumer.settling
    yield "cdc_window_capacity", (), consumer.window
    yield "cdc_window_throttled_types", (), consumer.throttled_types
    yield "cdc_shards", (), 0 if consumer.observing else SHARDS
    yield "cdc_shards_owned", (), consumer.owned_shards
    yield "cdc_members", (), consumer.members


def _of_pauses(consumer: ConsumerStatus, names: Collection[str], now: float) -> Iterator[_Sample]:
    """All scopes, so that an alert sees a pause begin and end; a key only under its type."""
    counts = Counter[tuple[str, ...]]({(scope, ""): 0 for scope in PAUSE_SCOPES})
    for pause in consumer.pauses:
        name = (pause.handler if pause.scope == "handler" else pause.entity_type) or ""
        counts[pause.scope, name if not name or name in names else "other"] += 1
    for labels, count in counts.items():
        yield "cdc_paused", labels, count
    endless = (pause.age_s for pause in consumer.pauses if pause.ends_in_s is None)
    oldest_s = max(endless, default=None)
    yield "cdc_pause_age_seconds", (), 0.0 if oldest_s is None else oldest_s + now - consumer.pauses_read_at


def _of_limits(consumer: ConsumerStatus) -> Iterator[_Sample]:
    for handler, limit in sorted(consumer.limits.items()):
        yield "cdc_limit_leased", (handler, "permits"), limit.permits
        yield "cdc_limit_leased", (handler, "slots"), limit.slots
        yield "cdc_limit_put_off_keys", (handler,), limit.put_off
        yield "cdc_limit_waiting_seconds", (handler,), limit.waits_s


def _of_handlers(status: ProcessStatus) -> Iterator[_Sample]:
    for kind, pool in status.pools.items():
        yield "cdc_transaction_connections", (kind, "busy"), pool.busy
        yield "cdc_transaction_connections", (kind, "idle"), pool.idle
        yield "cdc_transaction_waiting", (kind,), pool.waiting
    for handler, breaker in sorted(status.breakers.items()):
        yield from _states("cdc_handler_breaker", BreakerState, breaker.state, handler)


def _of_slot(name: str, poller: PollerStatus) -> Iterator[_Sample]:
    slot = poller.slot
    if slot is None:
        return
    yield "cdc_slot_present", (name,), slot.present
    yield "cdc_slot_active", (name,), slot.active
    yield "cdc_slot_retained_wal_bytes", (name,), slot.retained_wal_bytes
    yield "cdc_slot_confirmed_lag_bytes", (name,), slot.confirmed_lag_bytes
    yield "cdc_slot_safe_wal_bytes", (name,), slot.safe_wal_bytes
    yield "cdc_slot_catalog_xmin_age_transactions", (name,), slot.catalog_xmin_age
    yield "cdc_slot_spilled_bytes", (name,), slot.spilled_bytes
    if slot.wal_status is not None:
        yield from _states("cdc_slot_wal_status", WAL_STATUSES, slot.wal_status, name)


def _of_outbox(outbox: OutboxStatus) -> Iterator[_Sample]:
    for state in OUTBOX_STATES:
        yield "cdc_outbox_changes", (state.value,), outbox.changes.get(state, 0)
    yield "cdc_outbox_oldest_ready_age_seconds", (), outbox.oldest_ready_age_s
    yield "cdc_outbox_truncate_age_seconds", (), outbox.truncate_age_s
    yield "cdc_outbox_dead_age_seconds", (), outbox.dead_age_s
    yield "cdc_outbox_table_bytes", (), outbox.table_bytes
    yield "cdc_outbox_dead_tuples", (), outbox.dead_tuples
    yield "cdc_outbox_blocked_keys", (), outbox.blocked_keys
    yield "cdc_notify_queue_usage_ratio", (), outbox.notify_queue_usage
    yield "cdc_outbox_unhandled_changes", (), outbox.unhandled
    yield "cdc_outbox_due_later_changes", (), outbox.due_later


def _of_types(types: Iterable[TypeStatus]) -> Iterator[_Sample]:
    for each in types:
        for state in OUTBOX_STATES:
            yield "cdc_outbox_type_changes", (each.name, state.value), each.changes.get(state, 0)
        yield "cdc_outbox_type_oldest_ready_age_seconds", (each.name,), each.oldest_ready_age_s


def _of_subscriptions(subscriptions: SubscriptionsStatus) -> Iterator[_Sample]:
    yield "cdc_subscriptions", (), subscriptions.count
    for each in subscriptions.known:
        for state in OUTBOX_STATES:
            yield "cdc_subscription_changes", (each.name, state.value), each.changes.get(state, 0)
        yield "cdc_subscription_oldest_age_seconds", (each.name,), each.oldest_age_s
        yield "cdc_subscription_held_back_changes", (each.name,), each.held_back
        yield "cdc_subscription_paused", (each.name,), each.paused
        yield "cdc_subscription_consumers", (each.name,), each.consumers
