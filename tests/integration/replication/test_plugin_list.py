"""A server that allows the output plugins it lists, and by default not wal2json: minor releases since August 2026."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.app.application import App
from cdc.cli import cdc as command
from cdc.contrib.demo.temp_server import TempServer
from cdc.core import reconnect
from cdc.core.model import SHARDS
from cdc.observability.snapshots import Role, StreamStatus
from cdc.postgres import migrations
from tests import servers
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled
from tests.fix_slot import slot_facts

DEFAULT = "pgoutput, test_decoding"
ALLOW = 'ALTER ROLE "{}" SET output_plugin_libraries = pgoutput, test_decoding, wal2json;'


@pytest.fixture(scope="module")
def listing() -> Iterator[TempServer]:
    """A server whose list is the one it comes with."""
    with TempServer(durable=False, binaries=servers.required_with_list()) as server:
        server.configure(output_plugin_libraries=DEFAULT)
        server.restart()
        yield server


@pytest.fixture
def admin_dsn(listing: TempServer) -> str:
    return listing.dsn()


@pytest.fixture
def role(listing: TempServer, database: str, db: psycopg.Connection, slot: str) -> Iterator[str]:
    """Who may consume an outbox that is not its own."""
    migrations.install(db, "public")
    name = f"role_{slot}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(sql.Identifier(name)))
    assert _run("db", "grant", "--consumer", name, "--dsn", database).exit_code == 0
    yield name
    db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def _when(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return condition()

    return check


def _stream(app: App) -> StreamStatus:
    stream = app.status.stream
    assert stream is not None
    return stream


def _streams(app: App, plugin: str) -> Callable[[], Awaitable[bool]]:
    """Wake-ups come through that plugin, and the sweep that follows its start is over."""
    return _when(
        lambda: (
            (app.status.role, _stream(app).plugin) == (Role.STREAMING, plugin)
            and app.status.consumer.live_shards == SHARDS
        )
    )


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def _plugin_severities(dsn: str, *options: str) -> dict[str, Any]:
    """What doctor says of the plugin: each finding by its id."""
    found = json.loads(_run("doctor", "--json", "--dsn", dsn, "--slot-plugin", "wal2json", *options).stdout)["findings"]
    return {each["id"]: each for each in found if each["id"] in {"plugin", "plugin-allowed"}}


async def test_the_cycle_wal2json_refused_pgoutput_taken_wal2json_allowed_and_taken_back(
    database: str, db: psycopg.Connection, role: str, slot: str, caplog: pytest.LogCaptureFixture
) -> None:
    dsn = make_conninfo(database, user=role)
    allow = ALLOW.format(role)
    handled: list[str] = []
    router = cdc.Router()
    router.on("x")(lambda change: handled.append(change.entity_id))

    async def consume(expected: str, **settings: Any) -> None:
        """One change, whose wake-up comes through that plugin."""
        async with consuming(dsn, router, slot_name=slot, sweep_interval=3600, **settings) as app:
            await eventually_async(_streams(app, expected), what=f"{expected} is used")
            db.execute("SELECT publish_change('x', %s)", [f"{len(handled)}"])
            await eventually_async(_when(lambda: settled(db)), what="it is handled")
            assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == 1
        assert slot_facts(db, slot)["plugin"] == expected

    # Refused: the command says what to run, and so does doctor.
    refused = _run("slot", "create", slot, "--plugin", "wal2json", "--dsn", dsn)
    assert (refused.exit_code, allow in refused.stderr) == (1, True), refused.output
    found = _plugin_severities(dsn)
    assert {name: each["severity"] for name, each in found.items()} == {"plugin": "fail", "plugin-allowed": "unknown"}
    assert found["plugin"]["remedies"] == [allow]
    assert slot_facts(db, slot) == {}

    # Taken instead: pgoutput, and the log says so once.
    await consume("pgoutput")
    [said] = [record.getMessage() for record in caplog.records if "using pgoutput" in record.getMessage()]
    assert "does not allow" in said

    # Allowed: a slot of pgoutput stays what it is, and one that is recreated has wal2json.
    db.execute(allow)
    await consume("pgoutput")
    assert _run("slot", "recreate", slot, "--yes", "--dsn", dsn).exit_code == 0
    await consume("wal2json")
    assert _plugin_severities(dsn)["plugin"]["severity"] == "ok"

    # Taken back: the slot that cannot be read any more is recreated, with pgoutput.
    db.execute(sql.SQL("ALTER ROLE {} RESET output_plugin_libraries").format(sql.Identifier(role)))
    await consume("pgoutput")
    assert handled == ["0", "1", "2", "3"]


async def test_a_consumer_that_wants_wal2json_sweeps_until_it_is_allowed_and_then_streams(
    database: str, db: psycopg.Connection, role: str, slot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "PERMANENT_PAUSE_S", 0.5)
    router = cdc.Router()
    router.on("x")(lambda change: None)
    settings: dict[str, Any] = {"slot_plugin": "wal2json", "slot_name": slot, "sweep_interval": 0.2}
    async with consuming(make_conninfo(database, user=role), router, **settings) as app:
        await eventually_async(_when(lambda: _stream(app).reason == "plugin_refused"), what="it is refused")
        db.execute("SELECT publish_change('x', '1')")
        await eventually_async(_when(lambda: settled(db)), what="the sweep finds it")
        db.execute(ALLOW.format(role))
        await eventually_async(_streams(app, "wal2json"), what="it streams")
