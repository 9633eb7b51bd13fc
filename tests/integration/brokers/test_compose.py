"""What the Compose files of the brokers run, on brokers of the test: the settings of each, its delivery, its reader."""

from __future__ import annotations

import asyncio
import os
import runpy
import subprocess
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdc.contrib.demo.temp_server import free_port
from tests import compose
from tests.eventually import eventually
from tests.fix_brokers import BrokerServer, KafkaServer, NatsServer
from tests.fix_consumer import ROOT, Process, settled, states


class Reader:
    """The service on the other side; ``taken`` are the numbers of the changes that it took, by key."""

    def __init__(self, broker: BrokerServer, log: Path) -> None:
        self._broker, self._log = broker, log
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        service = compose.service("prepare", self._broker)
        environment = {**os.environ, **compose.environment(service, self._broker)}
        subprocess.run(compose.command(service), env=environment, check=True)

    def start(self) -> None:
        service = compose.service("from", self._broker)
        environment = {**os.environ, **compose.environment(service, self._broker)}
        with self._log.open("ab") as said:
            self._process = subprocess.Popen(compose.command(service), env=environment, stdout=said)

    def terminate(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(30)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def taken(self) -> dict[str, list[str]]:
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for line in self._log.read_text().rpartition("\n")[0].splitlines():
            how, _, key, number = line.split()
            if how == "took":
                found[key].setdefault(number)
        return {key: list(numbers) for key, numbers in found.items()}

    def has_taken(self, count: int) -> bool:
        return sum(map(len, self.taken.values())) >= count


@pytest.fixture
def reader(broker: BrokerServer, tmp_path: Path) -> Iterator[Reader]:
    found = Reader(broker, tmp_path / "read")
    yield found
    found.end()


@pytest.fixture
def delivery(broker: BrokerServer, outbox: str, tmp_path: Path) -> Iterator[None]:
    """The consumer of the file, without its subscription."""
    service = compose.environment(compose.service("to", broker), broker)
    with pytest.MonkeyPatch.context() as patch:
        for name in {"CDC_DELIVER_USER", "CDC_DELIVER_PASSWORD"} & set(service):
            patch.setenv(name, service[name])
        process = Process(outbox, tmp_path / "delivery.log", deliver_to=service["CDC_DELIVER_TO"])
    yield
    process.kill()


def _publish(db: psycopg.Connection, count: int) -> None:
    for entity_type in ("message", "reaction"):
        db.execute(
            "SELECT publish_change(%s, 'k' || n %% 20, 'INSERT', '{}') FROM generate_series(1, %s) AS n",
            [entity_type, count],
        )


def test_the_service_on_the_other_side_takes_every_change_in_the_order_of_its_key(
    broker: BrokerServer, outbox_db: psycopg.Connection, reader: Reader, request: pytest.FixtureRequest
) -> None:
    asyncio.run(compose.add_user(broker))
    reader.prepare()
    reader.prepare()  # a deployment does it each time
    request.getfixturevalue("delivery")
    reader.start()
    _publish(outbox_db, 100)
    eventually(lambda: reader.has_taken(50), within_s=60, what="the reader takes some")
    assert reader.terminate() == 0
    _publish(outbox_db, 100)
    reader.start()
    eventually(lambda: reader.has_taken(400), within_s=60, what="the next one takes the others")
    eventually(lambda: settled(outbox_db), what="every change is processed or dead")
    assert states(outbox_db) == {"processed": 400}
    assert [key for key, numbers in reader.taken.items() if numbers != sorted(numbers)] == []


def test_what_is_there_twice_is_taken_once(capsys: pytest.CaptureFixture[str]) -> None:
    events = runpy.run_path(str(ROOT / "deploy/compose/events.py"))["Events"]()
    for number in (1, 2, 1, 2, 3):
        events.take(b'{"type": "t", "partitionkey": "a", "sequence": "000%d"}' % number)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "took", "took", "double", "double", "took",
    ]  # fmt: skip


def test_the_broker_of_the_file_takes_the_command_line_that_it_is_given(small_broker: BrokerServer) -> None:
    port = str(free_port())
    command = compose.services(small_broker.scheme)[small_broker.scheme]["command"]
    store = str(small_broker.folder)
    options = [{"/data": store, "8222": port}.get(part, part) for part in command if part != small_broker.program]
    small_broker.restart(*options)
    if isinstance(small_broker, NatsServer):  # what its health check asks
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            assert answer.status == 200


@pytest.mark.usefixtures("kafka")  # skipped where there is none
def test_kafka_of_the_file_takes_the_settings_that_it_is_given(tmp_path: Path) -> None:
    """Its image writes a variable KAFKA_A_B as the setting a.b. Places and names are the test's."""
    here = {"controller.quorum.voters", "listeners", "advertised.listeners", "listener.security.protocol.map",
            "log.dirs", "heap.opts"}  # fmt: skip
    variables = compose.services("kafka")["kafka"]["environment"]
    settings = {name.removeprefix("KAFKA_").replace("_", ".").lower(): str(value) for name, value in variables.items()}
    assert here < set(settings)
    server = KafkaServer(tmp_path, {name: value for name, value in settings.items() if name not in here})
    try:
        server.start()
        asyncio.run(server.prepare())
    finally:
        server.end()
