"""The composition root: settings -> objects, and the order in which they start and stop.

start   health, so that a slow start can be seen; collector; consumer; listener; stream
stop    consumer (hands out nothing more, drains, settles), then the others, health last
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from cdc import __version__
from cdc.app import config
from cdc.app.config import Settings
from cdc.core.backoff import Policy
from cdc.core.errors import UsageError
from cdc.core.handler_limits import HandlerLimits
from cdc.core.model import WakeUp
from cdc.core.page_size import BYTES
from cdc.core.router import Router
from cdc.core.type_filter import NOTHING, TypeFilter
from cdc.engine import health_checks
from cdc.engine.circuit_breakers import CircuitBreakers
from cdc.engine.consumer import Consumer, ConsumerSettings
from cdc.engine.consumer_port import ConsumerPort
from cdc.engine.error_policy import ErrorPolicy
from cdc.engine.executor import Executor
from cdc.engine.health_checks import HealthThresholds, LoopWatch
from cdc.engine.hooks import Hooks
from cdc.engine.retention import Pruning
from cdc.engine.shadow import ObserverSettings, Shadow
from cdc.engine.stats_poller import StatsPoller
from cdc.engine.stream_bridge import StreamBridge
from cdc.engine.thread_pool import Threads
from cdc.engine.transactions import Transactions
from cdc.http import endpoint_url
from cdc.http.server import Check, HealthServer
from cdc.http.status_page import StatusPage
from cdc.observability.failures import RecentFailures
from cdc.observability.metrics import Metrics
from cdc.observability.snapshots import ProcessStatus
from cdc.observability.status_metrics import StatusMetrics
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.connect import driver_versions
from cdc.postgres.notify import Listener, Relay
from cdc.postgres.outbox import Store
from cdc.replication.stream import Stream, StreamSettings
from cdc.runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from cdc.http.delivery import Delivery

log = logging.getLogger("cdc")

_STOP_S = 3.0
_SLOT_NAME_PART = 40
"""Of a name of up to 63 characters, so that more fits behind it."""
_Run = Callable[[], Coroutine[Any, Any, None]]


async def run(dsn: str | None, router: Router | None, **settings: Any) -> None:
    """The consumer as a part of one's own asyncio program: works until cancelled, then drains.

    ``settings`` are those of ``cdc run``, with the names of its options (``slot_name="billing"``, ``drain_time=5``);
    the environment and cdc.toml are not read, and HTTP is off unless ``http_port`` is given. Raises ConnectError when
    the database cannot be reached at the start, UsageError for a setting that does not exist. A ``router`` of None
    needs ``deliver_to``.
    """
    app = App(config.from_options({"http_port": 0, "dsn": dsn, **settings}), router)
    work = asyncio.create_task(app.run())
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        app.consumer.stop()
        await work
        raise


class App:
    """One consumer with all that belongs to it. Made on the event loop. ``router`` is None where deliver.to is set."""

    def __init__(self, settings: Settings, router: Router | None, thresholds: HealthThresholds | None = None) -> None:
        if settings.observe:
            settings = _as_observer(settings)
        self._settings = settings
        self._thresholds = thresholds or HealthThresholds()
        self._delivery = _make_delivery(settings) if settings.deliver.to else None
        router = _the_one(router, self._delivery.router if self._delivery else None)
        self.scope = settings.scope if settings.unhandled == "discard" else settings.scope.within(router.scope)
        """The types whose changes are ours; what only a look is for sees those as well that nobody wants."""
        _refuse_unhandled(settings.scope, router)
        self._router = router
        self._threads = Threads(settings.threads)
        delivers = self._delivery is not None and not settings.observe
        self.metrics = metrics = Metrics(settings.slot.name, router, driver=driver_versions(), delivers=delivers)
        self._supervisor = Supervisor(metrics.process.task_ended)
        scope = settings.scope if settings.observe else self.scope
        page_bytes = min(BYTES, settings.window_bytes)
        store = Store(settings.schema_, settings.max_chain_depth, scope, page_bytes=page_bytes)
        self._hooks = hooks = Hooks(router)
        policy = Policy(settings.max_attempts, settings.backoff.base, settings.backoff.cap)
        self._transactions = Transactions(
            settings.handlers_dsn.get_secret_value if settings.handlers_dsn else settings.current_dsn, store,
            settings.transactions, router.handlers.values(), pooled=settings.handlers_dsn is not None,
        )  # fmt: skip
        handlers = router.handlers.values()
        self._failures = RecentFailures()
        self._loop = LoopWatch()
        self._breakers = CircuitBreakers({handler.name for handler in handlers})
        error_policy = ErrorPolicy(
            handlers, policy, hooks=hooks, metrics=metrics.handlers, breakers=self._breakers,
            failed=self._failures.add,
        )  # fmt: skip
        self.consumer: ConsumerPort = (
            self._make_observer(store) if settings.observe else self._make_consumer(store, error_policy, hooks)
        )
        self._relay = Relay(settings.current_dsn, settings.schema_, metrics.wakeups.relayed.inc)
        self._stats_poller = StatsPoller(
            settings.current_dsn,
            store=store,
            slot=settings.slot.name if settings.stream else None,
            asked=None if self.scope == settings.scope or settings.observe else settings.scope,
            page=OutboxAdmin(settings.schema_) if settings.http.port and settings.http.page else None,
            supervisor=self._supervisor,
            standbys_away=self._slot_waits_for_standbys,
        )
        self._stream = self._make_stream() if settings.stream else None
        self._listener = Listener(settings.current_dsn, settings.schema_, self._heard, captured=self.consumer.captured)
        self._page = self._make_page() if settings.http.port and settings.http.page else None
        metrics.registry.register(
            StatusMetrics(settings.slot.name, lambda: self.status, delivery=endpoint_url.HANDLER if delivers else None)
        )

    def _make_page(self) -> StatusPage:
        return StatusPage(
            lambda: self.status,
            self._checks,
            readings=lambda: self._stats_poller.readings,
            failures=lambda: self._failures.all,
            supervisor=self._supervisor,
        )

    def _make_consumer(self, store: Store, error_policy: ErrorPolicy, hooks: Hooks) -> Consumer:
        settings = self._settings
        executor = Executor(
            self._router,
            error_policy=error_policy,
            timeout_s=settings.timeout_s,
            threads=self._threads,
            transactions=self._transactions,
            metrics=self.metrics.handlers,
        )
        demand = HandlerLimits(
            self._router,
            concurrency=settings.concurrency,
            threads=settings.threads,
            transactions=settings.transactions,
            breakers=self._breakers.of,
        )
        return Consumer(
            _consumer_settings(settings, self.scope), executor=executor, demand=demand, store=store, hooks=hooks,
            metrics=self.metrics,
        )  # fmt: skip

    def _make_observer(self, store: Store) -> Shadow:
        settings = self._settings
        return Shadow(
            ObserverSettings(
                dsn=settings.current_dsn,
                schema=settings.schema_,
                sweep_interval_s=settings.sweep_interval,
                poll_interval_s=settings.poll_interval,
                scope=settings.scope,
            ),
            router=self._router,
            store=store,
            metrics=self.metrics,
        )

    async def run(self) -> None:
        """Until the consumer is stopped, or its first connection is refused."""
        handlers = sorted({handler.name for handler in self._router.handlers.values()})
        log.info("cdc %s; handlers: %s", __version__, ", ".join(handlers) or "none")
        if not self.scope.everything:
            log.info("for %s; changes of other types are left as they are", self.scope)
        if self.scope == NOTHING:
            log.warning("no handler is declared, so nothing is handled: see @router.on")
        with self._serving_health():
            async with self._beside():
                await self.consumer.run()

    @contextlib.contextmanager
    def _serving_health(self) -> Iterator[None]:
        http = self._settings.http
        if http.port == 0:
            yield
            return
        server = HealthServer(
            http.host,
            http.port,
            registry=self.metrics.registry,
            liveness=self.liveness,
            readiness=self.readiness,
            routes=self._page.routes if self._page else None,
            hosts=http.hosts or (),
            supervisor=self._supervisor,
        )
        server.start()
        if self._page:
            self._page.start()
        log.info("metrics on http://%s:%d/metrics%s", http.host, server.port, ", the page on /" if self._page else "")
        try:
            yield
        finally:
            server.stop()
            if self._page:
                self._page.stop(_STOP_S)

    @contextlib.asynccontextmanager
    async def _beside(self) -> AsyncIterator[None]:
        """All that runs beside the consumer."""
        keep, tasks = self._supervisor.keep, list[asyncio.Task[None]]()
        try:
            tasks += [asyncio.create_task(keep(name, run)) for name, run in self._kept()]
            await self._transactions.open()
            if self._delivery and not self._settings.observe:
                breaker = self._breakers.of[endpoint_url.HANDLER]
                self._delivery.open(
                    self.metrics.delivery, breaker, partial(self._breakers.succeeded, endpoint_url.HANDLER)
                )
            yield
        finally:
            for task in tasks:
                task.cancel()
            # All at once: each may have to wait for a link that is silent.
            await asyncio.gather(
                asyncio.wait(tasks, timeout=_STOP_S),
                self._stop_stream(),
                asyncio.to_thread(self._stats_poller.stop, _STOP_S),
                self._transactions.close(_STOP_S),
            )
            if self._delivery:
                await self._delivery.close()
            self._threads.close()

    async def _stop_stream(self) -> None:
        if self._stream and not await asyncio.to_thread(self._stream.stop, _STOP_S):
            log.warning("the stream's thread has not ended within %g s", _STOP_S)

    def _kept(self) -> Iterator[tuple[str, _Run]]:
        """The tasks, by name."""
        yield "loop", self._loop.run
        yield "hooks", self._hooks.run
        yield "threads", self._once_connected(self._start_threads)
        yield "listener", self._once_connected(self._listener.run)
        yield "relay", self._once_connected(self._relay.run)
        if (age_s := self._settings.retention_s) is not None and not self._settings.observe:
            pruning = Pruning(self._settings.current_dsn, self._settings.schema_, age_s, self.metrics.outbox)
            yield "retention", self._once_connected(pruning.run)

    def _once_connected(self, run: _Run) -> _Run:
        async def run_then() -> None:
            await self.consumer.connected.wait()
            await run()

        return run_then

    async def _start_threads(self) -> None:
        self._stats_poller.start()
        if self._stream:
            self._stream.start()
        else:
            log.info("the stream is switched off: changes are found by sweeping")
        await asyncio.Event().wait()

    def _make_stream(self) -> Stream:
        settings = self._settings
        return Stream(
            StreamSettings(
                dsn=settings.current_stream_dsn,
                schema=settings.schema_,
                slot=settings.slot.name,
                plugins=settings.slot.plugins,
                temporary=settings.slot.mode == "temporary",
                create_slot=settings.slot.create,
                recreate_slot=settings.slot.recreate,
                stall_limit_s=self._thresholds.stall_s,
            ),
            StreamBridge(self.consumer, self._relay, self.metrics, self._hooks, changed=self._stats_poller.poll_now),
            self._supervisor,
            exposed=lambda: self.consumer.exposed,
        )

    def _slot_waits_for_standbys(self) -> None:
        """In the collector's thread."""
        if self._stream and self._settings.slot.create and self._settings.slot.recreate:
            self._stream.waits_for_standbys()

    def _heard(self, wakeups: list[WakeUp] | None) -> None:
        if wakeups is None:
            self.consumer.sweep_now()
            return
        self._hooks.woken(wakeups)
        others = self.consumer.relayed(wakeups)
        self.metrics.wakeups.received.labels("notify").inc(len(wakeups) - len(others))

    # --- what others look at ---------------------------------------------------------------------------------------

    @property
    def status(self) -> ProcessStatus:
        """From any thread."""
        return ProcessStatus(
            consumer=self.consumer.status,
            stream=self._stream.status if self._stream else None,
            poller=self._stats_poller.status,
            handlers=self.metrics.handlers.status,
            pools=self._transactions.status,
            breakers=self._breakers.status,
            wakeups=self.metrics.wakeups.status,
            failing_tasks=dict(self._supervisor.failing()),
            loop_last_iteration=self._loop.last_iteration_at,
        )

    def liveness(self) -> list[Check]:
        """From any thread."""
        return health_checks.liveness(self.status, time.monotonic(), self._thresholds)

    def readiness(self) -> list[Check]:
        """From any thread."""
        delivery = endpoint_url.HANDLER if self._delivery else None
        return health_checks.readiness(self.status, time.monotonic(), self._thresholds, delivery=delivery)

    def _checks(self) -> list[Check]:
        return [*self.liveness(), *self.readiness()]


