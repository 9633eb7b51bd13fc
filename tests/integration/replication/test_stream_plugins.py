"""Which output plugin is used, and what happens where the preferred one cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.core.lsn import Lsn
from cdc.core.model import publication_name
from cdc.replication import stream
from cdc.replication.protocol import Plugin
from tests.eventually import eventually
from tests.fix_slot import make_slot, slot_facts
from tests.fix_stream import Libraries, send_wakeup, stream_of, wait_for_wakeups

pytestmark = pytest.mark.server

PUBLICATION = publication_name("public")


@pytest.fixture
def streamer(database: str, db: psycopg.Connection, slot: str) -> Iterator[str]:
    """The DSN of a role that may replicate, and nothing else."""
    name = f"role_{slot}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(sql.Identifier(name)))
    yield make_conninfo(database, user=name)
    db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def publications(db: psycopg.Connection) -> list[str]:
    return [str(name) for (name,) in db.execute("SELECT pubname FROM pg_publication")]


# Where wal2json is, and where it is not


@pytest.mark.needs("wal2json")
def test_wal2json_is_taken_where_it_is_and_needs_neither_publication_nor_rights(streamer: str, db, slot: str) -> None:
    with stream_of(streamer, slot) as (running, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert running.status.plugin == slot_facts(db, slot)["plugin"] == "wal2json"
    assert publications(db) == []


def test_where_wal2json_is_missing_pgoutput_is_used_and_the_log_says_so_once(
    database: str, db, slot: str, libraries: Libraries, caplog
) -> None:
    libraries("pgoutput")
    with stream_of(database, slot, temporary=True) as (running, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
        assert slot_facts(db, slot)["plugin"] == "pgoutput"
        end_reader(db, slot)
        send_wakeup(db, 2)
        eventually(lambda: received.starts == 2, what="a second start")
        send_wakeup(db, 3)
        wait_for_wakeups(received, 1, 3)
    assert running.status.plugin == "pgoutput"
    [said] = [record.getMessage() for record in caplog.records if "using pgoutput" in record.getMessage()]
    assert "wal2json is not installed" in said
    assert "postgresql-NN-wal2json" in said


def end_reader(db: psycopg.Connection, slot: str) -> None:
    db.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [slot])


@pytest.mark.needs("wal2json")
def test_a_plugin_that_is_removed_under_a_running_stream_is_replaced_and_its_slot_recreated(
    database: str, db, slot: str, libraries: Libraries
) -> None:
    with stream_of(database, slot) as (running, received):
        assert running.status.plugin == "wal2json"
        libraries("pgoutput")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)  # what is loaded stays
        end_reader(db, slot)
        eventually(lambda: running.status.connected and running.status.plugin == "pgoutput", what="the other plugin")
        send_wakeup(db, 2)
        wait_for_wakeups(received, 2)
    assert slot_facts(db, slot)["plugin"] == "pgoutput"
    assert received.starts == 2


@pytest.mark.needs("wal2json")
def test_a_slot_of_a_missing_plugin_is_kept_where_it_may_not_be_recreated(
    database: str, db, slot: str, libraries: Libraries
) -> None:
    make_slot(db, slot, "wal2json")
    libraries("pgoutput")
    with stream_of(database, slot, wait=False, recreate_slot=False) as (_, received):
        error = eventually(received.first_error)
    assert (error.reason, error.permanent) == ("plugin_missing", True)
    assert f"cdc slot recreate {slot}" in error.hint
    assert slot_facts(db, slot)["plugin"] == "wal2json"


def test_where_no_plugin_can_be_used_the_remedies_of_both_are_named(
    database: str, slot: str, libraries: Libraries
) -> None:
    libraries()
    with stream_of(database, slot, wait=False) as (_, received):
        error = eventually(received.first_error)
    assert (error.reason, error.permanent) == ("plugin_missing", True)
    assert "wal2json" in str(error)
    assert "pgoutput" in str(error)


@pytest.mark.needs("wal2json")
def test_a_wal2json_too_old_for_our_options_is_replaced(database: str, db, slot: str, monkeypatch, caplog) -> None:
    known = stream.plugins

    def with_an_option_of_the_future(schema: str) -> dict[str, Plugin]:
        wal2json = known(schema)["wal2json"]
        return {**known(schema), "wal2json": replace(wal2json, options=(*wal2json.options, ("of-the-future", "1")))}

    monkeypatch.setattr(stream, "plugins", with_an_option_of_the_future)
    with stream_of(database, slot) as (running, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert running.status.plugin == "pgoutput"
    assert "too old" in caplog.text


# Slots that are there already


def test_a_slot_of_the_other_plugin_is_used_as_it_is(database: str, db, slot: str) -> None:
    with stream_of(database, slot, plugins=("pgoutput",)):
        pass
    before = slot_facts(db, slot)["restart_lsn"]
    with stream_of(database, slot) as (running, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert running.status.plugin == "pgoutput"
    assert running.status.recreated == 0
    assert slot_facts(db, slot)["restart_lsn"] >= before


def test_a_slot_of_a_plugin_that_was_not_asked_for_is_kept_and_named(database: str, db, slot: str) -> None:
    make_slot(db, slot, "pgoutput")
    with stream_of(database, slot, wait=False, plugins=("wal2json",)) as (_, received):
        error = eventually(received.first_error)
    assert (error.reason, error.permanent) == ("slot_foreign", True)
    assert f"cdc slot recreate {slot} --plugin wal2json" in error.hint
    assert slot_facts(db, slot)["plugin"] == "pgoutput"


# The publication that pgoutput insists on


def test_for_a_role_that_may_not_create_the_publication_the_statement_is_named(streamer: str, db, slot: str) -> None:
    with stream_of(streamer, slot, wait=False, plugins=("pgoutput",)) as (_, received):
        error = eventually(received.first_error)
    assert (error.reason, error.permanent) == ("publication_missing", True)
    statement = f'CREATE PUBLICATION "{PUBLICATION}"'
    assert statement in error.hint
    db.execute(statement)
    with stream_of(streamer, slot, plugins=("pgoutput",)) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)


@pytest.mark.needs("wal2json")
def test_an_old_slot_whose_publication_cannot_be_had_gives_way_to_wal2json(streamer: str, db, slot: str) -> None:
    make_slot(db, slot, "pgoutput")
    with stream_of(streamer, slot) as (running, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert running.status.plugin == "wal2json"


def test_a_publication_with_tables_in_it_passes_on_messages_all_the_same(database: str, db, slot: str) -> None:
    db.execute("CREATE TABLE other (i int PRIMARY KEY)")
    db.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE other").format(sql.Identifier(PUBLICATION)))
    with stream_of(database, slot, plugins=("pgoutput",)) as (_, received):
        with db.transaction():
            db.execute("INSERT INTO other VALUES (1); UPDATE other SET i = 2; TRUNCATE other")
            send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert not received.errors


# A stream that fails at the same place at every start: WAL of a time without publication, which pgoutput cannot decode


def write_undecodable(db: psycopg.Connection) -> None:
    if db.info.server_version >= 180_000:
        pytest.skip("pgoutput of 18 goes on without its publication")
    db.execute("CREATE TABLE other (i int)")
    db.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(PUBLICATION)))
    db.execute("INSERT INTO other VALUES (1)")


def test_a_slot_that_fails_at_the_same_place_at_every_start_is_recreated(database: str, db, slot: str) -> None:
    with stream_of(database, slot, plugins=("pgoutput",)) as (running, received):
        write_undecodable(db)
        eventually(lambda: running.status.recreated == 1 and running.status.connected, what="a new slot")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert set(received.reasons) == {"publication_missing"}
    # Five came no further; on a busy machine some before them may each have come a little further. Each start sweeps
    # the wake-ups that the old slot would have delivered.
    assert 5 <= len(received.reasons) <= 15
    assert received.starts == len(received.reasons) + 1


def test_where_it_may_not_be_recreated_it_is_tried_again_and_the_command_named(database: str, db, slot: str) -> None:
    with stream_of(database, slot, plugins=("pgoutput",), recreate_slot=False) as (running, received):
        write_undecodable(db)
        end = db.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
        eventually(lambda: running.status.reason == "slot_stuck", what="it is told")
    error = received.errors[-1]
    assert error.permanent
    assert f"cdc slot recreate {slot}" in error.hint
    assert Lsn.parse(slot_facts(db, slot)["confirmed_flush_lsn"]) < Lsn.parse(end[0])


def test_a_process_that_begins_behind_what_cannot_be_decoded_reads_the_slot_as_it_is(
    database: str, db, slot: str
) -> None:
    make_slot(db, slot, "pgoutput")
    db.execute("CREATE TABLE other (i int); INSERT INTO other VALUES (1)")
    with stream_of(database, slot, plugins=("pgoutput",), recreate_slot=False) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert not received.errors


def test_a_publication_that_is_dropped_under_a_running_stream_is_made_again_or_done_without(
    database: str, db, slot: str
) -> None:
    db.execute("CREATE TABLE other (i int)")
    with stream_of(database, slot, plugins=("pgoutput",)) as (running, received):
        db.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(PUBLICATION)))
        db.execute("INSERT INTO other VALUES (1)")
        if db.info.server_version >= 180_000:  # pgoutput only warns
            send_wakeup(db, 1)
            wait_for_wakeups(received, 1)
            assert (running.status.recreated, received.errors, publications(db)) == (0, [], [])
            return
        eventually(lambda: running.status.recreated == 1 and running.status.connected, what="a new slot")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert publications(db) == [PUBLICATION]
