"""The stream on a real server, with each real output plugin, and what networks and operators do to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.lsn import Lsn
from cdc.core.model import WakeUp, message_prefix, publication_name
from cdc.replication.protocol import status_update
from cdc.replication.stream import Stream, StreamSettings, plugins
from tests.eventually import eventually
from tests.fix_proxy import Proxy
from tests.fix_slot import lose, slot_facts
from tests.fix_stream import (
    PUBLIC,
    Libraries,
    Recorder,
    Streaming,
    send_wakeup,
    send_wakeups,
    stream_of,
    wait_for_wakeups,
)

pytestmark = pytest.mark.server

# What is a wake-up


def test_a_committed_message_is_a_wake_up_with_its_number_shard_and_commit_time(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot) as (_, received):
        send_wakeup(db, 49, 27)
        wait_for_wakeups(received, 49)
        [server_time] = db.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert received.wakeups == [WakeUp(49, 27)]
    assert received.committed_at[0] is not None
    assert 0 <= server_time - received.committed_at[0] < 60


@pytest.mark.parametrize("schema", ["public", 'My "Schema", x.y', "Straße 日本 %41", "it's\\back"])
def test_wake_ups_of_every_schema_name_pass_through_the_real_plugin(
    streaming: Streaming, database: str, db, slot: str, schema: str
) -> None:
    with streaming(database, slot, schema=schema) as (_, received):
        send_wakeup(db, 7, prefix=message_prefix(schema))
        wait_for_wakeups(received, 7)
    assert received.wakeups == [WakeUp(7, 1)]


def sends_all(db: psycopg.Connection, plugin: str) -> bool:
    """Whether begin and commit of each transaction of the database travel, autovacuum's too: with pgoutput of 14."""
    return plugin == "pgoutput" and db.info.server_version < 150_000


def test_only_committed_messages_of_our_prefix_are_wake_ups(
    streaming: Streaming, plugin: str, database: str, db, slot: str
) -> None:
    db.execute("CREATE TABLE none (i int); CREATE TABLE other (i int)")
    with streaming(database, slot) as (stream, received):
        db.execute("INSERT INTO none VALUES (1); INSERT INTO other VALUES (1); UPDATE other SET i = 2")
        send_wakeup(db, 1, prefix="someone_elses_heartbeat")
        send_wakeup(db, 2, prefix=PUBLIC + "2")
        send_wakeup(db, 3, transactional=False)
        db.execute("SELECT pg_logical_emit_message(true, %s, 'no, numbers')", [PUBLIC])
        with db.transaction():
            send_wakeup(db, 4)
            raise psycopg.Rollback
        send_wakeup(db, 5)
        wait_for_wakeups(received, 5)
    assert received.wakeups == [WakeUp(5, 1)]
    # Filtered on the server: with wal2json all but our prefix, with pgoutput the rows.
    assert sends_all(db, plugin) or stream.status.messages == {"wal2json": 3, "pgoutput": 13}[plugin]


def test_a_large_transaction_is_handed_over_in_bounded_batches_in_order(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot) as (stream, received):
        send_wakeups(db, 1, 20_000)
        eventually(lambda: len(received.wakeups) >= 20_000, what="all wake-ups")
    assert [wakeup.seq for wakeup in received.wakeups] == list(range(1, 20_001))
    assert max(received.batches) <= 1000
    assert 20_000 <= stream.status.messages <= 20_002
    assert stream.status.bytes > 20_000 * 60


def test_wake_ups_that_come_while_nothing_streams_are_left_to_the_sweep(
    streaming: Streaming, database: str, db, slot: str, confirms: Callable[[str], None]
) -> None:
    with streaming(database, slot):
        pass
    send_wakeup(db, 1)
    with streaming(database, slot) as (_, received):
        send_wakeup(db, 2)
        wait_for_wakeups(received, 2)
        confirms(slot)
    assert received.wakeups == [WakeUp(2, 1)]


# Confirming


def test_the_slot_is_confirmed_on_a_database_where_nothing_watched_is_written(
    streaming: Streaming, database: str, db, slot: str, *, plugin: str, confirms: Callable[[str], None]
) -> None:
    db.execute("CREATE TABLE other (i int)")
    with streaming(database, slot) as (stream, received):
        for _ in range(3):
            db.execute("INSERT INTO other SELECT generate_series(1, 1000)")
            confirms(slot)
        assert stream.status.confirmed_lsn <= stream.status.received_lsn
    assert not received.wakeups
    assert sends_all(db, plugin) or stream.status.messages == 0
    assert stream.status.keepalives > 0


