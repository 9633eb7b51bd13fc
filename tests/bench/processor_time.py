"""Processor time and waits of a consumer and of its sessions: the kernel's own account, in nanoseconds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.bench.processes import Consumer

EVENT_LOOP, OTHER_THREADS = "event loop", "stream and other threads"
PROCESS = (EVENT_LOOP, OTHER_THREADS)
"""Parts of the consumer's process."""
SESSIONS = {"cdc: reader": "reader", "cdc: shards": "settle session", "cdc: stream": "walsender"}
"""Parts of the server that work for it, by the names of their sessions."""
_NAMED = "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database()"


class Used(NamedTuple):
    """By thread or session: microseconds of a processor, and how often it waited for something."""

    cpu_us: Counter[str]
    waits: Counter[str]

    def since(self, before: Used) -> Used:
        return Used(self.cpu_us - before.cpu_us, self.waits - before.waits)

    @property
    def by_process(self) -> int:
        """Microseconds of the consumer's process."""
        return sum(self.cpu_us[part] for part in PROCESS)

    @property
    def by_sessions(self) -> int:
        """Microseconds of its sessions."""
        return sum(self.cpu_us[part] for part in SESSIONS.values())


def used(consumer: Consumer, connection: psycopg.Connection) -> Used:
    """So far, by the consumer and its sessions in this connection's database."""
    found = Used(Counter(), Counter())
    for task in Path(f"/proc/{consumer.pid}/task").iterdir():
        _add(found, EVENT_LOOP if int(task.name) == consumer.pid else OTHER_THREADS, task)
    for pid, name in connection.execute(_NAMED).fetchall():
        if name in SESSIONS:
            _add(found, SESSIONS[name], Path(f"/proc/{pid}"))
    return found


def of_session(connection: psycopg.Connection) -> int:
    """Microseconds of a processor that the server's process of this connection has used so far."""
    return _cpu_us(Path(f"/proc/{connection.info.backend_pid}"))


def _add(found: Used, part: str, task: Path) -> None:
    found.cpu_us[part] += _cpu_us(task)
    status = (task / "status").read_text()
    found.waits[part] += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary"))


def _cpu_us(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0]) // 1000
