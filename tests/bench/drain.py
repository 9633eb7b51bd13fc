"""The consumer emptying an outbox of no-op changes: a process of its own, as users run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import psycopg

from cdc.throwaway import Server
from tests.bench.database import drained, fresh_outbox, preload, rest
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size

_WITHIN_S = 600.0


def _measure(router: str, server: Server, size: Size) -> list[Figure]:
    with fresh_outbox(server) as connection:
        preload(connection, changes=size.changes, keys=size.keys)
        rest(connection)
        with Consumer(connection.info.dsn, router) as consumer:
            consumer.until(lambda: drained(connection), within_s=_WITHIN_S)
            cpu_s = consumer.cpu_s
        check_order(consumer.calls, keys_by_number(connection))
        settled, first, last = _settled(connection)
    assert settled == size.changes
    return [
        Figure("settled", settled / (last - first), "changes/s"),
        Figure("with start-up", settled / (last - consumer.started_at), "changes/s"),
        Figure("consumer's cpu", cpu_s / settled * 1e6, "us/change"),
    ]


measure = partial(_measure, "noop")
measure_sync = partial(_measure, "noop_sync")


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


def _settled(connection: psycopg.Connection) -> tuple[int, float, float]:
    """How many, and the unix seconds of the first settle and of the last."""
    row = connection.execute(
        "SELECT count(*), extract(epoch FROM min(processed_at))::float8, extract(epoch FROM max(processed_at))::float8"
        " FROM entity_changes WHERE processed"
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]
