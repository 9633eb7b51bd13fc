"""A consumer with nothing to do: its share of a processor, and the statements that it sends. Counted by a proxy."""

from __future__ import annotations

import time

from cdc.contrib.demo.temp_server import TempServer
from tests.bench.database import fresh_outbox, rest, streaming
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size
from tests.fix_tally import Tally

_READY_S = 30.0
_QUIET_AFTER_S = 2.0


def measure(server: TempServer, size: Size) -> list[Figure]:
    with fresh_outbox(server) as connection:
        rest(connection)
        tally = Tally(connection.info.dsn)
        tally.start()
        try:
            with Consumer(tally.dsn, "nothing") as consumer:
                consumer.until(lambda: streaming(connection), within_s=_READY_S)
                _let_pass(consumer, _QUIET_AFTER_S)
                cpu_s, passed, began = consumer.cpu_s, tally.passed, time.monotonic()
                _let_pass(consumer, float(size.seconds))
                seconds = time.monotonic() - began
                cpu_s, passed = consumer.cpu_s - cpu_s, tally.passed.since(passed)
        finally:
            tally.stop()
    return [
        Figure("cpu", 100 * cpu_s / seconds, "% of a core"),
        Figure("statements", passed.statements / seconds, "1/s"),
        Figure("bytes, both ways", (passed.sent + passed.received) / seconds, "B/s"),
    ]


def _let_pass(consumer: Consumer, seconds: float) -> None:
    end = time.monotonic() + seconds
    consumer.until(lambda: time.monotonic() >= end, within_s=seconds + 1)
