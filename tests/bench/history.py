"""What operators, the collector and the consumer ask of a large history, and of a small one beside it.

Both tables hold processed changes of 30 days, some thousands that are fresh, waiting or dead, and 100,000 that are held
back behind one key. Figures are medians of a few calls; ``ratio`` is the large table's to the small one's.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

import psycopg
from psycopg import sql

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import SHARDS, WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.shard_cursor import Position
from cdc.postgres.admin import Filter, OutboxAdmin
from cdc.postgres.outbox import INDEXED, Store
from cdc.postgres.retention import Retention
from cdc.replication import slots
from tests.bench.database import fresh_outbox, preload_history, preload_unprocessed, rest
from tests.bench.report import Figure
from tests.bench.size import Size

_SMALL = 10_000
_CALLS = 5
_DAYS = 30.0

Milliseconds = dict[str, float]


def measure(server: TempServer, size: Size) -> list[Figure]:
    small, large = _measured(server, _SMALL), _measured(server, size.history)
    figures = []
    for name, value in large.items():
        figures += [
            Figure(f"{name}, {_SMALL:,}", small[name], "ms"),
            Figure(f"{name}, {size.history:,}", value, "ms"),
            Figure(f"{name}, ratio", value / small[name], ""),
        ]
    return figures


def _measured(server: TempServer, rows: int) -> Milliseconds:
    with fresh_outbox(server) as connection:
        preload_history(connection, rows=rows, days=_DAYS)
        # Before the others are there: as it is after a quiet hour.
        rest(connection)
        preload_unprocessed(connection, 1, wait="1 day", key="stuck")
        preload_unprocessed(connection, 100_000, key="stuck")
        preload_unprocessed(connection, 3_000)
        preload_unprocessed(connection, 2_000, wait="1 day")
        preload_unprocessed(connection, 1_000, dead=True)
        with psycopg.connect(connection.info.dsn, autocommit=True) as collecting:
            _set_up(collecting)
            return {
                **_views(connection),
                **_commands(connection),
                **_collected(collecting),
                **asyncio.run(_consumed(connection.info.dsn, _fresh(connection))),
            }


def _views(connection: psycopg.Connection) -> Milliseconds:
    return {
        "dashboard": _ms(lambda: connection.execute("SELECT * FROM action_processing_dashboard").fetchall()),
        "history LIMIT 20": _ms(lambda: connection.execute("SELECT * FROM recent_action_history LIMIT 20").fetchall()),
    }


def _commands(connection: psycopg.Connection) -> Milliseconds:
    """Their statements; a program's start is the same on every table."""
    letters, any_ = OutboxAdmin("public"), Filter()
    [(dead,)] = connection.execute("SELECT seq FROM entity_changes WHERE dead_at IS NOT NULL LIMIT 1").fetchall()
    return {
        "outbox stats": _ms(lambda: letters.stats(connection)),
        **{f"list {state}": _ms(lambda state=state: letters.find(connection, state, any_, 50))  # type: ignore[misc]
           for state in ("dead", "waiting", "blocked", "processed")},
        "show by seq": _ms(lambda: letters.show(connection, dead)),
    }  # fmt: skip


def _collected(connection: psycopg.Connection) -> Milliseconds:
    return {
        "collector, outbox": _ms(lambda: Store("public").figures(connection)),
        "collector, slot": _ms(lambda: slots.snapshot(connection, "cdc")),
    }


async def _consumed(dsn: str, wakeups: Sequence[WakeUp]) -> Milliseconds:
    store, retention = Store("public"), Retention("public")
    start = {shard: Position(floor=0, cursor=0, since=3) for shard in range(SHARDS)}
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(*_settings())
        return {
            "fetch of 100": await _ms_async(lambda: store.fetch(connection, wakeups)),
            "sweep, 500 rows": await _ms_async(lambda: store.sweep(connection, Sweep(start, 500 // SHARDS, 1))),
            "prune of 1,000": await _ms_async(lambda: retention.prune_batch(connection, _DAYS / 4 * 86_400)),
        }


def _fresh(connection: psycopg.Connection) -> list[WakeUp]:
    rows = connection.execute("SELECT seq, shard FROM entity_changes WHERE NOT processed AND next_attempt_at IS NULL"
                              " AND dead_at IS NULL ORDER BY seq DESC LIMIT 100").fetchall()  # fmt: skip
    return [WakeUp(*row) for row in rows]


def _settings() -> tuple[sql.SQL, list[list[str]]]:
    set_ = sql.SQL("SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS s(name, value)")
    return set_, [list(INDEXED), list(INDEXED.values())]


def _set_up(connection: psycopg.Connection) -> None:
    connection.execute(*_settings())


def _ms(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


async def _ms_async(call: Callable[[], Awaitable[object]]) -> float:
    await call()
    times = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3
