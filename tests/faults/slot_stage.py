"""Where the slot is broken: a server, an application that writes all the time, and ``cdc run`` as a process.

The stream has a connection of its own, through a proxy. What the consumer says of itself is read from its ``/metrics``
ten times a second, and written down as ``Moment``.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.postgres import grants, migrations
from tests.eventually import eventually
from tests.faults import hurried
from tests.fix_consumer import Process
from tests.fix_proxy import Proxy
from tests.fix_slot import SlotFacts, slot_facts

SLOT = "cdc"
ROLE = "cdc"
SERVER = {"max_replication_slots": "4", "max_wal_senders": "4", "max_wal_size": "64MB", "min_wal_size": "32MB"}
"""So few that a test can take them all."""
_CALLS = """
CREATE TABLE calls (
  seq bigint, key text, attempt int, pid int, started timestamptz DEFAULT clock_timestamp(), ended timestamptz
)
"""
_CONSUMER = {"slot_name": SLOT, "concurrency": 20, "max_attempts": 50, "backoff_base": 0.05, "backoff_cap": 0.5}
_POLL_INTERVAL_S = 0.1
_WRITE_EVERY_S = 0.01
_KEYS = 20
_NOT_STREAMING = re.compile(r"not streaming \((\w+)\): (.+)")


@dataclass(frozen=True, slots=True)
class Pace:
    """How patient the consumer's stream is, and how patient one must be with it."""

    module: str
    wal_sender_timeout_s: float
    within_s: float
    poll_interval_s: float


# Hurried, it sweeps for two seconds between two attempts to stream.
HURRIED = Pace("tests.faults.hurried", hurried.WAL_SENDER_TIMEOUT_S, 45, 0.2)
AS_SHIPPED = Pace("cdc", 15.0, 180, 0.5)


def prepare(dsn: str) -> None:
    """An outbox, the table of the handler's calls, and a role that can do what a consumer must."""
    with psycopg.connect(dsn, autocommit=True) as db:
        migrations.install(db, "public")
        db.execute(_CALLS)
        db.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(sql.Identifier(ROLE)))
        db.execute(sql.SQL("GRANT ALL ON calls TO {}").format(sql.Identifier(ROLE)))
        grants.grant(db, "public", [grants.consumer(ROLE, retention=False, publish=False)])


class Application(threading.Thread):
    """Writes a change every few milliseconds; ``committed`` are those that the server confirmed."""

    def __init__(self, dsn: str, first: int) -> None:
        super().__init__(name="application", daemon=True)
        self._dsn = dsn
        self._next = first
        self._stopping = threading.Event()
        self.committed: set[int] = set()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True, application_name="the application") as connection:
                    while not self._stopping.wait(_WRITE_EVERY_S):
                        self._write(connection)
            except psycopg.OperationalError:  # the server is away
                self._stopping.wait(0.05)

    def _write(self, connection: psycopg.Connection) -> None:
        self._next += 1
        number = self._next
        connection.execute(
            "SELECT publish_change('counted', 'k' || %s, 'INSERT', jsonb_build_object('number', %s::bigint))",
            [number % _KEYS, number],
        )
        self.committed.add(number)


@dataclass(frozen=True, slots=True)
class Moment:
    """What ``/metrics`` said at ``at``, monotonic seconds."""

    at: float
    figures: Mapping[str, float]

    @property
    def role(self) -> str:
        return self._state("cdc_role", "role")

    @property
    def unavailable(self) -> str:
        """The reason that the gauge names, or ""."""
        return self._state("cdc_stream_unavailable", "reason")

    @property
    def notified(self) -> float:
        """Wake-ups that came from the slot, since the process began."""
        return self.figures['cdc_wakeups_total{source="wal"}']

    @property
    def recreated(self) -> float:
        return self.total("cdc_stream_slot_recreations_total")

    def ends(self, reason: str = "") -> float:
        """Ends of a stream and refused starts, since the process began."""
        return self.total("cdc_stream_disconnects_total", f'reason="{reason}"' if reason else "")

    def total(self, name: str, label: str = "") -> float:
        return sum(
            value for series, value in self.figures.items() if series.startswith(f"{name}{{") and label in series
        )

    def _state(self, name: str, label: str) -> str:
        found = (re.fullmatch(rf'{name}{{{label}="(\w+)"}}', series) for series, value in self.figures.items() if value)
        return next((match[1] for match in found if match), "")


