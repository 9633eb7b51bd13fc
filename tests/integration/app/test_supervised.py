"""No notification, and no fault of ours, ends the tasks that run with the consumer."""

from __future__ import annotations

import asyncio
import ctypes
import http.client
import socket
import threading
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.router import Router
from cdc.engine.hooks import Hooks
from cdc.engine.retention import Pruning
from cdc.engine.stats_poller import StatsPoller
from cdc.postgres.notify import Listener, Relay
from cdc.replication.stream import Stream
from cdc.runtime import supervisor
from cdc.runtime.loop_watch import LoopWatch
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric

_NESTED = '{"a":' * 1_300


async def test_a_payload_nested_too_deep_to_read_causes_a_sweep(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, seen = Router(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.set()

    async with consuming(outbox, router, stream=False, sweep_interval=600, poll_interval=600) as app:

        async def listens() -> bool:
            return app.status.listening

        await eventually_async(listens)
        outbox_db.execute("SELECT pg_notify('entity_change', %s)", [_NESTED])
        outbox_db.execute("SELECT publish_change('x', '1')")
        outbox_db.execute("SELECT pg_notify('entity_change', %s)", [_NESTED])
        async with asyncio.timeout(30):
            await seen.wait()
        assert metric(app.metrics.registry, "cdc_task_ends_total") == 0


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("listener", Listener, "_listen"),
        ("relay", Relay, "run"),
        ("retention", Pruning, "_round"),
        ("loop", LoopWatch, "run"),
        ("hooks", Hooks, "run"),
        ("collector", StatsPoller, "_outbox"),
        ("stream", Stream, "_open"),
    ],
)
async def test_what_ends_by_a_fault_is_counted_started_again_and_in_the_end_a_failed_probe(
    name: str, kind: Any, method: str, outbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_MIN_S", 0.001)
    monkeypatch.setattr(supervisor, "FAILING_AT", 2)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    async def fail_soon(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(kind, method, fail_soon if asyncio.iscoroutinefunction(getattr(kind, method)) else fail)
    async with consuming(outbox, Router(), retention="1d") as app:

        async def failing() -> bool:
            return any(check.name == f"task.{name}" and not check.ok for check in app.liveness())

        await eventually_async(failing)
        assert metric(app.metrics.registry, "cdc_task_ends_total", task=name) >= 2


def _end(name: str) -> None:
    """As code of others can: a library that ends its calls by raising in their thread may be late."""
    [thread] = [thread for thread in threading.enumerate() if thread.name == f"cdc-{name}"]
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


@pytest.mark.parametrize("name", ["health", "collector", "page", "stream", "watch"])
async def test_a_thread_that_others_end_is_counted_and_started_again(
    name: str, outbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_MIN_S", 0.001)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with consuming(outbox, Router(), http_port=port, http_page=True) as app:

        async def turning() -> bool:
            return not [check for check in [*app.liveness(), *app.readiness()] if not check.ok]

        async def counted() -> bool:
            return metric(app.metrics.registry, "cdc_task_ends_total", task=name) == 1

        await eventually_async(turning)
        _end(name)
        await eventually_async(counted)
        await eventually_async(turning)
        status, body = await asyncio.to_thread(_ask, port, "/livez")
        assert status == 200, body
        assert name in {thread.name.removeprefix("cdc-") for thread in threading.enumerate()}


def _ask(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
