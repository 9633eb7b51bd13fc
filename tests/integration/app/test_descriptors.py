"""More open descriptors than select() knows: 1,024."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import psycopg
import pytest

import cdc
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled

_MANY = 1_100


@pytest.fixture
def many_open() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * _MANY:
        pytest.skip(f"the limit of open descriptors is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * _MANY), hard))
    null = os.open(os.devnull, os.O_RDONLY)
    copies = [os.dup(null) for _ in range(_MANY)]
    yield
    for each in (null, *copies):
        os.close(each)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_open")
async def test_a_consumer_streams_and_handles_with_every_kind_of_handler(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = cdc.Router()

    @router.on("async")
    async def on_the_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT")

    @router.on("sync")
    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("SELECT")

    async with consuming(outbox, router, slot_mode="temporary") as app:

        async def streams() -> bool:
            return metric(app.metrics.registry, "cdc_stream_connected") == 1

        await eventually_async(streams)
        for kind in ("async", "sync"):
            outbox_db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, 20) n", [kind])

        async def done() -> bool:
            return settled(outbox_db)

        await eventually_async(done)
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
