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
from dataclasses import dataclass
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
from cdc.engine.circuit_breakers import Breakers
from cdc.engine.consumer import Consumer, ConsumerSettings
from cdc.engine.error_policy import ErrorPolicy
from cdc.engine.executor import Executor
from cdc.engine.hooks import Hooks
from cdc.engine.retention import Pruning
from cdc.engine.shadow import ObserverSettings, Shadow
from cdc.engine.stats_poller import Collector
from cdc.engine.stream_bridge import StreamBridge
from cdc.engine.thread_pool import Threads
from cdc.engine.transactions import Transactions
from cdc.http import endpoint_url
from cdc.http.server import Check, HealthServer
from cdc.http.status_page import Page
from cdc.observability.metrics import Metrics
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.connect import driver_versions
from cdc.postgres.notify import Listener, Relay
from cdc.postgres.outbox import Store
from cdc.replication.stream import Stream, StreamSettings, StreamStatus
from cdc.runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from cdc.http.delivery import Delivery

log = logging.getLogger("cdc")

_HELD_UP_S = 30.0
"""Marks that cannot be written for longer are somebody\'s business."""

_STOP_S = 3.0
_SHOW_EVERY_S = 1.0
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


@dataclass(frozen=True, slots=True)
class Limits:
    """When a probe fails. ``turn_s`` and ``answer_s``: since a loop has turned, since the database has answered.

    ``stall_s``: the silence after which the stream begins anew; it grows while a server decodes something huge, and
    after ``silences`` times the limit of the moment it is clear that the watchdog itself has failed.
    """

    turn_s: float = 30.0
    answer_s: float = 30.0
    stall_s: float = 30.0
    silences: float = 3.0


