"""pgoutput's messages, protocol version 1, captured on PostgreSQL 15.18."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.errors import ProtocolError
from cdc.core.model import WakeUp, message_prefix, publication_name
from cdc.replication.pgoutput import PgoutputDecoder, options, plugin

PUBLIC = message_prefix("public")
ODD = message_prefix('My "Schema", x.y')
COMMITTED = datetime(2026, 11, 22, 16, 42, 47, 256952, tzinfo=UTC).timestamp()

BEGIN = b"B\x00\x00\x00\x00\x01PY@\x00\x03\x03\xde\xef\x94\xbbx\x00\x00\x02\xd5"
OURS = b"M\x01\x00\x00\x00\x00\x01PX\xb8entity_change:public\x00\x00\x00\x00\x0549,27"
OUTSIDE = b"M\x00\x00\x00\x00\x00\x01Pf\xc8entity_change:public\x00\x00\x00\x00\x037,7"
OTHERS = b"M\x01\x00\x00\x00\x00\x01Pg\x08other\x00\x00\x00\x00\x05hello"
NO_NUMBERS = b"M\x01\x00\x00\x00\x00\x01Pg\x90entity_change:public\x00\x00\x00\x00\x0eno, numbers \xc3\xbc"
COMMIT = b"C\x00\x00\x00\x00\x00\x01PY@\x00\x00\x00\x00\x01PYp\x00\x03\x03\xde\xef\x94\xbbx"
ROWS = {
    "relation": (
        b"R\x00\x00@\x00public\x00t\x00d\x00\x02\x01i\x00\x00\x00\x00\x17\xff\xff\xff\xff"
        b"\x00x\x00\x00\x00\x00\x19\xff\xff\xff\xff"
    ),
    "insert": b"I\x00\x00@\x00N\x00\x02t\x00\x00\x00\x011t\x00\x00\x00\x01a",
    "update": b"U\x00\x00@\x00N\x00\x02t\x00\x00\x00\x011t\x00\x00\x00\x01b",
    "delete": b"D\x00\x00@\x00K\x00\x02t\x00\x00\x00\x011n",
    "truncate": b"T\x00\x00\x00\x01\x00\x00\x00@\x00",
}


def test_a_transactions_wake_ups_have_its_commit_time() -> None:
    decode = PgoutputDecoder(PUBLIC)
    assert [decode(message) for message in (BEGIN, OURS, memoryview(OURS), COMMIT)] == [
        None, (WakeUp(49, 27), COMMITTED), (WakeUp(49, 27), COMMITTED), None,
    ]  # fmt: skip


def test_a_commit_time_is_not_kept_beyond_its_transaction() -> None:
    decode = PgoutputDecoder(PUBLIC)
    for message in (BEGIN, COMMIT):
        decode(message)
    assert decode(OURS) == (WakeUp(49, 27), None)


@pytest.mark.parametrize("message", [OUTSIDE, OTHERS, NO_NUMBERS], ids=["outside", "others", "no numbers"])
def test_messages_that_are_not_ours_do_not_ring(message: bytes) -> None:
    assert PgoutputDecoder(PUBLIC)(message) is None


@pytest.mark.parametrize("prefix", [ODD, PUBLIC + "2", PUBLIC[:-1]])
def test_a_prefix_is_ours_only_as_a_whole(prefix: str) -> None:
    theirs = OURS.replace(PUBLIC.encode(), prefix.encode())
    assert PgoutputDecoder(PUBLIC)(theirs) is None
    assert PgoutputDecoder(prefix)(theirs) == (WakeUp(49, 27), None)


@pytest.mark.parametrize("message", ROWS.values(), ids=ROWS)
def test_rows_of_a_publication_that_is_not_empty_are_passed_over(message: bytes) -> None:
    assert PgoutputDecoder(PUBLIC)(message) is None


every_message = pytest.mark.parametrize("message", [BEGIN, OURS, OUTSIDE, OTHERS, NO_NUMBERS, COMMIT])


@every_message
def test_every_strict_prefix_and_every_longer_message_is_a_protocol_error(message: bytes) -> None:
    decode = PgoutputDecoder(PUBLIC)
    for size in range(len(message)):
        with pytest.raises(ProtocolError):
            decode(message[:size])
    with pytest.raises(ProtocolError):
        decode(message + b"1")


@every_message
def test_every_change_of_one_byte_gives_a_value_or_a_protocol_error(message: bytes) -> None:
    decode = PgoutputDecoder(PUBLIC)
    for place in range(len(message)):
        for bits in (0x01, 0x10, 0x80, 0xFF):
            value_or_protocol_error(decode, message[:place] + bytes([message[place] ^ bits]) + message[place + 1 :])


@given(st.lists(st.binary(max_size=60) | st.binary(max_size=60).map(b"M\x01".__add__), max_size=5))
def test_any_bytes_give_a_value_or_a_protocol_error(messages: list[bytes]) -> None:
    decode = PgoutputDecoder(PUBLIC)
    for message in messages:
        value_or_protocol_error(decode, message)


@given(content=st.tuples(st.integers(-1, 2**64), st.integers(-1, 70)).map("{0[0]},{0[1]}".format) | st.text(max_size=9))
def test_any_content_of_ours_gives_a_value(content: str) -> None:
    body = content.encode()
    value_or_protocol_error(PgoutputDecoder(PUBLIC), OURS[:31] + len(body).to_bytes(4) + body, must_be_a_value=True)


def value_or_protocol_error(decode: PgoutputDecoder, message: bytes, *, must_be_a_value: bool = False) -> None:
    try:
        notified = decode(message)
    except ProtocolError:
        assert not must_be_a_value
        return
    assert notified is None or (1 <= notified[0].seq < 2**63 and 0 <= notified[0].shard < 64)


def test_the_publication_is_one_quoted_identifier() -> None:
    assert dict(options('cdc_My "Schema", x.y'))["publication_names"] == '"cdc_My ""Schema"", x.y"'


@pytest.mark.parametrize("schema", ["public", 'My "Schema", x.y', "日本" * 10, "x" * 63])
def test_a_publications_name_fits(schema: str) -> None:
    name = publication_name(schema)
    assert name.startswith("cdc_")
    assert len(name.encode()) <= 63
    assert plugin(PUBLIC, name).publication == name
