"""Messages of changes, read by the official SDK of CloudEvents."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event
from hypothesis import given
from hypothesis import strategies as st

from cdc.core import cloudevents
from cdc.core.broker_messages import Encoding, Message
from cdc.core.model import Change
from cdc.testing import change as make_change

_AT = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
_CAUSE = UUID(int=7)


def _change(**fields: Any) -> Change:
    return make_change(
        "order", "UPDATE", 'é "1" %', old={"total": 1}, new={"total": Decimal("12.50")}, changed_at=_AT, seq=42,
        caused_by=_CAUSE, depth=1, **fields,
    )  # fmt: skip


def _read_as_nats(message: Message) -> BaseCloudEvent:
    """Its binding is that of HTTP."""
    return from_http_event(HTTPMessage(dict(message.headers), message.body))


def _read_as_kafka(message: Message) -> BaseCloudEvent:
    headers = {name: value.encode() for name, value in message.headers.items()}
    return from_kafka_event(KafkaMessage(headers, message.key, message.body))


def _read_as_rabbitmq(message: Message) -> BaseCloudEvent:
    headers = dict(message.headers)
    return from_rabbitmq_event(RabbitMQMessage(headers, headers.pop("content-type"), message.body))


_Reader = Callable[[Message], BaseCloudEvent]
READERS: dict[str, tuple[dict[str, Any], _Reader]] = {
    "nats": ({"separator": "-", "percent": True}, _read_as_nats),
    "kafka": ({"separator": "_"}, _read_as_kafka),
    "amqp": ({"separator": "-"}, _read_as_rabbitmq),
}


@pytest.mark.parametrize("mode", ["structured", "binary"])
@pytest.mark.parametrize("protocol", READERS)
def test_anybody_elses_reading_of_the_specification_finds_the_event(protocol: str, mode: str) -> None:
    options, read = READERS[protocol]
    change = _change()
    message = Encoding(mode, None, **options).message(change, "name")
    event = read(message)
    assert (event.get_id(), event.get_type()) == (str(change.id), "cdc.order.update")
    assert (event.get_source(), event.get_subject()) == ("/schemas/public/tables/order", 'é "1" %')
    assert event.get_time() == _AT
    assert str(event.get_extension("causedby")) == str(_CAUSE)
    assert event.get_extension("partitionkey") == message.key == 'order/é "1" %'
    data = event.get_data()
    assert isinstance(data, dict)
    assert data["new"] == {"total": 12.5}


@pytest.mark.parametrize("mode", ["structured", "binary"])
def test_headers_have_what_one_routes_by_without_parsing(mode: str) -> None:
    message = Encoding(mode, "/shop", separator="_").message(_change(), "name")
    prefix = "cdc_" if mode == "structured" else "ce_"
    assert message.headers[f"{prefix}id"] == message.id
    assert message.headers[f"{prefix}time"] == "2026-01-02T03:04:05.000678Z"
    assert message.headers[f"{prefix}causedby"] == str(_CAUSE)


@pytest.mark.parametrize("mode", ["structured", "binary"])
def test_no_digit_of_a_number_is_lost(mode: str) -> None:
    message = Encoding(mode, None, separator="-").message(_change(), "name")
    found = json.loads(message.body or b"", parse_float=Decimal)
    assert str((found if mode == "binary" else found["data"])["new"]["total"]) == "12.50"


_TEXTS = st.text(st.sampled_from('a.B/ "\\{}\n\u00e9\u20ac\U0001f600%'), max_size=12)


@given(
    kind=_TEXTS.filter(bool),
    key=_TEXTS,
    schema=st.none() | _TEXTS,
    source=st.none() | _TEXTS.filter(bool),
    more=st.fixed_dictionaries({"caused_by": st.none() | st.uuids(), "replay_of": st.none() | st.uuids()}),
)
def test_the_document_of_an_event_has_its_attributes_and_its_data_whatever_is_in_them(
    kind: str, key: str, schema: str | None, source: str | None, more: dict[str, Any]
) -> None:
    change = make_change(kind, "UPDATE", key, old={"a": 1}, new=None, table_schema=schema, changed_at=_AT, **more)
    document = cloudevents.event(change, source)
    expected = {**cloudevents.attributes(change, source), "data": json.loads(cloudevents.data(change))}
    assert json.loads(document) == expected
    assert json.loads(cloudevents.data(change))["entity_id"] == key
    assert Encoding("structured", source, separator="-").message(change, "x").body == document


def test_each_of_the_changes_of_one_encoding_has_its_own_time() -> None:
    encoding = Encoding("structured", None, separator="-")
    times = [_AT, _AT, _AT.astimezone(timezone(timedelta(hours=2))), _AT + timedelta(seconds=1), _AT]
    found = [encoding.message(make_change("x", changed_at=each), "x").headers["cdc-time"] for each in times]
    assert found == ["2026-01-02T03:04:05.000678Z"] * 3 + ["2026-01-02T03:04:06.000678Z", "2026-01-02T03:04:05.000678Z"]
