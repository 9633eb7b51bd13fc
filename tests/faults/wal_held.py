"""How much WAL the slot of a running consumer holds, beside a slot that no consumer reads.

What the server keeps for a slot begins at ``restart_lsn``. It follows ``confirmed_flush_lsn`` in steps: only where the
server has noted which transactions were running, every 15 s while something is written and at every checkpoint, and
never past the beginning of the oldest open one. So the measure is seconds: how old is the WAL at the slot's position.
"""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import psycopg

from cdc.core.lsn import Lsn
from tests.eventually import eventually
from tests.faults.slot_stage import SLOT, Stage

_UNREAD = "unread"
_POLL_INTERVAL_S = 0.2
_CONCURRENCY = 4
SETTINGS: dict[str, Any] = {"concurrency": _CONCURRENCY}
"""Of the consumer: few handlers, so that few changes block them all."""
_MEGABYTE = 1 << 20
_LOOK = """
SELECT pg_current_wal_lsn(), ours.restart_lsn, ours.confirmed_flush_lsn, unread.restart_lsn
  FROM pg_replication_slots AS ours, pg_replication_slots AS unread
 WHERE ours.slot_name = %s AND unread.slot_name = %s
"""


@dataclass(frozen=True, slots=True)
class Size:
    """``steps_s``: a checkpoint so often, instead of waiting for what the server notes by itself; 0 is never."""

    seconds: float
    megabytes: int
    rows: int
    steps_s: float


SHORT = Size(seconds=15, megabytes=300, rows=100_000, steps_s=2)
FULL = Size(seconds=60, megabytes=2048, rows=1_000_000, steps_s=0)


@dataclass(frozen=True, slots=True)
class Reading:
    """Positions at ``at``, monotonic seconds: the end of the WAL, and where each slot begins to hold it."""

    at: float
    end: Lsn
    restart: Lsn
    confirmed: Lsn
    unread: Lsn


@dataclass(frozen=True, slots=True)
class Holding:
    """Highest values of a run; bytes of WAL, and seconds since the WAL at a position was written."""

    written: int
    held: int
    held_s: float
    unconfirmed_s: float
    unread: int
    unread_s: float
    held_at_the_end: int
    unhandled: int

    @classmethod
    def of(cls, readings: list[Reading], unhandled: int) -> Holding:
        last = readings[-1]
        return cls(
            written=last.end - readings[0].end,
            held=max(reading.end - reading.restart for reading in readings),
            held_s=_age_s(readings, attrgetter("restart")),
            unconfirmed_s=_age_s(readings, attrgetter("confirmed")),
            unread=max(reading.end - reading.unread for reading in readings),
            unread_s=_age_s(readings, attrgetter("unread")),
            held_at_the_end=last.end - last.restart,
            unhandled=unhandled,
        )


def _age_s(readings: list[Reading], position: Callable[[Reading], Lsn]) -> float:
    """The highest age of the WAL at ``position``, by the first reading at which the end of the WAL was past it."""
    ends = [reading.end for reading in readings]
    ages = (
        reading.at - readings[later].at
        for reading in readings
        if (later := bisect_right(ends, position(reading))) < len(readings)
    )
    return max(0.0, *ages)


class Watcher(threading.Thread):
    """Reads both slots five times a second."""

    def __init__(self, stage: Stage, steps_s: float) -> None:
        super().__init__(name="watcher", daemon=True)
        self._stage = stage
        self._steps_s = steps_s
        self._stopping = threading.Event()
        self.readings: list[Reading] = []

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        with self._stage.connect() as connection:
            stepped_at = time.monotonic()
            while not self._stopping.wait(_POLL_INTERVAL_S):
                if self._steps_s and time.monotonic() - stepped_at > self._steps_s:
                    connection.execute("CHECKPOINT")
                    stepped_at = time.monotonic()
                for row in connection.execute(_LOOK, [SLOT, _UNREAD]).fetchall():
                    self.readings.append(Reading(time.monotonic(), *map(Lsn.parse, row)))


def handlers_blocked(stage: Stage, size: Size) -> Holding:
    """Every handler stands still, and the application writes for ``size.seconds``."""
    with _watched(stage, size) as watcher:
        until = time.monotonic() + size.seconds
        with stage.connect() as connection:
            while time.monotonic() < until:
                _publish(connection, 200)
        _released(stage, watcher)
    return Holding.of(watcher.readings, _unhandled(stage))


def nothing_tracked(stage: Stage, size: Size) -> Holding:
    """Nothing that is tracked is written; a table that is not takes ``size.megabytes``."""
    stage.application.stop()
    with _watched(stage, size) as watcher, stage.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS untracked (content text)")
        notified, first = stage.now.notified, watcher.readings[-1].end
        while watcher.readings[-1].end - first < size.megabytes * _MEGABYTE:
            connection.execute("INSERT INTO untracked SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
        _released(stage, watcher)
        assert stage.now.notified == notified
    return Holding.of(watcher.readings, _unhandled(stage))


def large_transaction(stage: Stage, size: Size) -> Holding:
    """One transaction of ``size.rows`` changes, none of which is handled."""
    with _watched(stage, size) as watcher:
        with stage.connect() as connection:
            _publish(connection, size.rows)
        _released(stage, watcher)
    return Holding.of(watcher.readings, _unhandled(stage))


def _publish(connection: psycopg.Connection, rows: int) -> None:
    connection.execute(
        "SELECT count(publish_change('counted', 'r' || n, 'INSERT', jsonb_build_object('text', repeat('x', 500))))"
        " FROM generate_series(1, %s) AS n",
        [rows],
    )


@contextlib.contextmanager
def _watched(stage: Stage, size: Size) -> Iterator[Watcher]:
    """With all handlers blocked, for longer than any test, and a slot that no consumer reads."""
    stage.sql(
        "SELECT publish_change('counted', 'blocks' || n, 'INSERT', '{\"takes_s\": 3600}')"
        " FROM generate_series(1, %s) AS n",
        [_CONCURRENCY],
    )
    stage.sql("SELECT pg_create_logical_replication_slot(%s, %s)", [_UNREAD, stage.plugin])
    watcher = Watcher(stage, size.steps_s)
    watcher.start()
    try:
        eventually(lambda: watcher.readings, what="a first reading")
        yield watcher
    finally:
        watcher.stop()


def _released(stage: Stage, watcher: Watcher) -> None:
    """What was written until now is no longer held."""
    end = watcher.readings[-1].end
    stage.wait(lambda: watcher.readings[-1].restart >= end, "the slot holds nothing of it any more")


def _unhandled(stage: Stage) -> int:
    [(count,)] = stage.sql("SELECT count(*) FROM entity_changes WHERE NOT processed")
    return int(count)
