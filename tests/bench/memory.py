"""The consumer's resident memory: with nothing to do, and while a large backlog is drained."""

from __future__ import annotations

from cdc.throwaway import Server
from tests.bench.database import drained, fresh_outbox, preload, rest, streaming
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size

_READY_S = 30.0
_WITHIN_S = 900.0


def measure(server: Server, size: Size) -> list[Figure]:
    with fresh_outbox(server) as connection:
        rest(connection)
        with Consumer(connection.info.dsn, "nothing") as consumer:
            consumer.until(lambda: streaming(connection), within_s=_READY_S)
            idle_mb = consumer.rss_mb
            preload(connection, changes=size.pending, keys=size.keys)
            consumer.until(lambda: drained(connection), within_s=_WITHIN_S)
            peak_mb, after_mb = consumer.peak_rss_mb, consumer.rss_mb
    return [
        Figure("idle", idle_mb, "MiB"),
        Figure(f"peak, {size.pending:,} pending", peak_mb, "MiB"),
        Figure("afterwards", after_mb, "MiB"),
    ]
