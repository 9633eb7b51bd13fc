"""What one turn of the stream has read, messages and keepalives as they come."""

from __future__ import annotations

import struct
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cdc.replication import wal2json
from cdc.replication.batch import MessageBatch
from cdc.replication.protocol import Plugin

_PLUGIN = wal2json.plugin("entity_change:public")
_FIELDS = ("bytes", "committed_at", "highest", "keepalives", "messages", "reply_requested")
_ONE_BY_ONE = replace(_PLUGIN, decode_all=lambda _: None)
_MESSAGE = (
    '{"action":"M","timestamp":"2026-11-22 13:22:11.622365+00","transactional":true,'
    '"prefix":"entity_change:%s","content":"%d,27"}'
)


def _message(position: int, prefix: str = "public") -> bytes:
    return struct.pack("!cQQq", b"w", position, position, 0) + (_MESSAGE % (prefix, position)).encode()


def _keepalive(position: int, reply: bool) -> bytes:
    return struct.pack("!cQqB", b"k", position, 0, reply)


def _read(received: list[bytes], plugin: Plugin) -> dict[str, object]:
    batch = MessageBatch()
    batch.read([memoryview(data) for data in received], plugin)
    return {name: getattr(batch, name) for name in _FIELDS} | {"wakeups": list(batch.wakeups)}


_POSITIONS = st.integers(1, 1_000)
_USUAL = st.builds(_message, _POSITIONS)
_KEEPALIVE = st.builds(_keepalive, _POSITIONS, st.booleans())


@given(st.lists(st.one_of(_USUAL, _KEEPALIVE, st.builds(_message, _POSITIONS, st.just("other"))), min_size=1))
def test_read_together_they_say_what_each_would_by_itself(received: list[bytes]) -> None:
    assert _read(received, _PLUGIN) == _read(received, _ONE_BY_ONE)


@given(st.lists(_USUAL, min_size=1), st.lists(_KEEPALIVE))
def test_keepalives_among_them_do_not_have_messages_read_one_by_one(usual: list[bytes], others: list[bytes]) -> None:
    def no_more(_: object) -> None:
        raise AssertionError("decoded by itself")

    read = _read([*usual[:1], *others, *usual[1:]], replace(_PLUGIN, decode=no_more))
    assert (read["messages"], read["keepalives"]) == (len(usual), len(others))
