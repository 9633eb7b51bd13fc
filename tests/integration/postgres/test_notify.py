"""LISTEN entity_change on a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from cdc.core.model import WakeUp, message_prefix
from cdc.postgres.notify import PAYLOAD_BYTES_MAX, Listener, encode
from tests.eventually import eventually_async
from tests.fix_proxy import Proxy

PUBLIC = message_prefix("public")
Heard = list[list[WakeUp] | None]


@asynccontextmanager
async def listening(dsn: str, schema: str = "public", **options: Any) -> AsyncIterator[tuple[Listener, Heard]]:
    heard: Heard = []
    listener = Listener(dsn, schema, heard.append, **options)
    task = asyncio.create_task(listener.run())
    try:
        await count(heard, 1)
        yield listener, heard
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not listener.connected


async def count(heard: Heard, least: int) -> None:
    async def enough() -> bool:
        return len(heard) >= least

    await eventually_async(enough, what=f"{least} calls")


def notify(db: psycopg.Connection, *payloads: str) -> None:
    for payload in payloads:
        db.execute("SELECT pg_notify('entity_change', %s)", [payload])


async def test_once_it_listens_a_sweep_is_due_for_earlier_notifications(database: str) -> None:
    async with listening(database) as (listener, heard):
        assert listener.connected
        assert heard == [None]


async def test_wakeups_of_our_outbox_are_received_in_order(database: str, db: psycopg.Connection) -> None:
    async with listening(database, 'My "Schema"') as (_, heard):
        notify(db, *encode(message_prefix('My "Schema"'), [WakeUp(49, 27), WakeUp(50, 3)]))
        await count(heard, 2)
    assert heard == [None, [WakeUp(49, 27), WakeUp(50, 3)]]


async def test_the_longest_payload_fits_the_server(database: str, db: psycopg.Connection) -> None:
    many = [WakeUp(2**63 - 1 - number, number % 64) for number in range(700)]
    payloads = encode(PUBLIC, many)
    assert PAYLOAD_BYTES_MAX - 30 < max(map(len, payloads)) <= PAYLOAD_BYTES_MAX
    async with listening(database) as (_, heard):
        notify(db, *payloads)
        await count(heard, 1 + len(payloads))
    assert [wakeup for batch in heard if batch for wakeup in batch] == many


@pytest.mark.parametrize("payload", ["", '{"table":"tasks","operation":"INSERT","entity_type":"tasks"}', PUBLIC])
async def test_any_other_payload_means_sweep_now(database: str, db: psycopg.Connection, payload: str) -> None:
    async with listening(database) as (_, heard):
        notify(db, payload)
        await count(heard, 2)
    assert heard == [None, None]


async def test_wakeups_of_another_outbox_of_the_database_are_ignored(database: str, db: psycopg.Connection) -> None:
    async with listening(database) as (_, heard):
        notify(db, *encode(message_prefix("public2"), [WakeUp(1, 1)]), *encode(PUBLIC, [WakeUp(2, 2)]))
        await count(heard, 2)
    assert heard == [None, [WakeUp(2, 2)]]


async def test_a_terminated_listener_comes_back_and_asks_for_a_sweep(database: str, db: psycopg.Connection) -> None:
    async with listening(database, application_name="cdc listener test") as (_, heard):
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc listener test'"
        )
        await count(heard, 2)
        notify(db, *encode(PUBLIC, [WakeUp(1, 1)]))
        await count(heard, 3)
    assert heard == [None, None, [WakeUp(1, 1)]]


async def test_a_half_open_link_is_noticed_and_replaced(
    proxy: Proxy, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.postgres.notify._ANSWER_LIMIT_S", 0.5)
    async with listening(proxy.dsn + " connect_timeout=2", poll_s=0.2) as (listener, heard):
        proxy.hold()

        async def noticed() -> bool:
            return not listener.connected

        await eventually_async(noticed, what="the silence is noticed")
        proxy.open()
        await count(heard, 2)
        notify(db, *encode(PUBLIC, [WakeUp(1, 1)]))
        await count(heard, 3)
    assert heard[-1] == [WakeUp(1, 1)]


async def test_an_unreachable_server_is_logged_once_without_the_password(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cdc.listener")
    async with listening(proxy.dsn + " password=sesame") as (listener, heard):
        before = proxy.accepted
        proxy.refuse()

        async def tried_again() -> bool:
            listener.retry_now()
            return proxy.accepted >= before + 4

        await eventually_async(tried_again, what="four attempts")
        proxy.open()
        listener.retry_now()
        await count(heard, 2)
    # The end of the connection, and then every refusal as one.
    assert len(caplog.records) == 2
    assert "sesame" not in caplog.text
