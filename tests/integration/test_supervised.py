"""Nothing that anybody rings, and no fault of ours, ends what runs beside the consumer."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

import cdc
from cdc import collector, supervisor
from cdc.app import App
from cdc.collector import Collector
from cdc.hooks import Hooks
from cdc.pruning import Pruning
from cdc.routing import Router
from cdc.wakeup.relay import Listener, Relay
from cdc.wakeup.stream import Stream
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric

_NESTED = '{"a":' * 1_300


async def test_a_payload_nested_too_deep_to_read_is_a_bell_like_any_other(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, seen = Router(), asyncio.Event()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        seen.set()

    async with consuming(outbox, router, stream=False, sweep_interval=600, poll_interval=600) as app:

        async def listens() -> bool:
            return app._listener.connected

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
        ("figures", App, "_show"),
        ("hooks", Hooks, "run"),
        ("collector", Collector, "_outbox"),
        ("stream", Stream, "_open"),
    ],
)
async def test_what_ends_by_a_fault_is_counted_started_again_and_in_the_end_a_failed_probe(
    name: str, kind: Any, method: str, outbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_MIN_S", 0.001)
    monkeypatch.setattr(supervisor, "FAILING_AT", 2)
    monkeypatch.setattr(collector, "_EVERY_S", 0.01)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    async def fail_soon(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(kind, method, fail_soon if asyncio.iscoroutinefunction(getattr(kind, method)) else fail)
    async with consuming(outbox, Router(), retention="1d") as app:

        async def failing() -> bool:
            return any(check.name == f"task.{name}" and not check.ok for check in app._liveness())

        await eventually_async(failing)
        assert metric(app.metrics.registry, "cdc_task_ends_total", task=name) >= 2
