"""What a process requires of its consumer, whether it handles changes or only observes them."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Protocol

from cdc.core.pauses import Pauses
from cdc.core.subscription import DEFAULT as DEFAULT_NAME
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.engine.notifications import Notifications
from cdc.engine.reconnecting import Lifecycle
from cdc.observability.snapshots import ConsumerStatus
from cdc.postgres.connect import Dsn
from cdc.postgres.shard_locks import DEFAULT
from cdc.postgres.shared_look import Seen


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """Durations in seconds. ``window`` and ``concurrency`` count changes, ``transactions`` connections.

    ``subscription``: the number of the one whose changes are handled. ``beside``: consumers of other subscriptions in
    this process, which its stream wakes. ``seen``: what is looked at for all of these together; None: ask yourself.
    """

    dsn: Dsn
    schema: str
    concurrency: int
    transactions: int
    window: int
    window_bytes: int
    drain_time_s: float
    sweep_interval_s: float
    poll_interval_s: float
    scope: TypeFilter = EVERYTHING
    subscription: int = DEFAULT
    beside: Sized = ()
    subscription_name: str = DEFAULT_NAME
    seen: Callable[[], Seen | None] = lambda: None


class ConsumerPort(Protocol):
    """For the event loop, except ``status`` and ``exposed``."""

    lifecycle: Lifecycle
    notifications: Notifications

    @property
    def status(self) -> ConsumerStatus:
        """From any thread."""

    @property
    def pauses(self) -> Pauses:
        """What is paused, as far as this consumer knows; to an observer nothing is. From any thread."""

    def owns(self, shard: int) -> bool:
        """Whether this process owns the shard now; an observer owns none."""

    def exposed(self) -> bool:
        """Whether a change runs that may end the process; from any thread."""

    async def run(self) -> None:
        """Run until stopped. Raises the error when the very first connection is refused."""

    def stop(self) -> None: ...

    def sweep_now(self) -> None:
        """The table changed without a wake-up for each row."""
