"""Slots over an ordinary connection, and `cdc slot`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc import slots
from cdc.cli import cdc
from cdc.errors import CdcError, NotFoundError, RefusedError, UsageError
from cdc.throwaway import Server
from tests.eventually import eventually
from tests.fix_slot import slot_facts


@pytest.fixture
def reader(database: str, db: psycopg.Connection, slot: str) -> Iterator[int]:
    """Somebody reads the slot; the pid of the walsender."""
    slots.create(db, slot)
    with closing(psycopg.connect(database, replication="database", autocommit=True, application_name="rdr")) as link:
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 (\"format-version\" '2')").format(sql.Identifier(slot))
        link.pgconn.exec_(start.as_bytes(None))
        yield link.info.backend_pid


def run(database: str, *arguments: str) -> Result:
    return CliRunner().invoke(cdc, ["slot", *arguments, "--dsn", database])


def test_a_new_slot_is_ours_and_keeps_wal_until_somebody_reads_it(db: psycopg.Connection, slot: str) -> None:
    made = slots.create(db, slot)
    assert (made.name, made.plugin, made.ours, made.active, made.temporary) == (slot, "wal2json", True, False, False)
    db.execute("CREATE TABLE t AS SELECT generate_series(1, 10000)")
    eventually(lambda: slots.status(db, slot).retained_wal_bytes > made.retained_wal_bytes + 10_000, what="WAL is kept")
    now = slots.status(db, slot)
    assert now.confirmed_lag_bytes > 10_000
    assert slots.judge(now).fine
    assert slots.drop(db, slot).name == slot
    assert slots.snapshot(db, slot) is None


def test_a_slot_that_is_being_read_says_by_whom(db: psycopg.Connection, slot: str, reader: int) -> None:
    found = eventually(lambda: (now := slots.status(db, slot)).active and now)
    assert (found.active_pid, found.application_name, found.wal_status) == (reader, "rdr", "reserved")


def test_a_slot_that_is_being_read_is_not_dropped(db: psycopg.Connection, slot: str, reader: int) -> None:
    with pytest.raises(RefusedError, match=str(reader)):
        slots.drop(db, slot, force=True)
    assert slot_facts(db, slot)


def test_creating_twice_is_refused_or_accepted_as_one_says(db: psycopg.Connection, slot: str) -> None:
    slots.create(db, slot)
    with pytest.raises(RefusedError, match="already"):
        slots.create(db, slot)
    assert slots.create(db, slot, if_not_exists=True).name == slot


def test_another_plugins_slot_is_neither_accepted_nor_dropped_without_force(db: psycopg.Connection, slot: str) -> None:
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    with pytest.raises(RefusedError, match="test_decoding"):
        slots.create(db, slot, if_not_exists=True)
    with pytest.raises(RefusedError, match="not ours"):
        slots.drop(db, slot)
    slots.drop(db, slot, force=True)
    assert not slot_facts(db, slot)


def test_another_databases_slot_is_not_dropped_without_force(admin_dsn: str, db: psycopg.Connection, slot: str) -> None:
    slots.create(db, slot)
    with psycopg.connect(admin_dsn, autocommit=True) as elsewhere:
        assert not slots.status(elsewhere, slot).ours
        with pytest.raises(RefusedError, match="not ours"):
            slots.drop(elsewhere, slot)
        slots.drop(elsewhere, slot, force=True)
    assert not slot_facts(db, slot)


def test_a_physical_slot_is_listed_and_left_alone(db: psycopg.Connection, slot: str) -> None:
    db.execute("SELECT pg_create_physical_replication_slot(%s)", [slot])
    assert slot in [each.name for each in slots.list_slots(db) if not each.ours]
    with pytest.raises(RefusedError, match="physical"):
        slots.drop(db, slot)


@pytest.mark.parametrize("name", ["", "Cdc", "c-d-c", "a" * 64, "naïve", "x\n", "'; DROP TABLE t"])
def test_a_name_that_the_server_would_refuse_is_a_usage_error(db: psycopg.Connection, name: str) -> None:
    for use in (slots.create, slots.drop, slots.status):
        with pytest.raises(UsageError):
            use(db, name)


def test_a_missing_slot_is_not_found(db: psycopg.Connection, slot: str) -> None:
    for use in (slots.drop, slots.status):
        with pytest.raises(NotFoundError, match=slot):
            use(db, slot)
    assert slots.snapshot(db, slot) is None


def test_creating_names_the_write_transaction_it_will_not_wait_for(
    database: str, db: psycopg.Connection, slot: str
) -> None:
    with psycopg.connect(database) as writer:
        writer.execute("SELECT pg_current_xact_id()")
        with pytest.raises(RefusedError) as refused:
            slots.create(db, slot, limit_s=0.2)
        assert str(writer.info.backend_pid) in refused.value.hint
    assert "s old" in refused.value.hint
    assert not slot_facts(db, slot)
    assert db.execute("SHOW lock_timeout").fetchone() == ("0",)


def test_a_role_without_replication_is_told_what_it_lacks(database: str, db: psycopg.Connection, slot: str) -> None:
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(slot)))
    try:
        with psycopg.connect(make_conninfo(database, user=slot), autocommit=True) as weak:
            with pytest.raises(CdcError) as refused:
                slots.create(weak, slot)
            assert "REPLICATION" in refused.value.hint
            slots.create(db, slot)
            assert slots.status(weak, slot).retained_wal_bytes is not None
            with pytest.raises(CdcError, match="replication"):
                slots.drop(weak, slot)
    finally:
        db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(slot)))


def test_a_server_without_logical_wal_is_told_what_to_change() -> None:
    server = Server(durable=False, settings={"wal_level": "replica"})
    with server, psycopg.connect(server.dsn(), autocommit=True) as db:
        with pytest.raises(CdcError) as refused:
            slots.create(db, "cdc")
        assert "wal_level = logical" in refused.value.hint


def test_each_trouble_of_a_slot_has_its_verdict(db: psycopg.Connection, slot: str) -> None:
    healthy = replace(slots.create(db, slot), active=True)
    assert slots.judge(healthy) == slots.Verdict(True, "fine")
    for change, word in (
        ({"wal_status": "lost", "retained_wal_bytes": None, "invalidation_reason": "wal_removed"}, "wal_removed"),
        ({"confirmed_lag_bytes": -1}, "deaf"),
        ({"wal_status": "unreserved"}, "about to be lost"),
        ({"retained_wal_bytes": 2 << 30}, "being read"),
        ({"retained_wal_bytes": 2 << 30, "active": False}, "nobody reads it"),
    ):
        verdict = slots.judge(replace(healthy, **change))
        assert not verdict.fine
        assert word in verdict.sentence
        assert verdict.remedy


# The command


def test_the_command_creates_lists_shows_and_drops(database: str, slot: str) -> None:
    assert run(database, "create", slot).exit_code == 0
    assert slot in run(database, "list").stdout
    shown = run(database, "status", slot)
    assert shown.exit_code == 0
    assert "wal2json" in shown.stdout
    assert run(database, "drop", slot, "--yes").exit_code == 0
    assert slot not in run(database, "list").stdout


def test_json_is_one_object_on_stdout(database: str, slot: str) -> None:
    made = json.loads(run(database, "create", slot, "--json").stdout)
    assert (made["schema"], made["slot"]["name"]) == (1, slot)
    shown = json.loads(run(database, "status", slot, "--json").stdout)
    assert shown["verdict"]["fine"] is True
    assert slot in [each["name"] for each in json.loads(run(database, "list", "--json").stdout)["slots"]]
    assert json.loads(run(database, "drop", slot, "--yes", "--json").stdout)["slot"]["name"] == slot


def test_exit_codes_tell_usage_missing_and_refused_apart(database: str, db: psycopg.Connection, slot: str) -> None:
    assert run(database, "create", "No Such Name").exit_code == 2
    assert run(database, "status", slot).exit_code == 4
    assert run(database, "drop", slot, "--yes").exit_code == 4
    slots.create(db, slot)
    refused = run(database, "drop", slot)
    assert (refused.exit_code, "--yes" in refused.stderr) == (5, True)
    assert run(database, "create", slot).exit_code == 5
    assert run(database, "create", slot, "--if-not-exists").exit_code == 0
    assert slot_facts(db, slot)


def test_without_a_name_it_is_the_configured_slot(database: str, db: psycopg.Connection, slot: str) -> None:
    assert run(database, "create", "--slot-name", slot).exit_code == 0
    assert slot_facts(db, slot)