def test_what_was_received_is_confirmed_when_the_stream_stops(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    # An interval far away: only the update on leaving can have confirmed it.
    with streaming(database, slot, wal_sender_timeout_s=60.0) as (stream, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
        reached = stream.status.received_lsn
    eventually(lambda: not slot_facts(db, slot)["active"], what="the slot is free")
    assert Lsn.parse(str(slot_facts(db, slot)["confirmed_flush_lsn"])) >= reached
    with streaming(database, slot) as (_, again):
        send_wakeup(db, 2)
        wait_for_wakeups(again, 2)
    assert again.wakeups == [WakeUp(2, 1)]


def test_the_stream_does_not_wait_for_whoever_keeps_what_it_passed_on(
    streaming: Streaming, database: str, db, slot: str, confirms
) -> None:
    with streaming(database, slot) as (_, received):
        send_wakeups(db, 1, 5000)
        eventually(lambda: len(received.wakeups) >= 5000)
        confirms(slot)


# What networks, servers and operators do


def test_a_terminated_walsender_is_replaced_and_nothing_is_missed(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
        db.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [slot])
        send_wakeup(db, 2)
        eventually(lambda: received.starts == 2, what="a second start")
        send_wakeup(db, 3)
        wait_for_wakeups(received, 1, 2, 3)
    assert received.reasons == ["server_shutdown"]


def test_a_cut_connection_is_replaced_and_nothing_is_missed(streaming: Streaming, proxy: Proxy, db, slot: str) -> None:
    with streaming(proxy.dsn, slot) as (_, received):
        proxy.cut()
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert "network" in received.reasons


def test_a_half_open_link_is_noticed_by_its_silence(streaming: Streaming, proxy: Proxy, db, slot: str) -> None:
    with streaming(proxy.dsn, slot, stall_limit_s=1.0) as (stream, received):
        proxy.hold()
        send_wakeup(db, 1)
        eventually(lambda: "stalled" in received.reasons, what="the silence is noticed")
        assert not stream.status.connected
        proxy.open()
        wait_for_wakeups(received, 1)


def test_a_quiet_but_living_server_is_not_taken_for_dead(streaming: Streaming, database: str, db, slot: str) -> None:
    with streaming(database, slot, stall_limit_s=1.5, wal_sender_timeout_s=1.5) as (stream, received):
        seen = stream.status.keepalives
        # Each update asks for an answer, one every quarter of a second; ten of them outlast the stall limit.
        eventually(lambda: stream.status.keepalives >= seen + 10, what="ten answers")
    assert not received.errors


def test_a_server_that_refuses_connections_is_network_and_heals(
    streaming: Streaming, proxy: Proxy, db, slot: str
) -> None:
    proxy.refuse()
    with streaming(proxy.dsn, slot, wait=False) as (stream, received):
        eventually(lambda: received.reasons.count("network") >= 2, what="two refusals")
        assert stream.status.reason == "network"
        proxy.open()
        eventually(lambda: stream.status.connected, what="the stream starts")
    assert stream.status.reason is None


def test_a_slot_held_by_another_is_stood_by_for_and_then_taken_over(
    streaming: Streaming, database: str, db, slot: str, caplog
) -> None:
    caplog.set_level(logging.INFO, "cdc.stream")
    with streaming(database, slot) as (first, _), streaming(database, slot, wait=False) as (second, received):
        eventually(lambda: len(received.errors) >= 2, what="the second is refused")
        assert set(received.reasons) == {"slot_busy"}
        assert not any(error.permanent for error in received.errors)
        assert first.stop(20)
        eventually(lambda: second.status.connected, what="the second takes over")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    [said] = [record for record in caplog.records if "slot_busy" in record.getMessage()]
    assert said.levelno == logging.INFO


def test_a_dropped_slot_is_created_again(streaming: Streaming, database: str, db, slot: str) -> None:
    with streaming(database, slot) as (_, received):
        pass
    eventually(lambda: not slot_facts(db, slot)["active"], what="the slot is free")
    db.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    with streaming(database, slot) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)


def test_a_missing_slot_is_only_reported_where_it_may_not_be_created(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot, wait=False, create_slot=False) as (_, received):
        [error] = eventually(lambda: received.errors)
    assert (error.reason, error.permanent) == ("slot_missing", True)
    assert f"cdc slot create {slot}" in error.hint
    assert not slot_facts(db, slot)


def test_a_slot_confirmed_ahead_of_the_servers_wal_is_recreated(
    streaming: Streaming, plugin: str, database: str, db, slot: str
) -> None:
    with streaming(database, slot):
        pass
    confirm_a_position_of_the_future(database, slot, plugin)
    assert Lsn.parse(str(slot_facts(db, slot)["confirmed_flush_lsn"])) > Lsn.parse("F0/0")
    with streaming(database, slot) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert Lsn.parse(str(slot_facts(db, slot)["confirmed_flush_lsn"])) < Lsn.parse("F0/0")


def confirm_a_position_of_the_future(dsn: str, slot: str, plugin: str) -> None:
    """What a client does that puts a clock value in a position's place."""
    with closing(psycopg.connect(dsn, replication="database", autocommit=True, prepare_threshold=None)) as careless:
        options = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.Literal(value))
            for name, value in plugins("public")[plugin].options
        )
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 ({})").format(sql.Identifier(slot), options)
        careless.pgconn.exec_(start.as_bytes(None))
        careless.pgconn.put_copy_data(status_update(Lsn.parse("303DA/80E1CF6A"), unix_s=0.0, ping=True))
        careless.pgconn.flush()
        careless.pgconn.put_copy_end()
        while careless.pgconn.get_copy_data(0)[0] > 0:
            pass  # until the server agrees to the end, which says that it has read the update


