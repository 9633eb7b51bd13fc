"""From the stream to the event loop: wake-ups, and the state of the stream.

What the event loop reads itself is there at once, unless something that the thread has read is still on its way:
wake-ups stay in their order. What crosses from the thread is bounded. A server can send wake-ups many times faster than
changes are handled; those that the loop has not taken yet count, and beyond the bound wake-ups are dropped and a sweep
finds their changes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cdc.core.errors import StreamError
from cdc.core.model import WakeUp
from cdc.engine.hooks import Hooks
from cdc.engine.notifications import Notifications
from cdc.observability.metrics import Metrics
from cdc.postgres.notify import Relay

_CROSSING_MAX = 20_000


class Woken(NamedTuple):
    """What is woken for one consumer: its reads, and the hooks of its handlers.

    ``exposed``: whether a change of it runs that may end the process; from any thread.
    """

    notifications: Notifications
    hooks: Hooks
    metrics: Metrics
    exposed: Callable[[], bool] = lambda: False


class StreamBridge:
    """The ``StreamEvents`` of a consumer. Made on the event loop; its public methods run there or in the thread.

    ``beside``: the consumers of other subscriptions in this process, as they are at each event. They are woken here,
    and need no NOTIFY.
    """

    def __init__(
        self,
        ours: Woken,
        relay: Relay,
        *,
        changed: Callable[[], None],
        beside: Sequence[Woken] = (),
    ) -> None:
        self._notifications = ours.notifications
        self._relay = relay
        self._changed = changed
        self._metrics = ours.metrics
        self._hooks = ours.hooks
        self._beside = beside
        self._received = ours.metrics.wakeups.received.labels("wal")
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._lock = threading.Lock()
        self._on_their_way = 0
        """Calls; the next one does not overtake them."""
        self._crossing = 0
        """Wake-ups of theirs."""
        self._dropped = 0

    def streaming(self) -> None:
        self._cross(self._streaming)

    def notified(self, wakeups: Sequence[WakeUp], committed_at: float | None) -> None:
        latency_s = None if committed_at is None else time.time() - committed_at
        if not self._on_their_way and threading.get_ident() == self._loop_thread:  # _is_there, without a call
            self._notified(wakeups, latency_s)
            return
        with self._lock:
            full = self._crossing + len(wakeups) > _CROSSING_MAX
            if full:
                self._dropped += len(wakeups)
            else:
                self._crossing += len(wakeups)
        if not full:
            self._cross(self._crossed, wakeups, latency_s)

    def interrupted(self, error: StreamError) -> None:
        self._cross(self._interrupted, error.reason)

    @property
    def _is_there(self) -> bool:
        """This is the event loop, and nothing is on its way to it."""
        return not self._on_their_way and threading.get_ident() == self._loop_thread

    def _cross(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._is_there:
            call(*arguments)
            return
        with self._lock:
            self._on_their_way += 1
        try:
            self._loop.call_soon_threadsafe(self._arrive, call, arguments)
        except RuntimeError:  # the loop has been closed: the process is ending
            return

    # --- on the event loop -----------------------------------------------------------------------------------------

    def _arrive(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        with self._lock:
            self._on_their_way -= 1
        call(*arguments)

    def _streaming(self) -> None:
        self._notifications.streaming(connected=True)
        for each in self._beside:
            each.notifications.streaming(connected=True)
        self._changed()

    def _crossed(self, wakeups: Sequence[WakeUp], latency_s: float | None) -> None:
        with self._lock:
            self._crossing -= len(wakeups)
            dropped, self._dropped = self._dropped, 0
        self._notified(wakeups, latency_s)
        if dropped:
            self._metrics.wakeups.dropped.inc(dropped)
            self._notifications.missed()
            for each in self._beside:
                each.notifications.missed()
            if self._notifications.is_sharing:
                self._relay.missed()

    def _notified(self, wakeups: Sequence[WakeUp], latency_s: float | None) -> None:
        self._received.inc(len(wakeups))
        if latency_s is not None:
            self._metrics.wakeups.latency.observe(latency_s if latency_s > 0.0 else 0.0)
        if self._hooks.for_wakeups:
            self._hooks.woken(wakeups)
        if others := self._notifications.notified(wakeups):
            self._relay.offer(others)
        for each in self._beside:
            each.metrics.wakeups.received.labels("wal").inc(len(wakeups))
            if each.hooks.for_wakeups:
                each.hooks.woken(wakeups)
            each.notifications.notified(wakeups)

    def _interrupted(self, reason: str) -> None:
        self._metrics.stream.disconnected(reason)
        self._notifications.streaming(connected=False)
        for each in self._beside:
            each.notifications.streaming(connected=False)
