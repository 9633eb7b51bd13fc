"""The lane of one key: its changes in the window. Who may do what with it is told in ``scheduler``. Pure."""

from __future__ import annotations

from bisect import insort
from collections import deque

from cdc.core.model import Change, Key
from cdc.core.ready_queues import Requirements


class KeyQueue:
    """``running`` is one change, or a batch of successive ones. ``settling`` counts."""

    __slots__ = ("holding", "key", "needs", "orphan", "queue", "running", "settling")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.queue: deque[Change] = deque()
        self.running: list[Change] = []
        self.settling = 0
        self.holding = 0
        """How many of those settling hold the key back; a batch may end with several."""
        self.orphan = False
        """What runs was started in a session that is lost."""
        self.needs: Requirements | None = None
        """Of the first queued change, when it was last said to be ready."""

    @property
    def shut(self) -> bool:
        return self.holding > 0

    @property
    def fenced(self) -> bool:
        """Of the first queued change."""
        return self.needs is not None and self.needs.fenced

    @property
    def empty(self) -> bool:
        return not (self.queue or self.running or self.settling)

    @property
    def here(self) -> tuple[Change, ...]:
        """Those that have not finished."""
        return (*self.running, *self.queue)

    def enqueue(self, change: Change) -> None:
        if self.queue and self.queue[-1].seq > change.seq:
            # Only for a key coarser than the source row: its transactions may commit in another order.
            insort(self.queue, change, key=lambda queued: queued.seq)
        else:
            self.queue.append(change)

    def leave_running(self, change: Change) -> None:
        if change not in self.running:
            raise AssertionError(f"{change!r} finished but is not running")
        self.running.remove(change)
