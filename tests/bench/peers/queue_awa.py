"""awa emptying a queue of no-op jobs: ``queue_awa.py DSN JOBS WORKERS CLAIMED``

In its append-only storage, the one of its published figures; WORKERS jobs at a time, CLAIMED of them by one statement.
What it prints: ``settled``. A row that is done is soon folded into others, so a job counts as settled when its call has
returned, which favours it.

Run by the interpreter of the peers' environment; nothing of ours can be imported here.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
import uvloop
from awa import AsyncClient
from settled import tell

_ENQUEUE = 5_000


@dataclass
class Noop:
    n: int


async def measure(dsn: str, jobs: int, workers: int, claimed: int) -> tuple[float, list[float]]:
    """When the first job was handled, and when each was settled."""
    client = AsyncClient(_url(dsn), 20)
    await client.migrate()
    await client.install_queue_storage(schema="awa")
    for first in range(0, jobs, _ENQUEUE):
        some = range(first, min(first + _ENQUEUE, jobs))
        await client.enqueue_many_copy([Noop(n) for n in some], queue="noop")
    began: list[float] = []
    moments: list[float] = []
    done = asyncio.Event()

    @client.task(Noop, queue="noop")
    async def noop(job: Any) -> None:
        if not began:
            began.append(time.time())
        moments.append(time.time())
        if len(moments) == jobs:
            done.set()

    await client.start(
        [{"name": "noop", "max_workers": workers, "claim_batch_size": claimed}], queue_storage_schema="awa"
    )
    await done.wait()
    await client.shutdown()
    return began[0], moments


def _url(dsn: str) -> str:
    link = psycopg.conninfo.conninfo_to_dict(dsn)  # awa reads no DSN of key=value pairs
    host = quote(str(link["host"]), safe="")
    return f"postgres://{link['user']}@{host}:{link.get('port', 5432)}/{link['dbname']}"


def main() -> None:
    dsn, jobs, workers, claimed = sys.argv[1:]
    tell("awa-pg", *uvloop.run(measure(dsn, int(jobs), int(workers), int(claimed))))


if __name__ == "__main__":
    main()
