"""pgoutput, protocol version 1: its START options and its decoder. Every server has it, and allows it by default. Pure.

It requires a publication. Ours is empty, so no rows are sent; every logical message of the database is, and the decoder
picks ours by their prefix. On the wire (numbers big-endian, strings end with a zero byte):

    B  final LSN (8), commit time (8), xid (4)                              once, before the messages of a transaction
    M  flags (1: 1 = transactional), LSN (8), prefix, length (4), content
    C  flags (1), commit LSN (8), end LSN (8), commit time (8)
"""

from __future__ import annotations

import re
import struct

from cdc.core.errors import ProtocolError
from cdc.core.model import PAIR, pair
from cdc.replication.protocol import Decoded, Plugin, unix_s

_BEGIN = struct.Struct("!cQqI")
_COMMIT_BYTES = 26
_MESSAGE_HEAD_BYTES = 10
_OF_ROWS = frozenset(b"ORYIUDT")
"""Origin, relation, type, insert, update, delete, truncate: sent when tables were added to the publication."""


def plugin(prefix: str, publication: str) -> Plugin:
    """pgoutput, with wake-ups only for messages with ``prefix`` (``cdc.core.model.message_prefix``)."""
    return Plugin(
        "pgoutput", options(publication), PgoutputDecoder(prefix), lambda _: None,
        outbox="publication_names", publication=publication,
    )  # fmt: skip


def options(publication: str) -> tuple[tuple[str, str], ...]:
    """Options known to every version from 14 on."""
    # A list of SQL identifiers: an unquoted one would be folded to lower case and split at commas.
    quoted = '"' + publication.replace('"', '""') + '"'
    return (("proto_version", "1"), ("publication_names", quoted), ("messages", "true"))


class PgoutputDecoder:
    """Message bytes -> Decoded; None for messages of others; ProtocolError for bytes that are not pgoutput's."""

    def __init__(self, prefix: str) -> None:
        # The fast path: an exact match of a usual message.
        self._ours = re.compile(
            rb"M\x01[\x00-\xff]{8}" + re.escape(prefix.encode()) + rb"\x00([\x00-\xff]{4})" + PAIR.encode()
        ).fullmatch
        self._committed_at: float | None = None

    def __call__(self, payload: bytes | memoryview) -> Decoded | None:
        ours = self._ours(payload)
        if ours is None:
            self._other(bytes(payload))
            return None
        length, seq, shard = ours.groups()
        if int.from_bytes(length) != len(seq) + 1 + len(shard):
            raise _garbled(payload)
        wakeup = pair(seq, shard)
        return (wakeup, self._committed_at) if wakeup else None

    def _other(self, payload: bytes) -> None:
        """No wake-up; parsed for the commit time, and to detect bytes that are not pgoutput's."""
        match payload[:1]:
            case b"M":
                _check_message(payload)
            case b"B" if len(payload) == _BEGIN.size:
                _, _, committed_us, _ = _BEGIN.unpack(payload)
                self._committed_at = unix_s(committed_us)
            case b"C" if len(payload) == _COMMIT_BYTES:
                self._committed_at = None
            case kind if not kind or kind[0] not in _OF_ROWS:
                raise _garbled(payload)


def _check_message(payload: bytes) -> None:
    """Of another prefix, or outside a transaction (the server sends it before, or without, a commit), or no numbers."""
    prefix_end = payload.find(b"\0", _MESSAGE_HEAD_BYTES)
    content = prefix_end + 5
    if prefix_end < 0 or content > len(payload) or payload[1] > 1:
        raise _garbled(payload)
    if int.from_bytes(payload[prefix_end + 1 : content]) != len(payload) - content:
        raise _garbled(payload)


def _garbled(payload: bytes | memoryview) -> ProtocolError:
    return ProtocolError(f"a message of {len(payload)} bytes that is not pgoutput's")
