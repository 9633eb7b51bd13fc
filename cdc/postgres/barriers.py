"""Changes of whole tables, TRUNCATE and SCHEMA, that are not settled: they hold back what comes after them. A consumer
removes those that are settled, and finds out when one may start.

Theory
------
A captured TRUNCATE or SCHEMA, T, is a barrier for its type: it starts when no change of the type with a lower number is
fresh or waits, and none with a higher number starts before T is settled: processed, or dead and not pausing. Each read
of changes looks at the barriers in its own snapshot, which is exact: T's lock of its table made whoever wrote the table
before commit first, and whoever comes later sees T.

What is kept from starting is *barred*. The scheduler rejects it, like what it has no room for: the type gets a cursor
of its own, which pauses there and looks again (``core/read_planner``). So it stays fresh in the table, in the order
that it has, takes no memory, and is in no other type's way.

Waiting changes of a type are found by an index. For its fresh ones there is none, so each barrier remembers how far
the shards were walked. None with a lower number than T comes later; so what was walked once is never walked again.
"""

from __future__ import annotations

import psycopg
from psycopg import errors

from cdc.core.model import ChangeState
from cdc.postgres.pages import Barrier
from cdc.postgres.sql_files import load

_BARRIERS_MAX = 100
_SCAN_MAX = 20_000 // 64
"""Fresh changes of a shard that are looked at in search of one type; of all shards some 20 ms."""
_OLDEST_OF = 1_000
_BEGINNING = ""


class Barriers:
    """The statements for the outbox in ``schema``. ``of_default``: not those of a subscription, which has none."""

    def __init__(self, schema: str, *, of_default: bool = True) -> None:
        self._statements = load("barriers.sql", schema)
        self._of_default = of_default
        self._after = _BEGINNING

    async def advance(self, connection: psycopg.AsyncConnection) -> bool:
        """Look at some of them, those of the next types each time. Returns whether there are any."""
        if not self._of_default:
            return False
        parameters = {"type": self._after, "limit": _BARRIERS_MAX, "scan": _SCAN_MAX}
        cursor = await connection.execute(self._statements["advance"], parameters)
        row = await cursor.fetchone()
        assert row is not None
        left, last = row
        self._after = _BEGINNING if last is None else last
        return bool(left)

    def oldest(self, connection: psycopg.Connection) -> Barrier | None:
        """Of a thousand the one that stands the longest. None also where the role may not see them."""
        try:
            row = connection.execute(self._statements["oldest"], {"limit": _OLDEST_OF}).fetchone()
        except (errors.UndefinedTable, errors.InsufficientPrivilege):
            return None
        if row is None:
            return None
        operation, entity_type, seq, state, age_s, clear = row
        return Barrier(operation, entity_type, seq, ChangeState(state), age_s, clear)
