"""Several consumers of one process, each of a subscription: one stream, one port, and each fails alone.

The first of them *leads*: its stream wakes all, and it does what a process does once, as retention. Each of the others
has sessions, limits, threads and metrics of its own. One that ends by a fault begins again after a pause, while the
others go on; until it works the process is not ready, and says which one it is. One whose subscription is dropped
leaves, unless it is the last; if it led, the next one does. A fault of the settings, or a database that cannot be
reached, is an error at the start, as for one consumer, and nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cdc.app import config
from cdc.app.application import App, serving, subscription_of
from cdc.app.components import SharedStream
from cdc.app.config import Settings
from cdc.core.errors import CdcError, UsageError
from cdc.core.name_template import NameFunction
from cdc.core.router import Router
from cdc.core.subscription import DEFAULT
from cdc.engine.health_checks import HealthThresholds
from cdc.engine.looking import Looking
from cdc.http.server import Check, Routes
from cdc.http.status_page import Answer
from cdc.observability.registries import Registries
from cdc.postgres.subscriptions import Subscription
from cdc.runtime.deadline import wait_within
from cdc.runtime.supervisor import Supervisor

log = logging.getLogger("cdc")

_CANNOT_START = (CdcError, OSError)

Chosen = tuple[Settings, Router | None]
"""The settings of one consumer, which name its subscription, and its router; None: it delivers."""


@dataclass(slots=True, eq=False)
class _One:
    settings: Settings
    router: Router | None
    subscription: Subscription | None
    app: App
    ends: int = 0
    """Faults that have ended it."""

    @property
    def name(self) -> str:
        return self.settings.subscription


class Consumers:
    """``consumers``: of different subscriptions. Made on the event loop, by ``make``."""

    def __init__(
        self,
        consumers: Sequence[tuple[Settings, Router | None, Subscription | None]],
        thresholds: HealthThresholds | None = None,
    ) -> None:
        self._thresholds = thresholds or HealthThresholds()
        first, *_ = consumers
        self._looking = Looking(first[0].current_dsn, first[0].schema_)
        self._shared = SharedStream(sole=False, looking=self._looking)
        self._supervisor = Supervisor()
        self._stopping = asyncio.Event()
        self._pages: dict[str, Callable[[], Answer]] = {}
        # The default one first: it tells of all others, and retention and what is due later are about its columns.
        sorted_ = sorted(consumers, key=lambda each: each[0].subscription != DEFAULT)
        self._names = [settings.subscription for settings, _, _ in sorted_]
        self._ones: list[_One] = []
        """Replaced whole on the event loop, read by any thread."""
        for settings, router, subscription in sorted_:
            app = self._app(settings, router, subscription)
            self._ones.append(_One(settings, router, subscription, app))
        self.registry = Registries(lambda: {one.name: one.app.metrics.registry for one in self._ones})

    @classmethod
    async def make(cls, chosen: Sequence[Chosen], thresholds: HealthThresholds | None = None) -> Consumers:
        """Look the subscriptions up. Raises NotFoundError, ConnectError, UsageError."""
        return cls([(settings, router, await subscription_of(settings)) for settings, router in chosen], thresholds)

    @property
    def apps(self) -> Mapping[str, App]:
        """By subscription, the leading one first, as they are now."""
        return {one.name: one.app for one in self._ones}

    @property
    def connected(self) -> bool:
        """Whether all have reached the server once."""
        return all(one.app.connected for one in self._ones)

    def stop(self) -> None:
        """Let what runs finish. On the event loop."""
        self._stopping.set()
        for one in self._ones:
            one.app.stop()

    async def run(self) -> None:
        """Run until stopped. Raises the error of the first one that cannot start at all."""
        log.info("consumes the subscriptions %s", ", ".join(self._names))
        tasks: list[asyncio.Task[None]] = []
        with self._serving():
            looking = asyncio.create_task(self._supervisor.keep("look", self._looking.run))
            try:
                tasks += [asyncio.create_task(self._keep(one)) for one in self._ones]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                self.stop()
                await asyncio.gather(*tasks, return_exceptions=True)
                looking.cancel()
                await asyncio.wait([looking])

    async def _keep(self, one: _One) -> None:
        """Run it until it is stopped, or leaves; it begins again after a fault of its own, and where it is to lead."""
        at_start = True
        while True:
            began = time.monotonic()
            one.app.consumer.lifecycle.leaves = partial(self._leaves, one)
            try:
                await one.app.run()
            except Exception as error:
                if isinstance(error, _CANNOT_START) and at_start and not one.app.connected:
                    raise
                one.ends += 1
                await wait_within(self._stopping, self._supervisor.failed(f"consumer.{one.name}", began, error))
            if one not in self._ones:
                self._has_left(one)
                return
            if self._stopping.is_set():
                return
            at_start = False
            one.app = self._app(one.settings, one.router, one.subscription)
            for _ in range(one.ends):
                one.app.metrics.process.task_ended("consumer")

    def _leaves(self, one: _One) -> bool:
        """Its subscription was dropped. From now on it is no part of the process, unless it is the last."""
        others = [each for each in self._ones if each is not one]
        self._ones = others or self._ones
        return bool(others)

    def _has_left(self, one: _One) -> None:
        led = self._names[0] == one.name
        self._names.remove(one.name)
        self._pages[_page_of(one)] = self._figures
        log.warning(
            "the subscription %s was dropped, so its consumer has ended, and the others go on; leave it out at the next"
            " start, which is refused otherwise, or create it again and restart this process", one.name,
        )  # fmt: skip
        if led:  # what a process has once is made with its consumer
            self._ones[0].app.stop()

    def _app(self, settings: Settings, router: Router | None, subscription: Subscription | None) -> App:
        return App(
            settings, router, self._thresholds, subscription=subscription, shared=self._shared,
            leads=settings.subscription == self._names[0], beside=self._names,
        )  # fmt: skip

    # --- status for others -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        http = self._ones[0].settings.http
        with serving(
            http, registry=self.registry, liveness=self.liveness, readiness=self.readiness, routes=self._routes(),
            supervisor=self._supervisor,
        ):  # fmt: skip
            yield

    def _routes(self) -> Routes | None:
        """The page of the first one, and the figures of all by name."""
        page = self._ones[0].app.page
        if page is None:
            return None
        named = {_page_of(one): partial(_figures, one) for one in self._ones}
        self._pages = {**page.routes, "/status.json": self._figures, **named}
        return self._pages

    def _figures(self) -> Answer:
        return _figures(self._ones[0])

    def liveness(self) -> list[Check]:
        """From any thread."""
        failing = [
            Check(f"task.{name}", ok=False, detail=f"ended {times} times in a row")
            for name, times in self._supervisor.failing()
        ]
        return [*(check for one in self._ones for check in _named(one, one.app.liveness())), *failing]

    def readiness(self) -> list[Check]:
        """From any thread."""
        return [check for one in self._ones for check in _named(one, one.app.readiness())]


def _page_of(one: _One) -> str:
    return f"/status.json?subscription={one.name}"


def _figures(one: _One) -> Answer:
    assert one.app.page is not None
    return one.app.page.answer()


def _named(one: _One, checks: Sequence[Check]) -> Iterator[Check]:
    return (check._replace(name=f"{one.name}.{check.name}") for check in checks)


async def made(chosen: Sequence[Chosen], name_of: NameFunction | None = None) -> App | Consumers:
    """What runs these consumers. Raises NotFoundError, ConnectError, UsageError."""
    if len(chosen) > 1:
        return await Consumers.make(chosen)
    [(settings, router)] = chosen
    return App(settings, router, subscription=await subscription_of(settings), name_of=name_of)


async def run(
    dsn: str | None,
    router: Router | Mapping[str, Router] | None,
    *,
    deliver_name: NameFunction | None = None,
    **settings: Any,
) -> None:
    """The consumer as a part of one's own asyncio program: works until cancelled, then drains.

    ``router``: a router, or one for each subscription by name, "default" among them. If it is None, ``deliver_to`` is
    required. ``deliver_name``: a function of a change that returns the topic, subject, stream or routing key that it
    goes to, or None for that of the URL; it is called on the event loop. ``settings`` are those of ``cdc run``, with
    the names of its options (``slot_name="billing"``, ``drain_time=5``); the environment and cdc.toml are not read, and
    HTTP is off unless ``http_port`` is given. Raises ConnectError when the database cannot be reached at the start,
    NotFoundError for a subscription that does not exist, UsageError for a setting that does not.
    """
    consumers = await made(_chosen({"http_port": 0, "dsn": dsn, **settings}, router, deliver_name), deliver_name)
    work = asyncio.create_task(consumers.run())
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        consumers.stop()
        await work
        raise


def _chosen(
    options: Mapping[str, Any], router: Router | Mapping[str, Router] | None, name_of: NameFunction | None
) -> list[Chosen]:
    if not isinstance(router, Mapping):
        return [(config.from_options(options), router)]
    if name_of is not None:
        raise UsageError("deliver_name is for a delivery, and there are routers", hint="router=None and deliver_to=URL")
    if not router or "subscription" in options:
        raise UsageError(
            "the routers name their subscriptions" if router else "there is no router",
            hint='cdc.run(dsn, {"default": router, "search": another}), without subscription=',
        )
    return [(config.from_options({**options, "subscription": name}), each) for name, each in router.items()]
