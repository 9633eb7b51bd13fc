"""Consumers as containers, beside a database in one: started too early, stopped, killed, replaced; then the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from testcontainers.core.container import DockerContainer

from cdc.core.model import SHARDS
from tests import compose
from tests.container.brokers import ContainedKafka, ContainedNats, ContainedRabbit, ContainedRedis
from tests.container.containers import LOCKED_DOWN, Consumer, Database, container, create_consumer_role, run
from tests.container.images import CONSUMER, DATABASE
from tests.eventually import eventually
from tests.faults import records
from tests.faults.ledger import Evidence, judge
from tests.faults.stage import all_done
from tests.faults.writers import Writer
from tests.fix_brokers import BrokerServer
from tests.fix_consumer import ROOT, states
from tests.handlers_ledger import EFFECTS, KINDS

pytestmark = pytest.mark.timeout(900)  # whichever comes first has the images built

_DRAIN_S = 5
_LEAVE_S = 10
"""More than the drain time for what comes after it: a machine busy with everything else."""
_SETTINGS = {
    "CDC_HANDLERS": "handlers_ledger:router", "CDC_SLOT_NAME": "containers", "CDC_BACKOFF_BASE": "0.05",
    "CDC_BACKOFF_CAP": "0.5", "CDC_CONCURRENCY": "20", "CDC_WINDOW": "200", "CDC_TRANSACTIONS": "4",
    "CDC_DRAIN_TIME": str(_DRAIN_S), "CDC_RETENTION": "off", "LEDGER_FOLDER": "/ledgers",
}  # fmt: skip


class Stage:
    """A database of its own in the server, and consumers that handle what is written there."""

    def __init__(self, server: Database, folder: Path, undo: ExitStack) -> None:
        self.server = server
        self.dsn = server.dsn(dbname="shop")
        self.ledgers = folder / "ledgers"
        self.ledgers.mkdir()
        self.ledgers.chmod(0o777)  # the consumers are users of their own
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("CREATE DATABASE shop")
            admin.execute("CREATE ROLE consumers")
        self._undo = undo
        self.consumers: list[Consumer] = []

    def install(self) -> None:
        """By the commands in the image, as a job of a deployment does."""
        for command in (["db", "install"], ["db", "grant", "--consumer", "consumers"]):
            code, said = run(CONSUMER, *command, env={"CDC_DSN": self.dsn}, read_only=True)
            assert code == 0, said
        with self.connect() as connection:
            connection.execute(EFFECTS)
            connection.execute("GRANT INSERT ON effects TO consumers")
            for kind in KINDS:
                connection.execute(records.tracked_table(kind))

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.dsn, autocommit=True)

    def start(self) -> Consumer:
        name = f"consumer_{len(self.consumers) + 1}"
        with self.connect() as connection:
            password = create_consumer_role(connection, name)
        dsn = make_conninfo(self.dsn, user=name, password=password)
        mounts = [
            (ROOT / "tests/handlers_ledger.py", "/app/handlers_ledger.py", "ro"), (self.ledgers, "/ledgers", "rw"),
        ]  # fmt: skip
        consumer = Consumer(name, {**_SETTINGS, "CDC_DSN": dsn}, mounts)
        self._undo.callback(consumer.remove)
        self.consumers.append(consumer)
        consumer.wait_until_healthy()
        return consumer

    def works_on(self, changes: int = 60) -> None:
        with self.connect() as connection:
            so_far = self._processed(connection)
            eventually(lambda: self._processed(connection) >= so_far + changes, within_s=60, what="work goes on")

    def _processed(self, connection: psycopg.Connection) -> int:
        return states(connection).get("processed", 0)

    def evidence(self, writers: list[Writer], kills: int) -> Evidence:
        ended_at = {consumer.name: consumer.ended_at or 0.0 for consumer in self.consumers}
        with self.connect() as connection:
            return Evidence(
                captured=records.read_captured(connection, KINDS),
                calls=records.read_calls(self.ledgers, ended_at),
                committed=set().union(*(writer.committed for writer in writers)),
                unknown=set().union(*(writer.unknown for writer in writers)),
                effects=records.read_effects(connection),
                sessions=records.read_sessions(self.server.log, []),
                kills=kills,
            )


@pytest.fixture
def stage(container_server: Database, tmp_path: Path) -> Iterator[Stage]:
    with ExitStack() as undo:
        yield Stage(container_server, tmp_path, undo)


def _writing(stage: Stage, undo: ExitStack) -> list[Writer]:
    writers = [Writer(stage.dsn, number, 5, KINDS, keys=30, pause_s=0.02) for number in range(2)]
    for writer in writers:
        writer.start()
        undo.callback(writer.stop)
    return writers


def test_every_change_is_handled_although_containers_come_early_and_are_stopped_and_killed(stage: Stage) -> None:
    early = stage.start()
    early.wait_for("waiting: ")
    assert early.get("/livez")[0] == 200, "waiting for the schema is no reason to be restarted"
    assert early.get("/readyz")[0] == 503
    stage.install()
    with ExitStack() as undo:
        writers = _writing(stage, undo)
        early.wait_for("streaming the slot containers (wal2json)")
        second = stage.start()
        _shared_fairly([early, second])
        stage.works_on()

        code, took_s = early.terminate()
        assert code == 0, early.log
        assert took_s < _DRAIN_S + _LEAVE_S
        stage.works_on()

        third = stage.start()
        _shared_fairly([second, third])
        stage.works_on()
        second.kill()
        fourth = stage.start()
        _shared_fairly([third, fourth])
        stage.works_on()
    with stage.connect() as connection:
        eventually(lambda: all_done(connection), within_s=60, what="every change processed or dead")
    assert [consumer.terminate()[0] for consumer in (third, fourth)] == [0, 0]
    found = judge(stage.evidence(writers, kills=1))
    assert found.violations == [], str(found)
    assert found.figures["committed"] > 240, "else it proves nothing"
    assert [consumer.name for consumer in stage.consumers if "Traceback" in consumer.log] == []


def _shared_fairly(consumers: list[Consumer]) -> None:
    """As scraped: the shards are owned once each, in halves, and one of them streams."""

    def total(name: str) -> Callable[[], list[float]]:
        return lambda: [consumer.metric(name) for consumer in consumers]

    half = SHARDS / len(consumers)
    eventually(lambda: total("cdc_shards_owned")() == [half] * len(consumers), within_s=60, what="shards are shared")
    eventually(lambda: sum(total("cdc_stream_connected")()) == 1, within_s=60, what="one of them streams")
    eventually(lambda: min(total("cdc_changes_handled_total")()) > 0, within_s=60, what="each of them works")


def test_the_dsn_may_be_a_mounted_secret(container_server: Database, tmp_path: Path) -> None:
    secret = tmp_path / "dsn"
    secret.write_text(container_server.dsn())
    secret.chmod(0o444)
    there = "/run/secrets/cdc/dsn"
    code, said = run(
        CONSUMER, "slot", "list", env={"CDC_DSN_FILE": there}, mounts=[(secret, there, "ro")], **LOCKED_DOWN
    )
    assert code == 0, said


@pytest.fixture
def shop(container_server: Database) -> Iterator[Shop]:
    """The database of deploy/compose.yaml, set up by its service for that."""
    dsn = container_server.dsn(dbname="compose")
    with psycopg.connect(container_server.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE compose")
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute((ROOT / "deploy/compose/database.sql").read_bytes())
                connection.execute("RESET ROLE")
                found = Shop(dsn, connection, yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"])
                found.run("setup")
                yield found
        finally:
            admin.execute("DROP DATABASE compose WITH (FORCE)")
            admin.execute("DROP ROLE app; DROP ROLE cdc; DROP ROLE ops")


class Shop:
    """``services`` are definitions of Compose's, which run on the machine's own network."""

    def __init__(self, dsn: str, connection: psycopg.Connection, services: dict[str, Any]) -> None:
        self._dsn = dsn
        self.connection = connection
        self.services = services

    def here(self, name: str) -> dict[str, str]:
        """Its environment, with the test's database in the place of Compose's."""
        place = {part: str(value) for part, value in conninfo_to_dict(self._dsn, user="", password="").items() if value}
        found: dict[str, str] = dict(self.services[name]["environment"])
        if "CDC_DSN" in found:
            return found | {"CDC_DSN": make_conninfo(found["CDC_DSN"], **place)}
        if "PGHOST" in found:
            return found | {"PGHOST": place["host"], "PGPORT": place["port"], "PGDATABASE": place["dbname"]}
        return found

    def mounts(self, name: str) -> list[tuple[Path, str, str]]:
        parts = [volume.split(":") for volume in self.services[name].get("volumes", [])]
        return [(ROOT / "deploy" / here, there, mode) for here, there, mode in parts]

    def run(self, name: str) -> None:
        """To its end, which is to be a good one."""
        service = self.services[name]
        code, said = run(
            CONSUMER, *service["command"], env=self.here(name), mounts=self.mounts(name),
            entrypoint=service["entrypoint"], **LOCKED_DOWN,
        )  # fmt: skip
        assert code == 0, said

    def started(self, name: str, image: str) -> DockerContainer:
        service = self.services[name]
        options = {"entrypoint": service["entrypoint"]} if "entrypoint" in service else {}
        return container(image, self.here(name), self.mounts(name), **options).with_command(service["command"])


def test_the_services_of_compose_work_together(shop: Shop) -> None:
    """Without Prometheus and Grafana."""
    with ExitStack() as undo:
        consumer = Consumer("cdc", shop.here("consumer"), shop.mounts("consumer"))
        undo.callback(consumer.remove)
        undo.enter_context(shop.started("application", DATABASE))
        consumer.wait_for("(wal2json)")
        eventually(
            lambda: _types_processed(shop.connection) == {"message", "reaction", "task"}, within_s=60, what="all"
        )
        eventually(lambda: consumer.metric("cdc_handler_errors_total") > 0, within_s=60, what="a failed attempt")
        assert consumer.terminate()[0] == 0, consumer.log


def test_the_services_of_each_broker_work_together(broker: BrokerServer, shop: Shop) -> None:
    _work_together(broker, shop)


@pytest.mark.parametrize("kind", [ContainedNats, ContainedRedis, ContainedKafka, ContainedRabbit])
def test_they_do_so_with_a_broker_in_a_container(kind: type[BrokerServer], shop: Shop, tmp_path: Path) -> None:
    broker = kind(tmp_path)
    broker.start()
    try:
        _work_together(broker, shop)
    finally:
        broker.end()


def _work_together(broker: BrokerServer, shop: Shop) -> None:
    """From the application's write to the service on the other side, without a consumer of the default subscription."""
    asyncio.run(compose.add_user(broker))
    name = compose.BROKERS[broker.scheme]
    for other, service in compose.services(name).items():
        shop.services[other] = {**service, "environment": compose.environment(service, broker)}
    with ExitStack() as undo:
        shop.run(f"prepare-{name}")
        shop.run(f"setup-{name}")
        delivery = Consumer(name, shop.here(f"to-{name}"), [])
        undo.callback(delivery.remove)
        undo.enter_context(shop.started("application", DATABASE))
        reader = undo.enter_context(shop.started(f"from-{name}", CONSUMER))

        def taken(entity_type: str) -> bool:
            return f"took cdc.{entity_type}.insert" in b"".join(reader.get_logs()).decode()

        eventually(lambda: taken("message") and taken("reaction"), within_s=60, what="the reader takes both")
        assert delivery.metric("cdc_delivery_up") == 1
        assert delivery.terminate()[0] == 0, delivery.log


def _types_processed(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute("SELECT DISTINCT entity_type FROM entity_changes WHERE processed").fetchall()
    return {entity_type for (entity_type,) in rows}
