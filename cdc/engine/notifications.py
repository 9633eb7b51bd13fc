"""What a consumer is notified of: wake-ups, and what becomes of the stream that brings them.

On the event loop. It goes to the read planner, and ``due`` is set where there may be something to read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set

from prometheus_client import Counter

from cdc.core.model import SHARDS, WakeUp
from cdc.core.read_planner import ReadPlanner
from cdc.runtime.moving_timer import TimedEvent

_SOON_S = 0.05


class Notifications:
    """``owned``: the shards whose changes are read, as they are at each wake-up.

    The outbox is swept every ``sweep_interval_s`` seconds while the stream brings wake-ups, else every
    ``poll_interval_s``.
    """

    def __init__(
        self,
        planner: ReadPlanner,
        dropped: Counter,
        *,
        owned: Set[int],
        sweep_interval_s: float,
        poll_interval_s: float,
    ) -> None:
        self._planner = planner
        self._dropped = dropped
        self._owned = owned
        self._sweep_interval_s = sweep_interval_s
        self._poll_interval_s = poll_interval_s
        self.due = TimedEvent()
        self.relays_all = False
        """Others read the same changes: they are woken for each, also for those of shards that are owned here."""
        self._streams = False

    @property
    def is_sharing(self) -> bool:
        """Whether other consumers own some shards."""
        return self.relays_all or len(self._owned) < SHARDS

    def notified(self, wakeups: Sequence[WakeUp], *, relayed: bool = False) -> Sequence[WakeUp]:
        """Wake-ups have come in from the slot. Returns those that others are to be woken for.

        ``relayed``: they come from the process that streams, or streamed when it sent them.
        """
        if relayed and self._streams and self.relays_all:
            return wakeups  # they were relayed from here
        ours, others, owned = wakeups, list[WakeUp](), self._owned
        if len(owned) < SHARDS:
            ours = [wakeup for wakeup in wakeups if wakeup.shard in owned]
            others = [wakeup for wakeup in wakeups if wakeup.shard not in owned]
        if dropped := self._planner.notified(ours, relayed=relayed):
            self._dropped.inc(dropped)
        if ours:
            self.due.set()
        return wakeups if self.relays_all and not relayed else others

    def captured(self) -> None:
        """Changes were captured, and the notification cannot say which: sweep soon, but not for each of them."""
        self._planner.sweep_by(time.monotonic() + _SOON_S)
        self.due.set()

    def missed(self) -> None:
        """Wake-ups were lost."""
        self._planner.wakeups_lost()
        self.due.set()

    def streaming(self, *, connected: bool) -> None:
        """This process's stream has begun, and earlier wake-ups may be lost; or it has ended."""
        interval_s = self._sweep_interval_s if connected else self._poll_interval_s
        self._streams = connected
        self._planner.interval(interval_s, time.monotonic())
        self._planner.streaming(connected=connected)
        self.due.set()
