"""How many changes of a transactional handler share a transaction. Pure.

Its own transaction costs each change two round trips and a flush of the log; a group shares them. But when one of
a group fails all are rolled back and run again one by one, and the first of a group waits for its last. So the size
follows the handler: it doubles while groups commit, halves when one is rolled back, and stays so small that
the calls of a group should not take longer than ``_LASTS_S``. Only the calls count: the cost of the transaction itself
is what larger groups save, and counting it would keep them small just when a server is slow.

What a change's handler writes to captured tables has that change as its cause. To set the cause on the server for each
change is a round trip that most handlers do not need: it is done once the handler is seen to write there.
"""

from __future__ import annotations

_LASTS_S = 0.1
_WEIGHT = 0.3
"""Weight of the newest figure in the moving average."""


class AdaptiveBatchSize:
    """For one handler. ``most``: changes in a group, at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 1
        self._seconds_each: float | None = None
        self.captured = False
        """The handler's writes have been captured."""

    @property
    def limit(self) -> int:
        """How many changes the next group may have; 1 until the handler is known."""
        if not self._seconds_each:
            return 1
        return max(1, int(min(self._size, _LASTS_S / self._seconds_each)))

    def committed(self, changes: int, seconds: float, *, captured: bool = False) -> None:
        """The calls for ``changes`` changes took ``seconds``."""
        self.captured = self.captured or captured
        each = seconds / changes
        before = each if self._seconds_each is None else self._seconds_each
        self._seconds_each = before + _WEIGHT * (each - before)
        if changes >= self.limit:
            self._size = min(self._most, 2 * self._size)

    def rolled_back(self) -> None:
        """One of a group failed."""
        self._size = max(1, self._size // 2)
