"""What the counting proxy of the tests takes for a statement."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.fix_tally import _Messages


def message(kind: bytes, body: bytes) -> bytes:
    return kind + (len(body) + 4).to_bytes(4) + body


_START_UP = message(b"", b"\0\3\0\0user\0me\0\0")
_SAID = [
    (b"Q", b"SELECT 1\0"),
    (b"P", b"\0QEQE\0"),
    (b"B", b""),
    (b"E", b"\0\0\0\0\0"),
    (b"S", b""),
    (b"d", b"QQQQQQQQ"),
]


@given(st.lists(st.sampled_from(_SAID)), st.lists(st.integers(0, 400)))
def test_statements_are_counted_wherever_the_pieces_end(said: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    stream = _START_UP + b"".join(message(*each) for each in said)
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    messages = _Messages()
    counted = sum(messages.statements(stream[start:end]) for start, end in pairwise(ends))
    assert counted == sum(kind in b"QE" for kind, _ in said)
