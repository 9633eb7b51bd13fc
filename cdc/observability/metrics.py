"""Every metric of events, its help text and its labels, once; those of states are in ``status_metrics``.

Labels come from closed sets: a type without a handler is ``other``. Every counter and state exists from the start, with
0, so that the first error shows as a rise. A metric that can have no value yet does not exist until it has one: the
timestamps (a 0 would be an age of fifty years), the success of a reading (one that is switched off has not failed), and
what is read from the database, which also disappears when it cannot be read.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, values
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
"""Label of the handler of a change that no handler takes."""

SOURCES = ("wal", "notify", "retry", "sweep")
OUTCOMES = (
    "processed", "retried", "snoozed", "discarded", "filtered", "coalesced", "dead", "interrupted", "unavailable"
)  # fmt: skip
ERROR_KINDS = ("exception", "timeout", "validation", "crash", "depth", "rejected", "lost")
REQUESTS = ("2xx", "3xx", "4xx", "5xx", "timeout", "broken", "unreached")
"""How a request to the application ends: a status, no answer in time, a connection that broke or was never made."""
MESSAGES = ("acknowledged", "refused", "broken", "unreached")
"""How a message to a broker ends: refused by it, or without an acknowledgement: lost with a connection, or not sent."""
TASKS = (
    "loop", "watch", "hooks", "threads", "listener", "relay", "retention", "collector", "page", "health", "stream",
    "consumer",
)  # fmt: skip
"""Tasks and threads that run as long as the process does."""
INTERRUPTIONS = ("connection", "statement")
"""Why a consumer reconnected: it could not reach the server or lost it, or a statement failed."""
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

    prometheus_client keeps values in files if PROMETHEUS_MULTIPROC_DIR names a folder. The variable belongs to an
    application in the same environment: the folder may be missing, and its files are scraped as the application's.
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


class _Group:
    """Creates metrics in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return _Gauge(name, text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return _Counter(name, text, labels, registry=self._registry)  # the client appends _total

    def _count(self, name: str, text: str, *labels: str) -> CountTally:
        """For the event loop only."""
        tally = CountTally(name, text, *labels)
        self._registry.register(tally)
        return tally

    def _histogram(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> HistogramTally:
        """For the event loop only."""
        tally = HistogramTally(name, text, bounds, *labels)
        self._registry.register(tally)
        return tally

    def _distribution(self, name: str, text: str, bounds: Sequence[float]) -> Distribution:
        """The same without labels."""
        return self._histogram(name, text, bounds).labels()


class ProcessMetrics(_Group):
    """``driver``: the versions of psycopg and libpq."""

    def __init__(self, registry: CollectorRegistry, driver: tuple[str, str]) -> None:
        super().__init__(registry)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        build = self._gauge(
            "cdc_build_info",
            "Versions of cdc, Python and the database driver, as labels; always 1.",
            "version",
            "python",
            "psycopg",
            "libpq",
        )
        build.labels(__version__, platform.python_version(), *driver).set(1)
        self._task_ends = self._counter(
            "cdc_task_ends",
            "Tasks and threads of this process that ended unexpectedly and were started again. Each has a line"
            " in the log.",
            "task",
        )
        _start(self._task_ends, TASKS)

    def task_ended(self, name: str) -> None:
        """One of TASKS has ended; from any thread."""
        self._task_ends.labels(name).inc()


class StreamMetrics(_Group):
    def __init__(self, registry: CollectorRegistry, slot: str) -> None:
        super().__init__(registry)
        self._slot = slot
        self._disconnects = self._counter(
            "cdc_stream_disconnects",
            "How often reading the slot ended or could not begin, by the reason. slot_busy is usual: another"
            " consumer reads it.",
            "slot",
            "reason",
        )
        _start(self._disconnects, (slot,), Reason)

    def disconnected(self, reason: str) -> None:
        """A stream has ended, or its start was refused, for one of ``Reason``."""
        self._disconnects.labels(self._slot, reason).inc()


class WakeUpMetrics(_Group):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.received = self._count(
            "cdc_wakeups",
            "Changes announced to this consumer, by what found them: wal, the slot; notify, from another"
            " consumer; retry, a due attempt; sweep, a read of the table, which finds whatever was not"
            " announced.",
            "source",
        )
        self.dropped = self._counter(
            "cdc_wakeups_dropped",
            "Announced changes that were dropped because this process had too many in its queue. A sweep finds them.",
        )
        self.relayed = self._counter(
            "cdc_relay_notifies",
            "NOTIFY messages that this consumer has sent, to announce changes to consumers that do not read the slot.",
        )
        self.latency = self._distribution(
            "cdc_wakeup_latency_seconds",
            "From the commit of a change, by the server's clock, to its announcement, by this host's clock."
            " Negative counts as 0.",
            _CALL_S,
        )
        _start(self.received, SOURCES)

    @property
    def status(self) -> dict[str, int]:
        """How many wake-ups came in, by source; from any thread."""
        return self.received.totals(0)


class OutboxMetrics(_Group):
    """Reads and writes of the table."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.fetch_duration = self._distribution(
            "cdc_fetch_duration_seconds", "How long one read of announced changes from entity_changes took.", _CALL_S
        )
        self.fetch_changes = self._distribution(
            "cdc_fetch_changes", "How many changes one read from entity_changes returned.", _BATCH
        )
        self.visibility_retries = self._counter(
            "cdc_visibility_retries",
            "Announced changes that could not be seen in the table at the first read: found a moment later, or"
            " left to the next sweep.",
            "result",
        )
        self.settle_duration = self._distribution(
            "cdc_settle_duration_seconds",
            "How long one statement took that marks changes in entity_changes: processed, waiting or dead.",
            _CALL_S,
        )
        self.settle_changes = self._distribution(
            "cdc_settle_changes", "How many changes one such statement, a settle, marked.", _BATCH
        )
        self.settle_skipped = self._counter(
            "cdc_settle_skipped",
            "Changes that were handled here and that another session had marked before. Look into it, unless a"
            " session was lost just then.",
        )
        self.settle_delayed = self._counter(
            "cdc_settle_delayed",
            "Marks of handled changes that a lock or a full disk delayed; each attempt to write one counts.",
        )
        self.rows_refused = self._counter(
            "cdc_rows_refused",
            "Changes that the database refused to hand over (read) or to mark (mark); each is a dead letter"
            " now, whose last_error says why.",
            "step",
        )
        self.pruned = self._counter(
            "cdc_outbox_pruned", "Processed changes that retention has removed from entity_changes."
        )
        _start(self.visibility_retries, ("found", "left_to_sweep"))
        _start(self.rows_refused, REFUSALS)


class ConsumerMetrics(_Group):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.shard_moves = self._counter(
            "cdc_shard_moves",
            "Shards that this consumer has acquired, released to another one, or lost with its database session.",
            "direction",
        )
        self.interruptions = self._counter(
            "cdc_interruptions",
            "How often this consumer stopped and connected again: it lost the server (connection), or a"
            " statement failed.",
            "reason",
        )
        _start(self.shard_moves, ("acquired", "released", "lost"))
        _start(self.interruptions, INTERRUPTIONS)


class HandlerMetrics(_Group):
    """For the event loop, except ``status``."""

    def __init__(self, registry: CollectorRegistry, router: Router) -> None:
        super().__init__(registry)
        self._label = _labels(router).get
        self._attempts = self._count(
            "cdc_changes_handled",
            "Attempts at changes, by how they ended. skipped: no handler of the type names the operation;"
            " discarded: by the handler, or its type is ignored; interrupted: will run again.",
            "entity_type",
            "handler",
            "outcome",
        )
        self._errors = self._count(
            "cdc_handler_errors",
            "Attempts that failed, by kind: exception, timeout, validation against the model, crash of the"
            " process, depth of the chain of causes, rejected by the handler, lost with its session.",
            "handler",
            "kind",
        )
        durations = self._histogram(
            "cdc_handler_duration_seconds",
            "How long one call of a handler took, whether it worked or failed.",
            _HANDLER_S,
            "handler",
        )
        self._latency = self._histogram(
            "cdc_change_latency_seconds",
            "From the beginning of the transaction that wrote a change to its mark as processed, both by the"
            " server's clock.",
            _CHANGE_S,
            "entity_type",
        )
        self._handled = cache(self._attempts.labels)
        self._took = cache(self._latency.labels)
        self.duration_of = cache(durations.labels)
        """By the name of a handler."""
        handlers, types = _names(router), (*sorted(router.entity_types), OTHER)
        for entity_type, handler in _routes(router):
            _start(self._attempts, (entity_type,), (handler,), OUTCOMES)
        _start(self._attempts, types, (NO_HANDLER,), ("discarded", "skipped"))
        _start(self._errors, handlers, ERROR_KINDS)
        _start(durations, handlers)
        _start(self._latency, types)

    def handled(self, entity_type: str, handler: str, outcome: str, attempts: int = 1) -> None:
        """Attempts ended. On the hot path: the child is looked up once for each combination."""
        self._handled(self._label(entity_type, OTHER), handler, outcome).inc(attempts)

    def failed(self, handler: str, kind: str) -> None:
        """An attempt failed by one of ERROR_KINDS."""
        self._errors.labels(handler, kind).inc()

    def took(self, entity_type: str, seconds: Iterable[float]) -> None:
        """Changes were marked processed, each this many seconds after its transaction began; 0 and more."""
        self._took(self._label(entity_type, OTHER)).observe_each(seconds)

    @property
    def status(self) -> HandlerStatus:
        """From any thread."""
        errors = sum(self._errors.totals(0).values())
        return HandlerStatus(attempts=self._attempts.totals(2), errors=errors, latency=self._latency.total)


class DeliveryMetrics(_Group):
    """Of a consumer that delivers: requests to an application over HTTP, or messages to a broker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        requests = self._counter(
            "cdc_delivery_requests",
            "Requests to the application, or messages to a broker, by how they ended: an HTTP status,"
            " acknowledged or refused, no answer in time, broken off, or not reached.",
            "result",
        )
        _start(requests, (*REQUESTS, *MESSAGES[:2]))
        self._ended = cache(requests.labels)

    def ended(self, result: str, count: int = 1) -> None:
        """``result``: one of REQUESTS or MESSAGES; a status beyond 599 counts as what it is treated like."""
        self._ended(result if result in REQUESTS or result in MESSAGES else "5xx").inc(count)


class ShadowMetrics(_Group):
    """Of an observer, which runs and marks nothing."""

    def __init__(self, registry: CollectorRegistry, router: Router) -> None:
        super().__init__(registry)
        self._label = _labels(router).get
        self._changes = self._counter(
            "cdc_observed_changes",
            "Changes seen in shadow mode, by the handler that would have run. It runs nothing and marks nothing.",
            "entity_type", "handler",
        )  # fmt: skip
        self._invalid = self._counter(
            "cdc_observed_invalid",
            "Changes seen in shadow mode that do not fit their handler's model, or on which its filter fails.",
            "handler",
        )  # fmt: skip
        self._latency = self._histogram(
            "cdc_observed_latency_seconds",
            "In shadow mode: from the beginning of the transaction that wrote a change to its mark as processed"
            " by another program, by the server's clock.",
            _CHANGE_S,
            "entity_type",
        )
        _start(self._invalid, _names(router))

    def saw(self, entity_type: str, handler: str) -> None:
        """A change was seen that would have gone to this handler; NO_HANDLER: to none, or its filter leaves it out."""
        self._changes.labels(self._label(entity_type, OTHER), handler).inc()

    def invalid(self, handler: str) -> None:
        """A change does not fit the handler's model, or the handler's filter fails."""
        self._invalid.labels(handler).inc()

    def others_took(self, entity_type: str, seconds: float) -> None:
        """Another program marked a change processed, ``seconds`` after its transaction began."""
        self._latency.labels(self._label(entity_type, OTHER)).observe(max(seconds, 0.0))


class Metrics:
    """The metrics of one consumer, in groups, all in ``registry``.

    ``slot`` is the configured name, ``driver`` the versions of psycopg and libpq. ``delivery`` is None if nothing is
    delivered. Each group is used by the threads that it names, and may be scraped from any.
    """

    def __init__(
        self, slot: str, router: Router, *, driver: tuple[str, str] = ("", ""), delivers: bool = False
    ) -> None:
        self.registry: CollectorRegistry = _Registry()
        self.process = ProcessMetrics(self.registry, driver)
        self.stream = StreamMetrics(self.registry, slot)
        self.wakeups = WakeUpMetrics(self.registry)
        self.outbox = OutboxMetrics(self.registry)
        self.consumer = ConsumerMetrics(self.registry)
        self.handlers = HandlerMetrics(self.registry, router)
        self.delivery = DeliveryMetrics(self.registry) if delivers else None
        self.shadow = ShadowMetrics(self.registry, router)


def _labels(router: Router) -> dict[str, str]:
    """The label of each entity type that a rule names: itself. All others are ``other``."""
    return {entity_type: entity_type for entity_type in router.entity_types}


def _names(router: Router) -> list[str]:
    return sorted({handler.name for handler in router.handlers.values()})


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
