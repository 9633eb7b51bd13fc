"""What changes that come one by one cost: processor time and waits of each thread and session, and their latency.

A row is written every few milliseconds (``Size.rate``), so most changes are read, handled and marked alone. Processor
time is the kernel's own account of each thread, in nanoseconds. On a machine with other work each change costs more of
it: what runs meanwhile takes the caches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import latency, processor_time
from tests.bench.database import fresh_outbox
from tests.bench.processes import Consumer
from tests.bench.report import Figure, quantile
from tests.bench.size import Size


def measure(server: TempServer, size: Size) -> list[Figure]:
    used: list[processor_time.Used] = []
    with tempfile.TemporaryDirectory(prefix="cdcbench") as folder, fresh_outbox(server) as connection:

        @contextmanager
        def accounted(consumer: Consumer) -> Iterator[None]:
            before = processor_time.used(consumer, connection)
            yield
            used.append(processor_time.used(consumer, connection).since(before))

        latencies = latency.of_outbox(connection, size, Path(folder), accounted)
    [of_all] = used
    changes = size.rate * (size.warm_up_s + size.seconds)
    parts = [*processor_time.PROCESS, *processor_time.SESSIONS.values()]
    return [
        Figure("consumer's cpu", of_all.by_process / changes, "us/change"),
        Figure("server's cpu", of_all.by_sessions / changes, "us/change"),
        *(Figure(f"{part}, cpu", of_all.cpu_us[part] / changes, "us/change") for part in parts),
        *(Figure(f"{part}, waits", of_all.waits[part] / changes, "1/change") for part in parts),
        Figure("handler p50", quantile(latencies, 0.5), "ms"),
        Figure("handler p99", quantile(latencies, 0.99), "ms"),
    ]
