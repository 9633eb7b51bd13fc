"""Temporary slots, and a slot that goes away under a running stream."""

from __future__ import annotations

from functools import partial

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.eventually import eventually
from tests.fix_proxy import Proxy
from tests.fix_slot import lose, make_slot, slot_facts
from tests.fix_stream import Streaming, send_wakeup, wait_for_wakeups

# Temporary slots


def test_a_temporary_slot_delivers_and_is_gone_with_its_stream(
    streaming: Streaming, plugin: str, database: str, db, slot: str
) -> None:
    with streaming(database, slot, temporary=True) as (_, received):
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
        assert slot_facts(db, slot).items() >= {"plugin": plugin, "temporary": True}.items()
    eventually(lambda: not slot_facts(db, slot), what="the slot is gone")


def test_a_temporary_slot_is_gone_with_its_link_and_a_new_one_delivers(
    streaming: Streaming, proxy: Proxy, db, slot: str
) -> None:
    with streaming(proxy.dsn, slot, temporary=True) as (stream, received):
        proxy.refuse()
        eventually(lambda: not slot_facts(db, slot), what="the slot is gone")
        proxy.open()
        eventually(lambda: received.starts >= 2 and stream.status.connected, what="a second start")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)


def test_of_two_consumers_with_temporary_slots_one_streams_and_the_other_stands_by(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with (
        streaming(database, slot, temporary=True) as (first, _),
        streaming(database, slot, temporary=True, wait=False) as (second, received),
    ):
        eventually(lambda: len(received.errors) >= 2, what="the second is refused")
        assert set(received.reasons) == {"slot_busy"}
        assert first.stop(20)
        eventually(lambda: second.status.connected, what="the second takes over")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)


def test_a_durable_slot_of_an_earlier_mode_makes_way_for_a_temporary_one(
    streaming: Streaming, plugin: str, database: str, db, slot: str
) -> None:
    make_slot(db, slot, plugin)
    with streaming(database, slot, temporary=True):
        assert slot_facts(db, slot)["temporary"]
    eventually(lambda: not slot_facts(db, slot), what="nothing remains")


def test_a_durable_slot_that_may_not_be_recreated_is_kept(
    streaming: Streaming, plugin: str, database: str, db, slot: str
) -> None:
    make_slot(db, slot, plugin)
    with streaming(database, slot, temporary=True, recreate_slot=False, wait=False) as (_, received):
        error = eventually(received.first_error)
    assert (error.reason, error.permanent) == ("slot_foreign", True)
    assert slot_facts(db, slot)["temporary"] is False


# Slots that go away


def test_a_slot_that_is_dropped_under_a_running_stream_is_made_again(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot) as (stream, received):
        drop_under_its_reader(db, slot)
        send_wakeup(db, 1)
        eventually(lambda: received.starts >= 2 and stream.status.connected, what="a second start")
        send_wakeup(db, 2)
        wait_for_wakeups(received, 2)


def drop_under_its_reader(db: psycopg.Connection, slot: str) -> None:
    """As an operator must: the server refuses it while somebody reads, and the reader comes back at once."""

    def dropped() -> bool:
        try:
            db.execute(
                "SELECT pg_terminate_backend(active_pid, 1000) FROM pg_replication_slots WHERE slot_name = %s", [slot]
            )
            db.execute("SELECT pg_drop_replication_slot(%s)", [slot])
        except psycopg.errors.ObjectInUse:
            return False
        return True

    eventually(dropped, what="the slot is dropped")


def test_a_slot_whose_stream_is_broken_off_at_the_same_place_again_and_again_is_recreated(
    streaming: Streaming, proxy: Proxy, db, slot: str
) -> None:
    """As by a fault in the plugin that takes the server down: all that is seen of it here is a link that breaks."""
    with streaming(proxy.dsn, slot) as (stream, received):

        def has_started(times: int) -> bool:
            return received.starts >= times and stream.status.connected

        for starts in range(1, 30):
            eventually(partial(has_started, starts), what="another start")
            if stream.status.recreated:
                break
            proxy.cut()
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert stream.status.recreated == 1
    assert set(received.reasons) <= {"network", "slot_busy"}


def test_a_slot_that_is_lost_under_a_running_stream_is_recreated(streaming: Streaming) -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB", "wal_keep_size": "0"}
    with TempServer(durable=False, settings=settings) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        with streaming(server.dsn(), "cdc", lock_timeout_s=0.5) as (stream, received):
            with psycopg.connect(server.dsn()) as writer:
                # Every slot keeps what was written since the oldest open write transaction.
                writer.execute("SELECT pg_current_xact_id()")
                lose(db, "cdc")
                eventually(lambda: not stream.status.connected, what="the server ends the stream")
            eventually(lambda: stream.status.connected, what="a new slot")
            send_wakeup(db, 1)
            wait_for_wakeups(received, 1)
        assert stream.status.recreated == 1
        assert slot_facts(db, "cdc")["wal_status"] != "lost"
