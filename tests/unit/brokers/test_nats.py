"""What a message of NATS weighs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdc.brokers.nats import _size

_HEAD = len(b"NATS/1.0\r\n\r\n")


@given(
    st.binary(max_size=200),
    st.dictionaries(st.text(max_size=10), st.text(max_size=40), max_size=5),
    st.integers(0, 900),
)
def test_a_message_is_too_large_exactly_where_its_bytes_on_the_wire_are(
    body: bytes, headers: dict[str, str], limit: int
) -> None:
    wire = len(body) + _HEAD + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
    assert (_size(body, headers, limit) > limit) == (wire > limit)
