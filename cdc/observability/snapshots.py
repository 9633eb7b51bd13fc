"""The status of each part of a consumer: frozen values that any thread may take.

Made on request: by a scrape, the page, a probe, a test. The work itself pays nothing for them. Times are those of
``time.monotonic()``, in seconds, and None for events that have not happened yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cdc.core.circuit_breaker import BreakerState
from cdc.core.lsn import ZERO, Lsn
from cdc.core.model import ChangeState
from cdc.core.pauses import Pause
from cdc.core.stream_reason import Reason
from cdc.core.subscription import DEFAULT
from cdc.observability.history import Buckets


class Role(StrEnum):
    """Where a consumer's wake-ups come from. OBSERVING: an observer, wherever they come from."""

    STREAMING = "streaming"
    STANDBY = "standby"
    SWEEPING = "sweeping"
    OBSERVING = "observing"


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """Counters cover the life of the Stream. ``reason``: why it is not connected, one of ``Reason``.

    ``stall_limit_s``: the silence that the stream tolerates at present; it grows with a busy server.
    """

    connected: bool = False
    stopped: bool = False
    loop_last_iteration: float = 0.0
    stall_limit_s: float = 0.0
    last_byte_monotonic: float | None = None
    messages: int = 0
    keepalives: int = 0
    bytes: int = 0
    received_lsn: Lsn = ZERO
    confirmed_lsn: Lsn = ZERO
    plugin: str | None = None
    recreated: int = 0
    reason: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """Of a handler's limit over all consumers, what this one has: permits and slots.

    ``put_off``: keys that wait in the table for their turn. ``waits_s``: for how long work has waited without a call.
    """

    permits: int = 0
    slots: int = 0
    put_off: int = 0
    waits_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStatus:
    """``last_iteration``: by the name of a loop. Changes of the window are ``running``, ``queued`` or ``settling``.

    ``live_shards``: those read by number, from wake-ups; ``catching_up``: the others, read from their cursors on.
    ``uncommitted_wakeups``: of changes that no read has shown yet.
    ``held_up_s``: for how long some outcome could not be written, in seconds; ``unread_s``: the same for reading.
    ``pauses``: what is paused, with ages as they were at ``pauses_read_at``. ``limits``: by handler.
    """

    observing: bool = False
    in_service: bool = False
    stopping: bool = False
    answered_at: float | None = None
    last_iteration: Mapping[str, float] = field(default_factory=dict)
    owned_shards: int = 0
    members: int = 0
    running: int = 0
    queued: int = 0
    settling: int = 0
    window: int = 0
    waiting_wakeups: int = 0
    uncommitted_wakeups: int = 0
    live_shards: int = 0
    catching_up: bool = False
    throttled_types: int = 0
    held_up_s: float = 0.0
    unread_s: float = 0.0
    pauses: Sequence[Pause] = ()
    pauses_read_at: float = 0.0
    limits: Mapping[str, LimitStatus] = field(default_factory=dict)

    @property
    def paused(self) -> bool:
        """Everything is, and nothing is begun."""
        return any(pause.scope == "everything" for pause in self.pauses)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Connections of transactional handlers; ``waiting``: handlers that wait for one."""

    busy: int = 0
    idle: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    """``why``: the reason that the last unavailable call gave; "" while it is closed."""

    state: BreakerState = BreakerState.CLOSED
    why: str = ""

    @property
    def rests(self) -> bool:
        return self.state is not BreakerState.CLOSED


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStatus:
    """None: there is no value. A lost slot keeps no WAL, an unlimited one is safe."""

    present: bool
    active: bool = False
    wal_status: str | None = None
    retained_wal_bytes: int | None = None
    confirmed_lag_bytes: int | None = None
    safe_wal_bytes: int | None = None
    catalog_xmin_age: int | None = None
    spilled_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxStatus:
    """Counts end at a bound. ``notify_queue_usage``: of the whole server, 0 to 1.

    ``unhandled``: fresh changes of types that this consumer's settings name and none of its handlers handles.
    ``due_later``: events that are not published yet; None: not known. ``truncate_age_s``: for how long a TRUNCATE has
    held back its type. ``dead_age_s``: how long the oldest dead letter has been dead; 0: there is none.
    """

    changes: Mapping[ChangeState, int]
    oldest_ready_age_s: float
    table_bytes: int
    dead_tuples: int
    blocked_keys: int = 0
    notify_queue_usage: float = 0.0
    unhandled: int = 0
    due_later: int | None = None
    truncate_age_s: float = 0.0
    dead_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TypeStatus:
    """The unprocessed changes of an entity type, by state; counts end at a bound.

    ``oldest_ready_age_s``: of the oldest that could run now, were it not for a pause; 0: there is none.
    """

    name: str
    changes: Mapping[ChangeState, int]
    oldest_ready_age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionStatus:
    """Counts end at a bound. ``held_back``: what retention keeps for it. ``oldest_age_s``: of fresh ones, or 0."""

    name: str
    changes: Mapping[ChangeState, int]
    oldest_age_s: float
    held_back: int
    paused: bool
    consumers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionsStatus:
    """``count``: how many there are beside the default one. ``known``: those of them that figures are shown of."""

    count: int
    known: tuple[SubscriptionStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PollerStatus:
    """The latest figures from the database. A part that could not be read is None, and False in ``success``.

    ``subscriptions`` is None, too, where the role may not see them. ``types``: those of the outbox with the most
    unprocessed changes; none where they could not be read.
    """

    last_iteration_at: float | None = None
    outbox: OutboxStatus | None = None
    types: tuple[TypeStatus, ...] = ()
    slot: SlotStatus | None = None
    slot_waits_for_standbys: bool = False
    subscriptions: SubscriptionsStatus | None = None
    success: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerStatus:
    """``attempts``: by outcome; ``latency``: from the writer's transaction to processed. All since the start."""

    attempts: Mapping[str, int] = field(default_factory=dict)
    errors: int = 0
    latency: Buckets = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """Status of a consumer's whole process. ``stream`` is None if it is switched off; ``wakeups``: by source.

    ``subscription``: the one that it consumes. ``listening``: to wake-ups that another process sends by NOTIFY.

    ``loop_last_iteration``: when the event loop last turned. ``failing_tasks``: how often each has ended in a row.
    """

    subscription: str = DEFAULT
    consumer: ConsumerStatus = field(default_factory=ConsumerStatus)
    stream: StreamStatus | None = field(default_factory=StreamStatus)
    poller: PollerStatus = field(default_factory=PollerStatus)
    handlers: HandlerStatus = field(default_factory=HandlerStatus)
    pools: Mapping[str, PoolStatus] = field(default_factory=dict)
    breakers: Mapping[str, BreakerStatus] = field(default_factory=dict)
    wakeups: Mapping[str, int] = field(default_factory=dict)
    listening: bool = False
    failing_tasks: Mapping[str, int] = field(default_factory=dict)
    loop_last_iteration: float = 0.0

    @property
    def role(self) -> Role:
        if self.consumer.observing:
            return Role.OBSERVING
        if self.stream and self.stream.connected:
            return Role.STREAMING
        busy = self.stream is not None and self.stream.reason == Reason.SLOT_BUSY
        return Role.STANDBY if busy else Role.SWEEPING

    @property
    def not_streaming(self) -> Reason | None:
        """Why this process does not stream: a state that lasts. None: it streams, or its stream was stopped."""
        stream = self.stream
        if stream is None:
            return Reason.DISABLED
        if stream.connected:
            return None
        if stream.reason is not None:
            return Reason(stream.reason).lasting
        return None if stream.stopped else Reason.NETWORK
