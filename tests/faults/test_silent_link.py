"""A link that carries nothing and is not closed, as of a proxy whose way to the server has gone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import cdc
from cdc.postgres import shard_locks
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, settled
from tests.fix_proxy import Proxy

_DRAIN_S = 2
_FEW_S = 12
"""For the end of a process beyond its drain time, on a machine with other work."""


@pytest.fixture
def link(outbox: str) -> Iterator[Proxy]:
    running = Proxy(outbox)
    running.start()
    yield running
    running.stop()


def consumer(dsn: str, log: Path, **settings: Any) -> Process:
    return Process(dsn, log, slot_name="silent", drain_time=_DRAIN_S, **settings)


def ends_in_peace(process: Process) -> None:
    began = time.monotonic()
    assert process.terminate(60) == 0, process.log
    assert time.monotonic() - began < _DRAIN_S + _FEW_S, process.log


def publish(db: psycopg.Connection, count: int, entity_type: str = "nothing") -> None:
    db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, count])


def owns(process: Process, count: int) -> bool:
    return f"owns {count} of 64 shards" in process.log


@pytest.mark.promise("G8")
def test_a_consumer_whose_link_is_silent_says_so_and_another_one_has_its_shards_within_half_a_minute(
    outbox: str, outbox_db: psycopg.Connection, link: Proxy, processes: list[Process], tmp_path: Path
) -> None:
    first = consumer(link.dsn, tmp_path / "first.log")
    processes.append(first)
    first.wait_for("owns 64 of 64 shards")
    first.wait_for("streaming the slot")
    second = consumer(outbox, tmp_path / "second.log")
    processes.append(second)
    second.wait_for("owns 32 of 64 shards")
    link.swallow()
    publish(outbox_db, 50)
    eventually(lambda: owns(second, 64), within_s=45, what="the second one has all shards")
    eventually(lambda: settled(outbox_db), what="all is handled")
    eventually(lambda: "has not answered 'cdc: shards' for 25 s" in first.log, what="the first one says so")
    ends_in_peace(first)
    second.terminate()
    outbox_db.execute("SELECT pg_drop_replication_slot('silent')")


@pytest.mark.promise("G8")
def test_a_server_ends_the_session_of_an_owner_whose_proxy_is_frozen(
    outbox: str,
    outbox_db: psycopg.Connection,
    link: Proxy,
    processes: list[Process],
    tmp_path: Path,
) -> None:
    """Nothing is closed, at neither end, so only the server's own clock can tell."""
    first = consumer(link.dsn, tmp_path / "first.log", options=["--no-stream"])
    processes.append(first)
    first.wait_for("owns 64 of 64 shards")
    link.hold()
    second = consumer(outbox, tmp_path / "second.log", options=["--no-stream"])
    processes.append(second)
    publish(outbox_db, 50)
    eventually(lambda: owns(second, 64), within_s=shard_locks.SILENCE_MAX_S + 30, what="the second one has all shards")
    eventually(lambda: settled(outbox_db), what="all is handled")
    second.terminate()


@pytest.mark.parametrize("when", ["at_once", "at_work", "in_the_pool"])
def test_sigterm_while_the_link_is_silent_ends_after_the_drain_time(
    when: str, outbox_db: psycopg.Connection, link: Proxy, processes: list[Process], tmp_path: Path
) -> None:
    process = consumer(link.dsn, tmp_path / "log", handlers="tests.handlers_links:router")
    processes.append(process)
    process.wait_for("streaming the slot")
    if when != "at_once":
        publish(outbox_db, 3, "transactional" if when == "in_the_pool" else "sleeps")
        process.wait_for("a handler is at work")
    link.swallow()
    ends_in_peace(process)
    # The server's side of the slot ends with the proxy's.
    slot = (
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active AND slot_name = 'silent'"
    )
    eventually(lambda: outbox_db.execute(slot).fetchall(), what="the slot is free")


@pytest.mark.parametrize("hosts", [1, 3])
def test_sigterm_ends_a_consumer_that_waits_for_a_server_which_says_nothing(
    hosts: int, processes: list[Process], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dumb:
        port = str(dumb.getsockname()[1])
        dsn = make_conninfo("", host=",".join(["127.0.0.1"] * hosts), port=",".join([port] * hosts), dbname="x")
        process = consumer(dsn, tmp_path / "log")
        processes.append(process)
        taken, _ = dumb.accept()  # it has begun to connect
        with taken:
            ends_in_peace(process)


async def test_a_drain_that_takes_long_does_not_cost_the_session_which_must_say_something(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shard_locks.SESSION, "idle_session_timeout", "2500ms")
    router, calls = cdc.Router(), []

    @router.on("x")
    async def takes_long(change: cdc.Change) -> None:
        calls.append(change)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 5)

    publish(outbox_db, 1, "x")
    async with consuming(outbox, router, stream=False, drain_time=30):

        async def called() -> bool:
            return bool(calls)

        await eventually_async(called)
    assert settled(outbox_db)


async def test_a_consumer_that_waits_for_its_schema_keeps_its_session(
    database: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(shard_locks.SESSION, "idle_session_timeout", "1500ms")
    since = (
        "SELECT max(clock_timestamp() - backend_start) > '4 s' FROM pg_stat_activity"
        " WHERE application_name = 'cdc: shards' AND datname = current_database()"
    )
    async with consuming(database, cdc.Router(), stream=False):

        async def for_long() -> bool:
            return db.execute(since).fetchone() == (True,)

        await eventually_async(for_long, what="a session of some seconds")
    assert "interrupted" not in caplog.text
