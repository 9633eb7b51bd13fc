"""How much of a table a backfill reads next, and when. Pure: time is an argument.

Theory
------
Rows are read in pages, each in a transaction that holds the locks of its rows. Four things bound a page, or when it
comes:

- *The backlog.* Of what was written, at most ``backlog`` changes may be unsettled. So the rows of a backfill never fill
  a consumer's window, a handler that fails stops it, and what the application writes waits for few of them.
- *The rate*, in rows a second. A page takes as long as its rows may, so pages of a slow one are small.
- *Others.* A page keeps one processor busy, and what it wrote another. Where a server has no more than these, a change
  that is written meanwhile waits for one of them, up to a turn of the scheduler at each of its steps, and in the
  consumer for the READs that are read just then. A page of any length does so to what meets it. So while others
  write, a rest of forty times its length follows each page: few changes meet one. That others write is seen by the
  numbers: a page draws successive ones, unless somebody draws some in between.
- *Locked rows.* A page that met a row that somebody has locked is given up and read again at a quarter of its size.
  At one row it holds no other while it waits. Each page that succeeds doubles the size.

With a condition few of the rows that are examined may be written; then more are examined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PAGE_MAX = 200
"""Rows written in a transaction: some 20 ms of locks."""
_PAGES = 2.5
"""In a backlog: what a consumer gets at once is small, and it has some more while the next is read. Half of what a page
of 40 rows costs is the page."""
_EXAMINED_MAX = 20_000
"""Rows examined for a page: some 20 ms."""
_PAGE_S = 0.2
"""Of a rate's rows in one page."""
_ASK_AGAIN_S, _ASK_AGAIN_MAX_S = 0.005, 0.5
"""Whoever pauses it waits no longer than that."""
_LOCKED_S = 0.2
_RESTS, _REST_MAX_S = 40.0, 1.0
"""While others write, how many times as long as a page the rest after it is."""
_OTHERS_S = 1.0
"""So long after others have drawn a number they are taken to write."""


class Page(NamedTuple):
    """Write up to ``write`` rows of the next ``examine``."""

    write: int
    examine: int


class Wait(NamedTuple):
    """``seconds`` until the next may be asked for: because of the rate or of others, unless one of these is true.

    ``backlog``: because of what is not settled. ``locked``: because the page met a row that somebody has locked.
    """

    seconds: float
    backlog: bool = False
    locked: bool = False


class BackfillPace:
    """``rate``: rows a second, or None. ``backlog``: how many written rows may be unsettled, at least 1."""

    def __init__(self, *, rate: float | None, backlog: int) -> None:
        self._rate = rate
        self._backlog = backlog
        of_rate = PAGE_MAX if rate is None else int(rate * _PAGE_S)
        self._size_max = max(1, min(PAGE_MAX, int(backlog / _PAGES), of_rate))
        self._size = self._size_max
        self._examined = self._size
        self._not_before = 0.0
        self._locked = False
        self._ask_again_s = _ASK_AGAIN_S
        self._last_seq: int | None = None
        self._others_until = 0.0

    @property
    def wants_count(self) -> int:
        """From how many unsettled changes on ``next`` has no room for a page."""
        return self._backlog - self._size

    def next(self, unsettled: int, now: float) -> Page | Wait:
        """What to do now, while so many of the rows written before are unsettled."""
        if now < self._not_before:
            return Wait(min(self._not_before - now, _ASK_AGAIN_MAX_S), locked=self._locked)
        room = min(self._size, self._backlog - unsettled)
        if room < self._size and 2 * room < self._size_max:
            seconds, self._ask_again_s = self._ask_again_s, min(self._ask_again_s * 1.5, _ASK_AGAIN_MAX_S)
            return Wait(seconds, backlog=True)
        self._ask_again_s = _ASK_AGAIN_S
        return Page(room, max(room, self._examined))

    def done(self, page: Page, seqs: Sequence[int], began: float, now: float) -> None:
        """The page, begun at ``began``, is read and committed, as changes of these numbers."""
        self._locked, written = False, len(seqs)
        if self._rate:
            self._not_before = max(now, self._not_before) + written / self._rate
        if self._others_write(seqs, now):
            self._not_before = max(self._not_before, now + min(_RESTS * (now - began), _REST_MAX_S))
        self._size = min(self._size * 2, self._size_max)
        factor = 2 if written < page.write // 2 + 1 else 0.5
        self._examined = min(max(int(page.examine * factor), self._size), _EXAMINED_MAX)

    def _others_write(self, seqs: Sequence[int], now: float) -> bool:
        if seqs:
            first = seqs[0] - 1 if self._last_seq is None else self._last_seq
            self._last_seq = seqs[-1]
            if self._last_seq - first > len(seqs):
                self._others_until = now + _OTHERS_S
        return now < self._others_until

    def locked(self, now: float) -> None:
        """Somebody had locked a row of the page; it was given up."""
        self._locked = True
        self._size = max(1, self._size // 4)
        self._not_before = now + _LOCKED_S
