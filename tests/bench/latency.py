"""From the moment at which a writer's commit has returned to the start of the change's handler, at a steady pace.

Beside it the documented processor, woken by NOTIFY, which fetches and marks as well; and the shortest way there is, a
bare loop that hears NOTIFY and neither fetches, orders nor marks. A value below zero is no mistake: the news may
overtake the answer to the commit.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import Operation
from cdc.postgres.tracking import track
from tests.bench.database import (
    DOCUMENTED,
    ROWS,
    drained,
    fresh_database,
    fresh_outbox,
    rest,
    shared_by,
    streaming,
)
from tests.bench.processes import Consumer, child, finish
from tests.bench.report import Figure, quantile
from tests.bench.size import Size

_READY_S = 30.0
_KEEP_UP_S = 5.0
"""So much longer a listener has. The documented processor does not keep up everywhere; what it has not handled then
counts as handled at that moment."""
_TIMES = ("p50", "p99")

Moments = Mapping[int, int]
"""Row to nanosecond."""
Beside = Callable[[Consumer], AbstractContextManager[object]]


def measure(server: TempServer, size: Size) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="cdcbench") as name:
        folder = Path(name)
        handler = _figures("handler", *_through_cdc(server, size, folder), size)
        documented = _figures("documented", *_through_documented(server, size, folder), size)
        bare = _figures("NOTIFY", *_through_notify(server, size, folder), size)
    compared = []
    for ours, theirs, least in zip(handler, documented, bare, strict=True):
        if ours.name.endswith(_TIMES):
            compared += [
                Figure(f"{ours.name} to documented", ours.value / theirs.value, ""),
                Figure(f"{ours.name} above NOTIFY", ours.value - least.value, "ms"),
            ]
    return [*handler, *documented, *bare, *compared]


def measure_relayed(server: TempServer, size: Size) -> list[Figure]:
    """Of two consumers the one that does not stream: its half of the changes."""
    with tempfile.TemporaryDirectory(prefix="cdcbench") as folder, fresh_outbox(server) as connection:
        _tracked(connection)
        with Consumer(connection.info.dsn, "stamp") as first:
            first.until(lambda: streaming(connection), within_s=_READY_S)
            with Consumer(connection.info.dsn, "stamp") as second:
                second.until(lambda: shared_by(connection, 2), within_s=_READY_S)
                written = _write(connection, "insert", size, Path(folder))
                second.until(lambda: drained(connection), within_s=_READY_S)
    relayed = _moments(second.calls)
    assert relayed
    assert len(relayed) + len(first.calls) // 2 == len(written)
    return _figures("relayed", written, relayed, size)


def of_outbox(connection: psycopg.Connection, size: Size, folder: Path, beside: Beside = nullcontext) -> list[float]:
    """Of each row, in ms, through a consumer on this outbox; ``beside``: entered with it while rows are written."""
    return _latencies(*_stamped(connection, size, folder, beside), size)


def _through_cdc(server: TempServer, size: Size, folder: Path) -> tuple[array[int], Moments]:
    with fresh_outbox(server) as connection:
        return _stamped(connection, size, folder)


def _stamped(
    connection: psycopg.Connection, size: Size, folder: Path, beside: Beside = nullcontext
) -> tuple[array[int], Moments]:
    _tracked(connection)
    with Consumer(connection.info.dsn, "stamp") as consumer:
        consumer.until(lambda: streaming(connection), within_s=_READY_S)
        with beside(consumer):
            written = _write(connection, "insert", size, folder)
        consumer.until(lambda: drained(connection), within_s=_READY_S)
    assert len(consumer.calls) == 2 * len(written)
    return written, _moments(consumer.calls)


def _through_documented(server: TempServer, size: Size, folder: Path) -> tuple[array[int], Moments]:
    with fresh_database(server) as connection:
        connection.execute(ROWS)
        connection.execute(DOCUMENTED.read_bytes())
        return _listened(connection, "documented", "insert", size, folder)


def _through_notify(server: TempServer, size: Size, folder: Path) -> tuple[array[int], Moments]:
    with fresh_database(server) as connection:
        connection.execute(ROWS)
        return _listened(connection, "listener", "notify", size, folder)


def _listened(
    connection: psycopg.Connection, module: str, statement: str, size: Size, folder: Path
) -> tuple[array[int], Moments]:
    rest(connection)
    heard = folder / "heard"
    with child(module, connection.info.dsn, str(_rows(size)), str(heard)) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        written = _write(connection, statement, size, folder)
        with suppress(subprocess.TimeoutExpired):
            finish(listener, within_s=_KEEP_UP_S)
    ended = time.monotonic_ns()
    return written, {**dict.fromkeys(range(len(written)), ended), **_moments(numbers(heard))}


def _tracked(connection: psycopg.Connection) -> None:
    connection.execute(ROWS)
    track(connection, "public", "bench_rows", operations=[Operation.INSERT])
    rest(connection)


def _write(connection: psycopg.Connection, statement: str, size: Size, folder: Path) -> array[int]:
    """Row by row, the nanosecond at which its commit had returned."""
    path = folder / "written"
    with child("writer", connection.info.dsn, statement, str(size.rate), str(_rows(size)), str(path)) as writer:
        finish(writer, within_s=_READY_S + 10 * (size.warm_up_s + size.seconds))
    return numbers(path)


def _latencies(written: array[int], arrived: Moments, size: Size) -> list[float]:
    """The rows of the warm-up are left out, and those that another program has handled."""
    warm_up = size.rate * size.warm_up_s
    return [(arrived[row] - at) / 1e6 for row, at in enumerate(written) if row >= warm_up and row in arrived]


def _figures(name: str, written: array[int], arrived: Moments, size: Size) -> list[Figure]:
    warm_up = size.rate * size.warm_up_s
    latencies = _latencies(written, arrived, size)
    pace = (len(written) - warm_up - 1) / (written[-1] - written[warm_up]) * 1e9
    return [
        Figure(f"{name} p50", quantile(latencies, 0.5), "ms"),
        Figure(f"{name} p99", quantile(latencies, 0.99), "ms"),
        Figure(f"{name} max", max(latencies), "ms"),
        Figure(f"{name} pace", pace, "rows/s"),
    ]


def _rows(size: Size) -> int:
    return size.rate * (size.warm_up_s + size.seconds)


def _moments(pairs: array[int]) -> Moments:
    """The first of each row: the documented processor may handle one twice."""
    return dict(reversed(list(zip(pairs[::2], pairs[1::2], strict=True))))


def numbers(path: Path) -> array[int]:
    found = array("q")
    found.frombytes(path.read_bytes())
    return found
