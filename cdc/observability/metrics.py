"""Every metric of what happens, its help text and its labels, once; those of what is are in ``status_metrics``.

Labels come from closed sets: a type nobody routes is ``other``. Every counter and state exists from the start with 0,
so that the first error shows as a rise. What can have no value yet does not exist until it has one: the timestamps
(a 0 would be an age of fifty years), the success of a reading (one that is switched off has not failed), and what is
read from the database, which also goes when it cannot be read.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from cdc import __version__
from cdc.core.router import ANY, Router
from cdc.core.stream_reason import Reason
from cdc.observability.counters import CountTally, Distribution, HistogramTally
from cdc.observability.snapshots import HandlerStatus

OTHER = "other"
"""Label of an entity type without a rule of its own."""

NO_HANDLER = "none"
"""Label of the handler of a change that nobody wants."""

SOURCES = ("wal", "notify", "retry", "sweep")
OUTCOMES = ("processed", "retried", "discarded", "dead", "interrupted", "unavailable")
ERROR_KINDS = ("exception", "timeout", "validation", "crash", "depth", "rejected", "lost")
REQUESTS = ("2xx", "3xx", "4xx", "5xx", "timeout", "broken", "unreached")
"""How a request to the application ends: a status, no answer in time, a connection that broke or was never made."""
TASKS = ("loop", "hooks", "threads", "listener", "relay", "retention", "collector", "page", "health", "stream")
"""What runs as long as the process does."""
INTERRUPTIONS = ("connection", "statement")
"""Why a consumer began anew: it could not reach the server or lost it, or a statement failed."""
REFUSALS = ("read", "mark")
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
        self._types = router.entity_types
        handlers = sorted({handler.name for handler in router.handlers.values()})
        self._process(*driver)
        self._stream(slot)
        self._wakeups()
        self._shards()
        self._handlers(handlers, router)
        self._shadow(handlers)

    def entity_type(self, name: str) -> str:
        """The label value for an entity type: itself where a rule names it, else ``other``."""
        return name if name in self._types else OTHER

    def handled(self, entity_type: str, handler: str, outcome: str, attempts: int = 1) -> None:
        """Attempts ended. On the hot path: the child is looked up once for each combination."""
        self._handled(self.entity_type(entity_type), handler, outcome).inc(attempts)

    def took(self, entity_type: str, seconds: Iterable[float]) -> None:
        """Changes were marked processed so long after their transactions began."""
        self._took(self.entity_type(entity_type)).observe_each(max(each, 0.0) for each in seconds)

    def task_ended(self, name: str) -> None:
        """One of TASKS has ended."""
        self.task_ends.labels(name).inc()

    def delivers(self) -> None:
        """This consumer delivers to an application over HTTP: only then there are metrics of its requests."""
        self.delivery_requests = self._counter("cdc_delivery_requests", "Requests, by how they ended.", "result")
        _start(self.delivery_requests, REQUESTS)
        self.delivered = cache(self.delivery_requests.labels)

    def observed(self, entity_type: str, handler: str) -> None:
        """A change was seen that would have gone to this handler."""
        self.observed_changes.labels(self.entity_type(entity_type), handler).inc()

    def others_took(self, entity_type: str, seconds: float) -> None:
        """Somebody else marked a change processed so long after its transaction began."""
        self.observed_latency.labels(self.entity_type(entity_type)).observe(max(seconds, 0.0))

    @property
    def wakeup_counts(self) -> dict[str, int]:
        """By source, since the start; from any thread."""
        return self.wakeups.totals(0)

    @property
    def handler_status(self) -> HandlerStatus:
        """From any thread."""
        return HandlerStatus(
            attempts=self.changes_handled.totals(2),
            errors=sum(self.handler_errors.totals(0).values()),
            latency=self.change_latency.total,
        )

    def _process(self, psycopg: str, libpq: str) -> None:
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        build = self._gauge("cdc_build_info", "Versions; always 1.", "version", "python", "psycopg", "libpq")
        build.labels(__version__, platform.python_version(), psycopg, libpq).set(1)
        self.task_ends = self._counter(
            "cdc_task_ends",
            "Times that one ended, which nobody had asked for; it was started again.",
            "task",
        )
        _start(self.task_ends, TASKS)
        self.outbox_pruned = self._counter("cdc_outbox_pruned", "Processed changes that retention has removed.")

    def _stream(self, slot: str) -> None:
        self.stream_disconnects = self._counter(
            "cdc_stream_disconnects", "Ends of a stream and refused starts.", "slot", "reason"
        )
        _start(self.stream_disconnects, (slot,), Reason)

    def _wakeups(self) -> None:
        self.wakeups = CountTally("cdc_wakeups", "Wake-ups, by what found the work.", "source")
        self.registry.register(self.wakeups)
        self.wakeups_dropped = self._counter(
            "cdc_wakeups_dropped", "Wake-ups dropped because their queue was full; a sweep follows."
        )
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

    def _shards(self) -> None:
        self.shard_moves = self._counter(
            "cdc_shard_moves", "Shards that came and went; lost means with the session.", "direction"
        )
        self.interruptions = self._counter(
            "cdc_interruptions", "Times that the consumer gave up its connections and began anew.", "reason"
        )
        _start(self.interruptions, INTERRUPTIONS)
        _start(self.shard_moves, ("acquired", "released", "lost"))

    def _handlers(self, handlers: Sequence[str], router: Router) -> None:
        self.changes_handled = CountTally(
            "cdc_changes_handled", "Attempts, by how they ended.", "entity_type", "handler", "outcome"
        )
        self.handler_errors = CountTally("cdc_handler_errors", "Attempts that failed.", "handler", "kind")
        self.handler_duration = HistogramTally(
            "cdc_handler_duration_seconds", "Run time of a handler.", _HANDLER_S, "handler"
        )
        self.settle_duration = self._distribution("cdc_settle_duration_seconds", "One batched settle.", _CALL_S)
        self.settle_changes = self._distribution("cdc_settle_changes", "Changes in one settle.", _BATCH)
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
        for tally in (self.changes_handled, self.handler_errors, self.handler_duration, self.change_latency):
            self.registry.register(tally)
        self._handled = cache(self.changes_handled.labels)
        self._took = cache(self.change_latency.labels)
        for entity_type, handler in _routes(router):
            _start(self.changes_handled, (entity_type,), (handler,), OUTCOMES)
        _start(self.changes_handled, (*sorted(self._types), OTHER), (NO_HANDLER,), ("skipped",))
        _start(self.handler_errors, handlers, ERROR_KINDS)
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
