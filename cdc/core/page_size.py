"""How many changes the next page of the outbox may have. Pure.

Theory
------
The server ends a page at ``BYTES``: of what comes behind the row that reaches them, it sends the number only. So a page
fits into memory whatever its rows are like, but for a row alone, which is always read: how large it is nobody has asked
the writer to limit. But what a row weighs the server knows when it has made its text, which it does for every row of a
page: so the first page has few, each may have twice as many as the one before, and none more than would have made the
last one as heavy as a page may be. Where a page takes the server too long, the next has one row.
"""

from __future__ import annotations

from cdc.core.model import SHARDS

ROWS_FIRST, ROWS_MAX = SHARDS, 500
BYTES = 4 << 20


class PageSize:
    """``rows``: how many the next page may have."""

    def __init__(self) -> None:
        self.rows = ROWS_FIRST
        self.row_bytes = 0
        """What a row of the last page had, on the average."""

    def refused(self) -> None:
        """The page took too long."""
        self.rows = 1

    def read(self, rows: int, size: int) -> None:
        """A page of so many rows had so many bytes of documents."""
        if rows == 0:
            return
        self.row_bytes = size // rows
        fitting = BYTES // max(1, self.row_bytes)
        self.rows = max(1, min(2 * self.rows, fitting, ROWS_MAX))
