"""What capturing costs those who write: pgbench, one-row inserts from 16 clients.

Into a table that is not tracked, into one that is with the consumer at work beside, and into one with the documented
trigger and its NOTIFY, whose processor does not run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import Operation
from cdc.postgres import migrations
from cdc.postgres.tracking import track
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
_READY_S = 30.0
_TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


def measure(server: TempServer, size: Size) -> list[Figure]:
    untracked = _tps(server, size, _not_at_all)
    tracked = _tps(server, size, _with_cdc)
    documented = _tps(server, size, _as_documented)
    return [
        Figure("untracked", untracked, "tps"),
        Figure("tracked, consumer running", tracked, "tps"),
        Figure("documented, pg_notify", documented, "tps"),
        Figure("tracked to untracked", tracked / untracked, ""),
        Figure("documented to untracked", documented / untracked, ""),
        Figure("tracked to documented", tracked / documented, ""),
    ]


def _tps(server: TempServer, size: Size, capture: Callable[[psycopg.Connection, ExitStack], None]) -> float:
    with ExitStack() as stack:
        connection = stack.enter_context(fresh_database(server))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cdcbench"))
        connection.execute(_TABLE)
        capture(connection, stack)
        rest(connection)
        script = Path(folder, "insert.sql")
        script.write_text(_INSERT)
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


def _not_at_all(_connection: psycopg.Connection, _stack: ExitStack) -> None:
    pass


def _with_cdc(connection: psycopg.Connection, stack: ExitStack) -> None:
    migrations.install(connection, "public")
    track(connection, "public", "bench_rows", operations=[Operation.INSERT])
    consumer = stack.enter_context(Consumer(connection.info.dsn, "nothing"))
    consumer.until(lambda: streaming(connection), within_s=_READY_S)


def _as_documented(connection: psycopg.Connection, _stack: ExitStack) -> None:
    connection.execute(DOCUMENTED.read_bytes())
