"""A consumer's process: the order in which its components start and stop, and its status for others.

start   health, so that a slow start can be seen; stats; consumer; listener; stream
stop    consumer (starts nothing more, drains, settles), then the others, health last
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from cdc import __version__
from cdc.app import config
from cdc.app.components import build
from cdc.app.config import Settings
from cdc.core import deliveries
from cdc.core.router import Router
from cdc.core.subscription import DEFAULT
from cdc.core.type_filter import NOTHING, TypeFilter
from cdc.engine import health_checks
from cdc.engine.consumer_port import ConsumerPort
from cdc.engine.due_changes import DuePublisher
from cdc.engine.health_checks import HealthThresholds
from cdc.engine.retention import Pruning
from cdc.http.server import Check, HealthServer
from cdc.http.status_page import StatusPage
from cdc.observability.metrics import Metrics
from cdc.observability.snapshots import ProcessStatus
from cdc.postgres.connect import connect
from cdc.postgres.subscriptions import Subscription, Subscriptions

log = logging.getLogger("cdc")

_STOP_S = 3.0
_LOOK_UP_S = 10.0
_Run = Callable[[], Coroutine[Any, Any, None]]


async def run(dsn: str | None, router: Router | None, **settings: Any) -> None:
    """The consumer as a part of one's own asyncio program: works until cancelled, then drains.

    ``settings`` are those of ``cdc run``, with the names of its options (``slot_name="billing"``, ``drain_time=5``);
    the environment and cdc.toml are not read, and HTTP is off unless ``http_port`` is given. Raises ConnectError when
    the database cannot be reached at the start, UsageError for a setting that does not exist. If ``router`` is None,
    ``deliver_to`` is required.
    """
    chosen = config.from_options({"http_port": 0, "dsn": dsn, **settings})
    app = App(chosen, router, subscription=await subscription_of(chosen))
    work = asyncio.create_task(app.run())
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        app.consumer.stop()
        await work
        raise


async def subscription_of(settings: Settings) -> Subscription | None:
    """The subscription that is named in the settings; None: the default one. Raises NotFoundError."""
    if settings.subscription == DEFAULT:
        return None

    def look_up() -> Subscription:
        with connect(settings.current_dsn, application_name="cdc: subscription", answer_limit_s=_LOOK_UP_S) as found:
            return Subscriptions(settings.schema_).named(found, settings.subscription)

    return await asyncio.to_thread(look_up)


class App:
    """One consumer with its other components. Made on the event loop. ``router`` is None if deliver.to is set.

    ``subscription``: as ``subscription_of`` returns it.
    """

    def __init__(
        self,
        settings: Settings,
        router: Router | None,
        thresholds: HealthThresholds | None = None,
        *,
        subscription: Subscription | None = None,
    ) -> None:
        self._thresholds = thresholds or HealthThresholds()
        self.components = parts = build(
            settings, router, stall_limit_s=self._thresholds.stall_s, subscription=subscription
        )
        self._page = (
            StatusPage(
                lambda: parts.status,
                self._checks,
                readings=lambda: parts.poller.readings,
                failures=lambda: parts.failures.all,
                supervisor=parts.supervisor,
            )
            if settings.http.port and settings.http.page
            else None
        )

    @property
    def consumer(self) -> ConsumerPort:
        return self.components.consumer

    @property
    def metrics(self) -> Metrics:
        return self.components.metrics

    @property
    def scope(self) -> TypeFilter:
        """The types that this consumer handles; an observer also reads those that no handler names."""
        return self.components.scope

    @property
    def status(self) -> ProcessStatus:
        """From any thread."""
        return self.components.status

    async def run(self) -> None:
        """Run until the consumer is stopped, or its first connection is refused."""
        handlers = sorted({handler.name for handler in self.components.router.handlers.values()})
        log.info("cdc %s; handlers: %s", __version__, ", ".join(handlers) or "none")
        if not self.scope.everything:
            others = "left as they are" if self.components.settings.subscription == DEFAULT else "passed, for good"
            log.info("for %s; changes of other types are %s", self.scope, others)
        if self.scope == NOTHING:
            log.warning("no handler is declared, so nothing is handled: see @router.on")
        with self._watching_loop(), self._serving_health():
            async with self._running_components():
                await self.consumer.run()

    @contextlib.contextmanager
    def _watching_loop(self) -> Iterator[None]:
        keep, loop = self.components.supervisor.keep_here, self.components.loop
        thread = threading.Thread(target=keep, args=("watch", loop.watch, loop.stopping), name="cdc-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            loop.stopping.set()
            thread.join(_STOP_S)

    @contextlib.contextmanager
    def _serving_health(self) -> Iterator[None]:
        http = self.components.settings.http
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
            supervisor=self.components.supervisor,
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
    async def _running_components(self) -> AsyncIterator[None]:
        """Runs the other components while the consumer works."""
        keep, tasks = self.components.supervisor.keep, list[asyncio.Task[None]]()
        try:
            tasks += [asyncio.create_task(keep(name, run)) for name, run in self._kept()]
            await self.components.transactions.open()
            if self.components.delivery and not self.components.settings.observe:
                breaker = self.components.breakers.of[deliveries.HANDLER]
                self.components.delivery.open(
                    self.metrics.delivery, breaker, partial(self.components.breakers.succeeded, deliveries.HANDLER)
                )
            yield
        finally:
            for task in tasks:
                task.cancel()
            # All at once: each may have to wait for a silent connection.
            await asyncio.gather(
                asyncio.wait(tasks, timeout=_STOP_S),
                self._stop_stream(),
                asyncio.to_thread(self.components.poller.stop, _STOP_S),
                self.components.transactions.close(_STOP_S),
            )
            if self.components.delivery:
                await self.components.delivery.close()
            self.components.threads.close()

    async def _stop_stream(self) -> None:
        if self.components.stream and not await asyncio.to_thread(self.components.stream.stop, _STOP_S):
            log.warning("the stream's thread has not ended within %g s", _STOP_S)

    def _kept(self) -> Iterator[tuple[str, _Run]]:
        """The tasks, by name."""
        yield "loop", self.components.loop.run
        yield "hooks", self.components.hooks.run
        yield "threads", self._once_connected(self._start_threads)
        yield "listener", self._once_connected(self.components.listener.run)
        yield "relay", self._once_connected(self.components.relay.run)
        settings = self.components.settings
        if self.components.delivery and not settings.observe:
            yield "broker", self._once_connected(self._check_delivery)
        if not settings.observe:
            due = DuePublisher(settings.current_dsn, settings.schema_, self.consumer.owns)
            yield "due", self._once_connected(due.run)
        if (age_s := settings.retention_s) is not None and not settings.observe:
            pruning = Pruning(settings.current_dsn, settings.schema_, age_s, self.metrics.outbox)
            yield "retention", self._once_connected(pruning.run)

    def _once_connected(self, run: _Run) -> _Run:
        async def run_then() -> None:
            await self.consumer.lifecycle.connected.wait()
            await run()

        return run_then

    async def _start_threads(self) -> None:
        self.components.poller.start()
        if self.components.stream:
            self.components.stream.start()
        else:
            log.info("the stream is switched off: changes are found by sweeping")
        await asyncio.Event().wait()

    async def _check_delivery(self) -> None:
        assert self.components.delivery is not None
        await self.components.delivery.check()
        await asyncio.Event().wait()

    # --- status for others -----------------------------------------------------------------------------------------

    def poll_now(self, *, everything: bool = False) -> None:
        """Read the figures from the database at once. From any thread. ``everything``: also those on their pause."""
        self.components.poller.poll_now(everything=everything)

    def liveness(self) -> list[Check]:
        """From any thread."""
        return health_checks.liveness(self.status, time.monotonic(), self._thresholds)

    def readiness(self) -> list[Check]:
        """From any thread."""
        delivery = deliveries.HANDLER if self.components.delivery else None
        return health_checks.readiness(self.status, time.monotonic(), self._thresholds, delivery=delivery)

    def _checks(self) -> list[Check]:
        return [*self.liveness(), *self.readiness()]
