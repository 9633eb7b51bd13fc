"""What capturing costs those who write: pgbench, one-row inserts from 16 clients.

Into a table that is not tracked, into one that is with the consumer at work beside, and into one with the documented
trigger and its NOTIFY, whose processor does not run. And what a row of one large INSERT costs the writer's session.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import Operation
from cdc.postgres import migrations
from cdc.postgres.tracking import track
from tests.bench import processor_time
from tests.bench.database import DOCUMENTED, fresh_database, rest, streaming
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size

_TABLE = """
CREATE TABLE bench_rows (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  user_id bigint NOT NULL,
  chat_id text,
  room_id text,
  note text NOT NULL
)
"""
_INSERT = "INSERT INTO bench_rows (user_id, chat_id, note) VALUES (:client_id, 'a chat', 'a row to be captured');\n"
_BULK = """
INSERT INTO bench_rows (user_id, chat_id, note)
SELECT n %% 16, 'a chat', 'a row to be captured' FROM generate_series(1, %s) AS n
"""
_READY_S = 30.0
_TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


Beside = Callable[[], AbstractContextManager[object]]
"""Entered while pgbench runs."""


def measure(server: TempServer, size: Size) -> list[Figure]:
    of_consumer: list[Figure] = []
    untracked = _tps(server, size, _not_at_all)
    tracked = _tps(server, size, lambda connection, stack: _with_cdc(connection, stack, of_consumer))
    documented = _tps(server, size, _as_documented)
    return [
        Figure("untracked", untracked, "tps"),
        Figure("tracked, consumer running", tracked, "tps"),
        Figure("documented, pg_notify", documented, "tps"),
        Figure("tracked to untracked", tracked / untracked, ""),
        Figure("documented to untracked", documented / untracked, ""),
        Figure("tracked to documented", tracked / documented, ""),
        *of_consumer,
    ]


def measure_bulk(server: TempServer, size: Size) -> list[Figure]:
    """Processor time of the session that inserts so many rows in one statement; nobody consumes them."""
    untracked, tracked = (_bulk(server, size.changes, tracked=tracked) for tracked in (False, True))
    return [
        Figure("untracked", untracked, "us/row"),
        Figure("tracked", tracked, "us/row"),
        Figure("tracked above untracked", tracked - untracked, "us/row"),
    ]


def _bulk(server: TempServer, rows: int, *, tracked: bool) -> float:
    with fresh_database(server) as connection:
        connection.execute(_TABLE)
        if tracked:
            _track(connection)
        rest(connection)
        before = processor_time.of_session(connection)
        connection.execute(_BULK, [rows])
        return (processor_time.of_session(connection) - before) / rows


def _tps(server: TempServer, size: Size, capture: Callable[[psycopg.Connection, ExitStack], Beside]) -> float:
    with ExitStack() as stack:
        connection = stack.enter_context(fresh_database(server))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cdcbench"))
        connection.execute(_TABLE)
        beside = capture(connection, stack)
        rest(connection)
        script = Path(folder, "insert.sql")
        script.write_text(_INSERT)
        with beside():
            return _pgbench(server, connection.info.dbname, script, size)


def _pgbench(server: TempServer, dbname: str, script: Path, size: Size) -> float:
    output = subprocess.run(
        [
            server.bindir / "pgbench", "--no-vacuum", "--client", str(size.clients), "--jobs", "2",
            "--time", str(size.seconds), "--file", script, "--protocol", "prepared",
            "--host", server.folder, "--port", str(server.port), "--username", "postgres", dbname,
        ],
        check=True, text=True, stdin=subprocess.DEVNULL, capture_output=True,
    ).stdout  # fmt: skip
    found = _TPS.search(output)
    assert found, output
    return float(found[1])


def _not_at_all(_connection: psycopg.Connection, _stack: ExitStack) -> Beside:
    return nullcontext


def _with_cdc(connection: psycopg.Connection, stack: ExitStack, figures: list[Figure]) -> Beside:
    """``figures``: gets what the consumer and its sessions used meanwhile for a change that was settled meanwhile."""
    _track(connection)
    consumer = stack.enter_context(Consumer(connection.info.dsn, "nothing"))
    consumer.until(lambda: streaming(connection), within_s=_READY_S)

    @contextmanager
    def accounted() -> Iterator[None]:
        before = processor_time.used(consumer, connection)
        yield
        used, changes = processor_time.used(consumer, connection).since(before), _settled(connection)
        parts = [*processor_time.PROCESS, *processor_time.SESSIONS.values()]
        figures.extend(
            [
                Figure("consumer's cpu", used.by_process / changes, "us/change"),
                Figure("server's cpu", used.by_sessions / changes, "us/change"),
                *(Figure(f"{part}, cpu", used.cpu_us[part] / changes, "us/change") for part in parts),
            ]
        )

    return accounted


def _track(connection: psycopg.Connection) -> None:
    migrations.install(connection, "public")
    track(connection, "public", "bench_rows", operations=[Operation.INSERT])


def _settled(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT count(*) FROM entity_changes WHERE processed").fetchone()
    assert row is not None
    return int(row[0])


def _as_documented(connection: psycopg.Connection, _stack: ExitStack) -> Beside:
    connection.execute(DOCUMENTED.read_bytes())
    return nullcontext
