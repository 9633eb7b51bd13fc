"""The composition root: settings -> components, all made and connected, and none of them started."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cdc.app.config import Settings
from cdc.app.delivery import make as make_delivery
from cdc.core import deliveries
from cdc.core.backoff import Policy
from cdc.core.errors import UsageError
from cdc.core.handler_limits import HandlerLimits
from cdc.core.model import WakeUp
from cdc.core.name_template import NameFunction
from cdc.core.page_size import BYTES
from cdc.core.router import Router
from cdc.core.subscription import DEFAULT
from cdc.core.type_filter import NOTHING, TypeFilter
from cdc.engine.circuit_breakers import CircuitBreakers
from cdc.engine.consumer import Consumer
from cdc.engine.consumer_port import ConsumerPort, ConsumerSettings
from cdc.engine.error_policy import ErrorPolicy
from cdc.engine.executor import Executor
from cdc.engine.hooks import Hooks
from cdc.engine.looking import Looking
from cdc.engine.shadow import Shadow
from cdc.engine.stats_poller import StatsPoller
from cdc.engine.stream_bridge import StreamBridge, Woken
from cdc.engine.thread_pool import Threads
from cdc.engine.transactions import Transactions
from cdc.observability.failures import RecentFailures
from cdc.observability.metrics import Metrics
from cdc.observability.snapshots import ProcessStatus
from cdc.observability.status_metrics import StatusMetrics
from cdc.postgres import shard_locks
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.connect import driver_versions
from cdc.postgres.controls import Controls
from cdc.postgres.due import DueChanges
from cdc.postgres.notify import Listener, Relay
from cdc.postgres.outbox import Store
from cdc.postgres.shared_look import Seen
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscription_admin import SubscriptionAdmin
from cdc.postgres.subscriptions import Subscription, Subscriptions
from cdc.replication.stream import Stream, StreamSettings
from cdc.runtime.loop_watch import LoopWatch
from cdc.runtime.sockets import sockets_of
from cdc.runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from cdc.brokers.delivery import BrokerDelivery
    from cdc.http.delivery import Delivery

_SLOT_NAME_PART = 40
"""Of a name of up to 63 characters, so that a suffix fits."""
_SUBSCRIPTION_SCAN = 100
"""Changes of a subscription that its figures look at, of each shard."""


class Notified(NamedTuple):
    """What a consumer does with wake-ups, or None for "sweep now"; and when something was captured."""

    received: Callable[[list[WakeUp] | None], None]
    captured: Callable[[], None]


@dataclass(slots=True)
class SharedStream:
    """What reads the slot for all consumers of a process; None: it is switched off. ``beside``: who else is woken.

    ``sole``: there is one consumer only. ``looking``: what looks for all of several. ``listener``: that of who leads,
    which calls those of ``notified``, too.
    """

    sole: bool = True
    stream: Stream | None = None
    leading: Woken | None = None
    beside: list[Woken] = field(default_factory=list)
    looking: Looking | None = None
    notified: list[Notified] = field(default_factory=list)
    listener: Listener | None = None

    def seen(self) -> Seen | None:
        """What was looked at for all; from any thread."""
        return self.looking.seen if self.looking else None

    def no_event_is_due(self) -> bool:
        """Whether it is known that none is to be published."""
        seen = self.seen()
        return seen is not None and seen.no_event_is_due

    def exposed(self) -> bool:
        """Whether a change runs that may end the process; from any thread."""
        for each in self.beside:
            if each.exposed():
                return True
        return self.leading is not None and self.leading.exposed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """``settings``: as they are used. ``scope``: the types that this consumer handles.

    ``woken`` is None for the consumer whose components run what a process needs once: the stream, retention, what is
    due later, and listening: ``listener`` is None for the others. ``number``: that of the subscription. ``delivery`` is
    None if handlers are functions.
    """

    settings: Settings
    router: Router
    scope: TypeFilter
    metrics: Metrics
    supervisor: Supervisor
    threads: Threads
    hooks: Hooks
    transactions: Transactions
    breakers: CircuitBreakers
    failures: RecentFailures
    loop: LoopWatch
    consumer: ConsumerPort
    relay: Relay
    listener: Listener | None
    notified: Notified
    number: int
    poller: StatsPoller
    shared: SharedStream
    woken: Woken | None
    delivery: Delivery | BrokerDelivery | None

    @property
    def stream(self) -> Stream | None:
        """The one that these components run; None also if another consumer's do."""
        return self.shared.stream if self.woken is None else None

    @property
    def status(self) -> ProcessStatus:
        """From any thread."""
        return ProcessStatus(
            subscription=self.settings.subscription,
            consumer=self.consumer.status,
            stream=self.shared.stream.status if self.shared.stream else None,
            poller=self.poller.status,
            handlers=self.metrics.handlers.status,
            pools=self.transactions.status,
            breakers=self.breakers.status,
            wakeups=self.metrics.wakeups.status,
            listening=self.shared.listener is not None and self.shared.listener.connected,
            failing_tasks=dict(self.supervisor.failing()),
            loop_last_iteration=self.loop.last_iteration_at,
        )