def test_a_slot_of_another_plugin_or_database_is_left_alone(
    streaming: Streaming, database: str, admin_dsn: str, db, slot: str
) -> None:
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    for dsn in (database, admin_dsn):
        with streaming(dsn, slot, wait=False) as (_, received):
            eventually(received.first_error)
        [error] = received.errors
        assert (error.reason, error.permanent) == ("slot_foreign", True)
        assert "test_decoding" in str(error)
    assert slot_facts(db, slot)["plugin"] == "test_decoding"


def test_creating_the_slot_gives_way_to_an_open_write_transaction_and_succeeds_later(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with psycopg.connect(database) as writer:
        writer.execute("SELECT pg_current_xact_id()")
        with streaming(database, slot, wait=False, lock_timeout_s=0.2) as (stream, received):
            error = eventually(received.first_error)
            assert (error.reason, error.permanent) == ("slot_missing", False)
            assert "cdc slot create" in error.hint
            writer.commit()
            eventually(lambda: stream.status.connected, what="the slot is created")


def test_stop_in_the_middle_of_creating_leaves_no_backend_behind(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    creating = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender' AND datname = current_database()"
    with psycopg.connect(database) as writer:
        writer.execute("SELECT pg_current_xact_id()")
        with streaming(database, slot, wait=False, lock_timeout_s=60.0):
            eventually(lambda: slot_facts(db, slot), what="the half-made slot shows")
        eventually(lambda: db.execute(creating).fetchone() == (0,), what="the walsender is gone")
    assert not slot_facts(db, slot)


def test_stop_leaves_no_thread_and_no_connection(streaming: Streaming, database: str, db, slot: str) -> None:
    with streaming(database, slot):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "cdc-stream"]
    eventually(lambda: not slot_facts(db, slot)["active"], what="the slot is free")


def test_a_stream_that_was_never_started_holds_nothing_and_stops(database: str) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    stream = Stream(StreamSettings(dsn=database, schema="public", slot="unused"), Recorder())
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    assert stream.stop(1)


def test_stop_ends_a_pause_between_two_attempts(streaming: Streaming, database: str, db, slot: str) -> None:
    with streaming(database, slot, wait=False, create_slot=False) as (_, received):
        eventually(lambda: received.errors)  # permanent: the next look is a minute away


# Servers and roles that cannot


def test_a_server_without_logical_wal_is_named_with_its_remedy() -> None:
    server = TempServer(durable=False, settings={"wal_level": "replica"})
    with server, stream_of(server.dsn(), "unused", wait=False) as (_, received):
        [error] = eventually(lambda: received.errors)
    assert (error.reason, error.permanent) == ("wal_level", True)
    assert "wal_level = logical" in error.hint
    assert "restart" in error.hint


def test_a_server_without_walsenders_is_named_with_its_remedy() -> None:
    server = TempServer(durable=False, settings={"max_wal_senders": "0"})
    with server, stream_of(server.dsn(), "unused", wait=False) as (_, received):
        [error] = eventually(lambda: received.errors)
    assert (error.reason, error.permanent) == ("no_free_walsender", True)


@pytest.mark.needs("wal2json")
def test_a_missing_plugin_is_named_with_its_remedy(database: str, slot: str, libraries: Libraries) -> None:
    libraries("pgoutput")
    with stream_of(database, slot, wait=False, plugins=("wal2json",)) as (_, received):
        [error] = eventually(lambda: received.errors)
    assert (error.reason, error.permanent) == ("plugin_missing", True)
    assert "install" in error.hint


def test_a_role_without_replication_is_named_with_its_remedy(database: str, role: str, slot: str) -> None:
    with stream_of(make_conninfo(database, user=role), slot, wait=False) as (_, received):
        [error] = eventually(lambda: received.errors)
    assert (error.reason, error.permanent) == ("no_replication_role", True)
    assert f'ALTER ROLE "{role}" REPLICATION' in error.hint


def test_a_role_with_replication_and_no_other_right_streams(
    streaming: Streaming, database: str, db, role: str, slot: str
) -> None:
    db.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(role)))
    db.execute(sql.SQL("CREATE PUBLICATION {}").format(sql.Identifier(publication_name("public"))))
    with streaming(make_conninfo(database, user=role), slot) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)


