"""wal2json's messages, captured from version 2.5 on PostgreSQL 15.18."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.errors import ProtocolError
from cdc.core.model import WakeUp, message_prefix
from cdc.replication.protocol import Decoded, parse
from cdc.replication.wal2json import BatchDecoder, Wal2jsonDecoder, options, plugin

ODD = message_prefix('My "Schema", x.y')
COMMITTED = datetime(2026, 11, 22, 13, 22, 11, 622365, tzinfo=UTC).timestamp()

CASES = [
    (
        "ours",
        "entity_change:public",
        (
            '{"action":"M","timestamp":"2026-11-22 13:22:11.622365+00","transactional":true,'
            '"prefix":"entity_change:public","content":"49,27"}'
        ),
        (WakeUp(49, 27), COMMITTED),
    ),
    (
        "ours, of a schema with an odd name",
        ODD,
        (
            '{"action":"M","timestamp":"2026-11-22 13:22:11.622365+00","transactional":true,'
            '"prefix":"entity_change:My%20%22Schema%22%2C%20x%2Ey","content":"1,2"}'
        ),
        (WakeUp(1, 2), COMMITTED),
    ),
    (
        "ours, with more options, of a session elsewhere",
        ODD,
        (
            '{"action":"M","xid":760,"timestamp":"2026-11-22 18:52:11.622365+05:30",'
            '"lsn":"0/1501D70","transactional":true,'
            '"prefix":"entity_change:My%20%22Schema%22%2C%20x%2Ey","content":"1,2"}'
        ),
        (WakeUp(1, 2), COMMITTED),
    ),
    (
        "ours, without a time",
        ODD,
        '{"action":"M","transactional":true,"prefix":"entity_change:My%20%22Schema%22%2C%20x%2Ey","content":"1,2"}',
        (WakeUp(1, 2), None),
    ),
    (
        "our prefix outside a transaction",
        ODD,
        (
            '{"action":"M","timestamp":null,"transactional":false,'
            '"prefix":"entity_change:My%20%22Schema%22%2C%20x%2Ey","content":"7,7"}'
        ),
        None,
    ),
    (
        "our prefix with Unicode, quotes and a line break",
        ODD,
        (
            '{"action":"M","timestamp":"2026-11-22 13:22:11.622838+00","transactional":true,'
            '"prefix":"entity_change:My%20%22Schema%22%2C%20x%2Ey","content":"quotes \\" \\\\ \\n ünïcode 😀"}'
        ),
        None,
    ),
    (
        "another prefix",
        "entity_change:public",
        (
            '{"action":"M","timestamp":"2026-11-22 13:22:11.622365+00","transactional":true,'
            '"prefix":"entity_change:public2","content":"1,2"}'
        ),
        None,
    ),
    ("a begin", "entity_change:public", '{"action":"B"}', None),
    ("a commit", "entity_change:public", '{"action":"C","xid":760,"lsn":"0/1501DB0","nextlsn":"0/1501DE0"}', None),
    (
        "a row",
        "entity_change:public",
        '{"action":"I","schema":"public","table":"t","columns":[{"name":"i","type":"integer","value":1}]}',
        None,
    ),
]
by_name = pytest.mark.parametrize(
    ("prefix", "text", "notified"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


@by_name
def test_what_the_plugin_sends_is_read(prefix: str, text: str, notified: Decoded | None) -> None:
    assert Wal2jsonDecoder(prefix)(text.encode()) == notified
    assert Wal2jsonDecoder(prefix)(memoryview(text.encode())) == notified


@by_name
def test_every_strict_prefix_is_a_protocol_error(prefix: str, text: str, notified: Decoded | None) -> None:
    decode, payload = Wal2jsonDecoder(prefix), text.encode()
    for size in range(len(payload)):
        with pytest.raises(ProtocolError):
            decode(payload[:size])
    with pytest.raises(ProtocolError):
        decode(payload + b"}")


@by_name
def test_every_change_of_one_byte_gives_a_value_or_a_protocol_error(
    prefix: str, text: str, notified: Decoded | None
) -> None:
    decode, payload = Wal2jsonDecoder(prefix), text.encode()
    for place in range(len(payload)):
        for bits in (0x01, 0x10, 0x80, 0xFF):
            value_or_protocol_error(decode, payload[:place] + bytes([payload[place] ^ bits]) + payload[place + 1 :])


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,M0e-"\\', max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_a_protocol_error(payload: bytes) -> None:
    value_or_protocol_error(Wal2jsonDecoder("entity_change:public"), payload)


def test_json_without_end_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        Wal2jsonDecoder("entity_change:public")(b"[" * 100_000)


def value_or_protocol_error(decode: Wal2jsonDecoder, payload: bytes) -> None:
    try:
        notified = decode(payload)
    except ProtocolError:
        return
    assert notified is None or (1 <= notified[0].seq < 2**63 and 0 <= notified[0].shard < 64)


@given(
    prefix=st.text(min_size=1, max_size=63).map(message_prefix),
    content=st.tuples(st.integers(-1, 2**64), st.integers(-1, 70)).map("{0[0]},{0[1]}".format) | st.text(max_size=12),
    committed=st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    offset_m=st.integers(-15 * 4, 15 * 4).map(lambda quarter: quarter * 15),
)
def test_the_quick_way_reads_what_a_json_parser_reads(
    prefix: str, content: str, committed: datetime, offset_m: int
) -> None:
    local = committed.astimezone(timezone(timedelta(minutes=offset_m)))
    message = {
        "action": "M",
        "timestamp": local.isoformat(" "),
        "transactional": True,
        "prefix": prefix,
        "content": content,
    }
    usual = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()
    heard, notified = BatchDecoder(prefix)([envelope(usual, 77)]), Wal2jsonDecoder(prefix)(usual)
    if heard is not None:
        assert notified == (heard.wakeups[0], heard.committed_at)
        assert (heard.highest, len(heard.wakeups)) == (77, 1)
    assert (heard is None) == (notified is None)


def envelope(payload: bytes, position: int = 0) -> bytes:
    return struct.pack("!cQQq", b"w", position, position + 9, 0) + payload


USUAL = CASES[0][2]


def test_of_many_usual_messages_all_wake_ups_the_highest_position_and_the_last_time_are_read() -> None:
    # 0x0A is a line break, which is nothing special in a position.
    seconds, positions = (10, 10, 11), (0x0A0A0A, 0x7000000A00, 0)
    received = [
        memoryview(envelope(USUAL.replace("13:22:11", f"13:22:{second}").replace("49,", f"{n},").encode(), position))
        for n, (second, position) in enumerate(zip(seconds, positions, strict=True), start=1)
    ]
    assert BatchDecoder("entity_change:public")(received) == (
        0x7000000A00,
        [WakeUp(1, 27), WakeUp(2, 27), WakeUp(3, 27)],
        COMMITTED,
    )


@pytest.mark.parametrize(
    "odd",
    [
        envelope(CASES[6][2].encode()),
        envelope(CASES[7][2].encode()),
        envelope(USUAL.replace("49,27", "0,27").encode()),
        envelope(USUAL.replace("49,27", "49,64").encode()),
        envelope(USUAL.replace("49,27", f"{2**63},27").encode()),
        envelope(USUAL.encode())[:-1],
        envelope(USUAL.encode()) + b" ",
        b" " + envelope(USUAL.encode()),
        envelope(USUAL.encode()) * 2,
        struct.pack("!cQqB", b"k", 8, 0, 0),
        b"",
    ],
)
def test_one_that_is_not_usual_has_all_of_them_read_one_by_one(odd: bytes) -> None:
    usual = envelope(USUAL.encode())
    read = BatchDecoder("entity_change:public")
    assert all(read(received) is None for received in ([odd], [usual, odd], [odd, usual], [usual, odd, usual]))


@given(st.lists(st.sampled_from([envelope(USUAL.encode()), envelope(CASES[7][2].encode())]), min_size=1), st.data())
def test_whatever_is_damaged_many_messages_are_read_as_they_are_one_by_one(
    received: list[bytes], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(received) - 1))
    at = data.draw(st.integers(0, len(received[place]) - 1))
    damaged = bytearray(received[place])
    damaged[at] ^= data.draw(st.integers(0, 255))
    messages = [*received[:place], bytes(damaged), *received[place + 1 :]]
    heard = BatchDecoder("entity_change:public")(messages)
    if heard is not None:
        decode = Wal2jsonDecoder("entity_change:public")
        parsed = [parse(message) for message in messages]
        one_by_one = [decode(payload) for _, payload, _ in parsed if payload is not None]
        assert heard.wakeups == [notified[0] for notified in one_by_one if notified]
        assert heard.highest == max(position for position, _, _ in parsed)


def test_no_option_is_newer_than_version_2_5_or_could_be_read_as_several() -> None:
    chosen = dict(options(ODD))
    assert set(chosen) <= {
        "format-version", "include-transaction", "include-timestamp", "add-tables", "add-msg-prefixes",
    }  # fmt: skip
    assert not set(chosen["add-msg-prefixes"]) & set(", \\*'")
    assert plugin(ODD).name == "wal2json"
