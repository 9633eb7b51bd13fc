"""One look for all consumers of a process, each second, in place of some from each. Takes the connection.

Theory
------
An idle consumer asks each second who else consumes, and every few seconds what is new and what is due. Twenty of one
process would ask twenty times. A look shows, for all of them at once, whether there is anything to ask for:

- ``shares``: a text that changes whenever a poll of the shards would answer something else;
- ``due_s``: when the first change that waits is due;
- ``final``: whether all changes that were ever given a number are to be seen by now, or never will be. Then a sweep
  that has found nothing finds nothing again, until another number is drawn.

``final`` is proved as a position is (``subscription``): a number was drawn last, and then the first transaction id that
was not assigned yet is noted. A number is drawn after its transaction got its id. So once no transaction below that id
is open, and still no other number was drawn, nothing is to come. In a statement the snapshot comes before the number is
read: so the id is taken from the next look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import psycopg

from cdc.core.model import SHARDS
from cdc.core.read_planner import Sweep
from cdc.core.shard_cursor import Position, Snapshot
from cdc.core.type_filter import TypeFilter
from cdc.postgres.shard_locks import READERS, lock_class
from cdc.postgres.sql_files import load

RECENT_S = 3.0
"""For so long a look says how it is: they come each second."""
_NOTHING_S, _AT_END_S = 50.0, 300.0
"""So long an answer is taken as it was, for sweeps and for positions. The first is less than from one pass that begins
at the first change to the next: what only such a pass finds is found when it comes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has shown. ``at``: when it was sent, by time.monotonic(). ``drawn``: the number drawn last.

    ``shares`` and ``due_s`` are by the number of a subscription. None of ``due_s``: nothing waits. ``events_due_s``: of
    the first event that is to be published later; None: there is none.
    """

    at: float
    snapshot: Snapshot
    drawn: int
    final: bool
    shares: Mapping[int, str]
    due_s: Mapping[int, float | None]
    events_due_s: float | None = None

    @property
    def is_recent(self) -> bool:
        return time.monotonic() - self.at < RECENT_S

    @property
    def no_event_is_due(self) -> bool:
        return self.events_due_s is None or self.events_due_s > time.monotonic() - self.at


class SharedLook:
    """For the outbox in ``schema``; the looks of one process, one after the other."""

    def __init__(self, schema: str) -> None:
        self._statement = load("shared_look.sql", schema)["look"]
        self._schema = schema
        self._drawn: int | None = None
        self._needed: int | None = None
        """Once no transaction below this id is open, nothing up to ``_drawn`` is to come. None: not known yet."""

    async def look(self, connection: psycopg.AsyncConnection, subscriptions: Collection[int]) -> Seen | None:
        """At these subscriptions, by their numbers. None: there are none."""
        numbers = list(subscriptions)
        if not numbers:
            return None
        given = {
            "subscriptions": numbers, "members": SHARDS, "readers": READERS,
            "classes": [lock_class(self._schema, number) & 0xFFFFFFFF for number in numbers],
        }  # fmt: skip
        at = time.monotonic()
        rows = await (await connection.execute(self._statement, given)).fetchall()
        _, _, _, xmin, next_xid, drawn, events_due_s = rows[0]
        return Seen(
            at=at,
            snapshot=Snapshot(xmin, next_xid),
            drawn=drawn,
            final=self._is_final(drawn, xmin, next_xid),
            shares={row[0]: row[1] for row in rows},
            due_s={row[0]: row[2] for row in rows},
            events_due_s=events_due_s,
        )

    def _is_final(self, drawn: int, xmin: int, next_xid: int) -> bool:
        if drawn != self._drawn:
            self._drawn, self._needed = drawn, None
            return False
        # An id from the future is of before a restore.
        if self._needed is None or self._needed > next_xid:
            self._needed = next_xid
        return xmin >= self._needed


class _Nothing(NamedTuple):
    """A sweep of these types from here has found nothing, when so many numbers were drawn. By time.monotonic()."""

    position: Position
    scope: TypeFilter
    drawn: int
    at: float

    def answers(self, position: Position, scope: TypeFilter, seen: Seen) -> bool:
        """Whether a sweep from there finds nothing either: it looks at no more than this one has."""
        before = self.position
        further = position.floor >= before.floor and position.cursor >= before.cursor and position.since >= before.since
        return (
            further and scope == self.scope and seen.drawn == self.drawn and self.at <= seen.at < self.at + _NOTHING_S
        )


class KnownAnswers:
    """What the store of a subscription need not ask, as the answer is known. ``seen``: the last look, if it is recent.

    On the event loop, except ``state``.
    """

    def __init__(self, number: int, seen: Callable[[], Seen | None]) -> None:
        self._number = number
        self._seen = seen
        self._doubted_at = time.monotonic()
        self._nothing: dict[int, _Nothing] = {}
        """By shard."""
        self._at_end: tuple[int, float] | None = None
        """The number drawn last when all positions were as far as they can be, and when that was."""

    def doubt(self) -> None:
        """Something was written, or owned, or given back: only a look that is sent from now on counts."""
        self._doubted_at = time.monotonic()
        self._nothing.clear()
        self._at_end = None

    @property
    def seen(self) -> Seen | None:
        """The last look; None: it says nothing about now."""
        seen = self._seen()
        return seen if seen is not None and seen.at > self._doubted_at else None

    def state(self) -> tuple[int, float] | None:
        """The same while nothing changes, where nothing waits and all is to be seen. None: it may change."""
        seen = self.seen
        if seen is None or not seen.final or seen.due_s.get(self._number, 0.0) is not None:
            return None
        return seen.drawn, self._doubted_at

    def next_due_s(self, seen: Seen) -> float | None:
        """In how many seconds a change that waits is due, as it was seen; None: none waits."""
        due_s = seen.due_s.get(self._number, 0.0)
        return None if due_s is None else due_s - (time.monotonic() - seen.at)

    def finds_nothing(self, sweep: Sweep, seen: Seen) -> bool:
        nothing = self._nothing
        return sweep.only is None and all(
            number in nothing and nothing[number].answers(position, sweep.scope, seen)
            for number, position in sweep.positions.items()
        )

    def found_nothing(self, sweep: Sweep, before: Seen) -> None:
        """The sweep was sent after this look."""
        if before.final and sweep.only is None:
            now = time.monotonic()
            for number, position in sweep.positions.items():
                self._nothing[number] = _Nothing(position, sweep.scope, before.drawn, now)

    def at_end(self, before: Seen | None) -> None:
        """No position can be moved any further; asked after this look."""
        self._at_end = (before.drawn, time.monotonic()) if before and before.final else None

    @property
    def is_at_end(self) -> bool:
        seen = self.seen
        if seen is None or self._at_end is None:
            return False
        drawn, at = self._at_end
        return seen.drawn == drawn and seen.at < at + _AT_END_S
