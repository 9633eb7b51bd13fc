"""From the moment at which a writer's commit has returned to the start of the change's handler, at a steady pace.

LISTEN/NOTIFY stands beside it as the shortest way there is: a bare loop that fetches, orders and marks nothing. A value
below zero is no mistake: the news may overtake the answer to the commit.
"""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path

import psycopg

from cdc.model import Operation
from cdc.throwaway import Server
from cdc.tracking import track
from tests.bench.database import drained, fresh_database, fresh_outbox, rest, streaming
from tests.bench.processes import Consumer, child, finish
from tests.bench.report import Figure, quantile
from tests.bench.size import Size

_TABLE = "CREATE TABLE bench_rows (id bigint PRIMARY KEY, note text NOT NULL)"
_READY_S = 30.0


def measure(server: Server, size: Size) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="cdcbench") as folder:
        return [
            *_figures("handler", *_through_cdc(server, size, Path(folder)), size),
            *_figures("NOTIFY", *_through_notify(server, size, Path(folder)), size),
        ]


def _through_cdc(server: Server, size: Size, folder: Path) -> tuple[array[int], array[int]]:
    with fresh_outbox(server) as connection:
        connection.execute(_TABLE)
        track(connection, "public", "bench_rows", operations=[Operation.INSERT])
        rest(connection)
        with Consumer(connection.info.dsn, "stamp") as consumer:
            consumer.until(lambda: streaming(connection), within_s=_READY_S)
            written = _write(connection, "insert", size, folder)
            consumer.until(lambda: drained(connection), within_s=_READY_S)
    return written, consumer.calls


def _through_notify(server: Server, size: Size, folder: Path) -> tuple[array[int], array[int]]:
    with fresh_database(server) as connection:
        connection.execute(_TABLE)
        rest(connection)
        heard = folder / "heard"
        with child("listener", connection.info.dsn, str(_rows(size)), str(heard)) as listener:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "listening\n"
            written = _write(connection, "notify", size, folder)
            finish(listener, within_s=_READY_S)
    return written, _numbers(heard)


def _write(connection: psycopg.Connection, statement: str, size: Size, folder: Path) -> array[int]:
    """Row by row, the nanosecond at which its commit had returned."""
    path = folder / "written"
    with child("writer", connection.info.dsn, statement, str(size.rate), str(_rows(size)), str(path)) as writer:
        finish(writer, within_s=_READY_S + 10 * (size.warm_up_s + size.seconds))
    return _numbers(path)


def _figures(name: str, written: array[int], arrived: array[int], size: Size) -> list[Figure]:
    """``arrived``: pairs of a row's number and its nanosecond. The rows of the warm-up are left out."""
    warm_up = size.rate * size.warm_up_s
    moments = dict(zip(arrived[::2], arrived[1::2], strict=True))
    assert len(moments) == len(written)
    latencies = [(moments[row] - at) / 1e6 for row, at in enumerate(written) if row >= warm_up]
    pace = (len(written) - warm_up - 1) / (written[-1] - written[warm_up]) * 1e9
    return [
        Figure(f"{name} p50", quantile(latencies, 0.5), "ms"),
        Figure(f"{name} p99", quantile(latencies, 0.99), "ms"),
        Figure(f"{name} max", max(latencies), "ms"),
        Figure(f"{name} pace", pace, "rows/s"),
    ]


def _rows(size: Size) -> int:
    return size.rate * (size.warm_up_s + size.seconds)


def _numbers(path: Path) -> array[int]:
    numbers = array("q")
    numbers.frombytes(path.read_bytes())
    return numbers
