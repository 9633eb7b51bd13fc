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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from cdc import __version__
from cdc.app.components import SharedStream, build
from cdc.app.config import HttpSection, Settings
from cdc.core import deliveries
from cdc.core.name_template import NameFunction
from cdc.core.router import Router
from cdc.core.subscription import DEFAULT
from cdc.core.type_filter import NOTHING, TypeFilter
from cdc.engine import health_checks
from cdc.engine.consumer_port import ConsumerPort
from cdc.engine.due_changes import DuePublisher
from cdc.engine.health_checks import HealthThresholds
from cdc.engine.retention import Pruning
from cdc.http.server import Check, HealthServer, Routes
from cdc.http.status_page import StatusPage
from cdc.observability.metrics import Metrics
from cdc.observability.snapshots import ProcessStatus
from cdc.postgres.connect import connect
from cdc.postgres.subscriptions import Subscription, Subscriptions
from cdc.runtime.supervisor import Supervisor

log = logging.getLogger("cdc")

_STOP_S = 3.0
_LOOK_UP_S = 10.0
_Run = Callable[[], Coroutine[Any, Any, None]]


async def subscription_of(settings: Settings) -> Subscription | None:
    """The subscription that is named in the settings; None: the default one. Raises NotFoundError."""
    if settings.subscription == DEFAULT:
        return None

    def look_up() -> Subscription:
        with connect(settings.current_dsn, application_name="cdc: subscription", answer_limit_s=_LOOK_UP_S) as found:
            return Subscriptions(settings.schema_).named(found, settings.subscription)

    return await asyncio.to_thread(look_up)


@contextlib.contextmanager
def serving(
    http: HttpSection,
    *,
    registry: CollectorRegistry,
    liveness: Callable[[], list[Check]],
    readiness: Callable[[], list[Check]],
    routes: Routes | None,
    supervisor: Supervisor,
) -> Iterator[None]:
    """Metrics, probes and ``routes`` are answered meanwhile, if a port is set."""
    if http.port == 0:
        yield
        return
    server = HealthServer(
        http.host, http.port, registry=registry, liveness=liveness, readiness=readiness, routes=routes,
        hosts=http.hosts or (), supervisor=supervisor,
    )  # fmt: skip
    server.start()
    log.info("metrics on http://%s:%d/metrics%s", http.host, server.port, ", the page on /" if routes else "")
    try:
        yield
    finally:
        server.stop()


class App:
    """One consumer with its other components. Made on the event loop. ``router`` is None if deliver.to is set.

    ``subscription``: as ``subscription_of`` returns it. ``shared``: of a process with several of these, which
    serves the probes and the page itself; one of them ``leads``. ``name_of``: asked for the names of a delivery.
    """

    def __init__(
        self,
        settings: Settings,
        router: Router | None,
        thresholds: HealthThresholds | None = None,
        *,
        subscription: Subscription | None = None,
        shared: SharedStream | None = None,
        leads: bool = True,
        beside: Sequence[str] = (),
        name_of: NameFunction | None = None,
    ) -> None:
        self._thresholds = thresholds or HealthThresholds()
        self._serves = shared is None
        self.components = parts = build(
            settings, router, stall_limit_s=self._thresholds.stall_s, subscription=subscription, shared=shared,
            leads=leads, name_of=name_of,
        )  # fmt: skip
        self.page = (
            StatusPage(
                lambda: parts.status,
                self._checks,
                readings=lambda: parts.poller.readings,
                failures=lambda: parts.failures.all,
                beside=beside,
                supervisor=parts.supervisor,
            )
            if settings.http.port and settings.http.page
            else None
        )

    @property
    def consumer(self) -> ConsumerPort:
        return self.components.consumer

    @property
    def connected(self) -> bool:
        """Whether it has reached the server once."""
        return self.consumer.lifecycle.connected.is_set()

    def stop(self) -> None:
        """Let what runs finish. On the event loop."""
        self.consumer.stop()

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
        with contextlib.ExitStack() as served:
            if self._serves:
                served.enter_context(serving(
                    self.components.settings.http,
                    registry=self.metrics.registry,
                    liveness=self.liveness,
                    readiness=self.readiness,
                    routes=self.page.routes if self.page else None,
                    supervisor=self.components.supervisor,
                ))  # fmt: skip
            if self.page:
                self.page.start()
                served.callback(self.page.stop, _STOP_S)
            yield

    @contextlib.asynccontextmanager
    async def _running_components(self) -> AsyncIterator[None]:
        """Runs the other components while the consumer works."""
        keep, tasks = self.components.supervisor.keep, list[asyncio.Task[None]]()
        shared, woken = self.components.shared, self.components.woken
        if woken is not None:
            shared.beside.append(woken)
            shared.notified.append(self.components.notified)
            woken.notifications.streaming(connected=shared.stream is not None and shared.stream.status.connected)
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
            if woken is not None:
                shared.beside.remove(woken)
                shared.notified.remove(self.components.notified)
            else:
                for each in shared.beside:
                    each.notifications.streaming(connected=False)
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
        if self.components.listener:
            yield "listener", self._once_connected(self.components.listener.run)
        if looking := self.components.shared.looking:
            yield "look", self._once_connected(partial(looking.for_one, self.components.number))
        yield "relay", self._once_connected(self.components.relay.run)
        settings, leads = self.components.settings, self.components.woken is None
        if self.components.delivery and not settings.observe:
            yield "broker", self._once_connected(self._check_delivery)
        if leads and not settings.observe:
            due = DuePublisher(
                settings.current_dsn, settings.schema_, self.consumer.owns, self.components.shared.no_event_is_due
            )
            yield "due", self._once_connected(due.run)
        if leads and (age_s := settings.retention_s) is not None and not settings.observe:
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
        elif not self.components.shared.stream:
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
