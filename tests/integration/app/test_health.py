"""What turns /livez red, and what does not. The limits are shorter than those of ``cdc run``, nothing else differs."""

from __future__ import annotations

import asyncio
import http.client
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator

import psycopg
import pytest

from cdc.app.application import App
from cdc.contrib.demo.temp_server import free_port
from cdc.core import failpoints
from cdc.core.model import Change
from cdc.core.router import Router
from cdc.engine.health_checks import HealthThresholds
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, metric, settled
from tests.fix_proxy import Proxy

SHORT = HealthThresholds(turn_s=4.0, stall_s=600.0, silences=0.015)
"""Nine seconds of silence, though the stream itself would bear ten minutes: as if its watchdog had failed. A server
that is asked answers every five."""


def livez(port: int) -> tuple[int, list[str]]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        link.request("GET", "/livez")
        answer = link.getresponse()
        return answer.status, answer.read().decode().splitlines()
    finally:
        link.close()


def failing(port: int) -> list[str]:
    """Names of the checks that fail, if the answer is 503."""
    status, lines = livez(port)
    failed = [line.split()[1] for line in lines if line.startswith("fail ")]
    assert status == (503 if failed else 200)
    return failed


def publish(db: psycopg.Connection, entity_type: str, number: int = 1) -> None:
    db.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, %s) AS n", [entity_type, number])


async def until_streaming(app: App) -> None:
    async def streaming() -> bool:
        return metric(app.metrics.registry, "cdc_stream_connected") == 1

    await eventually_async(streaming, what="the stream is there")


def _green(port: int) -> Callable[[], Awaitable[bool]]:
    async def green() -> bool:
        try:
            return not await asyncio.to_thread(failing, port)
        except ConnectionRefusedError:
            return False  # it has not begun to listen yet

    return green


@pytest.fixture
def link(outbox: str) -> Iterator[Proxy]:
    running = Proxy(outbox)
    running.start()
    yield running
    running.stop()


async def test_a_filter_that_blocks_the_event_loop_is_named_in_the_log_and_no_row_is_quoted(
    outbox: str, outbox_db: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    router, named = Router(), threading.Event()

    class Named(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "event loop has not turned" in record.getMessage():
                named.set()

    def wanted(change: Change) -> bool:
        return named.wait(60)

    @router.on("order", when=wanted)
    async def handle(change: Change) -> None:
        pass

    listens = Named()
    logging.getLogger("cdc").addHandler(listens)
    try:
        async with consuming(outbox, router, stream=False):
            outbox_db.execute("""SELECT publish_change('order', 'hunter2', new_data => '{"card": "hunter2"}')""")

            async def handled() -> bool:
                return settled(outbox_db)

            await eventually_async(handled, within_s=60)
    finally:
        logging.getLogger("cdc").removeHandler(listens)
    [said] = [text for text in caplog.messages if "event loop has not turned" in text]
    assert "test_health.py" in said
    assert "in wanted" in said
    assert "hunter2" not in said


async def test_a_handler_that_blocks_the_event_loop_turns_it_red_and_the_probe_still_answers(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, release, port = Router(), threading.Event(), free_port()

    @router.on("order")
    async def blocks(change: Change) -> None:
        release.wait(60)

    seen: list[list[str]] = []

    def watch() -> None:  # from another thread: this one's event loop is the one that is blocked
        try:
            seen.append(eventually(lambda: failing(port), within_s=30, what="red"))
        finally:
            release.set()

    async with consuming(outbox, router, SHORT, stream=False, http_port=port):
        await eventually_async(_green(port), what="green")
        watcher = threading.Thread(target=watch)
        watcher.start()
        publish(outbox_db, "order")
        await asyncio.to_thread(watcher.join)
        await eventually_async(_green(port), what="green again")
    assert seen == [["loop.consumer"]]


async def test_a_frozen_stream_thread_turns_it_red(outbox: str) -> None:
    port, release = free_port(), threading.Event()

    def freeze(point: str) -> None:
        if point == "stream.before_confirm":
            release.wait(60)

    async with consuming(outbox, Router(), SHORT, http_port=port) as app:
        await until_streaming(app)
        assert await _green(port)()
        failpoints.install(freeze)
        try:
            with psycopg.connect(outbox, autocommit=True) as writer:
                publish(writer, "order")

            async def red() -> bool:
                return "loop.stream" in await asyncio.to_thread(failing, port)

            await eventually_async(red, within_s=30, what="red")
        finally:
            failpoints.install(None)
            release.set()
        await eventually_async(_green(port), what="green again")


async def test_a_half_open_link_that_the_stream_does_not_notice_turns_it_red(outbox: str, link: Proxy) -> None:
    port = free_port()
    async with consuming(outbox, Router(), SHORT, stream_dsn=link.dsn, http_port=port) as app:
        await until_streaming(app)
        assert await _green(port)()
        link.hold()

        async def red() -> bool:
            return await asyncio.to_thread(failing, port) == ["stream.last_byte"]

        try:
            await eventually_async(red, within_s=40, what="red")
        finally:
            link.open()
        await eventually_async(_green(port), within_s=40, what="green again")


async def test_a_half_open_link_that_the_stream_notices_leaves_it_green(outbox: str, link: Proxy) -> None:
    """The stream begins again by itself: there is nothing that a restart would fix."""
    port = free_port()
    async with consuming(
        outbox, Router(), HealthThresholds(turn_s=10, stall_s=6.0), stream_dsn=link.dsn, http_port=port
    ) as app:
        await until_streaming(app)
        link.hold()
        reds: list[list[str]] = []

        async def noticed() -> bool:
            reds.append(await asyncio.to_thread(failing, port))
            return metric(app.metrics.registry, "cdc_stream_disconnects_total", reason="stalled") >= 1

        try:
            await eventually_async(noticed, within_s=40, what="the stream gives up")
        finally:
            link.open()
        assert not any(reds)


async def test_a_slow_consumer_that_works_is_never_red(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, port = Router(), free_port()
    release = asyncio.Event()

    @router.on("slow")
    async def waits(change: Change) -> None:
        await release.wait()

    @router.on("thread")
    def waits_in_a_thread(change: Change) -> None:
        in_threads.wait(60)

    in_threads = threading.Event()
    publish(outbox_db, "slow", 500)
    publish(outbox_db, "thread", 500)
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 day'")
    async with consuming(outbox, router, SHORT, concurrency=20, threads=5, window=100, http_port=port) as app:
        await until_streaming(app)
        reds: list[list[str]] = []
        iterations: set[float] = set()

        async def watched() -> bool:
            reds.append(await asyncio.to_thread(failing, port))
            iterations.add(metric(app.metrics.registry, "cdc_loop_last_iteration_timestamp_seconds", loop="stream"))
            return max(iterations) - min(iterations) > 12  # beyond each limit

        try:
            await eventually_async(watched, within_s=60, what="time passes")
        finally:
            release.set()
            in_threads.set()
        assert not any(reds)
