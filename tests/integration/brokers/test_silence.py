"""What accepts a connection and never answers is an outage, not a hang: no wait for a broker is without a limit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from cdc.app import config, delivery
from cdc.brokers import publisher
from cdc.core.broker_url import PROTOCOLS
from cdc.diagnostics.findings import Severity
from tests.eventually import eventually_async
from tests.fix_brokers import BrokerServer
from tests.fix_consumer import consuming, metric, settled, states
from tests.fix_proxy import Proxy

_PATHS = {"kafka": "x", "nats": "cdc.x", "redis": "0/cdc:x", "amqp": "%2F/changes/x"}


@pytest.fixture
def dumb() -> Iterator[str]:
    """HOST:PORT of what takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def link(broker: BrokerServer) -> Iterator[Proxy]:
    running = broker.proxy()
    running.start()
    yield running
    running.stop()


async def _true(condition: Any, what: str) -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what)


def _publish(db: psycopg.Connection, count: int) -> None:
    db.execute("SELECT publish_change('x', 'k' || n, 'INSERT', '{}') FROM generate_series(1, %s) AS n", [count])


@pytest.mark.parametrize("tls", ["", "+tls"])
@pytest.mark.parametrize("scheme", sorted(PROTOCOLS))
async def test_a_broker_that_never_answers_a_connection_is_away_and_does_not_delay_the_end(
    scheme: str, tls: str, dumb: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    _publish(outbox_db, 3)
    url = f"{scheme}{tls}://{dumb}/{_PATHS[scheme]}"
    async with consuming(outbox, None, deliver_to=url, max_attempts=1, timeout=0) as app:
        await _true(lambda: app.status.breakers["deliver"].rests, "the delivery rests")
        assert "cannot be reached" in app.status.breakers["deliver"].why
    assert states(outbox_db) == {"fresh": 3}


@pytest.mark.parametrize("scheme", sorted(PROTOCOLS))
async def test_the_doctor_says_that_a_broker_never_answers(scheme: str, dumb: str) -> None:
    settings = config.from_options({"deliver_to": f"{scheme}://{dumb}/{_PATHS[scheme]}"})
    found = await asyncio.to_thread(delivery.examine, settings)
    assert found is not None
    assert found.severity is Severity.FAIL
    assert "cannot be reached" in found.detail


async def test_a_link_that_carries_nothing_any_more_is_an_outage_even_where_handlers_have_no_limit(
    broker: BrokerServer, link: Proxy, outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "ACKNOWLEDGED_S", 0.5)
    await broker.prepare()
    async with consuming(outbox, None, deliver_to=broker.url(port=link.port), max_attempts=1, timeout=0) as app:
        broken = partial(metric, app.metrics.registry, "cdc_delivery_requests_total", result="broken")
        _publish(outbox_db, 20)
        await _true(lambda: settled(outbox_db), "the first ones arrive")
        link.swallow()
        _publish(outbox_db, 20)
        await _true(lambda: broken() > 0, "silence is noticed")
        link.open()
        link.cut()
        await _true(lambda: settled(outbox_db), "all arrive")
    assert states(outbox_db) == {"processed": 40}
