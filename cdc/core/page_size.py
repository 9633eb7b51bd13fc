"""How many changes the next page of the outbox may have. Pure.

Theory
------
The server ends a page at ``BYTES``: of the rows behind the one that reaches them, it sends the number only. So a page
fits into memory whatever its rows are like, except for a single row, which is always read: its size has no limit. The
server knows the size of a row only when it has made its text, which it does for every row of a page. So the first page
has few rows, each may have twice as many as the one before, and none more than would have filled the last page. After
a page that took the server too long, the next has one row.
"""

from __future__ import annotations

from collections.abc import Collection

from cdc.core.model import SHARDS

ROWS_FIRST, ROWS_MAX = SHARDS, 1_000
BYTES = 4 << 20


class PageSize:
    """``rows``: how many the next page may have."""

    def __init__(self) -> None:
        self.rows = ROWS_FIRST
        self.row_bytes = 0
        """Average size of a row of the last page."""

    def refused(self) -> None:
        """The page took too long."""
        self.rows = 1

    def read(self, sizes: Collection[int]) -> None:
        """A page has been read; of each row, the bytes of its documents."""
        if not sizes:
            return
        self.row_bytes = row_bytes = sum(sizes) // len(sizes)
        fitting = BYTES // row_bytes if row_bytes else ROWS_MAX
        if self.rows != ROWS_MAX or fitting < ROWS_MAX:
            self.rows = max(1, min(2 * self.rows, fitting, ROWS_MAX))
