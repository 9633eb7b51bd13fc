"""Oban for Python emptying a queue of no-op jobs: ``queue_oban.py DSN JOBS LIMIT``

LIMIT jobs at a time. What it prints: ``settled``. It needs Python 3.12.

Run by the interpreter of an environment of the peers; nothing of ours can be imported here.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import psycopg
import uvloop
from oban import Oban, worker
from oban.schema import install
from psycopg_pool import AsyncConnectionPool
from settled import tell

_ENQUEUE = 5_000
_SETTLED = """
SELECT extract(epoch FROM completed_at)::float8 FROM oban_jobs WHERE state = 'completed' ORDER BY completed_at
"""


async def measure(dsn: str, jobs: int, limit: int) -> float:
    """When the first job was handled."""
    calls: list[float] = []
    done = asyncio.Event()

    @worker(queue="noop")
    class Noop:
        async def process(self, job: Any) -> None:
            calls.append(time.time() if not calls else 0.0)
            if len(calls) == jobs:
                done.set()

    async with AsyncConnectionPool(dsn, min_size=4, max_size=20) as pool:
        await install(pool)
        idle = Oban(pool=pool, name="idle")
        for first in range(0, jobs, _ENQUEUE):
            await idle.enqueue_many([Noop.new({"n": n}) for n in range(first, min(first + _ENQUEUE, jobs))])
        async with Oban(pool=pool, queues={"noop": limit}):
            await done.wait()  # its end waits for the marks
    return calls[0]


def main() -> None:
    dsn, jobs, limit = sys.argv[1:]
    began = uvloop.run(measure(dsn, int(jobs), int(limit)))
    with psycopg.connect(dsn) as connection:
        moments = [at for (at,) in connection.execute(_SETTLED)]
    tell("oban", began, moments)


if __name__ == "__main__":
    main()
