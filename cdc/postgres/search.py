"""Pages of changes by filters, for whoever looks through them: those of ``bulk``, and what they find in its order.

A page ends after some rows, or after so many were looked at, and says where the next one begins. So each is one bounded
statement, however large the table is and however rare what is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import psycopg

from cdc.core.model import SHARDS, ChangeState
from cdc.postgres.admin import ChangeSummary, OutboxAdmin, bounded
from cdc.postgres.bulk import Wanted, parameters_of
from cdc.postgres.sql_files import blocks, load

_SCAN = 20_000
_PER_SHARD = 300
"""Changes looked at for a page, and fresh ones of each shard: a tenth of a second."""
_LIMIT_S = 10


@dataclass(frozen=True, slots=True)
class SearchPlace:
    """In the order of a state: where a page ends. ``at``: None where the order is that of the numbers."""

    at: datetime | None
    seq: int


@dataclass(frozen=True, slots=True)
class SearchPage:
    """``next``: where the next page begins; None: this was the last. ``cut``: there it has not looked yet."""

    entries: list[ChangeSummary]
    next: SearchPlace | None
    cut: bool


class Search:
    """The statements for the outbox in ``schema``, on an autocommit connection; of its default subscription."""

    def __init__(self, schema: str) -> None:
        self._admin = OutboxAdmin(schema)
        self._statements = load("search.sql", schema, instead={"matches": blocks("bulk.sql")["matches"]})

    def page(
        self,
        connection: psycopg.Connection,
        state: ChangeState,
        wanted: Wanted,
        limit: int,
        *,
        behind: SearchPlace | None = None,
        scan: int = _SCAN,
        per_shard: int = _PER_SHARD,
    ) -> SearchPage:
        with bounded(connection, _LIMIT_S):
            [(now,)] = connection.execute("SELECT now()").fetchall()
            given = {
                **parameters_of(wanted, now), "at": behind and behind.at, "seq": behind and behind.seq,
                "limit": limit + 1, "scan": max(scan, limit + 1), "per_shard": max(per_shard, limit + 1),
                "shards": SHARDS,
            }  # fmt: skip
            rows = connection.execute(self._statements[f"page_of_{state}"], given).fetchall()
            found = [row for row in rows if row[0] is not None]
            ids = [id_ for id_, _, _ in found[:limit]]
            entries = self._admin.summaries(connection, ids)
        ends = [SearchPlace(at, seq) for id_, at, seq in rows if id_ is None]
        if len(found) > limit:
            _, at, seq = found[limit - 1]
            return SearchPage(entries, SearchPlace(at, seq), cut=False)
        return SearchPage(entries, ends[0] if ends else None, cut=bool(ends))
