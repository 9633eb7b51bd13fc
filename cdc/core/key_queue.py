"""The queue of one key: its changes in the window. The rules are in ``scheduler``. Pure."""

from __future__ import annotations

from bisect import insort
from collections import deque

from cdc.core.model import Change, Key
from cdc.core.ready_queues import Requirements


class KeyQueue:
    """``running`` is one change, or a batch of successive ones. ``settling``: how many are being settled."""

    __slots__ = ("blocking", "key", "needs", "orphan", "queued", "running", "settling")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.queued: deque[Change] = deque()
        self.running: list[Change] = []
        self.settling = 0
        self.blocking: tuple[int, ...] = ()
        """The numbers of the settling changes that block the key; a batch may end with several."""
        self.orphan = False
        """What runs was started in a session that is lost."""
        self.needs: Requirements | None = None
        """The requirements of the first queued change, when it was last made ready."""

    @property
    def blocked(self) -> bool:
        return bool(self.blocking)

    @property
    def after_settled(self) -> bool:
        """Whether the first queued change is fenced."""
        return self.needs is not None and self.needs.after_settled

    @property
    def startable(self) -> bool:
        """Whether a change may start; a fenced one becomes ready again when the last before it has settled."""
        return bool(self.queued) and not (self.running or self.blocking or (self.settling and self.after_settled))

    @property
    def unfinished(self) -> tuple[Change, ...]:
        """The changes that have not finished."""
        return (*self.running, *self.queued)

    @property
    def last(self) -> Change | None:
        """The last change that has not finished."""
        if self.queued:
            return self.queued[-1]
        return self.running[-1] if self.running else None

    def enqueue(self, change: Change) -> None:
        if self.queued and self.queued[-1].seq > change.seq:
            # Only for a key coarser than the source row: its transactions may commit in another order.
            insort(self.queued, change, key=lambda queued: queued.seq)
        else:
            self.queued.append(change)

    def remove_running(self, change: Change) -> None:
        try:
            self.running.remove(change)
        except ValueError:
            raise AssertionError(f"{change!r} finished but is not running") from None

    def settles(self, seq: int, *, blocks: bool) -> None:
        """A change has finished, and is to be written."""
        self.settling += 1
        if blocks:
            self.blocking += (seq,)

    def blocks_no_more(self, seq: int) -> None:
        """The change is in the table, or will not be written."""
        self.blocking = tuple([one for one in self.blocking if one != seq])
