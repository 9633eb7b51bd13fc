"""pgqueuer emptying a queue of no-op jobs: ``queue_pgqueuer.py DSN JOBS BATCH SECONDS``

With SECONDS other than 0 it stops after so many. What it prints: ``settled``. Its driver is asyncpg: with psycopg it
settled about half as many.

Run by the interpreter of the peers' environment; nothing of ours can be imported here.
"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta

import asyncpg
import psycopg
import uvloop
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode
from settled import tell

_ENQUEUE = 5_000
_SETTLED = """
SELECT extract(epoch FROM created)::float8 FROM pgqueuer_log WHERE status = 'successful' ORDER BY created
"""


async def measure(dsn: str, jobs: int, batch: int, seconds: float) -> float:
    """When the first job was handled."""
    calls: list[float] = []
    connection = await _connect(dsn)
    queries = Queries(connection)
    await queries.install()
    for first in range(0, jobs, _ENQUEUE):
        some = range(first, min(first + _ENQUEUE, jobs))
        await queries.enqueue(["noop"] * len(some), [str(n).encode() for n in some], [0] * len(some))
    manager = QueueManager(queries)

    @manager.entrypoint("noop")
    async def noop(job: Job) -> None:
        calls.append(time.time() if not calls else 0.0)

    if seconds:
        asyncio.get_running_loop().call_later(seconds, manager.shutdown.set)
    await manager.run(
        timedelta(seconds=1), batch_size=batch, mode=QueueExecutionMode.drain, log_aggregation_interval=timedelta(0)
    )
    return calls[0]


async def _connect(dsn: str) -> AsyncpgDriver:
    link = psycopg.conninfo.conninfo_to_dict(dsn)  # asyncpg reads no DSN of key=value pairs
    return AsyncpgDriver(
        await asyncpg.connect(
            host=link["host"], port=link.get("port", 5432), user=link["user"], database=link["dbname"]
        )
    )


def main() -> None:
    dsn, jobs, batch, seconds = sys.argv[1:]
    began = uvloop.run(measure(dsn, int(jobs), int(batch), float(seconds)))
    with psycopg.connect(dsn) as connection:
        moments = [at for (at,) in connection.execute(_SETTLED)]
    tell("pgqueuer", began, moments)


if __name__ == "__main__":
    main()
