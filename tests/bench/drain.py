"""Consumers emptying an outbox: processes of their own, as users run them.

The order of the calls is checked each time, except where several share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench.database import drained, fresh_outbox, preload, rest, settled, shared_by
from tests.bench.handlers import EFFECTS
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size

_WITHIN_S = 600.0
_CONCURRENCY = 100
_AWAITED_S = 0.010
_CONCURRENCY_EACH = 50


def measure(server: TempServer, size: Size) -> list[Figure]:
    return _drained(server, "noop", size.changes, size.keys)


def measure_sync(server: TempServer, size: Size) -> list[Figure]:
    return _drained(server, "noop_sync", size.changes, size.keys)


def measure_batches(server: TempServer, size: Size) -> list[Figure]:
    return _drained(server, "batches", size.changes, size.keys)


def measure_inserting(server: TempServer, size: Size) -> list[Figure]:
    return _drained(server, "inserts", size.inserting, size.keys)


def measure_awaiting(server: TempServer, size: Size) -> list[Figure]:
    figures = _drained(server, "awaits_10ms", size.awaiting, size.many_keys, concurrency=_CONCURRENCY)
    return [*figures, Figure("to theoretical", figures[0].value / (_CONCURRENCY / _AWAITED_S), "")]


def measure_two(server: TempServer, size: Size) -> list[Figure]:
    one, two = (rate_shared(server, consumers, size.awaiting // 4, size.many_keys) for consumers in (1, 2))
    return [Figure("one", one, "changes/s"), Figure("two", two, "changes/s"), Figure("two to one", two / one, "")]


def measure_two_noop(server: TempServer, size: Size) -> list[Figure]:
    one, two = (
        rate_shared(server, consumers, size.changes, size.keys, router="noop", concurrency=_CONCURRENCY)
        for consumers in (1, 2)
    )
    return [Figure("one", one, "changes/s"), Figure("two", two, "changes/s"), Figure("two to one", two / one, "")]


def rate_shared(
    server: TempServer,
    consumers: int,
    changes: int,
    keys: int,
    *,
    router: str = "awaits_20ms",
    concurrency: int = _CONCURRENCY_EACH,
) -> float:
    """Changes a second by so many consumers, so many at a time each; by default of a handler that awaits 20 ms."""
    with fresh_outbox(server) as connection, ExitStack() as stack:
        rest(connection)
        running = [
            stack.enter_context(Consumer(connection.info.dsn, router, concurrency=concurrency))
            for _ in range(consumers)
        ]
        running[0].until(lambda: shared_by(connection, consumers), within_s=_WITHIN_S)
        preload(connection, changes=changes, keys=keys)
        connection.execute("NOTIFY entity_change")
        running[0].until(lambda: drained(connection), within_s=_WITHIN_S)
        return settled(connection).rate


def _drained(server: TempServer, router: str, changes: int, keys: int, **settings: object) -> list[Figure]:
    with fresh_outbox(server) as connection:
        connection.execute(EFFECTS)
        preload(connection, changes=changes, keys=keys)
        rest(connection)
        with Consumer(connection.info.dsn, router, **settings) as consumer:
            consumer.until(lambda: drained(connection), within_s=_WITHIN_S)
            cpu_s = consumer.cpu_s
        check_order(consumer.calls, keys_by_number(connection))
        done = settled(connection)
    assert done.changes == changes
    return [
        Figure("settled", done.rate, "changes/s"),
        Figure("with start-up", done.changes / (done.last - consumer.started_at), "changes/s"),
        Figure("consumer's cpu", cpu_s / done.changes * 1e6, "us/change"),
    ]


def keys_by_number(connection: psycopg.Connection) -> dict[int, str]:
    return dict(connection.execute("SELECT seq, entity_id FROM entity_changes").fetchall())


def check_order(calls: Iterable[int], keys: Mapping[int, str]) -> None:
    """Each change was handled once, and those of a key in the order of their numbers; else the rate means nothing."""
    last: dict[str, int] = {}
    count = 0
    for seq in calls:
        count += 1
        key = keys[seq]
        if last.get(key, 0) >= seq:
            raise AssertionError(f"change {seq} of key {key} was handled after {last[key]}")
        last[key] = seq
    if count != len(keys):
        raise AssertionError(f"{count} calls for {len(keys)} changes")
