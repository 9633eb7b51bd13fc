"""Replication messages, captured from PostgreSQL 15.18 with wal2json 2.5."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.errors import ProtocolError
from cdc.core.lsn import ZERO, Lsn
from cdc.core.model import SHARDS, WakeUp, pair
from cdc.replication.protocol import parse, status_update

Envelope = tuple[int, bytes | memoryview | None, bool]

MESSAGE = (
    b'{"action":"M","timestamp":"2026-11-22 13:22:11.622365+00","transactional":true,'
    b'"prefix":"entity_change:public","content":"1,2"}'
)
CASES = [
    (
        "a message",
        bytes.fromhex("770000000001501de00000000001501de0000303dc223391c7") + MESSAGE,
        (0x1501DE0, MESSAGE, False),
    ),
    ("an empty message", bytes.fromhex("770000000001501de00000000001501de0000303dc223391c7"), (0x1501DE0, b"", False)),
    ("a keepalive", bytes.fromhex("6b0000000001501ff8000303dc2233927800"), (0x1501FF8, None, False)),
    ("a keepalive that asks", bytes.fromhex("6b00000000015020a0000303dc2236a49901"), (0x15020A0, None, True)),
]
by_name = pytest.mark.parametrize(("data", "value"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])


def plain(envelope: Envelope) -> Envelope:
    position, message, reply_requested = envelope
    return position, None if message is None else bytes(message), reply_requested


@by_name
def test_what_the_server_sends_is_read(data: bytes, value: Envelope) -> None:
    assert plain(parse(data)) == value
    assert plain(parse(memoryview(data))) == value


@by_name
def test_every_strict_prefix_of_the_envelope_is_a_protocol_error(data: bytes, value: Envelope) -> None:
    envelope = 18 if data[:1] == b"k" else 25
    for size in range(envelope):
        with pytest.raises(ProtocolError):
            parse(data[:size])


def test_bytes_after_a_keepalive_are_a_protocol_error() -> None:
    for _, data, value in CASES:
        if value[1] is None:
            with pytest.raises(ProtocolError):
                parse(data + b"\0")


@by_name
def test_every_change_of_one_byte_gives_a_value_or_a_protocol_error(data: bytes, value: Envelope) -> None:
    for place in range(len(data)):
        for bits in (0x01, 0x80, 0xFF):
            changed = data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]
            assert_value_or_protocol_error(changed)


@given(st.binary(max_size=64))
def test_any_bytes_give_a_value_or_a_protocol_error(data: bytes) -> None:
    assert_value_or_protocol_error(data)


def assert_value_or_protocol_error(data: bytes) -> None:
    try:
        envelope = parse(data)
    except ProtocolError:
        return
    assert Lsn(envelope[0]) >= ZERO


@given(st.integers(0, 2**64 - 1), st.floats(946684800, 4e9), st.booleans())
def test_a_status_update_says_one_position_three_times(position: int, unix_s: float, ping: bool) -> None:
    kind, written, flushed, applied, clock_us, asks = struct.unpack(
        "!cQQQqB", status_update(Lsn(position), unix_s=unix_s, ping=ping)
    )
    assert (kind, written, flushed, applied, asks) == (b"r", position, position, position, ping)
    assert clock_us / 1e6 + 946684800 == pytest.approx(unix_s)


@pytest.mark.parametrize(
    ("seq", "shard", "wakeup"),
    [
        ("1", "0", WakeUp(1, 0)),
        (b"9223372036854775807", b"63", WakeUp(2**63 - 1, SHARDS - 1)),
        ("9223372036854775808", "0", None),
        ("1", "64", None),
    ],
)
def test_a_pair_names_a_bigint_and_one_of_the_shards(seq: str, shard: str, wakeup: WakeUp | None) -> None:
    assert pair(seq, shard) == wakeup
