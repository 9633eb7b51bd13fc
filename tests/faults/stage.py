"""What a chaos run happens on: a server, consumers as processes, a proxy before each of them, and writers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.subscription import DEFAULT
from cdc.postgres import migrations
from tests import refusals
from tests.eventually import eventually
from tests.faults import records
from tests.faults.ledger import Evidence, Span
from tests.faults.operators import Operator
from tests.faults.subscriptions import Subscriptions
from tests.faults.writers import Writer
from tests.fix_consumer import Process, settled
from tests.fix_proxy import Proxy
from tests.handlers_ledger import ALL_KINDS, EFFECTS, FOLDER, ODD
from tests.small_disk import SmallDisk

SLOT = "ledger"
_SERVER = {
    "log_connections": "on", "log_disconnections": "on", "log_line_prefix": "%n %p ", "deadlock_timeout": "100ms",
    "max_connections": "100",
}  # fmt: skip
TIMEOUT_S = 4.0
"""Of a handler: some faults last longer."""
_CONSUMER = {
    "handlers": "tests.handlers_ledger:router", "slot_name": SLOT, "backoff_base": 0.05, "backoff_cap": 0.5,
    "concurrency": 20, "window": 200, "transactions": 4, "timeout": TIMEOUT_S, "drain_time": 5,
}  # fmt: skip


class Consumer:
    """One process, under a role of its own: the server's log then tells whose session was whose."""

    def __init__(self, name: str, process: Process, subscription: str) -> None:
        self.name = name
        self.subscription = subscription
        self.process = process
        self.ended_at: float | None = None

    @property
    def alive(self) -> bool:
        return self.process.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.process.process.send_signal(number)

    def kill(self) -> None:
        at = time.time()  # nothing that it does comes later: a call that begins after this ends with it
        self.process.kill()
        self.ended_at = at

    def terminate(self) -> int:
        code = self.process.terminate()
        self.ended_at = time.time()
        return code


