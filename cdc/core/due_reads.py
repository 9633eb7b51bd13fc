"""When to read waiting changes that are due, and which of their types. Pure: time is an argument.

Theory
------
A read visits the waiting types one after the other, and says when the next change of these will be due. One read visits
some types only; the next one goes on *from* there, at once, until all were visited. It *rests* between two, so that
other reads get their time.

A type with little room is *left out*: the same rows would be read again and again. It is read once in an interval, or
when it has room. While the whole window has little room, so are all. A type that a pause holds is left out until it is
resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import inf

_REST, _REST_MAX_S = 4, 1.0
"""The pause between two reads, in times as long as the first one took; up to a limit, since that may include a time in
which this process was stopped, or the table locked."""


class DueReads:
    """``poll_interval_s`` holds for types that are left out, ``sweep_interval_s`` for all others.

    ``room_for``: how many changes of a type can be taken in, and from how many on reading them is worth while.
    ``holds``: whether a type is held, and so has no room.
    """

    def __init__(
        self,
        room_for: Callable[[str], tuple[int, int]],
        *,
        sweep_interval_s: float,
        poll_interval_s: float,
        holds: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._room_for = room_for
        self._holds = holds
        self._sweep_interval_s = sweep_interval_s
        self._poll_interval_s = poll_interval_s
        self.start: int | None = None
        """Where the next read goes on; None: at the first type."""
        self._at = self._rests_until = self._began = 0.0
        self._next_due_at = inf
        """When the next change of the types read so far will be due."""
        self.left_out: Collection[str] = ()
        """The types that wait for room."""

    def within(self, seconds: float, now: float) -> None:
        """Read after this many seconds at the latest."""
        self._at = min(self._at, now + seconds)

    def next_at(self, now: float, *, scarce: bool) -> float:
        """When to read. ``scarce``: the window has little room."""
        at = self._at if self.start is None else now
        for entity_type in self.left_out:
            free, worth = self._room_for(entity_type)
            if free >= worth:
                at = now
        if at < self._rests_until:
            at = self._rests_until
        return max(at, self._began + self._poll_interval_s) if scarce else at

    def begin(self, now: float, types: Collection[str]) -> Collection[str]:
        """A read begins. ``types``: those in the window. Returns the types to leave out."""
        long_ago = now - self._began >= self._poll_interval_s
        known = {*types, *filter(self._holds, self.left_out)}
        rooms = {entity_type: self._room_for(entity_type) for entity_type in known}
        self.left_out = [name for name, (free, worth) in rooms.items() if free < (1 if long_ago else worth)]
        self._began = now
        if self.start is None:
            self._at = inf  # what settles meanwhile may bring it forward, until all types were read
        return self.left_out

    def done(
        self, now: float, *, rejected: Collection[str], next_due_s: float | None, go_on: int | None, more: bool
    ) -> None:
        """The answer: types without room, the next due time, where to go on, and whether more is due already."""
        self.left_out = {*self.left_out, *rejected}
        if more:
            self.within(0.0, now)
        if next_due_s is not None:
            self._next_due_at = min(self._next_due_at, now + next_due_s)
        self.start = go_on
        if go_on is None:
            awaited = any(not self._holds(entity_type) for entity_type in self.left_out)
            interval_s = self._poll_interval_s if awaited else self._sweep_interval_s
            self.within(min(self._next_due_at - now, interval_s), now)
            self._next_due_at = inf
        self._rests_until = now + min(_REST * (now - self._began), _REST_MAX_S)
