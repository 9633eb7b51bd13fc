"""From the commit to a real consumer of Kafka: ours, and Debezium in Connect standalone, the same rows in both.

    make bench ARGS=debezium                                     all of it, some minutes for each
    python -m tests.bench.debezium --phases steady --peers cdc   a part

Both write Debezium's envelope, into a topic of four partitions on one node. Debezium runs twice: with its defaults (a
schema in each record, 2,048 records a batch, a poll each half second), and as it is quickest here (no schema, larger
batches, a poll each 10 ms, a linger in its producer). Its JVM may have 2 GB, as Connect's own script gives it. Phases:

    start     one row is there; until its record is
    steady    rows at 500 and at 5,000 a second, one and ten in a transaction; from the commit to the record
    backlog   rows that were written while it was ended; from the first record to the last one
    away      the broker is killed for a minute, at 500 rows a second: what WAL its slot keeps
    slot      the slot is dropped while it is ended, with 1,000 rows behind it: how many of them come
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
from confluent_kafka import Consumer as KafkaConsumer
from psycopg.conninfo import conninfo_to_dict

from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.core.model import Operation
from cdc.postgres import migrations
from cdc.postgres.tracking import track
from tests.bench.database import ROWS, fresh_database, rest, streaming
from tests.bench.latency import numbers
from tests.bench.processes import Consumer, child, finish
from tests.bench.report import Figure, LeftOutError, quantile
from tests.bench.size import FULL, Size
from tests.eventually import eventually
from tests.fix_brokers import KAFKA_JARS, KafkaServer

_JARS = Path(__file__).parents[2] / ".venv-bench/debezium"
_TABLE = "public.bench_rows"
_WITHIN_S = 180.0
_WARM_UP_ROWS = 2_000
_BEHIND_SLOT = 1_000
_ROW = re.compile(rb'"after": ?\{"id": ?(\d+)')
PHASES = ("start", "steady", "backlog", "away", "slot")


class Reader:
    """The consumer of the topic: at which nanosecond each row was there first, and how many records there were."""

    def __init__(self, broker: KafkaServer, topic: str) -> None:
        self.arrived: dict[int, int] = {}
        self.records = 0
        self._consumer = KafkaConsumer({
            "bootstrap.servers": broker.address, "group.id": "bench", "auto.offset.reset": "earliest", "log_level": 0,
        })  # fmt: skip
        self._joined = threading.Event()
        self._consumer.subscribe([topic], on_assign=lambda *_: self._joined.set())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        if not self._joined.wait(_WITHIN_S):
            raise RuntimeError("the reader did not get its partitions")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._consumer.close()

    def _read(self) -> None:
        while not self._stopping.is_set():
            records = self._consumer.consume(1_000, 0.005)
            now = time.monotonic_ns()
            for record in records:
                if record.error() is None and (found := _ROW.search(bytes(record.value() or b""))):
                    self.records += 1
                    self.arrived.setdefault(int(found[1]), now)

    def until(self, rows: range, *, within_s: float = _WITHIN_S) -> int:
        """How many of these have come, when all have or the time is over."""
        ends = time.monotonic() + within_s
        while (count := sum(row in self.arrived for row in rows)) < len(rows) and time.monotonic() < ends:
            self._stopping.wait(0.05)
        return count


class Ours:
    name = "cdc"

    def __init__(self, server: TempServer, broker: KafkaServer) -> None:
        self._broker = broker
        self._dsn = ""

    def install(self, connection: psycopg.Connection) -> None:
        migrations.install(connection, "public")
        track(connection, "public", "bench_rows", operations=[Operation.INSERT])
        self._dsn = connection.info.dsn

    @contextmanager
    def running(self) -> Iterator[int]:
        url = self._broker.url("{schema}.{table}")
        with Consumer(self._dsn, "", deliver_to=url, format="debezium", timeout=5) as consumer:
            yield consumer.pid

    def state(self) -> str:
        return "RUNNING"


class Debezium:
    def __init__(self, server: TempServer, broker: KafkaServer, folder: Path, *, best: bool) -> None:
        self.name = "Debezium's best" if best else "Debezium's defaults"
        self._best = best
        self._server = server
        self._broker = broker
        self._folder = folder / ("best" if best else "defaults")
        self._folder.mkdir()
        self._port = free_port()
        self._database = ""
        self._process: subprocess.Popen[bytes] | None = None

    def install(self, connection: psycopg.Connection) -> None:
        self._database = str(conninfo_to_dict(connection.info.dsn)["dbname"])

    @contextmanager
    def running(self) -> Iterator[int]:
        command = [
            "java", "-Xms256M", "-Xmx2G", "-XX:+UseG1GC", "-cp", f"{_JARS}/*",
            "org.apache.kafka.connect.cli.ConnectStandalone",
            self._written("worker", self._worker()), self._written("connector", self._connector()),
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            process = self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)

    def _written(self, name: str, settings: Mapping[str, object]) -> str:
        path = self._folder / f"{name}.properties"
        path.write_text("".join(f"{setting}={value}\n" for setting, value in settings.items()))
        return str(path)

    def _worker(self) -> dict[str, object]:
        return {
            "bootstrap.servers": self._broker.address,
            "key.converter": "org.apache.kafka.connect.json.JsonConverter",
            "value.converter": "org.apache.kafka.connect.json.JsonConverter",
            "offset.storage.file.filename": self._folder / "offsets",
            "listeners": f"http://127.0.0.1:{self._port}",
            "plugin.discovery": "only_scan",
            "plugin.path": self._folder / "none",
            **({"connector.client.config.override.policy": "All"} if self._best else {}),
        }

    def _connector(self) -> dict[str, object]:
        best = {
            "key.converter": "org.apache.kafka.connect.json.JsonConverter", "key.converter.schemas.enable": "false",
            "value.converter": "org.apache.kafka.connect.json.JsonConverter", "value.converter.schemas.enable": "false",
            "max.batch.size": 16_384, "max.queue.size": 65_536, "poll.interval.ms": 10,
            "producer.override.linger.ms": 2, "producer.override.batch.size": 524_288,
            "producer.override.buffer.memory": 134_217_728,
        }  # fmt: skip
        return {
            "name": "bench",
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "database.hostname": "127.0.0.1", "database.port": self._server.port, "database.user": "postgres",
            "database.password": "unused", "database.dbname": self._database,
            "topic.prefix": self._broker.url("").rpartition("/")[2].removesuffix("."),
            "table.include.list": _TABLE, "plugin.name": "pgoutput", "publication.autocreate.mode": "filtered",
            "slot.name": "debezium",
            **(best if self._best else {}),
        }  # fmt: skip

    def state(self) -> str:
        """Of its task, as Connect says it; else whether Connect has ended, and what it logged last: its folder goes."""
        try:
            url = f"http://127.0.0.1:{self._port}/connectors/bench/status"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return ", ".join(task["state"] for task in json.load(answer)["tasks"]) or "no task"
        except OSError as error:
            code = None if self._process is None else self._process.poll()
            what = f"without an answer ({error})" if code is None else f"ended with {code}"
            log = self._folder / "log"
            return f"{what}; its log's end:\n{log.read_text(errors='replace')[-4_000:] if log.exists() else ''}"


class Run:
    """One peer in one database: phases in turn, each with rows of its own numbers."""

    def __init__(
        self, peer: Ours | Debezium, connection: psycopg.Connection, broker: KafkaServer, reader: Reader, size: Size
    ) -> None:
        self._peer, self._connection, self._broker, self._reader, self._size = peer, connection, broker, reader, size
        self._next = 0
        self._began = False

    def measure(self, phases: Sequence[str]) -> Iterator[Figure]:
        """What is not asked for of the start is done all the same: it has the slot made."""
        yield from self._start("start" in phases)
        if "steady" in phases:
            yield from self._steady()
        if "backlog" in phases:
            yield from self._backlog()
        if "away" in phases:
            yield from self._away()
        if "slot" in phases:
            yield from self._slot()

    def _rows(self, count: int) -> range:
        rows = range(self._next, self._next + count)
        self._next += count
        return rows

    def _insert(self, rows: range) -> None:
        self._connection.execute(
            "INSERT INTO bench_rows (id, note) SELECT n, 'a row to be captured' FROM generate_series(%s::int, %s) AS n",
            [rows.start, rows.stop - 1],
        )

    def _all_come(self, rows: range) -> None:
        if self._reader.until(rows) < len(rows):
            raise RuntimeError(f"{self._peer.name} did not deliver {rows} in time; it is {self._peer.state()}")

    def _figure(self, name: str, value: float, unit: str) -> Figure:
        return Figure(f"{self._peer.name}: {name}", value, unit)

    def _start(self, asked: bool) -> Iterator[Figure]:
        if not asked:
            return
        rows = self._rows(1)
        self._insert(rows)
        began = time.monotonic_ns()
        with self._peer.running():
            self._all_come(rows)
        yield self._figure("start to first record", (self._reader.arrived[rows.start] - began) / 1e9, "s")

    @contextmanager
    def _warm(self) -> Iterator[int]:
        with self._peer.running() as pid:
            rows = self._rows(1)  # what comes before it streams is a snapshot's
            self._insert(rows)
            self._all_come(rows)
            for _ in range(10):
                rows = self._rows(_WARM_UP_ROWS // 10)
                self._insert(rows)
                self._all_come(rows)
            yield pid

    def _steady(self) -> Iterator[Figure]:
        with self._warm() as pid:
            for rate, together in ((500, 1), (5_000, 10)):
                rows, committed = self._written(rate, together, self._size.seconds)
                self._all_come(rows)
                late = [(self._reader.arrived[row] - at) / 1e6 for row, at in zip(rows, committed, strict=True)]
                late = late[rate * self._size.warm_up_s :]
                yield self._figure(f"p50 at {rate:,}/s", quantile(late, 0.5), "ms")
                yield self._figure(f"p99 at {rate:,}/s", quantile(late, 0.99), "ms")
                yield self._figure(f"pace at {rate:,}/s", len(rows) / (committed[-1] - committed[0]) * 1e9, "rows/s")
            yield self._figure("memory, steady", _peak_mb(pid), "MB")

    def _written(self, rate: int, together: int, seconds: int) -> tuple[range, Sequence[int]]:
        rows = self._rows(rate * (self._size.warm_up_s + seconds))
        with tempfile.TemporaryDirectory(prefix="cdcbench") as folder:
            path = Path(folder) / "written"
            arguments = (
                self._connection.info.dsn,
                "insert",
                str(rate),
                str(len(rows)),
                str(path),
                str(together),
                str(rows.start),
            )
            with child("writer", *arguments) as writer:
                finish(writer, within_s=_WITHIN_S)
            return rows, numbers(path)

    def _backlog(self) -> Iterator[Figure]:
        if _kept_mb(self._connection) is None:
            with self._warm():
                pass
        rows = self._rows(self._size.changes // 2)
        for first in range(rows.start, rows.stop, 1_000):
            self._insert(range(first, min(first + 1_000, rows.stop)))
        rest(self._connection)
        with self._peer.running() as pid:
            self._all_come(rows)
            memory = _peak_mb(pid)
        times = [self._reader.arrived[row] for row in rows]
        yield self._figure("backlog", (len(times) - 1) / (max(times) - min(times)) * 1e9, "rows/s")
        yield self._figure("memory, backlog", memory, "MB")

    def _away(self) -> Iterator[Figure]:
        with self._warm():
            self._broker.kill()
            kept: list[float] = []
            done = threading.Event()

            def look() -> None:
                with psycopg.connect(self._connection.info.dsn, autocommit=True) as other:
                    while not done.wait(1.0):
                        kept.append(_kept_mb(other) or 0.0)

            looking = threading.Thread(target=look)
            before = self._wal_mb()
            looking.start()
            try:
                rows, _ = self._written(500, 10, self._size.away_s)  # not held up by each commit
            finally:
                done.set()
                looking.join()
            yield self._figure("WAL written, broker away", self._wal_mb() - before, "MB")
            yield self._figure("WAL kept, broker away, at most", max(kept), "MB")
            yield self._figure("WAL kept, broker away, at the end", kept[-1], "MB")
            self._broker.start()
            back = time.monotonic()
            came = self._reader.until(rows)
            print(f"{self._peer.name}: the broker is back, and it is {self._peer.state()}")
            yield self._figure(f"broker back: all there, or {_WITHIN_S:g}", time.monotonic() - back, "s")
            yield self._figure("broker back: rows that came", came, "rows")

    def _wal_mb(self) -> float:
        [(found,)] = self._connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8").fetchall()
        return float(found) / 1e6

    def _slot(self) -> Iterator[Figure]:
        with self._warm():
            pass
        eventually(lambda: not streaming(self._connection), what="nobody reads the slot")
        self._connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()"
        )
        rows = self._rows(_BEHIND_SLOT)
        self._insert(rows)
        began = time.monotonic()
        with self._peer.running():
            came = self._reader.until(rows, within_s=60.0)
            took, state = time.monotonic() - began, self._peer.state()
        print(f"{self._peer.name}: its slot lost, it is {state}")
        yield self._figure("slot lost: rows that came", came, "rows")
        yield self._figure("slot lost: until they came, or 60", took, "s")


def _kept_mb(connection: psycopg.Connection) -> float | None:
    """WAL that the slot of this database keeps; None without a slot."""
    [(kept,)] = connection.execute(
        "SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn))::float8 FROM pg_replication_slots"
        " WHERE database = current_database()"
    ).fetchall()
    return None if kept is None else float(kept) / 1e6


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


def measure(_: TempServer, size: Size, phases: Sequence[str] = PHASES, peers: Sequence[str] = ()) -> list[Figure]:
    """On a server of its own, which listens on TCP: JDBC knows nothing else."""
    if not any(_JARS.glob("debezium-connector-postgres-*.jar")):
        raise LeftOutError("there is no Debezium: make debezium")
    if shutil.which("java") is None or not any(KAFKA_JARS.glob("kafka_*.jar")):
        raise LeftOutError("there is no Kafka: make kafka")
    found: list[Figure] = []
    with TempServer(tcp=True) as server, tempfile.TemporaryDirectory(prefix="cdcbench") as name:
        folder = Path(name)
        (folder / "broker").mkdir()
        broker = KafkaServer(folder / "broker")
        broker.start()
        try:
            made: list[Callable[[], Ours | Debezium]] = [
                lambda: Ours(server, broker),
                lambda: Debezium(server, broker, folder, best=False),
                lambda: Debezium(server, broker, folder, best=True),
            ]
            for make in made:
                peer = make()
                if peers and not any(word in peer.name for word in peers):
                    continue
                asyncio.run(broker.prepare([_TABLE]))
                topic = broker.url(_TABLE).rpartition("/")[2]
                with ExitStack() as stack:
                    connection = stack.enter_context(fresh_database(server))
                    connection.execute(ROWS)
                    peer.install(connection)
                    rest(connection)
                    reader = stack.enter_context(Reader(broker, topic))
                    found += Run(peer, connection, broker, reader, size).measure(phases)
        finally:
            broker.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="*", choices=PHASES, default=PHASES)
    parser.add_argument("--peers", nargs="*", default=(), help="words of their names: cdc, defaults, best")
    parser.add_argument("--changes", type=int, default=FULL.changes)
    arguments = parser.parse_args()
    size = replace(FULL, changes=arguments.changes)
    with TempServer() as server:
        for figure in measure(server, size, arguments.phases, arguments.peers):
            print(f"{figure.name:<60} {figure.value:>10,.2f} {figure.unit}", flush=True)


if __name__ == "__main__":
    main()
