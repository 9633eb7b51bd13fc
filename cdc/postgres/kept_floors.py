"""Where the next owner of a shard begins to read: the statements that keep it. The theory is in ``core/kept_floor``."""

from __future__ import annotations

import time
from collections.abc import Collection

import psycopg

from cdc.core.kept_floor import KeptFloor
from cdc.core.shard_cursor import Snapshot
from cdc.postgres.sql_files import load

_EVERY_S = 10.0
"""Between two looks at floors: a new owner reads past what was settled since."""
_STRIDE, _STRIDE_MIN, _STRIDE_MAX, _STRIDE_S = 10_000, 1_000, 1 << 40, 0.05
"""Numbers that floors move by at once: at first, at least, at most. Twice as many after a look that took no longer than
these seconds, in which nothing is settled; else half."""


class KeptFloors:
    """Those of the default subscription of the outbox in ``schema``, as its owner moves them."""

    def __init__(self, schema: str) -> None:
        self._statements = load("kept_floors.sql", schema)
        self.begin()

    def begin(self) -> None:
        """On a new connection: another server may answer, with other transaction ids."""
        self._floor = KeptFloor()
        self._moves, self._move_at, self._stride = True, 0.0, _STRIDE

    def settled(self) -> None:
        """Something was: there may be something to move."""
        self._moves = True

    def may_move(self, now: float) -> bool:
        """Whether there may be something to move: something was settled, or a candidate waits for its proof."""
        return now >= self._move_at and (self._moves or self._floor.waits)

    async def move(self, session: psycopg.AsyncConnection, shards: Collection[int]) -> None:
        """Of these shards, on the session that owns them."""
        self._moves, began = False, time.monotonic()
        self._move_at = began + _EVERY_S
        try:
            more = await self._move(session, shards)
        except BaseException:
            self._moves = True
            raise
        took_s = time.monotonic() - began
        self._stride = max(_STRIDE_MIN, self._stride // 2) if took_s > _STRIDE_S else min(2 * self._stride, _STRIDE_MAX)
        if more:
            self._moves, self._move_at = True, began

    async def _move(self, session: psycopg.AsyncConnection, shards: Collection[int]) -> bool:
        """Returns whether there is more to move."""
        floor = self._floor
        cursor = await session.execute(self._statements["drawn"], {})
        [(last,)] = await cursor.fetchall()
        floor.drew(last)
        given = {
            "proved": floor.proved, "candidate": floor.candidate, "needs": floor.needs, "last": last,
            "shards": list(shards), "stride": self._stride,
        }  # fmt: skip
        [(xmin, next_xid, more)] = await (await session.execute(self._statements["move"], given)).fetchall()
        floor.looked(Snapshot(xmin, next_xid))
        return bool(more)
