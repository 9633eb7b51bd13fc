"""Slots over an ordinary connection, and `cdc slot`."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc import Change, Router
from cdc.app.config import Settings
from cdc.cli import cdc
from cdc.cli.options import open_database
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import CdcError, NotFoundError, RefusedError, StreamError, UsageError
from cdc.core.model import publication_name
from cdc.replication import slots
from cdc.replication.slot_health import assess
from cdc.replication.stream import plugins
from tests import servers
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import ROOT, consuming, metric, settled, slot_name
from tests.fix_slot import allow, lose, slot_facts

pytestmark = pytest.mark.server


@pytest.fixture
def reader(database: str, db: psycopg.Connection, slot: str) -> Iterator[int]:
    """Somebody reads the slot; the pid of the walsender."""
    slots.create(db, slot)
    with closing(psycopg.connect(database, replication="database", autocommit=True, application_name="rdr")) as link:
        options = plugins("public")[servers.preferred_plugin()].options
        given = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in options
        )
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 ({})").format(sql.Identifier(slot), given)
        link.pgconn.exec_(start.as_bytes(None))
        yield link.info.backend_pid


def run(database: str, *arguments: str) -> Result:
    return CliRunner().invoke(cdc, ["slot", *arguments, "--dsn", database])


def publications(db: psycopg.Connection) -> list[str]:
    return [name for (name,) in db.execute("SELECT pubname FROM pg_publication")]


class _Seen:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    async def __call__(self, change: Change) -> None:
        self.ids.append(change.entity_id)


def _settled(db: psycopg.Connection) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return settled(db)

    return look


def test_a_new_slot_is_ours_and_keeps_wal_until_it_is_read(db: psycopg.Connection, slot: str) -> None:
    made = slots.create(db, slot)
    assert (made.name, made.plugin, made.ours, made.active, made.temporary) == (
        slot,
        servers.preferred_plugin(),
        True,
        False,
        False,
    )
    db.execute("CREATE TABLE t AS SELECT generate_series(1, 10000)")
    eventually(lambda: slots.status(db, slot).retained_wal_bytes > made.retained_wal_bytes + 10_000, what="WAL is kept")
    now = slots.status(db, slot)
    assert now.confirmed_lag_bytes > 10_000
    assert assess(now).fine
    assert slots.drop(db, slot).name == slot
    assert slots.snapshot(db, slot) is None


def test_a_slot_that_is_being_read_says_by_whom(db: psycopg.Connection, slot: str, reader: int) -> None:
    eventually(lambda: slots.status(db, slot).active)
    found = slots.status(db, slot)
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


def test_for_a_role_without_replication_the_missing_right_is_named(
    database: str, db: psycopg.Connection, slot: str
) -> None:
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


def test_for_a_server_without_logical_wal_the_setting_is_named() -> None:
    server = TempServer(durable=False, settings={"wal_level": "replica"})
    with server, psycopg.connect(server.dsn(), autocommit=True) as db:
        with pytest.raises(CdcError) as refused:
            slots.create(db, "cdc")
        assert "wal_level = logical" in refused.value.hint


# Plugins


def test_a_slot_of_either_plugin_is_ours_and_pgoutputs_publication_comes_with_it(
    db: psycopg.Connection, slot: str
) -> None:
    made = slots.create(db, slot, plugin="pgoutput")
    assert (made.plugin, made.ours) == ("pgoutput", True)
    assert publications(db) == [publication_name("public")]
    slots.drop(db, slot)
    slots.create(db, slot, plugin="pgoutput")  # the publication is there already


def test_where_the_first_plugin_is_not_installed_the_next_one_is_taken(
    db: psycopg.Connection, slot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PLUGINS", ("nosuch", "pgoutput"))
    allow(db, "nosuch", "pgoutput")
    assert slots.create(db, slot).plugin == "pgoutput"
    slots.drop(db, slot)
    with pytest.raises(StreamError, match="nosuch is not installed"):
        slots.create(db, slot, plugin="nosuch")


def test_a_role_that_may_not_create_the_publication_gets_the_statement_for_the_owner(
    database: str, db: psycopg.Connection, slot: str
) -> None:
    db.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(sql.Identifier(slot)))
    try:
        with psycopg.connect(make_conninfo(database, user=slot), autocommit=True) as weak:
            with pytest.raises(StreamError) as refused:
                slots.create(weak, slot, plugin="pgoutput")
            statement = f'CREATE PUBLICATION "{publication_name("public")}"'
            assert statement in refused.value.hint
            assert not slot_facts(db, slot)
            db.execute(statement)
            assert slots.create(weak, slot, plugin="pgoutput").plugin == "pgoutput"
            slots.drop(weak, slot)
    finally:
        db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(slot)))


def test_a_slot_of_the_plugin_that_is_not_wanted_is_not_accepted(db: psycopg.Connection, slot: str) -> None:
    slots.create(db, slot, plugin="pgoutput")
    assert slots.create(db, slot, if_not_exists=True).plugin == "pgoutput"
    with pytest.raises(RefusedError) as refused:
        slots.create(db, slot, plugin="wal2json", if_not_exists=True)
    assert f"cdc slot recreate {slot} --plugin wal2json" in refused.value.hint


# Temporary, failover


def test_a_temporary_slot_leaves_nothing_behind(database: str, db: psycopg.Connection, slot: str) -> None:
    result = run(database, "create", slot, "--temporary", "--plugin", "pgoutput")
    assert (result.exit_code, "could be made" in result.stderr) == (0, True)
    eventually(lambda: not slot_facts(db, slot), what="the session that had it is gone")
    assert publications(db) == []


def test_failover_is_refused_where_the_server_does_not_know_it(
    database: str, db: psycopg.Connection, slot: str
) -> None:
    if db.info.server_version >= 170_000:
        pytest.skip("this server does")
    result = run(database, "create", slot, "--failover")
    assert (result.exit_code, "17" in result.stderr) == (2, True)
    assert run(database, "create", slot, "--failover", "--temporary").exit_code == 2
    assert not slot_facts(db, slot)


def test_a_slot_is_made_with_what_the_server_has_moved_and_recreated() -> None:
    with TempServer(durable=False) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        failover = db.info.server_version >= 170_000
        made = slots.create(db, "cdc", failover=failover)
        assert (made.plugin, made.failover) == ("wal2json" if server.wal2json else "pgoutput", failover or None)
        db.execute("CREATE TABLE t AS SELECT generate_series(1, 10000)")
        before, after = slots.advance(db, "cdc")
        assert before.confirmed_lag_bytes > 10_000 > after.confirmed_lag_bytes
        assert run(server.dsn(), "recreate", "cdc", "--yes").exit_code == 0
        assert slots.status(db, "cdc").failover == (failover or None)


# Advance


async def test_changes_that_an_advanced_slot_skips_are_handled_all_the_same(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    name, router = slot_name(), Router()
    router.on("x")(handled := _Seen())
    slots.create(outbox_db, name)
    outbox_db.execute("SELECT publish_change('x', i::text) FROM generate_series(1, 50) i")
    before, after = slots.advance(outbox_db, name)
    assert after.confirmed_lsn > before.confirmed_lsn
    assert after.confirmed_lag_bytes < before.confirmed_lag_bytes
    async with consuming(outbox, router, slot_name=name) as app:
        await eventually_async(_settled(outbox_db), what="all are processed")
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == 0
    assert sorted(handled.ids) == sorted(map(str, range(1, 51)))
    eventually(lambda: not slots.status(outbox_db, name).active, what="its walsender has ended, too")
    slots.drop(outbox_db, name)


def test_a_slot_that_is_read_or_not_ours_is_not_moved(
    admin_dsn: str, database: str, db: psycopg.Connection, slot: str, reader: int
) -> None:
    result = run(database, "advance", slot)
    assert (result.exit_code, str(reader) in result.stderr) == (5, True)
    with psycopg.connect(admin_dsn, autocommit=True) as elsewhere:
        eventually(lambda: slots.status(db, slot).active)
        db.execute("SELECT pg_terminate_backend(%s, 10000)", [reader])
        with pytest.raises(RefusedError, match="not ours"):
            slots.advance(elsewhere, slot)


def test_a_lost_slot_is_not_moved_but_recreated_and_says_when_it_would_have_been_lost() -> None:
    settings = {"max_slot_wal_keep_size": "64MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    server = TempServer(durable=False, settings=settings)
    with server, psycopg.connect(server.dsn(), autocommit=True) as db:
        slots.create(db, "cdc")
        healthy = json.loads(run(server.dsn(), "status", "--json").stdout)
        assert healthy["slot"]["safe_wal_bytes"] > 0
        assert set(healthy["outlook"]) == {"wal_bytes_per_s", "lost_in_s"}
        lose(db, "cdc")
        shown = run(server.dsn(), "status")
        assert (shown.exit_code, "cdc slot recreate cdc" in shown.stderr) == (1, True)
        refused = run(server.dsn(), "advance")
        assert (refused.exit_code, "cdc slot recreate cdc" in refused.stderr) == (5, True)
        assert run(server.dsn(), "recreate", "--yes").exit_code == 0
        assert run(server.dsn(), "status").exit_code == 0


# Recreate, and ending a reader


def test_a_reader_is_ended_only_when_one_says_so(database: str, db: psycopg.Connection, slot: str, reader: int) -> None:
    for command in ("drop", "recreate"):
        result = run(database, command, slot, "--yes")
        assert (result.exit_code, str(reader) in result.stderr) == (5, True)
    result = run(database, "recreate", slot, "--yes", "--terminate", "--plugin", "pgoutput")
    assert result.exit_code == 0
    assert "dropped" in result.stderr
    assert slots.status(db, slot).plugin == "pgoutput"


def test_for_a_role_that_may_not_end_the_reader_the_missing_right_is_named(
    database: str, db: psycopg.Connection, slot: str, reader: int
) -> None:
    name = sql.Identifier(f"{slot}_role")
    db.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(name))
    try:
        with (
            psycopg.connect(make_conninfo(database, user=f"{slot}_role"), autocommit=True) as weak,
            pytest.raises(RefusedError) as refused,
        ):
            slots.drop(weak, slot, terminate=True)
        assert "pg_signal_backend" in refused.value.hint
    finally:
        db.execute(sql.SQL("DROP ROLE {}").format(name))


def test_another_programs_slot_is_made_ours_only_by_force(database: str, db: psycopg.Connection, slot: str) -> None:
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    assert run(database, "recreate", slot, "--yes").exit_code == 5
    assert run(database, "recreate", slot, "--yes", "--force").exit_code == 0
    assert slots.status(db, slot).ours


def test_a_slot_that_is_not_there_is_not_made_by_recreate(database: str, slot: str) -> None:
    assert run(database, "recreate", slot, "--yes").exit_code == 4
    assert run(database, "advance", slot).exit_code == 4


# Watching


def test_off_a_terminal_each_look_is_a_line(database: str, db: psycopg.Connection, slot: str) -> None:
    slots.create(db, slot)
    result = run(database, "status", slot, "--watch", "--every", "0.1", "--times", "3")
    lines = result.stdout.splitlines()
    assert (result.exit_code, len(lines)) == (0, 3)
    assert all(f" {slot} reserved retained=" in line for line in lines)
    assert ["wal_per_s=" in line for line in lines] == [False, True, True]


def test_on_a_terminal_each_picture_takes_the_place_of_the_last_and_ctrl_c_ends_it_well(
    database: str, db: psycopg.Connection, slot: str
) -> None:
    slots.create(db, slot)
    command = [sys.executable, "-m", "cdc", "slot", "status", slot, "--dsn", database, "--watch", "--every", "0.1"]
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        try:
            while shown.count(b"\x1b[H\x1b[J") < 3:
                shown += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ours)
    assert slot.encode() in shown


# The command


def test_the_command_creates_lists_shows_and_drops(database: str, slot: str) -> None:
    assert run(database, "create", slot).exit_code == 0
    assert slot in run(database, "list").stdout
    shown = run(database, "status", slot)
    assert shown.exit_code == 0
    assert servers.preferred_plugin() in shown.stdout
    assert run(database, "drop", slot, "--yes").exit_code == 0
    assert slot not in run(database, "list").stdout


def test_json_is_one_object_on_stdout(database: str, slot: str) -> None:
    made = json.loads(run(database, "create", slot, "--json").stdout)
    assert (made["schema"], made["slot"]["name"]) == (1, slot)
    shown = json.loads(run(database, "status", slot, "--json").stdout)
    assert shown["health"]["fine"] is True
    assert slot in [each["name"] for each in json.loads(run(database, "list", "--json").stdout)["slots"]]
    assert json.loads(run(database, "drop", slot, "--yes", "--json").stdout)["slot"]["name"] == slot


def test_exit_codes_distinguish_usage_missing_and_refused(database: str, db: psycopg.Connection, slot: str) -> None:
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


def test_a_command_that_is_interrupted_in_the_middle_of_a_statement_leaves_its_connection_without_an_error(
    database: str,
) -> None:
    # So the driver leaves it where Ctrl-C comes between sending a statement and waiting for its answer.
    with open_database(Settings(dsn=database)) as connection:
        connection.pgconn.send_query(b"SELECT pg_advisory_lock(1)")
    assert connection.closed
