"""The whole way of a change on every PostgreSQL that is at hand: the machine's, and those that a Python wheel carries.

Everywhere with pgoutput, which all of them have. CDC_TEST_DSN has no say here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

import cdc
from cdc import testing
from cdc.app.application import App
from cdc.cli import cdc as command
from cdc.contrib.demo.pg_binaries import WHEEL, Installation, find_installations
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import RefusedError, UsageError
from cdc.core.model import SHARDS, publication_name
from cdc.diagnostics import inspect_outbox
from cdc.observability.snapshots import Role
from cdc.postgres import migration_scripts, migrations, remarks, tracking
from cdc.replication import slots
from tests import servers
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states


@pytest.fixture(scope="module", params=servers.MAJORS, ids="postgresql-{}".format)
def versioned(request: pytest.FixtureRequest) -> Iterator[TempServer]:
    """A throw-away server of each major version."""
    with TempServer(durable=False, binaries=servers.required(request.param)) as server:
        yield server


@pytest.fixture
def admin_dsn(versioned: TempServer) -> str:
    return versioned.dsn()


@pytest.fixture
def outbox(database: str, db: psycopg.Connection) -> str:
    migrations.install(db, "public")
    return database


def _slot(*arguments: str) -> Any:
    done = CliRunner().invoke(command, ["slot", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_outbox_can_be_installed_verified_upgraded_and_removed(db: psycopg.Connection) -> None:
    assert migrations.install(db, "public") == migration_scripts.migrations()
    assert migrations.verify(db, "public") == []
    assert migrations.upgrade(db, "public") == ([], [])
    migrations.uninstall(db, "public")
    assert db.execute("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace").fetchall() == []
    assert db.execute("SELECT pubname FROM pg_publication").fetchall() == []


def test_a_virtual_generated_column_is_refused_as_a_key(outbox: str, db: psycopg.Connection) -> None:
    if db.info.server_version < 180_000:
        pytest.skip("from PostgreSQL 18 on")
    db.execute("CREATE TABLE line (id int PRIMARY KEY, qty int, total int GENERATED ALWAYS AS (qty * 2) VIRTUAL)")
    with pytest.raises(UsageError, match="virtual generated column, which has no value when triggers fire"):
        tracking.track(db, "public", "line", key=["total"])
    for exclude, captured in ((None, True), (["total"], False)):
        done = tracking.track(db, "public", "line", exclude=exclude)
        assert (done.tracked.virtual, done.warnings) == (captured, ())


def test_a_virtual_generated_column_is_captured_with_its_value(outbox: str, db: psycopg.Connection) -> None:
    if db.info.server_version < 180_000:
        pytest.skip("from PostgreSQL 18 on")
    db.execute(
        "CREATE TABLE line (id int PRIMARY KEY, qty int, price numeric(10,2), secret text DEFAULT 's',"
        ' "the total" numeric(10,1) GENERATED ALWAYS AS (qty * price), per int GENERATED ALWAYS AS (100 / qty),'
        " hidden text GENERATED ALWAYS AS (secret || '!')) PARTITION BY RANGE (id)"
    )
    db.execute("CREATE TABLE line_1 PARTITION OF line DEFAULT")
    assert tracking.track(db, "public", "line", exclude=["secret", "hidden"]).warnings == ()
    statements = (
        "INSERT INTO line VALUES (1, 2, 10.25)", "UPDATE line SET qty = 3", "UPDATE line SET qty = 0",
        "UPDATE line SET id = 2, qty = NULL", "DELETE FROM line",
    )  # fmt: skip
    for statement in statements:
        db.execute(statement)
    at_two = '{"id": 1, "per": 50, "qty": 2, "price": 10.25, "the total": 20.5}'
    at_three = '{"id": 1, "per": 33, "qty": 3, "price": 10.25, "the total": 30.8}'
    failing = '{"id": 1, "per": {"cdc:omitted": "cannot be JSON: 22012"}, "qty": 0, "price": 10.25, "the total": 0.0}'
    empty = '{"id": 2, "per": null, "qty": null, "price": 10.25, "the total": null}'
    captured = "SELECT old_data::text, new_data::text FROM entity_changes WHERE operation <> 'READ' ORDER BY seq"
    assert db.execute(captured.encode()).fetchall() == [
        (None, at_two), (at_two, at_three), (at_three, failing), (failing, None), (None, empty), (empty, None),
    ]  # fmt: skip
    db.execute("INSERT INTO line VALUES (1, 0, 10.25), (3, 2, 10.25)")
    backfilled = CliRunner().invoke(command, ["backfill", "line", "--dsn", outbox], catch_exceptions=False)
    assert backfilled.exit_code == 0, backfilled.output
    read = "SELECT new_data::text FROM entity_changes WHERE operation = 'READ' ORDER BY seq"
    assert db.execute(read.encode()).fetchall() == [(failing,), (at_two.replace('"id": 1', '"id": 3'),)]


def test_a_trigger_that_captures_a_virtual_column_as_null_is_named_and_track_repairs_it(
    outbox: str, db: psycopg.Connection
) -> None:
    if db.info.server_version < 180_000:
        pytest.skip("from PostgreSQL 18 on")
    db.execute("CREATE TABLE line (id int PRIMARY KEY, qty int)")
    tracking.track(db, "public", "line")
    db.execute("ALTER TABLE line ADD total int GENERATED ALWAYS AS (qty * 2)")
    found = inspect_outbox.captured(db, "public")
    [remark] = remarks.about(found.remarks, remarks.VIRTUAL)
    assert "captures null in its place" in remark.detail
    assert remark.remedy.startswith("cdc track line ")
    assert tracking.track(db, "public", "line").changed
    assert remarks.about(inspect_outbox.captured(db, "public").remarks, remarks.VIRTUAL) == []
    db.execute("INSERT INTO line VALUES (1, 21)")
    assert db.execute("SELECT new_data ->> 'total' FROM entity_changes").fetchone() == ("42",)
    db.execute("ALTER TABLE line ALTER total SET EXPRESSION AS (qty * 3); UPDATE line SET qty = 1")
    assert db.execute("SELECT new_data ->> 'total' FROM entity_changes ORDER BY seq DESC").fetchone() == ("3",)


async def test_rows_of_a_tracked_table_are_handled_once_through_pgoutput_and_again_where_they_fail(
    outbox: str, db: psycopg.Connection, slot: str
) -> None:
    db.execute("CREATE TABLE note (a int, b text, secret text, PRIMARY KEY (a, b))")
    tracking.track(db, "public", "note", exclude=["secret"])
    router, seen = cdc.Router(), []

    @router.on("note")
    async def handle(change: cdc.Change) -> None:
        seen.append((change.operation.value, change.entity_id, change.attempt, change.old, change.new))
        if change.operation is cdc.Operation.UPDATE and change.attempt == 1:
            raise RuntimeError("not yet")

    settings: dict[str, Any] = {
        "slot_plugin": "pgoutput",
        "slot_name": slot,
        "sweep_interval": 3600,
        "backoff_base": 0.01,
    }
    async with consuming(outbox, router, **settings) as app:
        await _until(lambda: _is_live(app), "the stream")
        db.execute("INSERT INTO note VALUES (1, 'x', 'hidden')")
        db.execute("UPDATE note SET secret = 'hidden, too'")
        db.execute("DELETE FROM note")
        await _until(lambda: settled(db), "all is processed")
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == 3
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="sweep") == 0
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="retry") == 1
        assert slots.status(db, slot).plugin == "pgoutput"
    row = {"a": 1, "b": "x"}
    key = '[1, "x"]'
    assert seen == [
        ("INSERT", key, 1, None, row),
        ("UPDATE", key, 1, row, row),
        ("UPDATE", key, 2, row, row),
        ("DELETE", key, 1, row, None),
    ]
    assert states(db) == {"processed": 3}


async def test_a_dead_letter_is_requeued_and_runs_again_at_once(outbox: str, db: psycopg.Connection) -> None:
    router, failing = cdc.Router(), [True]

    @router.on("x")
    def handle(change: cdc.Change) -> None:  # in a thread
        if failing:
            raise RuntimeError("broken")

    @router.on("y")
    async def write(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO effect VALUES (%s)", [change.seq])

    db.execute("CREATE TABLE effect (seq bigint PRIMARY KEY)")
    async with consuming(outbox, router, sweep_interval=3600, slot_mode="temporary", backoff_base=0.01) as app:
        await _until(lambda: _is_live(app), "the stream")
        db.execute("SELECT publish_change('x', '1'), publish_change('y', '1')")
        await _until(lambda: states(db) == {"dead": 1, "processed": 1}, "the dead letter")
        failing.clear()
        assert db.execute("SELECT requeued_count FROM reprocess_failed_actions()").fetchall() == [(1,)]
        await _until(lambda: states(db) == {"processed": 2}, "it is processed")
    assert db.execute("SELECT count(*) FROM effect").fetchall() == [(1,)]
    left = "SELECT slot_name FROM pg_replication_slots"
    await _until(lambda: not db.execute(left).fetchall(), "the temporary slot has left with its reader")


def test_slot_commands_show_the_columns_that_this_version_has(outbox: str, db: psycopg.Connection, slot: str) -> None:
    major = db.info.server_version // 10_000
    _slot("create", slot, "--plugin", "pgoutput", "--dsn", outbox)
    assert db.execute("SELECT pubname FROM pg_publication").fetchall() == [(publication_name("public"),)]
    [listed] = [found for found in _slot("list", "--dsn", outbox)["slots"] if found["name"] == slot]
    shown = _slot("status", slot, "--dsn", outbox)["slot"]
    for found in (listed, shown):
        assert (found["plugin"], found["wal_status"], found["ours"]) == ("pgoutput", "reserved", True)
        assert found["retained_wal_bytes"] >= 0
        assert (found["conflicting"] is not None) == (major >= 16)
        assert (found["failover"], found["synced"]) == ((False, False) if major >= 17 else (None, None))
        assert (found["inactive_since"] is not None) == (major >= 17)
        assert found["invalidation_reason"] is None
    _slot("drop", slot, "--yes", "--dsn", outbox)


def test_a_lost_slot_says_so(versioned: TempServer, outbox: str, db: psycopg.Connection, slot: str) -> None:
    slots.create(db, slot, plugin="pgoutput")
    _set(db, "max_slot_wal_keep_size", "1MB")
    try:
        for _ in range(4):
            db.execute("SELECT pg_logical_emit_message(false, 'filling', repeat('x', 1000000)), pg_switch_wal()")
        db.execute("CHECKPOINT")
        lost = slots.status(db, slot)
    finally:
        _set(db, "max_slot_wal_keep_size", "-1")
    assert lost.wal_status == "lost"
    assert (lost.invalidation_reason or "wal_removed") == "wal_removed"
    assert slots.drop(db, slot).name == slot


@pytest.fixture
def closed(tmp_path: Path) -> Installation:
    """The wheel's programs in a folder that only its owner may enter."""
    carried = next((one for one in find_installations() if one.wheel), None)
    if carried is None:
        pytest.skip(f"no wheel {WHEEL} here")
    package = carried.bindir.parent.parent
    for folder in (package.with_name(f"{package.name}.libs"), carried.bindir.parent):
        if folder.exists():  # a wheel for macOS has no folder of libraries
            shutil.copytree(folder, tmp_path / folder.relative_to(package.parent))
    tmp_path.chmod(0o700)
    return replace(carried, bindir=tmp_path / carried.bindir.relative_to(package.parent))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as somebody else")
