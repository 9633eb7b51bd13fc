"""wal2json, format version 2: the START options that let only our messages through, and their decoder. Pure.

A message as version 2.5 writes it, on one line; with other options there are more fields, so a message that differs
from this is read as JSON before it is judged:

    {"action":"M","timestamp":"2026-10-05 12:34:56.789+00","transactional":true,
     "prefix":"entity_change:public","content":"49,27"}
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from cdc.errors import ProtocolError
from cdc.wakeup.wire import PAIR, Plugin, Rung, pair

_CONTENT = re.compile(PAIR)


def plugin(prefix: str) -> Plugin:
    """wal2json, ringing for messages with ``prefix`` (``cdc.model.message_prefix``) only."""
    return Plugin("wal2json", options(prefix), Decoder(prefix))


def options(prefix: str) -> tuple[tuple[str, str], ...]:
    """Only what version 2.5 knows: an option a version lacks is an error at START."""
    return (
        ("format-version", "2"),
        # Otherwise every transaction of the database sends a begin and a commit.
        ("include-transaction", "0"),
        ("include-timestamp", "1"),
        # No filter means all tables. The row is fetched by its number; on the wire it would be twenty times as long.
        ("add-tables", "none.none"),
        # Otherwise every logical message in the database reaches us, other tools' heartbeats among them.
        ("add-msg-prefixes", prefix),
    )


class Decoder:
    """Message bytes -> Rung, None for what is not ours; ProtocolError for what is not wal2json's."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        # An exact match of the usual message costs a third of parsing JSON, and the stream's speed is this function.
        self._usual = re.compile(
            rb'\{"action":"M","timestamp":"([^"\\]{1,40})","transactional":true,'
            + re.escape(f'"prefix":{json.dumps(prefix)},'.encode())
            + f'"content":"{PAIR}"'.encode()
            + rb"\}"
        ).fullmatch
        self._timestamp = b""
        self._committed_at: float | None = None

    def __call__(self, payload: bytes | memoryview) -> Rung | None:
        usual = self._usual(payload)
        if usual is None:
            return self._unusual(bytes(payload))
        timestamp, seq, shard = usual.groups()
        # All messages of one transaction carry one timestamp, and a large transaction is where speed counts.
        if timestamp != self._timestamp:
            self._timestamp, self._committed_at = timestamp, _unix_s(timestamp.decode("ascii", "replace"))
        wakeup = pair(seq, shard)
        return (wakeup, self._committed_at) if wakeup else None

    def _unusual(self, payload: bytes) -> Rung | None:
        message = _json_object(payload)
        # A message outside a transaction rings before, or without, a commit.
        if message.get("action") != "M" or message.get("transactional") is not True:
            return None
        content = message.get("content")
        if message.get("prefix") != self._prefix or not isinstance(content, str):
            return None
        fits = _CONTENT.fullmatch(content)
        wakeup = pair(fits[1], fits[2]) if fits else None
        return (wakeup, _unix_s(message.get("timestamp"))) if wakeup else None


def _json_object(payload: bytes) -> dict[str, Any]:
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError(f"a message of {len(payload)} bytes that is not wal2json's JSON") from None
    if not isinstance(message, dict) or "action" not in message:
        raise ProtocolError(f"a message of {len(payload)} bytes without wal2json's action")
    return message


def _unix_s(timestamp: object) -> float | None:
    """A timestamp is worth a latency figure and nothing else: one that cannot be read is left out."""
    if not isinstance(timestamp, str):
        return None
    try:
        parsed = datetime.fromisoformat(timestamp)
    except ValueError:
        return None
    return parsed.timestamp() if parsed.tzinfo else None
