"""A stream whose small pieces an event loop reads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import psycopg
import pytest

from cdc.core.errors import StreamError
from cdc.core.lsn import Lsn
from cdc.core.model import WakeUp
from cdc.core.stream_reason import Reason
from cdc.replication.connection import SocketWait, open_session
from cdc.replication.protocol import status_update
from cdc.replication.stream import Stream, StreamSettings, plugins
from cdc.runtime.sockets import sockets_of
from tests.eventually import eventually, eventually_async
from tests.fix_slot import make_slot, slot_facts
from tests.fix_stream import Recorder, send_wakeup, send_wakeups

pytestmark = pytest.mark.server


class _Threads(Recorder):
    """Also remembers in which thread it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def notified(self, wakeups: Sequence[WakeUp], committed_at: float | None) -> None:
        super().notified(wakeups, committed_at)
        self.threads.append(threading.get_ident())


@contextmanager
def _stream(dsn: str, slot: str, plugin: str) -> Iterator[tuple[Stream, _Threads]]:
    received = _Threads()
    settings = StreamSettings(dsn=dsn, schema="public", slot=slot, plugins=(plugin,), wal_sender_timeout_s=3.0)
    stream = Stream(settings, received, sockets=sockets_of(asyncio.get_running_loop()))
    stream.start()
    try:
        eventually(lambda: stream.status.connected, what="the stream starts")
        yield stream, received
    finally:
        assert stream.stop(20)


async def _wait_for(received: Recorder, count: int) -> None:
    async def there() -> bool:
        return len(received.wakeups) >= count

    await eventually_async(there, what=f"{count} wake-ups")


async def test_the_loop_reads_what_comes_alone(database: str, db: psycopg.Connection, slot: str, plugin: str) -> None:
    with _stream(database, slot, plugin) as (_, received):
        for number in range(1, 21):
            send_wakeup(db, number)
            await _wait_for(received, number)
    assert [wakeup.seq for wakeup in received.wakeups] == list(range(1, 21))
    assert received.threads.count(threading.get_ident()) > 10


class _Waits(SocketWait):
    """Counts the waits of a session."""

    count = 0

    def until(self, deadline: float, link: int | None = None, *, write: bool = False, roused: bool = False) -> bool:
        self.count += 1
        return super().until(deadline, link, write=write, roused=roused)


def test_the_read_that_meets_the_end_of_the_stream_does_not_wait_for_the_reason(
    database: str, db: psycopg.Connection, slot: str, plugin: str
) -> None:
    """The event loop may make it, while the thread waits. The next one, which is the thread's, says what happened."""
    make_slot(db, slot, plugin)
    with (
        closing(_Waits().open()) as waiting,
        open_session(database, waiting, application_name="cdc: test", settings={}, slot=slot) as session,
    ):
        session.start(plugins("public")[plugin], Lsn(0))
        db.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [slot])
        met = False
        while not met:
            session.wait(time.monotonic() + 20.0)
            before = waiting.count
            session.receive(1_000)
            session.send(status_update(Lsn(0), unix_s=time.time(), ping=False))
            assert waiting.count == before
            met = not session.idle
        with pytest.raises(StreamError) as error:
            session.receive(1_000)
        assert error.value.reason == Reason.SERVER_SHUTDOWN.value


async def test_while_the_loop_stands_still_the_thread_reads_and_confirms(
    database: str, db: psycopg.Connection, slot: str, plugin: str
) -> None:
    with _stream(database, slot, plugin) as (stream, received):
        send_wakeup(db, 1)
        await _wait_for(received, 1)
        send_wakeup(db, 2)
        # From here on nothing runs on the loop, for longer than the server waits for an answer.
        keepalives = stream.status.keepalives
        eventually(lambda: len(received.wakeups) == 2, what="the thread reads")
        eventually(lambda: stream.status.keepalives > keepalives + 10, what="ten answers")
        reached = stream.status.received_lsn
        eventually(lambda: Lsn.parse(slot_facts(db, slot)["confirmed_flush_lsn"]) >= reached, what="it is confirmed")
        assert not received.errors
        send_wakeup(db, 3)
        await _wait_for(received, 3)
    assert [wakeup.seq for wakeup in received.wakeups] == [1, 2, 3]


async def test_a_flood_comes_whole_and_in_order_whoever_reads_it(
    database: str, db: psycopg.Connection, slot: str, plugin: str
) -> None:
    with _stream(database, slot, plugin) as (_, received):
        for first in range(1, 20_001, 4_000):
            send_wakeup(db, first)
            send_wakeups(db, first + 1, first + 3_999)
        await _wait_for(received, 20_000)
        send_wakeup(db, 20_001)
        await _wait_for(received, 20_001)
    assert [wakeup.seq for wakeup in received.wakeups] == list(range(1, 20_002))


async def test_a_stream_whose_link_ends_begins_again(
    database: str, db: psycopg.Connection, slot: str, plugin: str
) -> None:
    with _stream(database, slot, plugin) as (stream, received):
        send_wakeup(db, 1)
        await _wait_for(received, 1)
        db.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [slot])

        async def again() -> bool:
            return received.starts == 2 and stream.status.connected

        await eventually_async(again, what="it streams again")
        send_wakeup(db, 2)
        await _wait_for(received, 2)
    assert len(received.errors) == 1
