"""How many places of something bounded each of its users may hold. Pure.

Theory
------
All entity types share the window, the workers, the threads. A fixed part for each would leave most of it idle;
no limit at all would let one slow type take everything. So the limit follows what is free, as in the shared memory of
network switches (dynamic thresholds, Choudhury and Hahne 1998): a user gets one more place while it holds less than
``factor`` times what would then be free. Of n places, one user that takes all it can get holds at most about
n * factor / (1 + factor), and k users that come at the same time n * factor / (1 + k * factor) each. If users come
one after the other and never give anything back, each gets the same part of what is left. In all cases there is room
for the next user, until not one place is left; and a user that holds nothing gets a place as long as there is one.
Limits sink as others come and rise as they go.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple


class Room(NamedTuple):
    """How many more changes of a type the window takes, and from how many on reading a page of them is worth while."""

    free: int
    worth: int


class DynamicLimit:
    """``size`` places. ``sole``: there is one user only, and nothing to keep free for others."""

    def __init__(self, size: int, factor: int, *, sole: bool = False) -> None:
        self.free = size
        self._size = size
        self._factor = factor
        self._sole = sole
        self._held: dict[Hashable, int] = {}

    @property
    def users(self) -> Collection[Any]:
        """The users that hold any places."""
        return self._held.keys()

    def held(self, user: Hashable) -> int:
        return self._held.get(user, 0)

    def admits(self, user: Hashable) -> bool:
        """Whether the user may take one more place now."""
        held = self._held.get(user)
        if self._sole or not held:
            return self.free > 0
        return held < self._factor * (self.free - 1)

    def room(self, user: Hashable) -> int:
        """How many more places the user may take one after the other, if no other user takes any."""
        if self._sole:
            return max(0, self.free)
        held = self._held.get(user, 0)
        # The n-th of them, from 0, is given while held + n < factor * (free - n - 1).
        room = max(0, -((held - self._factor * (self.free - 1)) // (self._factor + 1)))
        return room if held else max(room, min(1, self.free))

    def acquire(self, user: Hashable, places: int = 1) -> None:
        self._held[user] = self._held.get(user, 0) + places
        self.free -= places

    def release(self, user: Hashable, places: int = 1) -> None:
        """These places are free again."""
        left = self._held[user] - places  # as end_use, whose call each change would pay for
        if left:
            self._held[user] = left
        else:
            del self._held[user]
        self.free += places

    def end_use(self, user: Hashable, places: int = 1) -> None:
        """The user needs these places no more, though they are not free yet; ``vacate`` follows."""
        left = self._held[user] - places
        if left:
            self._held[user] = left
        else:
            del self._held[user]

    def vacate(self, places: int = 1) -> None:
        self.free += places

    def clear(self) -> None:
        self._held.clear()
        self.free = self._size