def build(
    settings: Settings,
    router: Router | None,
    *,
    stall_limit_s: float,
    subscription: Subscription | None = None,
    shared: SharedStream | None = None,
    leads: bool = True,
    name_of: NameFunction | None = None,
) -> Components:
    """On the event loop. ``router`` is None if deliver.to is set. Raises UsageError if these do not fit.

    ``stall_limit_s``: the silence after which the stream reconnects. ``subscription``: the one that is named in the
    settings, if that is not the default one. ``shared``: where a process has several consumers, of which one ``leads``.
    """
    shared = shared or SharedStream()
    if settings.observe:
        settings = _as_observer(settings)
    delivery = make_delivery(settings, name_of)
    router = _the_one(router, delivery.router if delivery else None)
    scope = _scope(settings, router, subscription)
    delivers = delivery is not None and not settings.observe
    metrics = Metrics(settings.slot.name, router, driver=driver_versions(), delivers=delivers)
    supervisor = Supervisor(metrics.process.task_ended)
    store = _store(settings, scope, subscription, shared.seen)
    threads, hooks, failures = Threads(settings.threads), Hooks(router), RecentFailures()
    transactions = _transactions(settings, router, store)
    breakers = CircuitBreakers({handler.name for handler in router.handlers.values()})
    policy = _error_policy(settings, router, metrics, hooks=hooks, breakers=breakers, failures=failures)
    executor = Executor(
        router, error_policy=policy, timeout_s=settings.timeout_s, threads=threads, transactions=transactions,
        metrics=metrics.handlers,
    )  # fmt: skip
    consumer: ConsumerPort = (
        Shadow(_consumer_settings(settings, settings.scope, None, shared), router=router, store=store, metrics=metrics)
        if settings.observe
        else Consumer(
            _consumer_settings(settings, scope, subscription, shared), executor=executor,
            demand=_limits(settings, router, breakers), store=store, hooks=hooks, metrics=metrics,
        )
    )  # fmt: skip
    relay = Relay(settings.current_dsn, settings.schema_, metrics.wakeups.relayed.inc)
    woken = Woken(consumer.notifications, hooks, metrics, consumer.exposed)
    if leads:
        shared.leading = woken
        bridge = StreamBridge(woken, relay, changed=lambda: poller.poll_now(), beside=shared.beside)  # noqa: PLW0108 - made below
        shared.stream = _stream(settings, bridge, supervisor, shared, stall_limit_s) if settings.stream else None
    poller = _poller(settings, scope, store, supervisor, shared, subscription, consumer=consumer, leads=leads)
    notified = _notified(consumer, hooks, metrics)
    listener = shared.listener = _listener(settings, notified, shared) if leads else shared.listener
    components = Components(
        settings=settings, router=router, scope=scope, metrics=metrics, supervisor=supervisor, threads=threads,
        hooks=hooks, transactions=transactions, breakers=breakers, failures=failures, loop=LoopWatch(),
        consumer=consumer, relay=relay, listener=listener if leads else None, notified=notified, poller=poller,
        number=subscription.number if subscription else shard_locks.DEFAULT, shared=shared,
        woken=None if leads else woken, delivery=delivery,
    )  # fmt: skip
    metrics.registry.register(_status_metrics(components, delivers=delivers))
    return components


