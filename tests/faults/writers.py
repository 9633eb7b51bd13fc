"""Applications that write, and remember what was committed. Threads of the test's own process."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import psycopg
from psycopg import sql

from tests.faults.ledger import Write
from tests.handlers_ledger import KINDS

_RECONNECT_S = 0.05
_BURSTS = 0.01
_TRUNCATES = 0.004
"""What comes behind one waits for a second."""
_PUBLISHES = 0.03
_DUE_S = 2.0
_BEHIND_MAX = 300
"""Unsettled changes. On a slow machine there would be ever more, and every limit would measure how slow it is."""
_LOOKS = 0.1
_TRUNCATE = """
TRUNCATE kept_truncated;
SELECT max(seq) FROM cdc_barriers WHERE entity_type = 'kept_truncated'
"""
_PUBLISH = "SELECT publish_change(%s, %s, new_data => jsonb_build_object('token', %s::text), due => to_timestamp(%s))"
_BEHIND = """
SELECT count(*) >= %(n)s
FROM (SELECT FROM entity_changes WHERE NOT processed AND dead_at IS NULL LIMIT %(n)s) AS unsettled
"""


class Writer(threading.Thread):
    """Inserts, updates and deletes rows of ``tables`` until ``stop``, truncates one, and publishes what is due later.

    Some transactions linger, some roll back.

    ``committed`` was confirmed by the server; ``unknown`` is what the answer to its commit was lost for. All else was
    never committed.
    """

    def __init__(self, dsn: str, number: int, seed: int, tables: Sequence[str], *, keys: int, pause_s: float) -> None:
        super().__init__(name=f"writer-{number}", daemon=True)
        self._dsn = dsn
        self._number = number
        self._dice = random.Random(f"{seed} writer {number}")
        self._tables = tables
        self._rows = [(table, key) for table in tables for key in range(keys)]
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._written = 0
        self.committed: set[Write] = set()
        self.unknown: set[Write] = set()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._dsn, application_name="a writer") as connection:
                    while not self._stopping.wait(self._dice.random() * self._pause_s * 2):
                        if self._dice.random() < _LOOKS:
                            self._let_them_catch_up(connection)
                        self._transact(connection)
            except psycopg.Error:  # the server is away, or has chosen us as the victim of a deadlock
                self._stopping.wait(_RECONNECT_S)

    def _let_them_catch_up(self, connection: psycopg.Connection) -> None:
        behind = True
        while behind and not self._stopping.wait(_RECONNECT_S):
            [(behind,)] = connection.execute(_BEHIND, {"n": _BEHIND_MAX}).fetchall()
            connection.rollback()

    def _transact(self, connection: psycopg.Connection) -> None:
        share = self._dice.random()
        if share < _TRUNCATES:
            written = self._truncate(connection)
        elif share < _TRUNCATES + _PUBLISHES:
            written = self._publish(connection)
        elif share > 1 - _BURSTS:
            written = self._burst(connection, self._dice.choice(self._tables))
        else:
            # In one order, so that two writers seldom lock each other out.
            rows = sorted(self._dice.sample(self._rows, self._dice.choice([1, 1, 1, 2, 5])))
            written = [write for table, key in rows for write in self._write(connection, table, key)]
        if self._dice.random() < 0.1:
            self._stopping.wait(self._dice.random() * 0.05)
        if self._dice.random() < 0.05:
            connection.rollback()
            return
        try:
            connection.commit()
        except psycopg.Error:
            self.unknown.update(written)
            raise
        self.committed.update(written)

    def _write(self, connection: psycopg.Connection, table: str, key: int) -> list[Write]:
        name = sql.Identifier(table)
        if self._dice.random() < 0.2:
            delete = sql.SQL("DELETE FROM {} WHERE id = %s RETURNING token").format(name)
            return [Write("DELETE", token) for (token,) in connection.execute(delete, [key]).fetchall()]
        token = self._token()
        connection.execute(
            sql.SQL(
                "INSERT INTO {} (id, token) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET token = excluded.token"
            ).format(name),
            [key, token],
        )
        return [Write("WRITE", token)]

    def _burst(self, connection: psycopg.Connection, table: str) -> list[Write]:
        """Every row several times: a backlog, with a queue in every lane."""
        update = sql.SQL("UPDATE {} SET token = %s || '.' || id RETURNING token").format(sql.Identifier(table))
        found = [connection.execute(update, [self._token()]).fetchall() for _ in range(4)]
        return [Write("WRITE", token) for rows in found for (token,) in rows]

    def _truncate(self, connection: psycopg.Connection) -> list[Write]:
        cursor = connection.execute(_TRUNCATE)
        cursor.nextset()
        [(seq,)] = cursor.fetchall()
        return [Write("TRUNCATE", str(seq))]

    def _publish(self, connection: psycopg.Connection) -> list[Write]:
        """An event that is due later, with a key of its own."""
        due = time.time() + self._dice.random() * _DUE_S
        token = f"{self._token()}@{due}"
        connection.execute(_PUBLISH, [self._dice.choice(KINDS), token, token, due])
        return [Write("WRITE", token)]

    def _token(self) -> str:
        self._written += 1
        return f"{self._number}.{self._written}"
