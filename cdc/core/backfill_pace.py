"""How much of a table a backfill reads next, and when. Pure: time is an argument.

Theory
------
Rows are read in pages, each in a transaction that holds the locks of its rows. Three things bound a page:

- *The backlog.* Of what was written, at most ``backlog`` changes may be unsettled. So the rows of a backfill never fill
  a consumer's window, a handler that fails stops it, and what the application writes waits for few of them.
- *The rate*, in rows a second. A page takes as long as its rows may, so pages of a slow one are small.
- *Locked rows.* A page that met a row that somebody has locked is given up and read again at a quarter of its size.
  At one row it holds no other while it waits. Each page that succeeds doubles the size.

With a condition few of the rows that are examined may be written; then more are examined.
"""

from __future__ import annotations

from typing import NamedTuple

PAGE_MAX = 200
"""Rows written in a transaction: some 20 ms of locks."""
_PAGES = 5
"""In a backlog: what a consumer gets at once is small, and it has some more while the next is read."""
_EXAMINED_MAX = 20_000
"""Rows examined for a page: some 20 ms."""
_PAGE_S = 0.2
"""Of a rate's rows in one page."""
_ASK_AGAIN_S, _ASK_AGAIN_MAX_S = 0.005, 0.5
"""Whoever pauses it waits no longer than that."""
_LOCKED_S = 0.2


class Page(NamedTuple):
    """Write up to ``write`` rows of the next ``examine``."""

    write: int
    examine: int


class Wait(NamedTuple):
    """``seconds`` until the next may be asked for: because of the rate, unless one of the others is true.

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
        self._size_max = max(1, min(PAGE_MAX, backlog // _PAGES, of_rate))
        self._size = self._size_max
        self._examined = self._size
        self._not_before = 0.0
        self._locked = False
        self._ask_again_s = _ASK_AGAIN_S

    @property
    def wants_count(self) -> int:
        """From how many unsettled changes on ``next`` has no room for a page."""
        return self._backlog - self._size

    def next(self, unsettled: int, now: float) -> Page | Wait:
        """What to do now, while so many of the rows written before are unsettled."""
        if now < self._not_before:
            return Wait(min(self._not_before - now, _ASK_AGAIN_MAX_S), locked=self._locked)
        room = min(self._size, self._backlog - unsettled)
        if room < self._size and room < self._size_max // 2 + 1:
            seconds, self._ask_again_s = self._ask_again_s, min(self._ask_again_s * 1.5, _ASK_AGAIN_MAX_S)
            return Wait(seconds, backlog=True)
        self._ask_again_s = _ASK_AGAIN_S
        return Page(room, max(room, self._examined))

    def done(self, page: Page, written: int, now: float) -> None:
        """The page is read and committed."""
        self._locked = False
        if self._rate:
            self._not_before = max(now, self._not_before) + written / self._rate
        self._size = min(self._size * 2, self._size_max)
        factor = 2 if written < page.write // 2 + 1 else 0.5
        self._examined = min(max(int(page.examine * factor), self._size), _EXAMINED_MAX)

    def locked(self, now: float) -> None:
        """Somebody had locked a row of the page; it was given up."""
        self._locked = True
        self._size = max(1, self._size // 4)
        self._not_before = now + _LOCKED_S
