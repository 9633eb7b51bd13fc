"""What consumers lease of a limit, in the database."""

from __future__ import annotations

import asyncio

import psycopg

from cdc.core.limits import LeaseRequest
from cdc.postgres.limits import Leases

_AGE = "UPDATE cdc_limit_leases SET leases = jsonb_set(leases, %s::text[], to_jsonb((leases #>> %s)::float8 + %s))"


async def test_what_a_dead_consumer_has_leased_ends_also_where_the_servers_clock_went_back(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    async def lease(consumer: str) -> tuple[int, int]:
        ask = LeaseRequest(handler="send", key="", permits=20, slots=3, wants=9, for_s=1.0, total=20, slots_total=3)
        async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as connection:
            [found] = await Leases("public", consumer, "default").lease(connection, asyncio.Lock(), [ask])
        return found.permits.get(consumer, 0), found.slots.get(consumer, 0)

    def later(seconds: float) -> None:
        path = ["dead", "3"]
        outbox_db.execute(_AGE, [path, path, -seconds])

    assert await lease("dead") == (20, 3)
    later(-3_600)  # the clock goes back by an hour, so what is on record is an hour ahead
    assert await lease("alive") == (0, 0)
    later(4.5)
    assert await lease("alive") == (0, 3), "its calls have ended with it, and its permits rest"
    later(1)
    assert await lease("alive") == (20, 3)