def _stream(
    settings: Settings, bridge: StreamBridge, supervisor: Supervisor, shared: SharedStream, stall_limit_s: float
) -> Stream:
    chosen, sockets = _stream_settings(settings, stall_limit_s), sockets_of(asyncio.get_running_loop())
    return Stream(chosen, bridge, supervisor, exposed=shared.exposed, sockets=sockets)


def _status_metrics(components: Components, *, delivers: bool) -> StatusMetrics:
    names = {each for kind, handler in components.router.handlers.items() for each in (kind[0], handler.name)}
    name = deliveries.HANDLER if delivers else None
    return StatusMetrics(components.settings.slot.name, lambda: components.status, delivery=name, names=names)


def _scope(settings: Settings, router: Router, subscription: Subscription | None) -> TypeFilter:
    """The types that this consumer handles."""
    asked = settings.scope
    if subscription:
        _refuse_for_subscription(settings, router, subscription)
        asked = asked if subscription.types is None else TypeFilter(subscription.types, include=True)
    _refuse_unhandled(settings.scope, router)
    return asked if settings.unhandled == "discard" else asked.within(router.scope)


def _store(
    settings: Settings, scope: TypeFilter, subscription: Subscription | None, seen: Callable[[], Seen | None]
) -> Store:
    """An observer also reads the types that no handler names."""
    read = settings.scope if settings.observe else scope
    page_bytes = min(BYTES, settings.window_bytes)
    if subscription:
        return SubscriptionStore(
            settings.schema_, subscription, settings.max_chain_depth, read, page_bytes=page_bytes, seen=seen
        )
    return Store(settings.schema_, settings.max_chain_depth, read, page_bytes=page_bytes, observes=settings.observe)


def _transactions(settings: Settings, router: Router, store: Store) -> Transactions:
    dsn = settings.handlers_dsn.get_secret_value if settings.handlers_dsn else settings.current_dsn
    pooled = settings.handlers_dsn is not None
    return Transactions(dsn, store, settings.transactions, router.handlers.values(), pooled=pooled)


def _error_policy(
    settings: Settings,
    router: Router,
    metrics: Metrics,
    *,
    hooks: Hooks,
    breakers: CircuitBreakers,
    failures: RecentFailures,
) -> ErrorPolicy:
    return ErrorPolicy(
        router.handlers.values(),
        Policy(settings.max_attempts, settings.backoff.base, settings.backoff.cap),
        hooks=hooks,
        metrics=metrics.handlers,
        breakers=breakers,
        failed=failures.add,
    )


def _limits(settings: Settings, router: Router, breakers: CircuitBreakers) -> HandlerLimits:
    return HandlerLimits(
        router,
        concurrency=settings.concurrency,
        threads=settings.threads,
        transactions=settings.transactions,
        breakers=breakers.of,
        clock=time.monotonic,
    )


def _stream_settings(settings: Settings, stall_limit_s: float) -> StreamSettings:
    return StreamSettings(
        dsn=settings.current_stream_dsn,
        schema=settings.schema_,
        slot=settings.slot.name,
        plugins=settings.slot.plugins,
        temporary=settings.slot.mode == "temporary",
        create_slot=settings.slot.create,
        recreate_slot=settings.slot.recreate,
        stall_limit_s=stall_limit_s,
    )


def _admin(settings: Settings, subscription: Subscription | None) -> OutboxAdmin:
    return SubscriptionAdmin(settings.schema_, subscription) if subscription else OutboxAdmin(settings.schema_)


