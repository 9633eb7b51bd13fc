"""Debezium's envelope of a change."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from cdc.brokers.delivery import BrokerDelivery
from cdc.core import broker_url
from cdc.core.broker_messages import Encoding
from cdc.core.debezium import DebeziumEncoding
from cdc.core.model import Operation
from cdc.testing import change as make_change

_AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("encoding", [DebeziumEncoding(None), Encoding("structured", None, separator="-")])
def test_each_operation_that_is_delivered_has_a_message(encoding: DebeziumEncoding | Encoding) -> None:
    no_sender: Any = None
    delivery = BrokerDelivery(no_sender, broker_url.parse("kafka://h/x").names(), encoding, target="kafka://h/x")
    delivered = [operation for operation in Operation if delivery.router.match("order", operation)]
    assert set(Operation) - set(delivered) <= {Operation.SCHEMA}
    for operation in delivered:
        assert encoding.message(make_change("order", operation, "1", changed_at=_AT), "topic").body


@pytest.mark.parametrize(
    ("operation", "old", "new", "letter"),
    [
        ("INSERT", None, {"id": 1}, "c"),
        ("UPDATE", {"id": 1}, {"id": 1, "total": Decimal("12.50")}, "u"),
        ("DELETE", {"id": 1}, None, "d"),
        ("READ", None, {"id": 1}, "r"),
        ("TRUNCATE", None, None, "t"),
    ],
)
def test_the_envelope_has_both_rows_the_operation_and_its_source(
    operation: str, old: dict[str, object] | None, new: dict[str, object] | None, letter: str
) -> None:
    change = make_change("order", operation, "1", old=old, new=new, changed_at=_AT, seq=7, table="orders")
    message = DebeziumEncoding(None).message(change, "topic")
    found = json.loads(message.body, parse_float=Decimal)
    assert (found["before"], found["after"], found["op"]) == (old, new, letter)
    assert found["ts_ms"] == found["source"]["ts_ms"] == 1_767_225_600_000
    assert (found["source"]["schema"], found["source"]["table"]) == ("public", "orders")
    assert found["source"]["snapshot"] == ("true" if operation == "READ" else "false")
    assert (message.key, message.headers["cdc_id"], message.ends) == ("order/1", str(change.id), letter == "d")
