"""The pure parts of delivery, against the two specifications."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from standardwebhooks import Webhook

from cdc.core import cloudevents
from cdc.core.deliveries import AwayError, DeliveryError, RejectedError
from cdc.core.fast_change import Json, read_change
from cdc.core.model import Change, Operation
from cdc.http import endpoint_url, webhook_signature
from cdc.http.delivery import Delivery, OneOfThemError, _judge, _reason
from cdc.http.endpoint_url import Target
from cdc.http.responses import AWAY, DEAD, Answer, Disposition
from tests.changes import change

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
PAGE = Path(__file__).resolve().parents[3] / "docs/guides/http-delivery.md"

# --- CloudEvents ---------------------------------------------------------------------------------------------------


def _full(**given: Any) -> Change:
    return replace(
        change(42, "7"),
        **{
            "entity_type": "order",
            "table": "orders",
            "operation": Operation.UPDATE,
            "old": {"total": 1},
            "new": {"total": 2, "name": "Ädä"},
            "metadata": {"user_id": "u"},
            "changed_at": datetime(2026, 1, 1, 1, 2, 3, 456000, tzinfo=timezone(timedelta(hours=1))),
            **given,
        },
    )


def test_an_event_has_what_the_change_has() -> None:
    cause = UUID(int=9)
    assert json.loads(cloudevents.event(_full(attempt=2, caused_by=cause, depth=1), None)) == {
        "specversion": "1.0",
        "id": "00000000-0000-0000-0000-00000000002a",
        "source": "/schemas/public/tables/orders",
        "type": "cdc.order.update",
        "subject": "7",
        "time": "2026-01-01T00:02:03.456000Z",
        "datacontenttype": "application/json",
        "partitionkey": "order/7",
        "sequence": "0000000000000000042",
        "attempt": 2,
        "depth": 1,
        "causedby": str(cause),
        "data": {
            "entity_type": "order",
            "entity_id": "7",
            "operation": "UPDATE",
            "table_schema": "public",
            "table": "orders",
            "old": {"total": 1},
            "new": {"total": 2, "name": "Ädä"},
            "metadata": {"user_id": "u"},
        },
    }


@pytest.mark.parametrize(
    ("schema", "table", "source"),
    [
        ("public", "orders", "/schemas/public/tables/orders"),
        (None, "invoice.paid", "/tables/invoice.paid"),
        ("a/b", "ü n?#", "/schemas/a%2Fb/tables/%C3%BC%20n%3F%23"),
    ],
)
def test_the_source_is_the_table_unless_one_is_named(schema: str | None, table: str, source: str) -> None:
    made = _full(table_schema=schema, table=table)
    assert json.loads(cloudevents.event(made, None))["source"] == source
    assert json.loads(cloudevents.event(made, "urn:shop"))["source"] == "urn:shop"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


@given(
    entity_id=st.text(st.characters(codec="utf-8")),
    row=st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), JSON),
    seq=st.integers(1, 2**63 - 1),
    caused_by=st.none() | st.uuids(),
)
def test_every_event_is_one_by_the_specification(
    entity_id: str, row: dict[str, Any] | None, seq: int, caused_by: UUID | None
) -> None:
    made = _full(entity_id=entity_id, new=row, seq=seq, caused_by=caused_by)
    event = json.loads(cloudevents.single(made, None).body)
    assert {"id", "source", "specversion", "type"} <= event.keys()
    for name, value in event.items():
        assert re.fullmatch("[a-z0-9]{1,20}", name)
        assert value not in (None, ""), "an attribute has a value, or is not there"
        assert name == "data" or isinstance(value, str) or -(2**31) <= value < 2**31
    assert event["data"]["new"] == row


@given(a=st.integers(1, 2**63 - 1), b=st.integers(1, 2**63 - 1))
def test_sequences_sort_as_text_as_the_numbers_do(a: int, b: int) -> None:
    first, second = (json.loads(cloudevents.event(_full(seq=seq), None))["sequence"] for seq in (a, b))
    assert (first < second) == (a < b)


def test_a_batch_has_the_same_id_whenever_it_is_the_same_batch() -> None:
    one, two, three = change(1), change(2), change(3)
    assert cloudevents.batch([one, two], None).id == cloudevents.batch([replace(one, attempt=2), two], None).id
    ids = {cloudevents.batch(list(each), None).id for each in ([one], [one, two], [two, one], [one, two, three])}
    assert len(ids) == 4
    assert ids.isdisjoint(str(each.id) for each in (one, two, three))
    message = cloudevents.batch([one, two], "urn:shop")
    assert message.content_type == "application/cloudevents-batch+json"
    assert json.loads(message.body) == [json.loads(cloudevents.event(each, "urn:shop")) for each in (one, two)]


# --- signatures ----------------------------------------------------------------------------------------------------


@given(secret=st.binary(min_size=24, max_size=64), older=st.binary(min_size=24, max_size=64), text=st.text())
def test_a_signature_is_genuine_to_anybody_elses_implementation(secret: bytes, older: bytes, text: str) -> None:
    body, now = json.dumps(text).encode(), int(datetime.now(UTC).timestamp())
    headers = dict(webhook_signature.headers([secret, older], "id", now, body))
    for each in (secret, older):
        written = "whsec_" + base64.b64encode(each).decode()
        assert webhook_signature.key(written) == each
        assert Webhook(written).verify(body, headers) == text


def test_without_a_secret_there_is_no_signature() -> None:
    assert webhook_signature.headers([], "id", 1, b"") == {"webhook-id": "id", "webhook-timestamp": "1"}


@pytest.mark.parametrize(
    "secret", ["", "hunter", "whsec_hunter!", "whsec_aHVudGVy", "whsk_" + "a" * 44, "a" * 44, "whsec_" + "a" * 92]
)
def test_a_secret_that_is_none_is_refused_and_not_quoted(secret: str) -> None:
    with pytest.raises(ValueError, match="a secret is whsec_ and then base64 of 24 to 64 bytes") as refused:
        webhook_signature.key(secret)
    assert "hunter" not in str(refused.value)
    assert "aaaa" not in str(refused.value)


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "shown"),
    [
        ("http://app", Target("http://app"), "http://app"),
        ("https://app:8443/in?token=x", Target("https://app:8443/in?token=x"), "https://app:8443/in"),
        ("http://[::1]:3000/c", Target("http://[::1]:3000/c"), "http://[::1]:3000/c"),
        ("unix:///run/app.sock:/in", Target("http://localhost/in", "/run/app.sock"), "unix:///run/app.sock:/in"),
        ("unix:///run/app.sock", Target("http://localhost/", "/run/app.sock"), "unix:///run/app.sock:/"),
        ("unix:///a:b:/c:/d?e=f", Target("http://localhost/c:/d?e=f", "/a:b"), "unix:///a:b:/c:/d"),
    ],
)
def test_a_target_is_a_url_or_a_socket_with_a_path(text: str, found: Target, shown: str) -> None:
    assert endpoint_url.parse(text) == found
    assert str(found) == shown


@pytest.mark.parametrize(
    "text",
    [
        "", "hunter", "ftp://hunter/", "http://", "http:///hunter", "http://hunter:port/", "http://hunter:0/",
        "http://user:hunter@app/", "http://hunter@app/", "http://app/#hunter", "http://app/hunter now",
        "http://app/\nhunter", "http://[hunter/", "unix://hunter.sock:/", "unix:hunter", "unix://",
        "http://unix:/run/hunter.sock:/", "http://app/h\u00fcnter", "http://hunter%zz/", "http://hunter%41/",
    ],
)  # fmt: skip
def test_what_is_no_target_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        endpoint_url.parse(text)
    assert "hunter" not in str(refused.value)


# --- answers -------------------------------------------------------------------------------------------------------

_MEANINGS = {
    **dict.fromkeys(range(200, 300), Disposition.DONE),
    **dict.fromkeys((502, 503, 504), Disposition.AWAY),
    **dict.fromkeys((400, 410, 413, 415, 422), Disposition.DEAD),
}


def test_the_status_means_done_away_later_or_never() -> None:
    for status in range(200, 1_000):
        assert Answer(status).meaning is _MEANINGS.get(status, Disposition.LATER), status


def test_the_table_in_the_documents_names_every_status_with_a_meaning_of_its_own() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| answers"))
    expected = {
        "answers 2xx": "processed",
        f"answers {_or(AWAY)}": "waits, and no attempt is counted",
        f"answers {_or(DEAD)}": "is a dead letter at once",
        "answers anything else": "waits, and an attempt is counted",
    }
    assert rows.keys() == expected.keys()
    assert all(rows[status].startswith(start) for status, start in expected.items())


def _or(statuses: Sequence[int]) -> str:
    return f"{', '.join(map(str, statuses[:-1]))} or {statuses[-1]}"


@pytest.mark.parametrize(
    "header",
    [
        "Mon, 99999999999999999999 Jan 2024 00:00:00 GMT",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Mon, 01 Jan 2024 99999999999999999999:00:00 GMT",
    ],
)
def test_no_date_of_a_retry_after_hides_the_answer(header: str) -> None:
    seconds = Answer(503, header).retry_after_s(NOW)
    assert seconds is None or seconds == 86_400


@given(st.text(max_size=60))
def test_whatever_retry_after_says_it_is_a_time_or_nothing(header: str) -> None:
    seconds = Answer(503, header).retry_after_s(NOW)
    assert seconds is None or 0 < seconds <= 86_400


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("120", 120),
        (" 5 ", 5),
        ("0", None),
        ("-5", None),
        ("1.5", None),
        ("²", None),
        ("soon", None),
        ("9" * 400, 86_400),
        ("Thu, 01 Jan 2026 12:02:00 GMT", 120),
        ("Thu, 01 Jan 2026 12:02:00 -0000", 120),
        ("Thu, 01 Jan 2026 13:02:00 +0100", 120),
        ("Thu, 01 Jan 2026 11:59:00 GMT", None),
        ("Fri, 01 Jan 2044 12:00:00 GMT", 86_400),
        ("Thu, 99 Jan 2026 12:02:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_longer_than_a_day(
    header: str | None, seconds: float | None
) -> None:
    assert Answer(503, header).retry_after_s(NOW) == seconds


@given(st.text())
def test_no_header_is_too_strange(header: str) -> None:
    seconds = Answer(503, header).retry_after_s(NOW)
    assert seconds is None or 0 < seconds <= 86_400


@given(st.integers(1, 86_400))
def test_a_date_is_as_good_as_the_seconds_until_then(seconds: int) -> None:
    date = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    assert Answer(429, date).retry_after_s(NOW) == Answer(429, str(seconds)).retry_after_s(NOW)


@pytest.mark.parametrize(
    ("answer", "alone", "error", "text"),
    [
        (Answer(429, "30", b"busy"), True, DeliveryError, "answered 429 Too Many Requests: busy"),
        (Answer(503, "30", b"busy"), True, AwayError, "answered 503 Service Unavailable: busy"),
        (Answer(503), False, AwayError, "answered 503 Service Unavailable"),
        (Answer(500), True, DeliveryError, "answered 500 Internal Server Error"),
        (Answer(500), False, OneOfThemError, ""),
        (Answer(422), False, OneOfThemError, ""),
        (Answer(410, None, b"a\n  b\x00\xff"), True, RejectedError, "answered 410 Gone: a b\0\ufffd"),
        (Answer(499), True, DeliveryError, "answered 499"),
        (Answer(404), False, OneOfThemError, ""),
        (Answer(400, None, b"x" * 5_000), True, RejectedError, "answered 400 Bad Request: " + "x" * 1_000),
    ],
)
def test_of_a_batch_an_answer_is_about_all_or_about_one_of_them(
    answer: Answer, alone: bool, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        _judge(answer, alone=alone)
    assert str(raised.value) == text
    if isinstance(raised.value, DeliveryError | AwayError):
        after_s = raised.value.after if isinstance(raised.value, DeliveryError) else raised.value.retry_after
        assert after_s == (30 if answer.retry_after else None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            aiohttp.ClientConnectorError(None, OSError(111, "Connect call failed ('10.0.0.1', 80)")),
            "Connection refused",
        ),
        (aiohttp.ClientConnectorDNSError(None, OSError(-2, "Name or service not known")), "Name or service not known"),
        (aiohttp.ClientConnectorError(None, OSError("hunter")), "ClientConnectorError"),
        (aiohttp.ConnectionTimeoutError("hunter"), "no answer to the attempt to connect"),
    ],
)
def test_why_an_application_is_not_reached_is_said_without_its_address(error: aiohttp.ClientError, told: str) -> None:
    assert _reason(error) == told


def test_the_event_in_the_documents_is_one_that_is_sent() -> None:
    [example] = re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    shown = json.loads(example)
    made = _full(
        id=UUID(shown["id"]),
        entity_id="4711",
        old={"id": 4711, "total": 12.5},
        new={"id": 4711, "total": 15},
        metadata={"timestamp": "2026-01-01T18:04:05.678+00:00"},
        changed_at=datetime(2026, 1, 1, 18, 4, 5, 678000, tzinfo=UTC),
    )
    assert shown == json.loads(cloudevents.event(made, None))


DOCUMENT = (
    '{"n": 12345678901234567890.123, "money": 10.10, "whole": 9007199254740993, "deep": ' + "[" * 100 + "]" * 100
    + ', "long": 1' + "0" * 400 + '.5}'
)  # fmt: skip


def _stored(**documents: str) -> Change:
    made = _full()
    values = {field.name: getattr(made, field.name) for field in fields(Change)}
    values |= {name: Json(text.encode()) for name, text in documents.items()}
    return read_change(*values.values())


def test_a_delivery_carries_the_stored_digits_and_a_handler_gets_them() -> None:
    made = _stored(old=DOCUMENT, new=DOCUMENT, metadata=DOCUMENT)
    one, many = cloudevents.single(made, None).body, cloudevents.batch([made, made], None).body
    assert (one.count(DOCUMENT.encode()), many.count(DOCUMENT.encode())) == (3, 6)
    for document in (made.old, made.new, made.metadata):
        assert document["n"] == Decimal("12345678901234567890.123")
        assert str(document["money"]) == "10.10"
        assert document["whole"] == 9007199254740993
        assert document["long"] == Decimal("1" + "0" * 400 + ".5")
    again = cloudevents.single(made, None).body
    assert b'"n":12345678901234567890.123,"money":10.10,' in again, "what somebody has read already, too"
    json.loads(again, parse_constant=pytest.fail)


def test_what_is_too_deep_or_too_long_to_read_is_delivered_as_it_is() -> None:
    for text in ("[" * 5_000 + "]" * 5_000, "1" * 5_000):
        assert text.encode() in cloudevents.single(_stored(new=text), None).body


def test_a_model_gets_the_kind_of_number_that_it_asks_for() -> None:
    made = _stored(new='{"a": 10.10, "b": 10.10, "c": 7}')

    class Row(BaseModel):
        a: Decimal
        b: float
        c: int

    row = Row.model_validate(made.new)
    assert (str(row.a), row.b, row.c) == ("10.10", 10.1, 7)


@pytest.mark.parametrize("batch", [1, 10])
def test_a_truncate_is_delivered_like_any_other_change(batch: int) -> None:
    delivery = Delivery(endpoint_url.parse("http://127.0.0.1:1/"), types=["order"], batch=batch)
    assert delivery.router.match("order", "TRUNCATE") is delivery.router.match("order", "INSERT") is not None
    sent = json.loads(cloudevents.event(_full(operation=Operation.TRUNCATE, entity_id="", old=None, new=None), None))
    assert (sent["type"], "subject" in sent, sent["data"]["new"]) == ("cdc.order.truncate", False, None)
