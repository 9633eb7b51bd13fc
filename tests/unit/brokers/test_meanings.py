"""What an error of each broker's client means for a change: the same table as docs/guides/brokers.md has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiormq import exceptions as amqp_errors
from confluent_kafka import KafkaError
from nats.aio.msg import Msg
from redis import exceptions as redis_errors

from cdc.brokers.amqp import _meaning as of_amqp
from cdc.brokers.kafka import _meaning as of_kafka
from cdc.brokers.nats import _meaning as of_nats
from cdc.brokers.redis import _meaning as of_redis
from cdc.core.deliveries import AwayError, DeliveryError, RejectedError
from tests.fix_consumer import ROOT

_AWAY, _AGAIN, _DEAD = "waits, no attempt", "an attempt", "dead at once"
_ROWS = {
    "| cannot be reached": _AWAY,
    "| takes nothing": _AWAY,
    "| has no topic": _AGAIN,
    "| finds it too large": _DEAD,
}
"""How the rows of the page begin, and what they say."""


def _kind(result: Exception | None) -> str:
    for kind, name in ((AwayError, _AWAY), (RejectedError, _DEAD), (DeliveryError, _AGAIN)):
        if isinstance(result, kind):
            return name
    return "acknowledged"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("_ALL_BROKERS_DOWN", "_MSG_TIMED_OUT", "_TRANSPORT", "_PURGE_QUEUE", "_AUTHENTICATION", "_SSL"), _AWAY),
        (("NOT_ENOUGH_REPLICAS", "LEADER_NOT_AVAILABLE", "NOT_LEADER_FOR_PARTITION", "REQUEST_TIMED_OUT"), _AWAY),
        (("UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "TOPIC_AUTHORIZATION_FAILED", "POLICY_VIOLATION"), _AGAIN),
        (("MSG_SIZE_TOO_LARGE", "INVALID_MSG_SIZE"), _DEAD),
    ],
)
def test_of_kafka(names: tuple[str, ...], kind: str) -> None:
    found = {name: _kind(of_kafka(KafkaError(getattr(KafkaError, name)), "t")) for name in names}
    assert found == dict.fromkeys(names, kind)


def _answer(**error: Any) -> Msg:
    return Msg(_client=None, data=json.dumps({"error": error} if error else {"stream": "S", "seq": 1}).encode())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({}, "acknowledged"),
        ({"code": 503, "err_code": 10_077, "description": "maximum messages exceeded"}, _AWAY),
        ({"code": 503, "err_code": 10_008, "description": "no leader"}, _AWAY),
        ({"code": 400, "err_code": 10_054, "description": "message size exceeds maximum allowed"}, _DEAD),
        ({"code": 400, "err_code": 10_097, "description": "header size exceeds maximum allowed of 64k"}, _DEAD),
        ({"code": 400, "err_code": 10_071, "description": "wrong last sequence"}, _AGAIN),
    ],
)
def test_of_nats(error: dict[str, Any], kind: str) -> None:
    assert _kind(of_nats(_answer(**error), "s")) == kind


def test_of_nats_without_a_stream_or_an_answer_that_can_be_read() -> None:
    nobody = Msg(_client=None, headers={"Status": "503"})
    assert _kind(of_nats(nobody, "s")) == _AGAIN
    assert _kind(of_nats(Msg(_client=None, data=b"?"), "s")) == _AGAIN


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), _AWAY),
        (redis_errors.ReadOnlyError("You can't write against a read only replica."), _AWAY),
        (redis_errors.ResponseError("MISCONF Redis is configured to save RDB snapshots"), _AWAY),
        (redis_errors.ResponseError("NOREPLICAS Not enough good replicas to write."), _AWAY),
        (redis_errors.NoPermissionError("User app has no permissions"), _AGAIN),
        (redis_errors.ResponseError("WRONGTYPE Operation against a key"), _AGAIN),
    ],
)
def test_of_redis(error: Exception, kind: str) -> None:
    assert _kind(of_redis(error)) == kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (amqp_errors.AMQPConnectionError("gone"), _AWAY),
        (amqp_errors.ChannelInvalidStateError("gone"), _AWAY),
        (OSError("gone"), _AWAY),
        (amqp_errors.DeliveryError(None, None), _AWAY),
        (amqp_errors.ChannelNotFoundEntity("no exchange"), _AGAIN),
        (amqp_errors.ChannelAccessRefused("no right"), _AGAIN),
        (amqp_errors.ChannelPreconditionFailed("too large"), _DEAD),
    ],
)
def test_of_rabbitmq(error: Exception, kind: str) -> None:
    assert _kind(of_amqp(error, "k")) == kind


def test_the_page_has_a_row_for_each_of_them() -> None:
    page = (ROOT / "docs/guides/brokers.md").read_text("utf-8")
    says = {
        _AWAY: ("no attempt is counted", "the same"),
        _AGAIN: ("an attempt is counted",),
        _DEAD: ("dead letter at once",),
    }
    for begins, kind in _ROWS.items():
        [row] = [line for line in page.splitlines() if line.startswith(begins)]
        assert any(words in row for words in says[kind]), row