def _poller(  # noqa: PLR0917 - one of each
    settings: Settings,
    scope: TypeFilter,
    store: Store,
    supervisor: Supervisor,
    shared: SharedStream,
    subscription: Subscription | None,
    *,
    consumer: ConsumerPort,
    leads: bool,
) -> StatsPoller:
    may_recreate, stream = settings.slot.create and settings.slot.recreate, shared.stream if leads else None
    # The default one tells of all: of a subscription without a consumer no other would. So does the first of several.
    shown = subscription.number if subscription and shared.sole else None
    subscriptions = Subscriptions(settings.schema_)
    return StatsPoller(
        settings.current_dsn,
        store=store,
        due=DueChanges(settings.schema_),
        pauses=lambda: consumer.pauses,
        oldest_ready_age_s=store.oldest_ready_age_s
        if isinstance(store, SubscriptionStore)
        else partial(Controls(settings.schema_).oldest_ready_age_s, scope=store.scope),
        slot=settings.slot.name if stream else None,
        asked=None
        if scope == settings.scope or settings.observe or settings.subscription != DEFAULT
        else settings.scope,
        types=_admin(settings, subscription) if settings.http.port else None,
        subscriptions=(lambda connection: subscriptions.figures(connection, shown, _SUBSCRIPTION_SCAN))
        if leads
        else None,
        supervisor=supervisor,
        state=store.known.state if isinstance(store, SubscriptionStore) and not leads else lambda: None,
        standbys_away=stream.waits_for_standbys if stream and may_recreate else lambda: None,
    )


def _listener(settings: Settings, own: Notified, shared: SharedStream) -> Listener:
    def received(wakeups: list[WakeUp] | None) -> None:
        for each in (own, *shared.notified):
            each.received(wakeups)

    def captured() -> None:
        for each in (own, *shared.notified):
            each.captured()

    return Listener(settings.current_dsn, settings.schema_, received, captured=captured)


def _notified(consumer: ConsumerPort, hooks: Hooks, metrics: Metrics) -> Notified:
    notifications, count = consumer.notifications, metrics.wakeups.received.labels("notify")

    def received(wakeups: list[WakeUp] | None) -> None:
        """None: the table has changed, and it is not known where."""
        if wakeups is None:
            consumer.sweep_now()
            return
        hooks.woken(wakeups)
        others = notifications.notified(wakeups, relayed=True)
        count.inc(len(wakeups) - len(others))

    return Notified(received, notifications.captured)


def _the_one(given: Router | None, deliverys: Router | None) -> Router:
    router = given or deliverys
    if router is None or (given and deliverys):
        raise UsageError(
            "a consumer has either a router or deliver_to", hint="pass a cdc.Router, or None and deliver_to=URL"
        )
    return router


def _consumer_settings(
    settings: Settings, scope: TypeFilter, subscription: Subscription | None, shared: SharedStream
) -> ConsumerSettings:
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
        subscription=subscription.number if subscription else shard_locks.DEFAULT,
        beside=shared.beside,
        subscription_name=settings.subscription,
        seen=shared.seen,
    )


def _as_observer(settings: Settings) -> Settings:
    """With a slot of its own, dropped with the observer: the configured one is for consumers that handle changes."""
    name = f"{settings.slot.name[:_SLOT_NAME_PART]}_observe_{secrets.token_hex(4)}"
    slot = settings.slot.model_copy(update={"name": name, "mode": "temporary", "create": True, "recreate": True})
    return settings.model_copy(update={"slot": slot})


def _refuse_for_subscription(settings: Settings, router: Router, subscription: Subscription) -> None:
    """What no handler wants is nothing to a subscription: its position passes it, for good.

    So all of its consumers must want the same, and what it names in particular.
    """
    unhandled = [each for each in subscription.types or () if not router.scope.has(each)]
    if settings.unhandled != "discard" and (unhandled or router.scope == NOTHING):
        taken = ", ".join(map(repr, unhandled)) or subscription.taking
        raise UsageError(
            f"the subscription {subscription.name} takes {taken}, but no handler wants changes of it: they would be"
            " passed, and no later version would get them",
            hint="add the handler, or router.ignore(...); other types are a drop and a create",
        )
    if settings.only or settings.except_:
        raise UsageError(
            "the consumers of a subscription take the same types, and so --only and --except are not for them",
            hint="cdc subscription create NAME --type TYPE; another subscription for the other types",
        )
    if settings.observe:
        raise UsageError("a subscription cannot be observed", hint="leave out --observe, or --subscription")


def _refuse_unhandled(scope: TypeFilter, router: Router) -> None:
    """Changes of a type that is named and has no handler would wait for ever: the opposite of what is meant."""
    for entity_type in scope.types if scope.include else ():
        if not router.scope.has(entity_type):
            raise UsageError(
                f"only {entity_type!r}, but no handler wants changes of it", hint="correct --only, or add the handler"
            )
