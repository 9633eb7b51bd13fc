"""Every metric, its help text and its labels, once.

Labels come from closed sets: a type nobody routes is ``other``. Every counter and state exists from the start with 0,
so that the first error shows as a rise. What can have no value yet does not exist until it has one: the timestamps
(a 0 would be an age of fifty years), the success of a collector (one that is switched off has not failed), and the
figures of the database, which also go when their collector fails.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from cdc import __version__
from cdc.core.circuit_breaker import State
from cdc.core.model import SHARDS, ChangeState
from cdc.core.router import ANY, Router
from cdc.core.stream_reason import Reason
from cdc.observability.counters import CountTally, Distribution, HistogramTally
from cdc.observability.figures import Samples, outbox_figures, slot_figures

OTHER = "other"
"""Label of an entity type without a rule of its own."""

NO_HANDLER = "none"
"""Label of the handler of a change that nobody wants."""

ROLES = ("streaming", "standby", "sweeping", "observing")
SOURCES = ("wal", "notify", "retry", "sweep")
OUTCOMES = ("processed", "retried", "discarded", "dead", "interrupted", "unavailable")
ERROR_KINDS = ("exception", "timeout", "validation", "crash", "depth", "rejected", "lost")
REQUESTS = ("2xx", "3xx", "4xx", "5xx", "timeout", "broken", "unreached")
"""How a request to the application ends: a status, no answer in time, a connection that broke or was never made."""
OUTBOX_STATES = (ChangeState.FRESH, ChangeState.WAITING, ChangeState.DEAD)
TASKS = ("figures", "hooks", "threads", "listener", "relay", "retention", "collector", "page", "health", "stream")
"""What runs as long as the process does."""
CONNECTION_KINDS = ("async", "sync")
INTERRUPTIONS = ("connection", "statement")
"""Why a consumer began anew: it could not reach the server or lost it, or a statement failed."""
REFUSALS = ("read", "mark")
WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")
UNAVAILABLE = tuple(reason for reason in Reason if reason.lasting is reason)
"""Why this process does not stream: states that last."""

_HANDLER_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_CHANGE_S = (*_HANDLER_S, 900, 3600, 14400)
_CALL_S = (0.0005, *(bound for bound in _HANDLER_S if bound <= 5))
_BATCH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class _Registry(CollectorRegistry):
    """Without the ``_created`` twin of each counter and histogram.

    prometheus_client can switch them off, but only for the whole process: another program's metrics, too.
    """

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


_swapped = threading.Lock()


class _InMemory(MetricWrapperBase):
    """Its values are this process's alone.

    prometheus_client keeps them in files where PROMETHEUS_MULTIPROC_DIR names a folder, which is an application's that
    shares our environment: it may not be there, and what is in it is told as the application's.
    """

    def _metric_init(self) -> None:
        with _swapped:
            usual, values.ValueClass = values.ValueClass, values.MutexValue
            try:
                super()._metric_init()  # type: ignore[no-untyped-call]  # the library's is
            finally:
                values.ValueClass = usual


class _Counter(_InMemory, Counter):
    pass


class _Gauge(_InMemory, Gauge):
    pass


class _Histogram(_InMemory, Histogram):
    pass


class Metrics:
    """The metrics of one consumer, in ``registry``. Attributes carry the names without ``cdc_`` and unit.

    ``slot`` is the configured name, ``driver`` the versions of psycopg and libpq. Thread-safe.
    """

    def __init__(self, slot: str, router: Router, *, driver: tuple[str, str] = ("", "")) -> None:
        self.registry: CollectorRegistry = _Registry()
        self._slot = slot
        self._types = router.entity_types
        self._observing = False
        handlers = sorted({handler.name for handler in router.handlers.values()})
        self._process(*driver)
        self._stream(slot)
        self._wakeups()
        self._lanes_and_shards()
        self._handlers(handlers, router)
        self._shadow(handlers)
        self._slot_figures, self._outbox_figures = slot_figures(), outbox_figures()
        self.registry.register(self._slot_figures)
        self.registry.register(self._outbox_figures)

    def entity_type(self, name: str) -> str:
        """The label value for an entity type: itself where a rule names it, else ``other``."""
        return name if name in self._types else OTHER

    def handled(self, entity_type: str, handler: str, outcome: str, attempts: int = 1) -> None:
        """Attempts ended. On the hot path: the child is looked up once for each combination."""
        self._handled(self.entity_type(entity_type), handler, outcome).inc(attempts)

    def took(self, entity_type: str, seconds: Iterable[float]) -> None:
        """Changes were marked processed so long after their transactions began."""
        self._took(self.entity_type(entity_type)).observe_each(max(each, 0.0) for each in seconds)

    def show_lanes(self, *, running: int, queued: int, settling: int) -> None:
        """What the window holds."""
        for state, count in (("running", running), ("queued", queued), ("settling", settling)):
            self.lanes_changes.labels(state).set(count)

    def show_connections(self, kind: str, *, busy: int, idle: int, wanted: int) -> None:
        """Those of transactional handlers, of one of CONNECTION_KINDS; ``wanted``: handlers that wait for one."""
        self.transaction_connections.labels(kind, "busy").set(busy)
        self.transaction_connections.labels(kind, "idle").set(idle)
        self.transaction_waiting.labels(kind).set(wanted)

    def set_breaker(self, handler: str, state: State) -> None:
        """The handler's breaker is in this state from now on."""
        for each in State:
            self.handler_breaker.labels(handler, each.value).set(each is state)

    def task_ended(self, name: str) -> None:
        """One of TASKS has ended."""
        self.task_ends.labels(name).inc()

    def delivers(self, up: Callable[[], bool]) -> None:
        """This consumer delivers to an application over HTTP: only then there are figures of it.

        ``up``: asked at each scrape, in its thread.
        """
        delivery_up = self._gauge("cdc_delivery_up", "1 while the application is there, 0 while changes wait for it.")
        delivery_up.set_function(up)
        self.delivery_requests = self._counter("cdc_delivery_requests", "Requests, by how they ended.", "result")
        _start(self.delivery_requests, REQUESTS)
        self.delivered = cache(self.delivery_requests.labels)

    def observing(self) -> None:
        """Whatever it does for the doorbell from now on: this consumer only looks, and nothing is for it to own."""
        self.set_role("observing")
        self._observing = True
        self._shards.set(0)

    def observed(self, entity_type: str, handler: str) -> None:
        """A change was seen that would have gone to this handler."""
        self.observed_changes.labels(self.entity_type(entity_type), handler).inc()

    def others_took(self, entity_type: str, seconds: float) -> None:
        """Somebody else marked a change processed so long after its transaction began."""
        self.observed_latency.labels(self.entity_type(entity_type)).observe(max(seconds, 0.0))

    def set_role(self, role: str) -> None:
        """One of ROLES."""
        if self._observing:
            return
        _set_state(self.role, ROLES, role)

    def set_stream(self, unavailable: str | None) -> None:
        """None: this process streams. Else why it does not: one of UNAVAILABLE."""
        self.stream_connected.labels(self._slot).set(unavailable is None)
        _set_state(self.stream_unavailable, UNAVAILABLE, unavailable)

    def show_slot(
        self,
        *,
        present: bool,
        active: bool = False,
        wal_status: str | None = None,
        retained_wal_bytes: int | None = None,
        confirmed_lag_bytes: int | None = None,
        safe_wal_bytes: int | None = None,
        catalog_xmin_age: int | None = None,
        spilled_bytes: int | None = None,
    ) -> None:
        """A reading of the slot. What is None has no series: a lost slot keeps no WAL, an unlimited one is safe."""
        figures = {
            "cdc_slot_present": int(present),
            "cdc_slot_active": int(active),
            "cdc_slot_retained_wal_bytes": retained_wal_bytes,
            "cdc_slot_confirmed_lag_bytes": confirmed_lag_bytes,
            "cdc_slot_safe_wal_bytes": safe_wal_bytes,
            "cdc_slot_catalog_xmin_age_transactions": catalog_xmin_age,
            "cdc_slot_spilled_bytes": spilled_bytes,
        }
        shown: dict[str, Samples] = {
            name: [((self._slot,), value)] for name, value in figures.items() if value is not None
        }
        if wal_status is not None:
            shown["cdc_slot_wal_status"] = [((self._slot, state), state == wal_status) for state in WAL_STATUSES]
        self._slot_figures.show(shown)
        self.collector_success.labels("slot").set(1)

    def forget_slot(self) -> None:
        """The slot could not be read: better no figures than old ones."""
        self._slot_figures.show({})
        self.collector_success.labels("slot").set(0)

    def show_outbox(
        self,
        *,
        changes: Mapping[str, int],
        oldest_ready_age_s: float,
        table_bytes: int,
        dead_tuples: int,
        blocked_keys: int = 0,
        notify_queue_usage: float = 0.0,
        unhandled: int = 0,
    ) -> None:
        """A reading of the outbox; ``changes`` counts the states of OUTBOX_STATES, and one left out is 0."""
        self._outbox_figures.show(
            {
                "cdc_outbox_changes": [((state.value,), changes.get(state, 0)) for state in OUTBOX_STATES],
                "cdc_outbox_oldest_ready_age_seconds": [((), oldest_ready_age_s)],
                "cdc_outbox_table_bytes": [((), table_bytes)],
                "cdc_outbox_dead_tuples": [((), dead_tuples)],
                "cdc_outbox_blocked_keys": [((), blocked_keys)],
                "cdc_notify_queue_usage_ratio": [((), notify_queue_usage)],
                "cdc_outbox_unhandled_changes": [((), unhandled)],
            }
        )
        self.collector_success.labels("outbox").set(1)

    def forget_outbox(self) -> None:
        """The outbox could not be read."""
        self._outbox_figures.show({})
        self.collector_success.labels("outbox").set(0)

    def _process(self, psycopg: str, libpq: str) -> None:
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        build = self._gauge("cdc_build_info", "Versions; always 1.", "version", "python", "psycopg", "libpq")
        build.labels(__version__, platform.python_version(), psycopg, libpq).set(1)
        self.role = self._gauge("cdc_role", "What this consumer does for the doorbell; 1 for its role.", "role")
        _start(self.role, ROLES)
        self.loop_last_iteration = self._gauge(
            "cdc_loop_last_iteration_timestamp_seconds", "When each started loop last turned.", "loop"
        )
        self.collector_success = self._gauge(
            "cdc_collector_success", "1 if the last reading of these figures worked.", "collector"
        )
        self.task_ends = self._counter(
            "cdc_task_ends",
            "Times that one ended, which nobody had asked for; it was started again.",
            "task",
        )
        _start(self.task_ends, TASKS)
        self.outbox_pruned = self._counter("cdc_outbox_pruned", "Processed changes that retention has removed.")

    def _stream(self, slot: str) -> None:
        self.stream_connected = self._gauge("cdc_stream_connected", "1 while this process reads the slot.", "slot")
        self.stream_unavailable = self._gauge("cdc_stream_unavailable", "Why it does not; 1 for the reason.", "reason")
        self.stream_last_byte = self._gauge(
            "cdc_stream_last_byte_timestamp_seconds", "When the server last sent a byte, keepalives included.", "slot"
        )
        self.stream_messages = self._counter("cdc_stream_messages", "Messages read from the stream.", "slot", "kind")
        self.stream_received_bytes = self._counter("cdc_stream_received_bytes", "Bytes read from the stream.", "slot")
        self.stream_disconnects = self._counter(
            "cdc_stream_disconnects", "Ends of a stream and refused starts.", "slot", "reason"
        )
        self.stream_slot_recreations = self._counter(
            "cdc_stream_slot_recreations", "Slots that were lost or could not be read, and were made anew.", "slot"
        )
        _start(self.stream_slot_recreations, (slot,))
        _start(self.stream_connected, (slot,))
        _start(self.stream_unavailable, UNAVAILABLE)
        _start(self.stream_messages, (slot,), ("change", "keepalive"))
        _start(self.stream_received_bytes, (slot,))
        _start(self.stream_disconnects, (slot,), Reason)

    def _wakeups(self) -> None:
        self.wakeups = CountTally("cdc_wakeups", "Wake-ups, by what found the work.", "source")
        self.registry.register(self.wakeups)
        self.wakeups_dropped = self._counter(
            "cdc_wakeups_dropped", "Wake-ups dropped because their queue was full; a sweep follows."
        )
        self.wakeup_queue_length = self._gauge("cdc_wakeup_queue_length", "Wake-ups that wait to be fetched.")
        self.relay_notifies = self._counter(
            "cdc_relay_notifies", "NOTIFY payloads sent for consumers that do not stream."
        )
        self.wakeup_latency = self._distribution(
            "cdc_wakeup_latency_seconds", "From the commit to the wake-up; two clocks, negative counts as 0.", _CALL_S
        )
        self.fetch_duration = self._distribution(
            "cdc_fetch_duration_seconds", "One fetch of changes by number.", _CALL_S
        )
        self.fetch_changes = self._distribution("cdc_fetch_changes", "Changes in one fetch.", _BATCH)
        self.visibility_retries = self._counter(
            "cdc_visibility_retries", "Changes that were not visible at first look, by how it ended.", "result"
        )
        _start(self.wakeups, SOURCES)
        _start(self.visibility_retries, ("found", "left_to_sweep"))

    def _lanes_and_shards(self) -> None:
        self.lanes_changes = self._gauge("cdc_lanes_changes", "Changes this consumer holds.", "state")
        self.lanes_capacity = self._gauge("cdc_lanes_capacity", "Changes it may hold.")
        self.lanes_limited_types = self._gauge(
            "cdc_lanes_limited_types", "Entity types that hold their share of it and have more to do."
        )
        self._shards = self._gauge("cdc_shards", "Shards there are; 0 where nothing but observing is to be done.")
        self._shards.set(SHARDS)
        self.shards_owned = self._gauge("cdc_shards_owned", "Shards this consumer owns.")
        self.members = self._gauge("cdc_members", "Live consumers, as this one sees them.")
        self.shard_moves = self._counter(
            "cdc_shard_moves", "Shards that came and went; lost means with the session.", "direction"
        )
        self.interruptions = self._counter(
            "cdc_interruptions", "Times that the consumer gave up its connections and began anew.", "reason"
        )
        _start(self.interruptions, INTERRUPTIONS)
        _start(self.lanes_changes, ("running", "queued", "settling"))
        _start(self.shard_moves, ("acquired", "released", "lost"))

    def _handlers(self, handlers: Sequence[str], router: Router) -> None:
        self.changes_handled = CountTally(
            "cdc_changes_handled", "Attempts, by how they ended.", "entity_type", "handler", "outcome"
        )
        self.handler_errors = self._counter("cdc_handler_errors", "Attempts that failed.", "handler", "kind")
        self.handler_duration = HistogramTally(
            "cdc_handler_duration_seconds", "Run time of a handler.", _HANDLER_S, "handler"
        )
        self.handler_breaker = self._gauge(
            "cdc_handler_breaker",
            "The circuit breaker of a handler, not closed while what it needs is away; 1 for its state.",
            "handler",
            "state",
        )
        for handler in handlers:
            self.set_breaker(handler, State.CLOSED)
        self.settle_duration = self._distribution("cdc_settle_duration_seconds", "One batched settle.", _CALL_S)
        self.settle_changes = self._distribution("cdc_settle_changes", "Changes in one settle.", _BATCH)
        self.transaction_connections = self._gauge(
            "cdc_transaction_connections", "Connections of transactional handlers.", "kind", "state"
        )
        self.transaction_waiting = self._gauge(
            "cdc_transaction_waiting", "Transactional handlers that wait for a connection.", "kind"
        )
        self.settle_skipped = self._counter("cdc_settle_skipped", "Changes that somebody else had settled.")
        self.marks_delayed = self._counter(
            "cdc_marks_delayed", "Tries to mark a change that something stood in the way of: a lock, a full disk."
        )
        self.rows_refused = self._counter(
            "cdc_rows_refused", "Changes that the database would not mark or hand over; now dead letters.", "step"
        )
        _start(self.rows_refused, REFUSALS)
        self.change_latency = HistogramTally(
            "cdc_change_latency_seconds",
            "From the writer's transaction to processed, by the database's clock.",
            _CHANGE_S,
            "entity_type",
        )
        for tally in (self.changes_handled, self.handler_duration, self.change_latency):
            self.registry.register(tally)
        self._handled = cache(self.changes_handled.labels)
        self._took = cache(self.change_latency.labels)
        for entity_type, handler in _routes(router):
            _start(self.changes_handled, (entity_type,), (handler,), OUTCOMES)
        _start(self.changes_handled, (*sorted(self._types), OTHER), (NO_HANDLER,), ("skipped",))
        _start(self.handler_errors, handlers, ERROR_KINDS)
        _start(self.transaction_connections, CONNECTION_KINDS, ("busy", "idle"))
        _start(self.transaction_waiting, CONNECTION_KINDS)
        _start(self.handler_duration, handlers)
        _start(self.change_latency, (*sorted(self._types), OTHER))

    def _shadow(self, handlers: Iterable[str]) -> None:
        self.observed_changes = self._counter(
            "cdc_observed_changes", "Changes that one who only observes saw, by who would have got them.",
            "entity_type", "handler",
        )  # fmt: skip
        self.observed_misfits = self._counter(
            "cdc_observed_misfits", "Those that do not fit the model of their handler.", "handler"
        )
        self.observed_latency = self._histogram(
            "cdc_observed_latency_seconds",
            "The same as cdc_change_latency_seconds, of changes that somebody else marked processed.",
            _CHANGE_S,
            "entity_type",
        )
        _start(self.observed_misfits, handlers)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return _Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return _Counter(name, text, labels, registry=self.registry)  # the client appends _total

    def _distribution(self, name: str, text: str, bounds: tuple[float, ...]) -> Distribution:
        """For the event loop only, without labels."""
        tally = HistogramTally(name, text, bounds)
        self.registry.register(tally)
        return tally.labels()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return _Histogram(name, text, labels, buckets=buckets, registry=self.registry)


def _routes(router: Router) -> set[tuple[str, str]]:
    """(entity type, handler) that can occur: a rule for any type also gets the other operations of a named one."""
    routes: set[tuple[str, str]] = set()
    for (entity_type, _), handler in router.handlers.items():
        types = (*router.entity_types, OTHER) if entity_type == ANY else (entity_type,)
        routes.update((one, handler.name) for one in types)
    return routes


def _start(metric: MetricWrapperBase | CountTally | HistogramTally, *label_values: Iterable[str]) -> None:
    """Create the series of every combination, at 0."""
    for combination in product(*label_values):
        metric.labels(*combination)


def _set_state(metric: Gauge, states: Iterable[str], current: str | None) -> None:
    for state in states:
        metric.labels(state).set(state == current)
