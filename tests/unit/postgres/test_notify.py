"""Payloads of NOTIFY entity_change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.model import WakeUp, message_prefix
from cdc.postgres.notify import PAYLOAD_BYTES_MAX, decode, encode

PUBLIC = message_prefix("public")
wakeups = st.lists(st.builds(WakeUp, st.integers(1, 2**63 - 1), st.integers(0, 63)), max_size=900)
prefixes = st.text(min_size=1, max_size=63).map(message_prefix)


@given(prefixes, wakeups)
def test_what_is_encoded_is_decoded_and_fits(prefix: str, notified: list[WakeUp]) -> None:
    payloads = encode(prefix, notified)
    assert all(len(payload.encode()) <= PAYLOAD_BYTES_MAX for payload in payloads)
    assert [wakeup for payload in payloads for wakeup in decode(prefix, payload) or [None]] == notified


@given(prefixes, prefixes, wakeups)
def test_one_outbox_never_reads_anothers(ours: str, theirs: str, notified: list[WakeUp]) -> None:
    if ours != theirs:
        assert all(decode(ours, payload) == [] for payload in encode(theirs, notified))


def test_many_wakeups_travel_in_few_payloads() -> None:
    assert len(encode(PUBLIC, [WakeUp(100_000 + number, number % 64) for number in range(1000)])) == 2
    assert encode(PUBLIC, []) == []


@pytest.mark.parametrize(
    "payload",
    [
        "",
        PUBLIC,
        PUBLIC + " ",
        PUBLIC + " 1,2,3",
        PUBLIC + " 1,64",
        PUBLIC + " 1,2 x",
        PUBLIC + " 0,1",
        PUBLIC + " 9223372036854775808,1",
        PUBLIC + "  1,2",
        PUBLIC + " 1,2 ",
        PUBLIC + " 1,2\n",
        PUBLIC + " \u0661,2",
        PUBLIC + "2",
        '{"table":"tasks","operation":"INSERT","entity_type":"tasks"}',
        "entity_change",
        "hello 1,2",
    ],
)
def test_a_payload_that_does_not_fit_exactly_means_sweep_now(payload: str) -> None:
    assert decode(PUBLIC, payload) is None


@given(st.text(max_size=60))
def test_any_payload_is_read(payload: str) -> None:
    decoded = decode(PUBLIC, payload)
    assert decoded is None or all(1 <= seq < 2**63 and 0 <= shard < 64 for seq, shard in decoded)
