"""Reading wake-ups from a slot: the consumer's stream, and pg_recvlogical with the same options beside it.

Both from the start of the program, or thread, to the last wake-up; the server decodes the same WAL for both.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import psycopg

from cdc.app.serve import spare_the_garbage_collector
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import StreamError
from cdc.core.model import WakeUp, message_prefix
from cdc.replication.stream import Stream, StreamSettings
from cdc.replication.wal2json import options
from tests.bench.database import fresh_outbox
from tests.bench.report import Figure, LeftOutError
from tests.bench.size import Size

_TRANSACTION = 100
_PREFIX = message_prefix("public")
_WITHIN_S = 120.0
_TURNS = 3
_RING = "SELECT count(pg_logical_emit_message(true, %s, g || ',' || g %% 64)) FROM generate_series(%s::int, %s) AS g"


def measure(server: TempServer, size: Size) -> list[Figure]:
    if not server.wal2json:
        raise LeftOutError("the server has no wal2json")
    spare_the_garbage_collector(0)  # as ``cdc run`` does
    with fresh_outbox(server) as connection:
        for turn in range(_TURNS):
            for reader in ("ours", "theirs"):
                connection.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [f"{reader}_{turn}"])
        for first in range(1, size.notified + 1, _TRANSACTION):
            connection.execute(_RING, [_PREFIX, first, first + _TRANSACTION - 1])
        theirs, ours = [], []
        for turn in range(_TURNS):
            theirs.append(_seconds(lambda turn=turn: _recvlogical(server, connection, f"theirs_{turn}")))  # type: ignore[misc]
            ours.append(_seconds(lambda turn=turn: _stream(connection.info.dsn, f"ours_{turn}", size.notified)))  # type: ignore[misc]
    return [
        Figure("stream", size.notified / min(ours), "messages/s"),
        Figure("pg_recvlogical", size.notified / min(theirs), "messages/s"),
        Figure("stream to pg_recvlogical", min(theirs) / min(ours), ""),
    ]


def _seconds(read: Callable[[], None]) -> float:
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def _recvlogical(server: TempServer, connection: psycopg.Connection, slot: str) -> None:
    row = connection.execute("SELECT pg_current_wal_lsn()::text").fetchone()
    assert row is not None
    chosen = [word for name, value in options(_PREFIX) for word in ("--option", f"{name}={value}")]
    subprocess.run(
        [
            server.bindir / "pg_recvlogical", "--start", "--no-loop", "--slot", slot, "--endpos", row[0], "--file",
            "/dev/null", *chosen, "--host", server.folder, "--port", str(server.port), "--username", "postgres",
            "--dbname", connection.info.dbname,
        ],
        check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WITHIN_S,
    )  # fmt: skip


def _stream(dsn: str, slot: str, messages: int) -> None:
    heard = _Counter(messages)
    stream = Stream(StreamSettings(dsn=dsn, schema="public", slot=slot, create_slot=False), heard)
    stream.start()
    try:
        assert heard.all.wait(_WITHIN_S)
    finally:
        stream.stop(10)


class _Counter:
    """StreamEvents that counts."""

    def __init__(self, messages: int) -> None:
        self._left = messages
        self.all = threading.Event()

    def streaming(self) -> None:
        pass

    def notified(self, wakeups: Sequence[WakeUp], committed_at: float | None) -> None:
        self._left -= len(wakeups)
        if self._left <= 0:
            self.all.set()

    def interrupted(self, error: StreamError) -> None:
        pass
