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
    _gauge("cdc_role", "Where this consumer's wake-ups come from; 1 for its role.", "role"),
    _gauge("cdc_loop_last_iteration_timestamp_seconds", "When each loop last began an iteration.", "loop"),
    _gauge("cdc_collector_success", "1 if the last reading of these figures worked.", "collector"),
    _gauge("cdc_stream_connected", "1 while this process reads the slot.", "slot"),
    _gauge("cdc_stream_unavailable", "Why it does not; 1 for the reason.", "reason"),
    _gauge("cdc_stream_last_byte_timestamp_seconds", "When the server last sent a byte, keepalives included.", "slot"),
    _counter("cdc_stream_messages", "Messages read from the stream.", "slot", "kind"),
    _counter("cdc_stream_received_bytes", "Bytes read from the stream.", "slot"),
    _counter("cdc_stream_slot_recreations", "Slots recreated because they were lost or could not be read.", "slot"),
    _gauge("cdc_wakeup_queue_length", "Wake-ups that wait to be fetched."),
    _gauge("cdc_window_changes", "Changes in memory.", "state"),
    _gauge("cdc_window_capacity", "Changes that memory may hold."),
    _gauge("cdc_window_throttled_types", "Entity types that are at their limit of the window and have a backlog."),
    _gauge(
        "cdc_paused",
        "Pauses in force (cdc pause), by what they are about: everything, a type, a handler or a key.",
        "scope",
        "name",
    ),
    _gauge(
        "cdc_limit_leased",
        "What this consumer has leased of a handler's limit over all consumers: permits, each for a call, and slots,"
        " each for a call that runs.",
        "handler",
        "what",
    ),
    _gauge("cdc_limit_put_off_keys", "Keys whose next change waits in the table for its handler's limit.", "handler"),
    _gauge(
        "cdc_limit_waiting_seconds",
        "For how long a handler, or a key of its limit, has had work and made no call because of its limit.",
        "handler",
    ),
    _gauge("cdc_pause_age_seconds", "Age of the oldest pause that has no end; 0 if there is none."),
    _gauge("cdc_shards", "Number of shards; 0 in shadow mode."),
    _gauge("cdc_shards_owned", "Shards this consumer owns."),
    _gauge("cdc_members", "Live consumers, as this one counts them."),
    _gauge("cdc_transaction_connections", "Connections of transactional handlers.", "kind", "state"),
    _gauge("cdc_transaction_waiting", "Transactional handlers that wait for a connection.", "kind"),
    _gauge(
        "cdc_handler_breaker",
        "State of a handler's circuit breaker; 1 for the one it is in.",
        "handler",
        "state",
    ),
    _gauge("cdc_slot_present", "1 if the slot exists.", "slot"),
    _gauge("cdc_slot_active", "1 if a consumer reads the slot.", "slot"),
    _gauge("cdc_slot_wal_status", "State of the slot's WAL; 1 for the one it is in.", "slot", "wal_status"),
    _gauge("cdc_slot_retained_wal_bytes", "WAL the server keeps for the slot.", "slot"),
    _gauge("cdc_slot_confirmed_lag_bytes", "WAL the reader has not confirmed.", "slot"),
    _gauge("cdc_slot_safe_wal_bytes", "WAL that may be written before the slot is lost.", "slot"),
    _gauge("cdc_slot_catalog_xmin_age_transactions", "How far the slot holds back vacuum of the catalogs.", "slot"),
    _counter("cdc_slot_spilled_bytes", "Bytes that decoding wrote to disk.", "slot"),
    _gauge("cdc_outbox_changes", "Unprocessed changes, counted up to a bound.", "state"),
    _gauge("cdc_outbox_oldest_ready_age_seconds", "Age of the oldest change that could run now; 0 if none."),
    _gauge("cdc_outbox_truncate_age_seconds", "How long a TRUNCATE has held back its type; 0 if none does."),
    _gauge("cdc_outbox_table_bytes", "Size of entity_changes with indexes and TOAST."),
    _gauge("cdc_outbox_dead_tuples", "Row versions of entity_changes that vacuum has not removed."),
    _gauge("cdc_outbox_blocked_keys", "Keys blocked by a waiting change or a pausing dead letter, up to a bound."),
    _gauge(
        "cdc_outbox_unhandled_changes", "Fresh changes of types that no handler of this consumer wants, up to a bound."
    ),
    _gauge("cdc_outbox_due_later_changes", "Events that are due later, up to a bound."),
    _gauge("cdc_subscriptions", "Subscriptions of the outbox beside the default one."),
    _gauge(
        "cdc_subscription_changes",
        "Changes that a subscription has not done, up to a bound; fresh: neither waiting nor dead in it.",
        "subscription",
        "state",
    ),
    _gauge(
        "cdc_subscription_oldest_age_seconds", "Age of its oldest fresh change; 0 if there is none.", "subscription"
    ),
    _gauge(
        "cdc_subscription_held_back_changes",
        "Changes that the default subscription has processed and this one has not done, up to a bound: retention keeps"
        " them.",
        "subscription",
    ),
    _gauge("cdc_subscription_paused", "1 while it is paused.", "subscription"),
    _gauge("cdc_subscription_consumers", "Its live consumers.", "subscription"),
    _gauge("cdc_notify_queue_usage_ratio", "How full the server's queue of notifications is."),
)
_DELIVERY = _gauge("cdc_delivery_up", "1 while the application is there, 0 while changes wait for it.")


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
    yield "cdc_outbox_table_bytes", (), outbox.table_bytes
    yield "cdc_outbox_dead_tuples", (), outbox.dead_tuples
    yield "cdc_outbox_blocked_keys", (), outbox.blocked_keys
    yield "cdc_notify_queue_usage_ratio", (), outbox.notify_queue_usage
    yield "cdc_outbox_unhandled_changes", (), outbox.unhandled
    yield "cdc_outbox_due_later_changes", (), outbox.due_later


def _of_subscriptions(subscriptions: SubscriptionsStatus) -> Iterator[_Sample]:
    yield "cdc_subscriptions", (), subscriptions.count
    for each in subscriptions.known:
        for state in OUTBOX_STATES:
            yield "cdc_subscription_changes", (each.name, state.value), each.changes.get(state, 0)
        yield "cdc_subscription_oldest_age_seconds", (each.name,), each.oldest_age_s
        yield "cdc_subscription_held_back_changes", (each.name,), each.held_back
        yield "cdc_subscription_paused", (each.name,), each.paused
        yield "cdc_subscription_consumers", (each.name,), each.consumers
