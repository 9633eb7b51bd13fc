"""What changes that come one by one cost: processor time and waits of each thread and session, and their latency.

A row is written every few milliseconds (``Size.rate``), so most changes are read, handled and marked alone. Processor
time is the kernel's own account of each thread, in nanoseconds. On a machine with other work each change costs more of
it: what runs meanwhile takes the caches.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import latency
from tests.bench.database import fresh_outbox
from tests.bench.processes import Consumer
from tests.bench.report import Figure, quantile
from tests.bench.size import Size

_SESSIONS = "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database()"
_SERVERS = {"cdc: reader": "reader", "cdc: shards": "settle session", "cdc: stream": "walsender"}


class _Used(NamedTuple):
    """By thread or session: microseconds of a processor, and how often it waited for something."""

    cpu_us: Counter[str]
    waits: Counter[str]

    def since(self, before: _Used) -> _Used:
        return _Used(self.cpu_us - before.cpu_us, self.waits - before.waits)


def measure(server: TempServer, size: Size) -> list[Figure]:
    used: list[_Used] = []
    with tempfile.TemporaryDirectory(prefix="cdcbench") as folder, fresh_outbox(server) as connection:

        @contextmanager
        def accounted(consumer: Consumer) -> Iterator[None]:
            before = _used(consumer, connection)
            yield
            used.append(_used(consumer, connection).since(before))

        latencies = latency.of_outbox(connection, size, Path(folder), accounted)
    [(cpu_us, waits)] = used
    changes = size.rate * (size.warm_up_s + size.seconds)
    parts = ["event loop", "stream and other threads", *_SERVERS.values()]
    consumer, sessions = (sum(cpu_us[part] for part in some) for some in (parts[:2], parts[2:]))
    return [
        Figure("consumer's cpu", consumer / changes, "us/change"),
        Figure("server's cpu", sessions / changes, "us/change"),
        *(Figure(f"{part}, cpu", cpu_us[part] / changes, "us/change") for part in parts),
        *(Figure(f"{part}, waits", waits[part] / changes, "1/change") for part in parts),
        Figure("handler p50", quantile(latencies, 0.5), "ms"),
        Figure("handler p99", quantile(latencies, 0.99), "ms"),
    ]


def _used(consumer: Consumer, connection: psycopg.Connection) -> _Used:
    used = _Used(Counter(), Counter())
    for task in Path(f"/proc/{consumer.pid}/task").iterdir():
        _add(used, "event loop" if int(task.name) == consumer.pid else "stream and other threads", task)
    for pid, name in connection.execute(_SESSIONS).fetchall():
        if name in _SERVERS:
            _add(used, _SERVERS[name], Path(f"/proc/{pid}"))
    return used


def _add(used: _Used, part: str, task: Path) -> None:
    used.cpu_us[part] += int((task / "schedstat").read_text().split()[0]) // 1000
    status = (task / "status").read_text()
    used.waits[part] += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary"))