class App:
    """One consumer with all that belongs to it. Made on the event loop. ``router`` is None where deliver.to is set."""

    def __init__(self, settings: Settings, router: Router | None, limits: Limits | None = None) -> None:
        if settings.observe:
            settings = _as_observer(settings)
        self._settings = settings
        self._limits = limits or Limits()
        self._delivery = _make_delivery(settings) if settings.deliver.to else None
        router = _the_one(router, self._delivery.router if self._delivery else None)
        self.scope = settings.scope if settings.unhandled == "discard" else settings.scope.within(router.scope)
        """The types whose changes are ours; what only a look is for sees those as well that nobody wants."""
        _refuse_unhandled(settings.scope, router)
        self._router = router
        self._threads = Threads(settings.threads)
        self.metrics = metrics = Metrics(settings.slot.name, router, driver=driver_versions())
        self._supervisor = Supervisor(metrics.task_ended)
        metrics.lanes_capacity.set(settings.window)
        metrics.set_role("sweeping")
        metrics.set_stream("network" if settings.stream else "disabled")
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
        self._page = (
            Page(metrics.registry, self._checks, supervisor=self._supervisor)
            if settings.http.port and settings.http.page
            else None
        )
        self._breakers = Breakers({handler.name for handler in handlers}, metrics)
        error_policy = ErrorPolicy(
            handlers, policy, hooks=hooks, metrics=metrics, breakers=self._breakers,
            failed=self._page.failed if self._page else None,
        )  # fmt: skip
        self.consumer: Consumer | Shadow = (
            self._make_observer(store) if settings.observe else self._make_consumer(store, error_policy, hooks)
        )
        self._relay = Relay(settings.current_dsn, settings.schema_, metrics.relay_notifies.inc)
        self._collector = Collector(
            settings.current_dsn,
            store=store,
            slot=settings.slot.name if settings.stream else None,
            asked=None if self.scope == settings.scope or settings.observe else settings.scope,
            metrics=metrics,
            page=(self._page, OutboxAdmin(settings.schema_)) if self._page else None,
            supervisor=self._supervisor,
            deaf=self._slot_is_deaf,
        )
        self._stream = self._make_stream() if settings.stream else None
        self._listener = Listener(settings.current_dsn, settings.schema_, self._heard, captured=self.consumer.captured)
        self._turned = time.monotonic()
        self._shown = StreamStatus()

    def _make_consumer(self, store: Store, error_policy: ErrorPolicy, hooks: Hooks) -> Consumer:
        settings = self._settings
        executor = Executor(
            self._router,
            error_policy=error_policy,
            timeout_s=settings.timeout_s,
            threads=self._threads,
            transactions=self._transactions,
            metrics=self.metrics,
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
        self.metrics.observing()
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
            liveness=self._liveness,
            readiness=self._readiness,
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
                self._delivery.open(self.metrics, breaker, partial(self._breakers.succeeded, endpoint_url.HANDLER))
            yield
        finally:
            for task in tasks:
                task.cancel()
            # All at once: each may have to wait for a link that is silent.
            await asyncio.gather(
                asyncio.wait(tasks, timeout=_STOP_S),
                self._stop_stream(),
                asyncio.to_thread(self._collector.stop, _STOP_S),
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
        yield "figures", self._show
        yield "hooks", self._hooks.run
        yield "threads", self._once_connected(self._start_threads)
        yield "listener", self._once_connected(self._listener.run)
        yield "relay", self._once_connected(self._relay.run)
        if (age_s := self._settings.retention_s) is not None and not self._settings.observe:
            pruning = Pruning(self._settings.current_dsn, self._settings.schema_, age_s, self.metrics)
            yield "retention", self._once_connected(pruning.run)

    def _once_connected(self, run: _Run) -> _Run:
        async def run_then() -> None:
            await self.consumer.connected.wait()
            await run()

        return run_then

    async def _start_threads(self) -> None:
        self._collector.start()
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
                stall_limit_s=self._limits.stall_s,
            ),
            StreamBridge(
                self.consumer, self._relay, self.metrics, settings.slot.name, changed=self._collector.look_now
            ),
            self._supervisor,
            exposed=self._exposed,
        )

    def _exposed(self) -> bool:
        """An observer marks nothing."""
        return isinstance(self.consumer, Consumer) and self.consumer.crash_guard.exposed

    def _unheard(self) -> str | None:
        """Why no slot rings here, where one should. Work goes on by sweeping, so it is ready all the same."""
        if self._stream is None:
            return None
        return "slot_deaf" if self._collector.slot_is_deaf else self._stream.status.reason

    def _slot_is_deaf(self) -> None:
        """In the collector's thread."""
        if self._stream and self._settings.slot.create and self._settings.slot.recreate:
            self._stream.is_deaf()

    def _heard(self, wakeups: list[WakeUp] | None) -> None:
        if wakeups is None:
            self.consumer.sweep_now()
            return
        others = self.consumer.relayed(wakeups)
        self.metrics.wakeups.labels("notify").inc(len(wakeups) - len(others))

    # --- what others look at ---------------------------------------------------------------------------------------

    async def _show(self) -> None:
        """Bring the gauges up to date, and with each turn prove that the event loop turns."""
        while True:
            self._turned = time.monotonic()
            self.consumer.show_figures()
            self._transactions.show(self.metrics)
            offset = time.time() - time.monotonic()
            for loop, turned in self.consumer.turned.items():
                self.metrics.loop_last_iteration.labels(loop).set(turned + offset)
            if self._stream:
                self._show_stream(self._stream.status, offset)
            await asyncio.sleep(_SHOW_EVERY_S)

    def _show_stream(self, status: StreamStatus, offset: float) -> None:
        slot, metrics, before = self._settings.slot.name, self.metrics, self._shown
        metrics.stream_messages.labels(slot, "change").inc(status.messages - before.messages)
        metrics.stream_messages.labels(slot, "keepalive").inc(status.keepalives - before.keepalives)
        metrics.stream_received_bytes.labels(slot).inc(status.bytes - before.bytes)
        metrics.stream_slot_recreations.labels(slot).inc(status.recreated - before.recreated)
        if status.loop_turned_monotonic:  # it has begun
            metrics.loop_last_iteration.labels("stream").set(status.loop_turned_monotonic + offset)
        if status.last_byte_monotonic is not None:
            metrics.stream_last_byte.labels(slot).set(status.last_byte_monotonic + offset)
        self._shown = status

    def _checks(self) -> list[Check]:
        return [*self._liveness(), *self._readiness()]

    def _liveness(self) -> list[Check]:
        """Called in the health server's threads. Only what a restart would mend: never the database, lag or role."""
        now, limits = time.monotonic(), self._limits
        checks = [_recent("loop.consumer", now - self._turned, limits.turn_s)]
        status = self._stream.status if self._stream else StreamStatus()
        if status.loop_turned_monotonic:  # it has begun
            checks.append(_recent("loop.stream", now - status.loop_turned_monotonic, limits.turn_s))
            if status.connected and status.last_byte_monotonic is not None:
                silence_s = limits.silences * status.stall_limit_s
                checks.append(_recent("stream.last_byte", now - status.last_byte_monotonic, silence_s))
        for name, times in self._supervisor.failing():
            checks.append(Check(f"task.{name}", ok=False, detail=f"ended {times} times in a row"))
        return checks

    def _readiness(self) -> list[Check]:
        answered = self.consumer.answered_at
        observing = [Check("observing", ok=True, detail="runs and marks nothing")] if self._settings.observe else []
        return [
            *observing,
            Check("database", answered is not None and time.monotonic() - answered < self._limits.answer_s,
                  "never answered" if answered is None else f"{time.monotonic() - answered:.1f}s"),
            Check("schema", self.consumer.in_service, "" if self.consumer.in_service else "not there yet"),
            Check("marks", self.consumer.held_up_s < _HELD_UP_S, f"held up for {self.consumer.held_up_s:.1f}s"),
            Check("reads", self.consumer.unread_s < _HELD_UP_S, f"held up for {self.consumer.unread_s:.1f}s"),
            Check("draining", not self.consumer.stopping, "yes" if self.consumer.stopping else "no"),
            *([Check("stream", ok=True, detail=unheard)] if (unheard := self._unheard()) else ()),
            *self._resting(),
        ]  # fmt: skip

    def _resting(self) -> list[Check]:
        """A consumer that delivers has nothing else to do; one of several handlers may rest, and the others work."""
        resting = dict(self._breakers.resting())
        if self._delivery:
            why = resting.get(endpoint_url.HANDLER, "")
            return [Check("application", not why, why)]
        return [Check(f"handler.{name}", ok=True, detail=f"rests: {why}") for name, why in sorted(resting.items())]


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
    for entity_type in scope.types if scope.among else ():
        if not router.scope.has(entity_type):
            raise UsageError(
                f"only {entity_type!r}, but no handler wants changes of it", hint="correct --only, or add the handler"
            )


def _recent(name: str, age_s: float, limit_s: float) -> Check:
    return Check(name, age_s < limit_s, f"{age_s:.1f}s")