def _the_one(given: Router | None, deliverys: Router | None) -> Router:
    router = given or deliverys
    if router is None or (given and deliverys):
        raise UsageError(
            "a consumer has either a router or deliver_to", hint="pass a cdc.Router, or None and deliver_to=URL"
        )
    return router


def _make_delivery(settings: Settings) -> Delivery:
    try:
        from cdc.http.delivery import Delivery  # noqa: PLC0415 - its library is an extra
    except ModuleNotFoundError as missing:
        if missing.name != "aiohttp":
            raise
        raise UsageError("delivering over HTTP needs aiohttp", hint="pip install 'cdc-consumer[http]'") from None
    deliver = settings.deliver
    assert deliver.to is not None
    return Delivery(
        endpoint_url.parse(deliver.to),
        types=deliver.types or (),
        batch=deliver.batch,
        linger_s=deliver.linger,
        source=deliver.source,
        keys=deliver.keys,
        timeout_s=settings.timeout_s,
    )


def _consumer_settings(settings: Settings, scope: TypeFilter) -> ConsumerSettings:
    return ConsumerSettings(
        dsn=settings.current_dsn,
        schema=settings.schema_,
        concurrency=settings.concurrency,
        transactions=settings.transactions,
        window=settings.window,
        window_bytes=settings.window_bytes,
        drain_time_s=settings.drain_time,
        sweep_interval_s=settings.sweep_interval,
        poll_interval_s=settings.poll_interval,
        scope=scope,
    )


def _as_observer(settings: Settings) -> Settings:
    """With a slot of its own, that goes with it: the configured one is for those who work."""
    name = f"{settings.slot.name[:_SLOT_NAME_PART]}_observe_{secrets.token_hex(4)}"
    slot = settings.slot.model_copy(update={"name": name, "mode": "temporary", "create": True, "recreate": True})
    return settings.model_copy(update={"slot": slot})


def _refuse_unhandled(scope: TypeFilter, router: Router) -> None:
    """A type that is named and that nobody handles would wait for ever: the opposite of what is meant."""
    for entity_type in scope.types if scope.include else ():
        if not router.scope.has(entity_type):
            raise UsageError(
                f"only {entity_type!r}, but no handler wants changes of it", hint="correct --only, or add the handler"
            )