class Watch(threading.Thread):
    """Looks at ``/metrics`` ten times a second until stopped; a consumer that does not answer leaves a gap."""

    def __init__(self, port: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._stopping = threading.Event()
        self.moments: list[Moment] = []

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        while not self._stopping.wait(_POLL_INTERVAL_S):
            with contextlib.suppress(OSError), urllib.request.urlopen(self._url, timeout=1) as answer:
                lines = (line for line in answer.read().decode().splitlines() if not line.startswith("#"))
                figures = {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}
                self.moments.append(Moment(time.monotonic(), figures))


class Stage:
    """``with Stage(...) as stage:`` the consumer streams, and the application writes."""

    def __init__(
        self,
        server: TempServer,
        folder: Path,
        plugin: str,
        *,
        pace: Pace = HURRIED,
        dsn: str | None = None,
        **settings: Any,
    ) -> None:
        self.server = server
        self.dsn = dsn or server.dsn()
        self.plugin = plugin
        self.pace = pace
        self.proxy = Proxy(server.dsn())
        self.port = free_port()
        self._folder = folder
        own = {"slot_plugin": plugin, "http_port": self.port, "poll_interval": pace.poll_interval_s}
        self._settings = {**_CONSUMER, **own, **settings}
        self._leads_elsewhere = dsn is not None

    def __enter__(self) -> Stage:
        with ExitStack() as undo:
            [(self._first_seq, first)] = self.sql(
                "SELECT coalesce(max(seq), 0), coalesce(max((new_data->>'number')::bigint), 0) FROM entity_changes"
            )
            self.proxy.start()
            undo.callback(self.proxy.stop)
            undo.callback(self._clear_away)
            self.process = self._start()
            undo.callback(self._kill)
            self.watch = Watch(self.port)
            self.watch.start()
            undo.callback(self.watch.stop)
            self.application = Application(self.dsn, first)
            self.application.start()
            undo.callback(self.application.stop)
            self.wait(lambda: self._woken_since(0), "the consumer streams, and wake-ups arrive")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _start(self) -> Process:
        dsn = make_conninfo(self.dsn, user=ROLE)
        stream_dsn = dsn if self._leads_elsewhere else make_conninfo(self.proxy.dsn, user=ROLE)
        log = self._folder / "consumer.log"
        return Process(dsn, log, module=self.pace.module, stream_dsn=stream_dsn, **self._settings)

    def _kill(self) -> None:
        if self.process.process.poll() is None:
            self.process.process.send_signal(signal.SIGCONT)
            self.process.kill()

    def _clear_away(self) -> None:
        """A slot that is left would hold WAL, and be there for the next."""

        def dropped() -> bool:
            self.sql("SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE active")
            with contextlib.suppress(psycopg.errors.ObjectInUse):
                self.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")
            return self.sql("SELECT count(*) FROM pg_replication_slots") == [(0,)]

        eventually(dropped, what="no slot is left")

    # --- what faults do ----------------------------------------------------------------------------------------------

    def connect(self, **parameters: Any) -> psycopg.Connection:
        """As a superuser, past the proxy."""
        return psycopg.connect(make_conninfo(self.dsn, **parameters), autocommit=True, application_name="the stage")

    def sql(self, statement: str | sql.SQL | sql.Composed, values: list[object] | None = None) -> list[tuple[Any, ...]]:
        """Its rows, on a connection of its own: faults end connections."""
        with self.connect() as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def set(self, **settings: str) -> None:
        """ALTER SYSTEM, and a reload; "" takes it back."""
        with self.connect() as connection:
            for name, value in settings.items():
                change = sql.SQL("ALTER SYSTEM SET {} = {}") if value else sql.SQL("ALTER SYSTEM RESET {}")
                connection.execute(change.format(sql.Identifier(name), *([sql.Literal(value)] if value else [])))
            connection.execute("SELECT pg_reload_conf()")

    def end_stream(self) -> None:
        """The walsender is terminated; the consumer connects again at once."""
        self.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'cdc: stream'")

    @contextlib.contextmanager
    def stopped_process(self) -> Iterator[None]:
        os.kill(self.process.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.process.pid, signal.SIGCONT)

    def slot(self) -> SlotFacts:
        with self.connect() as connection:
            return slot_facts(connection, SLOT)

    # --- what can be seen --------------------------------------------------------------------------------------------

    @property
    def now(self) -> Moment:
        """The last look."""
        return self.watch.moments[-1]

    def moments_since(self, at: float) -> list[Moment]:
        return [moment for moment in self.watch.moments if moment.at >= at]

    def logged_since(self, length: int) -> list[tuple[str, str]]:
        """(reason, what happened and what to do) of each "not streaming" behind so many characters of the log."""
        return _NOT_STREAMING.findall(self.process.log[length:])

    def wait(self, condition: Callable[[], object], what: str) -> None:
        def holds() -> bool:
            assert self.process.process.poll() is None, f"the consumer has ended: {self.process.log}"
            return bool(condition())

        try:
            eventually(holds, within_s=self.pace.within_s, what=what)
        except AssertionError as missing:
            raise AssertionError(f"{missing}\n{self.process.log[-3000:]}") from None

    def keeps_up(self) -> None:
        """What is written after an attempt to stream is handled before the next one, which would sweep by itself."""
        self.wait(self._kept_up_between_attempts, "what is written meanwhile is handled")

    def _kept_up_between_attempts(self) -> bool:
        attempts = self._look().ends()
        [(newest,)] = self.sql("SELECT max(seq) + 15 FROM entity_changes")
        left = "SELECT max(seq) < %s OR bool_or(seq <= %s AND NOT processed) FROM entity_changes"
        self.wait(lambda: self.sql(left, [newest, newest]) == [(False,)], "it is handled at all")
        return self._look().ends() == attempts

    def _look(self) -> Moment:
        """A new one."""
        at = time.monotonic()
        self.wait(lambda: self.now.at > at, "another look")
        return self.now

    def streams_again(self, at: float) -> None:
        """Since ``at`` it has begun to stream, or has never ceased, and wake-ups arrive."""
        self.wait(lambda: self._woken_since(at), "it streams again, and wake-ups arrive")

    def _woken_since(self, at: float) -> bool:
        moments = self.moments_since(at)
        silent = [number for number, moment in enumerate(moments) if moment.role != "streaming"]
        streaming = moments[silent[-1] + 1 if silent else 0 :]
        # Ten looks: a stream that breaks again at once has not come back.
        return len(streaming) > 10 and streaming[-1].notified > streaming[0].notified

    # --- the end -----------------------------------------------------------------------------------------------------

    def ends_in_peace(self) -> Account:
        """The application stops, the rest is handled, the consumer leaves; and what has become of it all."""
        self.application.stop()
        pending = "SELECT count(*) FROM entity_changes WHERE NOT processed AND dead_at IS NULL"
        self.wait(lambda: self.sql(pending) == [(0,)], "every change is settled")
        self.watch.stop()
        assert self.process.terminate() == 0, self.process.log
        captured = self.sql(
            "SELECT seq, entity_id, (new_data->>'number')::bigint, processed FROM entity_changes WHERE seq > %s",
            [self._first_seq],
        )
        calls = self.sql(
            "SELECT seq, key FROM calls WHERE seq > %s AND ended IS NOT NULL ORDER BY started", [self._first_seq]
        )
        return Account(frozenset(self.application.committed), captured, calls)


@dataclass(frozen=True, slots=True)
class Account:
    """``captured``: (seq, key, number, processed); ``calls`` that came to their end: (seq, key), in order."""

    committed: frozenset[int]
    captured: list[tuple[int, str, int | None, bool]]
    calls: list[tuple[int, str]]

    @property
    def lost(self) -> set[int]:
        """Committed, and not captured, not marked or not handled."""
        called = {seq for seq, _ in self.calls}
        kept = {number for seq, _, number, processed in self.captured if processed and seq in called}
        return set(self.committed - kept)

    @property
    def doubled(self) -> int:
        return len(self.calls) - len({seq for seq, _ in self.calls})

    @property
    def out_of_order(self) -> list[str]:
        """The keys whose changes were first handled in another order than they were captured in."""
        first: dict[str, dict[int, None]] = {}
        for seq, key in self.calls:
            first.setdefault(key, {}).setdefault(seq)
        return [key for key, seqs in first.items() if list(seqs) != sorted(seqs)]
