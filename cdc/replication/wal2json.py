"""wal2json, format version 2: the START options that let only our messages through, and their decoder. Pure.

A message as version 2.5 writes it, on one line. Other options add fields, so a message that differs from this is
parsed as JSON before it is judged:

    {"action":"M","timestamp":"2026-10-05 12:34:56.789+00","transactional":true,
     "prefix":"entity_change:public","content":"49,27"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from typing import Any

from cdc.core.errors import ProtocolError
from cdc.core.fast_change import fast_make
from cdc.core.model import PAIR, SEQ_MAX, SHARDS, WakeUp, pair
from cdc.replication.protocol import XLOGDATA, Decoded, DecodedBatch, Plugin

_CONTENT = re.compile(PAIR)
_OWNERS = {str(shard).encode(): shard for shard in range(SHARDS)}
_WAKEUP, _DECODED = fast_make(WakeUp), fast_make(DecodedBatch)


def plugin(prefix: str) -> Plugin:
    """wal2json, with wake-ups only for messages with ``prefix`` (``cdc.core.model.message_prefix``)."""
    return Plugin("wal2json", options(prefix), Wal2jsonDecoder(prefix), BatchDecoder(prefix), outbox="add-msg-prefixes")


def options(prefix: str) -> tuple[tuple[str, str], ...]:
    """Only options that version 2.5 knows: an unknown option is an error at START."""
    return (
        ("format-version", "2"),
        # Without it every transaction of the database sends a begin and a commit.
        ("include-transaction", "0"),
        ("include-timestamp", "1"),
        # No filter means all tables. The row is fetched by its number; on the wire it would be twenty times as long.
        ("add-tables", "none.none"),
        # Without it every logical message in the database is sent to us, other tools' heartbeats among them.
        ("add-msg-prefixes", prefix),
    )


class Wal2jsonDecoder:
    """Message bytes -> Decoded; None for messages of others; ProtocolError for bytes that are not wal2json's."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __call__(self, payload: bytes | memoryview) -> Decoded | None:
        message = _json_object(bytes(payload))
        # A message outside a transaction is sent before, or without, a commit.
        if message.get("action") != "M" or message.get("transactional") is not True:
            return None
        content = message.get("content")
        if message.get("prefix") != self._prefix or not isinstance(content, str):
            return None
        numbers = _CONTENT.fullmatch(content)
        wakeup = pair(numbers[1], numbers[2]) if numbers else None
        return (wakeup, _unix_s(message.get("timestamp"))) if wakeup else None


class BatchDecoder:
    """Many messages at once, if all have the form that the module shows; else None.

    This function sets the stream's speed: one regular expression over all messages, instead of parsing each. They
    follow one another without a separator, so two numbers prove that the expression has found every message and
    nothing else: their count, and their total length.
    """

    def __init__(self, prefix: str) -> None:
        before, between = b'{"action":"M","timestamp":"', b'","transactional":true,"prefix":%s,"content":"'
        between %= json.dumps(prefix).encode()
        usual = re.compile(
            XLOGDATA + re.escape(before) + rb"([ -!#-\[\]-~]{1,40})" + re.escape(between) + PAIR.encode() + b'"}'
        )
        self._find, self._match = usual.findall, usual.fullmatch
        self._bytes_besides = 17 + len(before) + len(between) + len(',"}')
        """Bytes of a message outside the groups."""

    def __call__(self, received: Sequence[bytes | memoryview]) -> DecodedBatch | None:
        """``received``: CopyData, at least one."""
        if len(received) == 1:
            return self._alone(received[0])
        joined = b"".join(received)
        found: list[tuple[bytes, bytes, bytes, bytes]] = self._find(joined)
        length = len(found) * self._bytes_besides + sum(map(len, chain.from_iterable(found)))
        if len(found) != len(received) or length != len(joined):
            return None
        positions, timestamps, seqs, shards = zip(*found, strict=True)
        numbers, owners = list(map(int, seqs)), list(map(_OWNERS.get, shards))
        if max(numbers) > SEQ_MAX or None in owners:
            return None
        wakeups: list[WakeUp] = list(map(_WAKEUP, zip(numbers, owners, strict=True)))
        committed_at = _unix_s(timestamps[-1].decode("ascii", "replace"))
        return DecodedBatch(int.from_bytes(max(positions)), wakeups, committed_at)

    def _alone(self, received: bytes | memoryview) -> DecodedBatch | None:
        """Most changes come one by one; to join and to count takes three times as long."""
        if (found := self._match(received)) is None:
            return None
        position, timestamp, digits, shard = found.groups()
        seq, owner = int(digits), _OWNERS.get(shard)
        if seq > SEQ_MAX or owner is None:
            return None
        committed_at = _unix_s(timestamp.decode("ascii", "replace"))
        return _DECODED((int.from_bytes(position), [_WAKEUP((seq, owner))], committed_at))


def _json_object(payload: bytes) -> dict[str, Any]:
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError(f"a message of {len(payload)} bytes that is not wal2json's JSON") from None
    if not isinstance(message, dict) or "action" not in message:
        raise ProtocolError(f"a message of {len(payload)} bytes without wal2json's action")
    return message


def _unix_s(timestamp: object) -> float | None:
    """A timestamp serves the latency figure only: one that cannot be read is left out."""
    if not isinstance(timestamp, str):
        return None
    try:
        parsed = datetime.fromisoformat(timestamp)
    except ValueError:
        return None
    return parsed.timestamp() if parsed.tzinfo else None