def test_root_may_keep_the_wheel_in_an_environment_of_its_own(closed: Installation) -> None:
    with TempServer(durable=False, binaries=closed) as server:
        with psycopg.connect(server.dsn()) as connection:
            assert connection.execute("SELECT current_setting('server_version')").fetchone() == (closed.version,)
        assert server.bindir.is_relative_to(server.folder)
    assert not server.folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as somebody else")
def test_other_programs_that_only_root_may_use_are_refused_with_the_remedy(closed: Installation) -> None:
    with (
        pytest.raises(RefusedError, match="may not use the programs") as refused,
        TempServer(binaries=replace(closed, wheel=False)),
    ):
        pass
    assert "as an ordinary user" in refused.value.hint


def _set(db: psycopg.Connection, setting: str, value: str) -> None:
    db.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(setting), sql.Literal(value)))
    db.execute("SELECT pg_reload_conf()")


def _is_live(app: App) -> bool:
    """Wake-ups come from the slot, and the sweep that follows its start is over."""
    return app.status.role is Role.STREAMING and app.status.consumer.live_shards == SHARDS


async def _until(condition: Any, what: str) -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_databases_of_other_encodings_are_installed_verified_and_handled(
    versioned: TempServer, db: psycopg.Connection, encoding: str
) -> None:
    name = f"{db.info.dbname}_{encoding.lower()}"
    create = sql.SQL("CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    db.execute(create.format(sql.Identifier(name), sql.Literal(encoding)))
    router, seen = cdc.Router(), list[Any]()

    @router.on("note")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO effect VALUES (%s)", [change.new["t"]])
        seen.append(change.new["t"])

    try:
        dsn = versioned.dsn(name)
        with psycopg.connect(dsn, autocommit=True, client_encoding="utf8") as there:
            migrations.install(there, "public")
            assert migrations.verify(there, "public") == []
            there.execute("CREATE TABLE note (id int PRIMARY KEY, t text); CREATE TABLE effect (t text)")
            tracking.track(there, "public", "note", entity_type="note")
            there.execute("INSERT INTO note VALUES (1, 'größer')")
            drained = await testing.drain(dsn, router)
            assert (drained.processed, drained.dead, seen) == (1, 0, ["größer"])
            assert there.execute("SELECT t FROM effect").fetchall() == [("größer",)]
    finally:
        db.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
