"""Slots for failover, PostgreSQL 17 and later: a server delivers nothing before the standbys it names have it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner

import cdc
from cdc.cli import cdc as root_command
from cdc.contrib.demo.pg_binaries import find_installation
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import NotFoundError
from cdc.postgres import migrations
from cdc.replication import slots
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric
from tests.fix_slot import lose, slot_facts
from tests.fix_stream import send_wakeup, stream_of, wait_for_wakeups


@pytest.fixture
def modern() -> Iterator[TempServer]:
    try:
        binaries = find_installation(18)
    except NotFoundError as missing:
        pytest.skip(str(missing))
    with TempServer(durable=False, binaries=binaries, settings={"max_slot_wal_keep_size": "32MB"}) as running:
        yield running


@pytest.fixture
def admin(modern: TempServer) -> Iterator[psycopg.Connection]:
    with psycopg.connect(modern.dsn(), autocommit=True) as connection:
        migrations.install(connection, "public")
        slots.create(connection, "x", plugin="pgoutput", failover=True)
        yield connection


def absent_standby(admin: psycopg.Connection) -> None:
    admin.execute("SELECT pg_create_physical_replication_slot('phys')")
    admin.execute("ALTER SYSTEM SET synchronized_standby_slots = 'phys'")
    admin.execute("SELECT pg_reload_conf()")
    eventually(lambda: admin.execute("SHOW synchronized_standby_slots").fetchone() == ("phys",))


def test_a_slot_that_would_deliver_nothing_goes_on_without_failover_and_the_log_says_so(
    modern: TempServer, admin: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    absent_standby(admin)
    with stream_of(modern.dsn(), "x") as (_, received):
        send_wakeup(admin, 1)
        wait_for_wakeups(received, 1)
    assert slot_facts(admin, "x")["failover"] is False
    assert "waits for the standby slots phys, which no standby reads" in caplog.text


def test_where_it_may_not_change_the_slot_it_leaves_it(modern: TempServer, admin: psycopg.Connection) -> None:
    absent_standby(admin)
    with stream_of(modern.dsn(), "x", recreate_slot=False):
        assert slot_facts(admin, "x")["failover"] is True


async def test_a_slot_that_stops_delivering_is_repaired_while_the_stream_runs(
    modern: TempServer, admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with consuming(modern.dsn(), cdc.Router(), slot_name="x") as app:

        async def streams() -> bool:
            return metric(app.metrics.registry, "cdc_stream_connected") == 1

        await eventually_async(streams)
        assert slot_facts(admin, "x")["failover"] is True
        absent_standby(admin)

        async def fixed() -> bool:
            app.poll_now()
            return slot_facts(admin, "x")["failover"] is False

        await eventually_async(fixed)
        await eventually_async(streams)
    assert "not streaming (standbys_away)" in caplog.text


async def test_a_probe_names_it_where_it_may_not_be_mended(
    modern: TempServer, admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent_standby(admin)
    async with consuming(modern.dsn(), cdc.Router(), slot_name="x", slot_recreate=False) as app:

        async def told() -> bool:
            app.poll_now()
            return ("stream", True, "standbys_away") in [(c.name, c.ok, c.detail) for c in app.readiness()]

        await eventually_async(told)
    assert slot_facts(admin, "x")["failover"] is True


def test_status_and_doctor_say_that_it_waits_for_standbys(modern: TempServer, admin: psycopg.Connection) -> None:
    absent_standby(admin)
    told = CliRunner().invoke(root_command, ["slot", "status", "x", "--dsn", modern.dsn()])
    assert told.exit_code == 1
    assert "waiting: it is one for failover" in told.output
    found = CliRunner().invoke(root_command, ["doctor", "--dsn", modern.dsn(), "--slot-name", "x", "--json"]).stdout
    [slot] = [each for each in json.loads(found)["findings"] if each["id"] == "slot"]
    assert (slot["severity"], "no standby reads phys" in slot["detail"]) == ("fail", True)


def test_a_lost_slot_that_is_recreated_stays_one_for_failover(modern: TempServer, admin: psycopg.Connection) -> None:
    lose(admin, "x")
    with stream_of(modern.dsn(), "x") as (stream, received):
        assert stream.status.recreated == 1
        send_wakeup(admin, 1)
        wait_for_wakeups(received, 1)
    assert slot_facts(admin, "x")["failover"] is True


@pytest.mark.parametrize("major", [16, 18])
def test_a_stream_that_is_led_to_a_standby_says_so_and_makes_no_slot_there(major: int) -> None:
    try:
        binaries = find_installation(major)
    except NotFoundError as missing:
        pytest.skip(str(missing))
    with TempServer(durable=False, binaries=binaries) as server:
        (server.data / "standby.signal").touch()
        server.restart()
        with stream_of(server.dsn(), "x", wait=False) as (_, received):
            eventually(lambda: received.reasons)
        assert received.reasons[0] == "in_recovery"
        done = CliRunner().invoke(root_command, ["doctor", "--dsn", server.dsn(), "--json"]).stdout
        [plugin] = [each for each in json.loads(done)["findings"] if each["id"] == "plugin"]
        assert plugin["severity"] == "skip"
