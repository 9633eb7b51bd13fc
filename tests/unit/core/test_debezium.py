"""Debezium's envelope of a change."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from cdc.core.debezium import DebeziumEncoding
from cdc.testing import change as make_change

_AT = datetime(2026, 1, 1, tzinfo=UTC)


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
