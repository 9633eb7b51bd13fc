"""An operator who backfills tables and replays changes meanwhile. A thread of the test's own process."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime

import psycopg

from cdc.core.errors import CdcError
from cdc.postgres import bulk
from cdc.postgres.backfill import UNFINISHED, Backfills
from cdc.postgres.bulk import Bulk, Round, Wanted
from cdc.postgres.connect import connect
from tests.faults.ledger import ReplayRound

OPERATOR = "an operator"
_PAUSE_S = 0.5
_ROUND, _ROUND_S = 5, 0.02
"""Small, and with a rest after each, so that what ends it comes between two."""
_INTERRUPTED = 0.05
_NOW = "SELECT now(), (SELECT coalesce(max(seq), 0) FROM entity_changes)"
_NEWEST = "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('entity_changes', 'seq')::regclass), 0)"
_THERE = "SELECT coalesce(array_agg(seq), '{}') FROM entity_changes WHERE NOT processed AND dead_at IS NULL"


class Operator(threading.Thread):
    """Until ``stop``. What is interrupted is resumed: a backfill reads a row once, and no change is replayed twice.

    ``replays_from``: the newest number at the beginning of each replay. ``replay_rounds``: what was there at each of
    their rounds.
    """

    def __init__(self, dsn: str, seed: int, tables: Sequence[str], replayed: Sequence[str]) -> None:
        super().__init__(name="operator", daemon=True)
        self._dsn = dsn
        self._dice = random.Random(f"{seed} operator")
        self._tables = tables
        self._replayed = replayed
        self._stopping = threading.Event()
        self._replay: tuple[str, datetime, datetime] | None = None
        self._replayed_until: dict[str, datetime] = {}
        self.replays_from: list[int] = []
        self.replay_rounds: list[ReplayRound] = []

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        bulk._ROUND = _ROUND  # noqa: SLF001 - nobody else in this process replays
        while not self._stopping.wait(_PAUSE_S):
            try:
                with closing(connect(self._dsn, application_name=OPERATOR, user_path=True)) as connection:
                    while not self._stopping.wait(_PAUSE_S):
                        self._backfill(connection, self._dice.choice(self._tables))
                        self._replay_some(connection, self._dice.choice(self._replayed))
            except (psycopg.Error, CdcError):  # the server is away, or a session that it has not missed yet is at work
                continue

    def _backfill(self, connection: psycopg.Connection, table: str) -> None:
        backfills = Backfills("public")
        unfinished = [each for each in backfills.newest(connection) if each.state in UNFINISHED]
        found = unfinished[0] if unfinished else backfills.start(connection, table, backlog=20)
        for step in backfills.work(connection, found):
            if self._stopping.wait(step.waits.seconds if step.waits else 0.0):
                return

    def _round(self, connection: psycopg.Connection, rounds: Iterator[Round]) -> bool:
        """Make the next one. False: there is none."""
        [(before,)] = connection.execute(_NEWEST).fetchall()
        [(there,)] = connection.execute(_THERE).fetchall()
        self.replay_rounds.append(ReplayRound(before, None, frozenset(there)))
        made = next(rounds, None)
        [(after,)] = connection.execute(_NEWEST).fetchall()
        self.replay_rounds[-1] = ReplayRound(before, after, frozenset(there))
        return made is not None

    def _replay_some(self, connection: psycopg.Connection, entity_type: str) -> None:
        [(now, newest)] = connection.execute(_NOW).fetchall()
        if self._replay is None:
            since = self._replayed_until.get(entity_type, now)
            self._replayed_until[entity_type] = now
            self._replay = entity_type, since, now
            self.replays_from.append(newest)
        entity_type, since, until = self._replay
        wanted = Wanted(entity_type=entity_type, since=since, until=until)
        with Bulk("public").replayable(connection, wanted, unless_since=since) as replay:
            rounds = replay.rounds()
            while self._round(connection, rounds):
                if self._stopping.wait(_ROUND_S) or self._dice.random() < _INTERRUPTED:
                    return  # as by Ctrl-C; the next one goes on with it
        self._replay = None
