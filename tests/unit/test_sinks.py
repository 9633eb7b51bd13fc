"""Sinks without a broker: what cannot be meant is refused at once, and in one sentence."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

import cdc
from cdc import sinks
from cdc.core.deliveries import RejectedError, UnreachedError
from cdc.testing import change


@pytest.mark.parametrize(
    ("make", "url", "settings", "why"),
    [
        (sinks.kafka, "http://h/x", {}, "a URL for kafka is expected"),
        (sinks.kafka, "nats://h/x", {}, "a URL for kafka is expected, and this is one for nats"),
        (sinks.nats, "nats://h/a..b", {}, "the subject has characters that are not allowed there"),
        (sinks.nats, "nats://hunter:2@h/a", {}, "a URL with a user or a password in it"),
        (sinks.kafka, "kafka://h/x", {"password": "hunter"}, "a password for kafka needs a user"),
        (sinks.nats, "nats://h/x", {"format": "debezium"}, "the format is one of structured, binary for nats"),
        (sinks.amqp, "amqp://h/x", {}, "input should be a URL such as amqp://"),
        (sinks.redis, "redis://h/x/y", {}, "the database is a number"),
    ],
)
def test_a_sink_that_cannot_be_meant_is_refused_and_not_quoted(
    make: Any, url: str, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(cdc.UsageError, match=f"^{re.escape(why)}") as refused:
        make(url, **settings)
    assert "hunter" not in f"{refused.value} {refused.value.hint}"


def test_a_broker_that_is_away_is_an_outage_for_the_handler() -> None:
    async def send() -> None:
        async with sinks.nats("nats://127.0.0.1:1/x") as sink:
            await sink.send(change("x"))

    with pytest.raises(UnreachedError) as away:
        asyncio.run(send())
    assert isinstance(away.value, cdc.Unavailable)


def test_names_and_headers_that_are_none_fail_before_anything_is_sent() -> None:
    async def send(payload: sinks.Payload) -> None:
        async with sinks.nats("nats://127.0.0.1:1/x") as sink:
            await sink.send(change("x"), payload)

    with pytest.raises(RejectedError, match="the handler's name for it cannot be one: the subject has"):
        asyncio.run(send(sinks.Payload(1, to="a b")))
    texts: list[Any] = [{"headers": {"hunter": 1}}, {"id": change("x").id}, {"key": 5}, {"content_type": None}]
    for each in texts:
        with pytest.raises(TypeError, match=r"^the id, the key, the content type and the headers of a"):
            asyncio.run(send(sinks.Payload(1, **each)))
    for each in ({"id": "a\r\nb"}, {"content_type": "a\nb"}, {"headers": {"a\n": "b"}}):
        with pytest.raises(ValueError, match="control characters"):
            asyncio.run(send(sinks.Payload(1, **each)))
    with pytest.raises(ValueError, match="control characters") as refused:
        asyncio.run(send(sinks.Payload(1, headers={"hunter": "a\r\nb"})))
    assert "hunter" not in str(refused.value)
