"""procrastinate emptying a queue of no-op jobs: ``queue_procrastinate.py DSN JOBS CONCURRENCY``

What it prints: ``settled``. Run by the interpreter of the peers' environment; nothing of ours can be imported here.
"""

from __future__ import annotations

import sys
import time

import psycopg
import uvloop
from procrastinate import App, PsycopgConnector
from settled import tell

_SETTLED = """
SELECT extract(epoch FROM at)::float8 FROM procrastinate_events WHERE type = 'succeeded' ORDER BY at
"""


async def measure(dsn: str, jobs: int, concurrency: int) -> float:
    """When the first job was handled."""
    calls: list[float] = []
    app = App(connector=PsycopgConnector(conninfo=dsn, max_size=concurrency + 2))

    @app.task
    async def noop(n: int) -> None:
        calls.append(time.time() if not calls else 0.0)

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await noop.batch_defer_async(*({"n": n} for n in range(jobs)))
        await app.run_worker_async(concurrency=concurrency, wait=False, listen_notify=False)
    return calls[0]


def main() -> None:
    dsn, jobs, concurrency = sys.argv[1:]
    began = uvloop.run(measure(dsn, int(jobs), int(concurrency)))
    with psycopg.connect(dsn) as connection:
        moments = [at for (at,) in connection.execute(_SETTLED)]
    tell("procrastinate", began, moments)


if __name__ == "__main__":
    main()