class Stage:
    """``with Stage(folder, seed) as stage:`` everything runs; ``stage.evidence()`` once it has been healed.

    ``subscriptions``: of each place whose it is; those beside the default one are made before the first change.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        subscriptions: Sequence[str] = (DEFAULT,) * 3,
        writers: int = 3,
        keys: int = 30,
    ) -> None:
        self.folder = folder
        self.server = TempServer(durable=True, tcp=True, settings=_SERVER)
        self.crashed_at: list[float] = []
        self.paused: dict[str, list[Span]] = defaultdict(list)
        self.troubles: list[str] = []
        self.kills = 0
        self.restarted = 0
        self.disk: SmallDisk | None = None
        """What the outbox is on; None where nothing can be mounted."""
        by_tcp = self.server.dsn(tcp=True)
        self.proxies = [Proxy(by_tcp) for _ in subscriptions]
        self.subscriptions = Subscriptions(self, subscriptions)
        self.writers_proxy = Proxy(by_tcp)
        self.writers = [
            Writer(self.writers_proxy.dsn, number, seed, ALL_KINDS, keys=keys, pause_s=0.02)
            for number in range(writers)
        ]
        self.operator = Operator(self.writers_proxy.dsn, seed, ALL_KINDS, ["kept_async", "kept_transactional"])
        self.consumers: list[Consumer] = []
        self._everyone: list[Consumer] = []

    def __enter__(self) -> Stage:
        with ExitStack() as undo:
            undo.callback(_set_folder, os.environ.get(FOLDER))
            _set_folder(str(self.folder))
            undo.enter_context(self.server)
            self.dsn = self.server.dsn()
            with self.connect() as connection:
                migrations.install(connection, "public")
                refusals.install(connection)
                self.disk = self._small_disk(connection, undo)
                connection.execute(EFFECTS)
                for kind in ALL_KINDS:
                    connection.execute(records.tracked_table(kind))
                connection.execute(records.TRUNCATES)
            self.subscriptions.make()
            for proxy in (*self.proxies, self.writers_proxy):
                undo.callback(proxy.stop)
                proxy.start()
            undo.callback(self._kill_all)
            self.consumers += [self._started(place) for place in range(len(self.proxies))]
            for writer in self.writers:
                writer.start()
                undo.callback(writer.stop)
            self.operator.start()
            undo.callback(self.operator.stop)
            self.subscriptions.start()
            undo.callback(self.subscriptions.stop)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _small_disk(self, connection: psycopg.Connection, undo: ExitStack) -> SmallDisk | None:
        try:
            disk = undo.enter_context(SmallDisk(self.server))
        except OSError:
            return None
        undo.callback(self.server.stop, "immediate")
        disk.move_outbox(connection)
        return disk

    def _kill_all(self) -> None:
        for consumer in self._everyone:
            if consumer.alive:
                consumer.kill()

    def connect(self) -> psycopg.Connection:
        """To the server itself, past the proxies."""
        return psycopg.connect(self.dsn, autocommit=True, application_name="the stage")

    def processed(self) -> int:
        with self.connect() as connection:
            [(count,)] = connection.execute("SELECT count(*) FROM entity_changes WHERE processed").fetchall()
        return int(count)

    # --- consumers -------------------------------------------------------------------------------------------------

    def start(self, place: int) -> None:
        """A new process at this place, after the one before has ended."""
        self.consumers[place] = self._started(place)

    def watch(self) -> None:
        """As a supervisor does: whoever has ended is started again. A first connection may be refused."""
        for place, consumer in enumerate(self.consumers):
            if not consumer.alive:
                consumer.ended_at = consumer.ended_at or time.time()
                self.restarted += 1
                self.start(place)

    def _started(self, place: int) -> Consumer:
        name, subscription = f"consumer_{len(self._everyone) + 1}", self.subscriptions.at[place]
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN").format(sql.Identifier(name)))
        dsn = make_conninfo(self.proxies[place].dsn, user=name)
        own = {} if subscription == DEFAULT else {"subscription": subscription}
        process = Process(dsn, self.folder / f"{name}.log", **{**_CONSUMER, **own})  # type: ignore[arg-type]
        consumer = Consumer(name, process, subscription)
        self._everyone.append(consumer)
        return consumer

    def end_backends(self, application: str = "cdc: %", place: int | None = None) -> int:
        """pg_terminate_backend; how many there were. Of every consumer, or of the one at this place; by LIKE."""
        role = None if place is None else self.consumers[place].name
        with self.connect() as connection:
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE %s AND (%s::text IS NULL OR usename = %s)",
                [application, role, role],
            ).fetchall()
        return len(ended)

    def cancel_statements(self) -> None:
        """pg_cancel_backend of all that the consumers have asked and not been answered."""
        with self.connect() as connection:
            connection.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE 'cdc: %' AND state = 'active'"
            )

    def crash_or_restart(self, mode: str) -> None:
        if mode == "immediate":
            self.crashed_at.append(time.time())
        self.server.restart(mode)

    def newest(self) -> int:
        """The highest number there is."""
        with self.connect() as connection:
            [(seq,)] = connection.execute("SELECT coalesce(max(seq), 0) FROM entity_changes").fetchall()
        return int(seq)

    def unsettled(self, seq: int, place: int) -> int:
        """How many changes up to this number have no outcome, in the subscription of this place."""
        if (name := self.subscriptions.at[place]) != DEFAULT:
            return self.subscriptions.unsettled(name, seq)
        with self.connect() as connection:
            [(count,)] = connection.execute(
                "SELECT count(*) FROM entity_changes WHERE seq <= %s AND NOT processed AND dead_at IS NULL", [seq]
            ).fetchall()
        return int(count)

    def was_paused(self, place: int, began: float) -> None:
        """The consumer at this place has heard nothing from then until now."""
        self.paused[self.consumers[place].name].append(Span(began, time.time()))

    # --- the end ---------------------------------------------------------------------------------------------------

    def heal(self, *, within_s: float = 90.0) -> None:
        """The writers stop; every change is given the time to end as processed or dead; consumers leave in peace."""
        for writer in self.writers:
            writer.stop()
        self.operator.stop()
        for proxy in (*self.proxies, self.writers_proxy):
            proxy.open()
        self.watch()
        with self.connect() as connection:
            try:
                eventually(lambda: all_done(connection), within_s=within_s, what="every change processed or dead")
                for name in self.subscriptions.names:
                    done = partial(self.subscriptions.all_done, name)
                    eventually(done, within_s=within_s, what=f"every change processed or dead in {name}")
            except AssertionError as stuck:
                self.troubles.append(str(stuck))  # what is missing, the judge says
        for consumer in self.consumers:
            if (code := consumer.terminate()) != 0:
                self.troubles.append(f"{consumer.name} ended with {code}")

    def evidence(self, subscription: str = DEFAULT) -> Evidence:
        """Of one subscription: whose calls and effects those of its consumers are."""
        ended_at = {consumer.name: consumer.ended_at or time.time() for consumer in self._everyone}
        own = [consumer.name for consumer in self._everyone if consumer.subscription == subscription]
        calls = [call for call in records.read_calls(self.folder, ended_at) if call.consumer in own]
        with self.connect() as connection:
            effects = records.read_effects(connection, own)
            if subscription == DEFAULT:
                captured = records.read_captured(connection, ALL_KINDS)
            else:
                captured = self.subscriptions.captured(connection, subscription, calls, effects)
        log = (self.server.folder / "server.log").read_text()
        return Evidence(
            captured=captured,
            calls=calls,
            committed=set().union(*(writer.committed for writer in self.writers)),
            unknown=set().union(*(writer.unknown for writer in self.writers)),
            effects=effects,
            sessions=records.read_sessions(log, self.crashed_at),
            paused=dict(self.paused),
            kills=self.kills + self.restarted,
            replays_from=self.operator.replays_from,
            replay_rounds=self.operator.replay_rounds,
        )

    def odd_survivors(self) -> list[str]:
        """Changes that can be nothing but dead letters, and are not."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT seq, left(entity_id, 20) FROM entity_changes WHERE entity_type = %s AND dead_at IS NULL", [ODD]
            ).fetchall()
        return [f"no dead letter: {seq}, the odd one {id_!r}" for seq, id_ in rows]

    def logged(self, text: str) -> list[str]:
        """The consumers whose log says so."""
        return [consumer.name for consumer in self._everyone if text in consumer.process.log]


def all_done(connection: psycopg.Connection) -> bool:
    """Nothing is to be handled, and no event is due later."""
    due_later = connection.execute("SELECT FROM cdc_due_changes LIMIT 1").fetchall()
    return not due_later and settled(connection)


def _set_folder(folder: str | None) -> None:
    """Consumers find the folder of their ledgers in the environment they are started with."""
    if folder is None:
        os.environ.pop(FOLDER, None)
    else:
        os.environ[FOLDER] = folder


def pause(seconds: float) -> None:
    """Chaos is a matter of time: nothing else tells when a stopped process has been stopped for long enough."""
    threading.Event().wait(seconds)
