"""Logical messages of any size, which any role that may connect can write into the WAL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.eventually import eventually
from tests.fix_consumer import Process
from tests.fix_memory import killed_above, megabytes
from tests.fix_slot import slot_facts
from tests.fix_stream import PUBLIC, Streaming, send_wakeup, wait_for_wakeups

_MB = 1 << 20
_CALLS = (
    "CREATE TABLE calls (seq bigint, key text, attempt int, pid int, started timestamptz DEFAULT now(),"
    " ended timestamptz)"
)


def shout(db: psycopg.Connection, size: int, *, prefix: str = PUBLIC, transactional: bool = False) -> None:
    db.execute("SELECT pg_logical_emit_message(%s, %s, repeat('a', %s))", [transactional, prefix, size])


@pytest.mark.parametrize(("prefix", "transactional"), [(PUBLIC, False), (PUBLIC, True), ("other", False)])
def test_what_is_too_long_to_be_ours_is_passed_over_and_the_stream_goes_on(
    streaming: Streaming, database: str, db, slot: str, *, prefix: str, transactional: bool
) -> None:
    with streaming(database, slot) as (stream, received):
        for size in (20_000, 100_000, 2 * _MB):
            shout(db, size, prefix=prefix, transactional=transactional)
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
        assert not received.errors
        assert stream.status.confirmed_lsn <= stream.status.received_lsn


def test_after_one_that_took_much_memory_the_session_starts_again_behind_it(
    streaming: Streaming, database: str, db, slot: str
) -> None:
    with streaming(database, slot) as (_, received):
        shout(db, 40 * _MB)
        eventually(lambda: received.starts == 2, what="a new session")
        send_wakeup(db, 1)
        wait_for_wakeups(received, 1)
    assert received.reasons == ["protocol"]
    assert "message of 40 MB" in str(received.errors[0])


@pytest.fixture
def consumer(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, processes: list[Process]
) -> Iterator[Callable[..., Process]]:
    """Starts one that streams with a plugin; its slot is gone afterwards."""
    outbox_db.execute(_CALLS)
    started: list[Process] = []

    def start(plugin: str, **settings: Any) -> Process:
        process = Process(
            outbox, tmp_path / f"log{len(started)}", slot_name="sizes", slot_plugin=plugin, poll_interval=0.1,
            **settings,
        )  # fmt: skip
        processes.append(process)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.process.poll() is None:
            process.kill()
    eventually(lambda: not slot_facts(outbox_db, "sizes").get("active"), what="no consumer reads the slot")
    if slot_facts(outbox_db, "sizes"):
        outbox_db.execute("SELECT pg_drop_replication_slot('sizes')")


def test_a_message_is_held_twice_by_libpq_and_never_by_us(
    consumer: Callable[..., Process], outbox_db: psycopg.Connection, plugin: str
) -> None:
    process = consumer(plugin)
    process.wait_for("streaming the slot")
    before = megabytes(process.process.pid)
    shout(outbox_db, 200 * _MB, prefix=PUBLIC)
    process.wait_for("a logical message of 200 MB")
    assert megabytes(process.process.pid) - before < 2.2 * 200


@pytest.mark.parametrize("options", [(), ("--no-slot-recreate",)])
def test_what_a_message_has_killed_starts_behind_it(
    consumer: Callable[..., Process], outbox_db: psycopg.Connection, plugin: str, options: tuple[str, ...]
) -> None:
    process = consumer(plugin, options=options)
    process.wait_for("streaming the slot")
    with killed_above(process.process.pid, 150) as killed:
        shout(outbox_db, 200 * _MB, prefix=PUBLIC)
        assert killed.wait(60)
    process.process.wait()
    again = consumer(plugin, options=options)
    with killed_above(again.process.pid, 150) as killed:
        again.wait_for("streaming the slot")
        outbox_db.execute("SELECT publish_change('nothing', '1')")
        done = "SELECT FROM entity_changes WHERE processed"
        eventually(lambda: outbox_db.execute(done).fetchall(), what="it works")
        end = outbox_db.execute("SELECT pg_current_wal_flush_lsn()").fetchone()
        moved = "SELECT FROM pg_replication_slots WHERE slot_name = 'sizes' AND confirmed_flush_lsn >= %s::pg_lsn"
        eventually(lambda: outbox_db.execute(moved, end).fetchall(), what="the slot moves on")
        assert not killed.is_set()


def test_messages_that_kill_again_and_again_cost_no_change_an_attempt(
    consumer: Callable[..., Process], outbox_db: psycopg.Connection
) -> None:
    slow = "SELECT publish_change('counted', n::text, new_data => '{\"takes_s\": 20}') FROM generate_series(1, 3) AS n"
    running, left = "SELECT FROM calls HAVING count(*) = %s", "SELECT FROM entity_changes WHERE NOT processed"
    first = consumer("auto")
    first.wait_for("streaming the slot")
    outbox_db.execute(slow)
    eventually(lambda: outbox_db.execute(running, [3]).fetchall(), what="all three are running")
    with killed_above(first.process.pid, 150) as killed:
        shout(outbox_db, 100 * _MB)
        assert killed.wait(60)
    first.process.wait()
    second = consumer("auto")
    with killed_above(second.process.pid, 150) as killed:
        eventually(lambda: outbox_db.execute(running, [6]).fetchall(), what="all three are running again")
        shout(outbox_db, 100 * _MB)
        eventually(lambda: not outbox_db.execute(left).fetchall(), what="all three are processed")
        second.wait_for("streaming the slot")
        assert not killed.is_set()
    assert outbox_db.execute("SELECT DISTINCT error_count FROM entity_changes").fetchall() == [(0,)]
