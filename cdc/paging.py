"""How many changes the next page of the outbox may have, so that its documents fit into memory. Pure.

Theory
------
What a page will weigh is known when it has been read. So the first one is small, each may have twice as many rows as
the one before, and none more than would have made the last one as heavy as a page may be. Where the rows are alike,
that holds the bound; where they become large all of a sudden, one page of up to ``ROWS_MAX`` of them comes too large,
and the next is small. A row alone is always read: how large it is nobody has asked the writer to limit.
"""

from __future__ import annotations

ROWS_FIRST, ROWS_MAX = 50, 500
BYTES = 4 << 20


class Paging:
    """``rows``: how many the next page may have."""

    def __init__(self) -> None:
        self.rows = ROWS_FIRST
        self.row_bytes = 0
        """What a row of the last page had, on the average."""

    def read(self, rows: int, size: int) -> None:
        """A page of so many rows had so many bytes of documents."""
        if rows == 0:
            return
        self.row_bytes = size // rows
        fitting = BYTES // max(1, self.row_bytes)
        self.rows = max(1, min(2 * self.rows, fitting, ROWS_MAX))
