"""The envelope of streaming replication: what travels inside CopyData, both ways. Pure: bytes in, values out.

Numbers are big-endian. The bytes come from a network, so every length is checked: for any bytes ``parse`` returns a
value or raises ProtocolError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cdc.core.errors import ProtocolError
from cdc.core.lsn import Lsn
from cdc.core.model import WakeUp

_EPOCH_UNIX_S = 946_684_800
"""PostgreSQL counts microseconds from 2000-01-01 00:00 UTC."""

LONGEST = 16_384
"""Bytes of a CopyData message: ours has some 150, also with a long schema name. A longer one is not ours."""

_XLOGDATA = struct.Struct("!cQQq")  # 'w', WAL start, WAL end, server clock; the plugin's message follows
_KEEPALIVE = struct.Struct("!cQqB")  # 'k', WAL end, server clock, reply requested
_STATUS = struct.Struct("!cQQQqB")  # 'r', written, flushed, applied, client clock, reply requested

Decoded = tuple[WakeUp, float | None]
"""What a decoder reads from one message: the wake-up and, if present, the commit time (unix seconds, server's clock). A
plain tuple, like the result of ``parse``: hundreds of thousands are made in a second."""


class DecodedBatch(NamedTuple):
    """The content of many messages: the highest position among them, the wake-ups, the last commit time."""

    highest: int
    wakeups: list[WakeUp]
    committed_at: float | None


Decode = Callable[[bytes | memoryview], Decoded | None]
"""Decodes one message of an output plugin: None if it is not ours, ProtocolError if it cannot be read."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """An output plugin as the stream uses it: its options at START_REPLICATION, and how to read its messages.

    ``decode_all``: decodes many CopyData messages at once, which is faster; None where each must be read alone.
    ``publication``: must exist, and be empty, before the slot is created. ``outbox``: the option that names the outbox
    it is for.
    """

    name: str
    options: tuple[tuple[str, str], ...]
    decode: Decode
    decode_all: Callable[[Sequence[bytes | memoryview]], DecodedBatch | None]
    outbox: str
    publication: str | None = None


KEEPALIVE = ord("k")
"""The first byte of a keepalive; ``parse`` checks the rest."""

XLOGDATA = rb"w([\x00-\xff]{8})[\x00-\xff]{16}"
"""The bytes before the plugin's message: a regular expression with one group, the position, big-endian."""


def head(data: bytes | memoryview) -> memoryview:
    """A copy of the bytes up to the position: ``parse`` then returns an empty message."""
    return memoryview(bytes(data[: _XLOGDATA.size]))


def parse(data: bytes | memoryview) -> tuple[int, bytes | memoryview | None, bool]:
    """(position, the plugin's message or None for a keepalive, reply requested).

    The position is the message's own, or the server's end of WAL. A plain int: one Lsn is made for a whole batch.
    """
    size = len(data)
    if size == _KEEPALIVE.size:
        kind, position, _, reply_requested = _KEEPALIVE.unpack(data)
        if kind == b"k" and reply_requested <= 1:
            return position, None, bool(reply_requested)
    elif size >= _XLOGDATA.size:
        kind, position, _, _ = _XLOGDATA.unpack_from(data)
        if kind == b"w":
            return position, data[_XLOGDATA.size :], False
    raise ProtocolError(f"{size} bytes that are neither a replication message nor a keepalive")


def status_update(confirmed: Lsn, *, unix_s: float, ping: bool) -> bytes:
    """What we have read. ``ping`` asks for an answer: without it an idle server sends the client no byte at all."""
    clock_us = int((unix_s - _EPOCH_UNIX_S) * 1_000_000)
    return _STATUS.pack(b"r", confirmed, confirmed, confirmed, clock_us, ping)


def unix_s(clock_us: int) -> float:
    """A server's clock as unix seconds."""
    return _EPOCH_UNIX_S + clock_us / 1_000_000
