"""Limits of handlers in the database: as consumers read and lease them. See ``core.limits``.

All that is leased of a limit, or of one key of it, is one row, so a lock of that row is all that keeps the sum exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg

from cdc.core.limits import LEASE_S, Leased, LeaseRequest, Limit, LimitSetting
from cdc.core.pauses import Pause
from cdc.postgres.sql_files import load

_ASKED = {
    "handlers": "handler", "keys": "key", "permits": "permits", "slots": "slots", "wants": "wants", "for_s": "for_s",
    "totals": "total", "slots_totals": "slots_total",
}  # fmt: skip


def controls_of(rows: Sequence[Sequence[Any]]) -> tuple[list[Pause], list[LimitSetting]]:
    """What the rows of a poll are."""
    pauses = [Pause(*fields[:9]) for fields in rows if fields[9] is None and fields[11] is None]
    limits = [
        LimitSetting(fields[0], fields[3], Limit(*fields[9:13]), fields[1], fields[5], fields[6])
        for fields in rows
        if fields[9] is not None or fields[11] is not None
    ]
    return pauses, limits


class Leases:
    """The statement of a consumer, for the outbox in ``schema``. ``me`` identifies the process."""

    def __init__(self, schema: str, me: str, subscription: str) -> None:
        self._statement = load("limits.sql", schema)["lease"]
        self._given = {"me": me, "subscription_name": subscription, "lease_s": LEASE_S}

    async def lease(
        self,
        connection: psycopg.AsyncConnection,
        writing: asyncio.Lock,
        asks: Sequence[LeaseRequest],
        lease_s: float = LEASE_S,
    ) -> list[Leased]:
        """What is leased by then, of what was asked for."""
        parameters = {column: [getattr(ask, name) for ask in asks] for column, name in _ASKED.items()}
        async with writing:
            cursor = await connection.execute(self._statement, {**self._given, **parameters, "lease_s": lease_s})
            rows = await cursor.fetchall()
        return [_leased(*row) for row in rows]


def _leased(handler: str, key: str, at: float, leases: dict[str, list[Any]]) -> Leased:
    def column(number: int) -> dict[str, int]:
        return {consumer: int(values[number]) for consumer, values in leases.items()}

    live = {consumer: values for consumer, values in leases.items() if values[3] + LEASE_S > at}
    wants = {consumer: int(values[2]) for consumer, values in live.items()}
    return Leased(handler, key, at, column(0), column(1), wants)