@pytest.fixture
def role(db: psycopg.Connection, slot: str) -> Iterator[str]:
    name = f"role_{slot}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    yield name
    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_an_unknown_host_or_database_is_network_and_shows_no_password(database: str) -> None:
    for wrong in ({"host": "/nowhere"}, {"dbname": "nowhere"}):
        dsn = make_conninfo(database, password="sesame", **wrong)
        with stream_of(dsn, "unused", wait=False) as (stream, received):
            error = eventually(received.first_error)
        assert error.reason == "network"
        assert error.hint
        assert "sesame" not in f"{error}{error.hint}{stream.status}"


def test_a_wrong_password_is_reported_once_in_the_log_however_often_it_is_tried(caplog) -> None:
    with TempServer(durable=False, tcp=True) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("CREATE ROLE streamer LOGIN REPLICATION PASSWORD 'right'")
        hba = server.data / "pg_hba.conf"
        hba.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        server.restart()
        dsn = make_conninfo(server.dsn(user="streamer", tcp=True), password="wrong-sesame")
        with stream_of(dsn, "unused", wait=False) as (_, received):
            eventually(lambda: len(received.errors) >= 3, what="three attempts")
    assert set(received.reasons) == {"network"}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert "sesame" not in caplog.text


def test_after_a_restart_of_the_server_the_stream_goes_on_and_misses_nothing(streaming: Streaming) -> None:
    for mode in ("fast", "immediate"):
        with TempServer() as server, streaming(server.dsn(), "cdc") as (_, received):
            with psycopg.connect(server.dsn(), autocommit=True) as before:
                send_wakeup(before, 1)
                wait_for_wakeups(received, 1)
            server.restart(mode)
            with psycopg.connect(server.dsn(), autocommit=True) as after:
                send_wakeup(after, 2)
            wait_for_wakeups(received, 1, 2)
            assert set(received.reasons) <= {"server_shutdown", "network"}


def test_a_lost_slot_is_recreated(streaming: Streaming) -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB", "wal_keep_size": "0"}
    with TempServer(durable=False, settings=settings) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        with streaming(server.dsn(), "cdc"):
            pass
        lose(db, "cdc")
        with streaming(server.dsn(), "cdc") as (_, received):
            send_wakeup(db, 1)
            wait_for_wakeups(received, 1)
        assert slot_facts(db, "cdc")["wal_status"] != "lost"


def test_a_slot_that_another_outbox_reads_is_distinguished_from_one_to_stand_by_for(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot, schema="search"), streaming(database, slot, wait=False) as (_, second):
        eventually(lambda: second.reasons, what="the second one is refused")
        assert second.reasons[0] == "slot_foreign"
        assert "another outbox" in str(second.errors[0])
        assert "CDC_SLOT_NAME" in second.errors[0].hint
