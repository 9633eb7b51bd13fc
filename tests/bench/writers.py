"""What capturing costs those who write: pgbench, one-row inserts from 16 clients, with three ways of capturing."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import psycopg

from cdc import schema
from cdc.model import Operation
from cdc.throwaway import Server
from cdc.tracking import track
from tests.bench.database import fresh_database, rest
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
_TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


def measure(server: Server, size: Size) -> list[Figure]:
    untracked = _tps(server, size, _not_at_all)
    tracked = _tps(server, size, _with_cdc)
    documented = _tps(server, size, _as_documented)
    return [
        Figure("untracked", untracked, "tps"),
        Figure("tracked", tracked, "tps"),
        Figure("documented, pg_notify", documented, "tps"),
        Figure("tracked to untracked", tracked / untracked, ""),
        Figure("documented to untracked", documented / untracked, ""),
    ]


def _tps(server: Server, size: Size, capture: Callable[[psycopg.Connection], None]) -> float:
    with fresh_database(server) as connection, tempfile.TemporaryDirectory(prefix="cdcbench") as folder:
        connection.execute(_TABLE)
        capture(connection)
        rest(connection)
        script = Path(folder, "insert.sql")
        script.write_text(_INSERT)
        return _pgbench(server, connection.info.dbname, script, size)


def _pgbench(server: Server, dbname: str, script: Path, size: Size) -> float:
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


def _not_at_all(connection: psycopg.Connection) -> None:
    pass


def _with_cdc(connection: psycopg.Connection) -> None:
    schema.install(connection, "public")
    track(connection, "public", "bench_rows", operations=[Operation.INSERT])


def _as_documented(connection: psycopg.Connection) -> None:
    """The documented table, indexes and trigger as they stand, NOTIFY included."""
    connection.execute(Path(__file__).with_name("documented.sql").read_bytes())
