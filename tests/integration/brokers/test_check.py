"""What is said about a broker before a change comes: by ``cdc smoke``, and when ``cdc run`` starts."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner, Result

from cdc.cli import cdc as command
from tests.eventually import eventually_async
from tests.fix_brokers import BrokerServer, NatsServer
from tests.fix_consumer import consuming


def _smoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["smoke", *arguments])


def test_a_smoke_test_sends_one_event_and_says_where_it_went(broker: BrokerServer) -> None:
    asyncio.run(broker.prepare())
    name = broker.url().rpartition("/")[2].format(type="order")
    said = _smoke("--deliver-to", broker.url(), "--type", "order")
    assert said.exit_code == 0, said.output
    assert f" {name}\n" in said.output
    assert "is reached: " in said.output
    sent = _smoke("--deliver-to", broker.url(), "--type", "order", "--json")
    assert sent.exit_code == 0, sent.output
    assert json.loads(sent.output)["name"] == name
    first, second = asyncio.run(broker.received())
    assert second.event["id"] == json.loads(sent.output)["event_id"]
    assert (first.event["type"], first.event["subject"]) == ("cdc.order.insert", "cdc-smoke")
    assert first.event["data"]["metadata"] == {"test": True}


def test_a_smoke_test_that_does_not_reach_the_broker_fails_with_the_reason(broker: BrokerServer) -> None:
    asyncio.run(broker.prepare())
    broker.kill()
    said = _smoke("--deliver-to", broker.url(), "--type", "order")
    assert said.exit_code == 1
    assert f"cannot be reached ({broker.refused})" in said.output


def test_a_smoke_test_to_what_is_not_there_fails_with_the_reason(broker: BrokerServer) -> None:
    asyncio.run(broker.prepare())
    if broker.scheme == "redis":
        pytest.skip("its first entry makes a stream")
    asyncio.run(broker.remove())
    said = _smoke("--deliver-to", broker.url(), "--type", "order")
    assert said.exit_code == 1
    assert "create" in said.output or "declare" in said.output, said.output


@pytest.mark.parametrize("arguments", [(), ("--deliver-to", "http://127.0.0.1:1/")], ids=["nothing", "http"])
def test_a_smoke_test_without_a_broker_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    said = _smoke(*arguments)
    assert said.exit_code == 2
    assert "no broker is named" in said.output


async def test_what_is_missing_in_a_broker_is_said_at_the_start_before_a_change_comes(
    broker: BrokerServer, outbox: str, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.prepare()
    if broker.scheme == "redis":
        pytest.skip("its first entry makes a stream")
    await broker.remove()

    async def said() -> bool:
        return any(each.levelname == "WARNING" and "or correct deliver.to" in each.message for each in caplog.records)

    async with consuming(outbox, None, deliver_to=broker.url(), deliver_types=("order",)):
        await eventually_async(said, what="what is missing is said")


async def test_a_broker_that_is_away_at_the_start_is_waited_for_and_then_looked_at(
    nats_server: NatsServer, outbox: str, caplog: pytest.LogCaptureFixture
) -> None:
    await nats_server.prepare()
    nats_server.kill()

    async def says(text: str) -> None:
        async def check() -> bool:
            return text in caplog.text

        await eventually_async(check, what=text)

    with caplog.at_level("INFO"):
        async with consuming(outbox, None, deliver_to=nats_server.url(), deliver_types=("order",)):
            await says("cannot be reached (Connection refused); it is waited for")
            await asyncio.to_thread(nats_server.start)
            await says("cdc.order goes into the stream CDC of 0 messages")
    assert caplog.text.count("it is waited for") == 1
