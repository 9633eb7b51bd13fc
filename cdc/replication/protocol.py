"""The envelope of streaming replication: what travels inside CopyData, both ways. Pure: bytes in, values out.

Numbers are big-endian. The bytes come from a network, so every length is checked: whatever they are, ``parse``
returns a value or raises ProtocolError.
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
"""Bytes of a CopyData message: ours has some 150, also where the schema's name is long. A longer one is not for us."""

_XLOGDATA = struct.Struct("!cQQq")  # 'w', WAL start, WAL end, server clock; the plugin's message follows
_KEEPALIVE = struct.Struct("!cQqB")  # 'k', WAL end, server clock, reply requested
_K = ord("k")
_STATUS = struct.Struct("!cQQQqB")  # 'r', written, flushed, applied, client clock, reply requested

Decoded = tuple[WakeUp, float | None]
"""What a decoder reads from one message: the wake-up and, if it is there, the commit time (unix seconds, server's
clock). A plain tuple, as is what ``parse`` returns: hundreds of thousands are made in a second."""


class DecodedBatch(NamedTuple):
    """What many messages say: the highest position among them, the wake-ups, the last commit time."""

    highest: int
    wakeups: list[WakeUp]
    committed_at: float | None


Decode = Callable[[bytes | memoryview], Decoded | None]
"""One message of an output plugin; None if it is not for us, ProtocolError if it cannot be read."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """An output plugin as the stream needs it: its options at START_REPLICATION, and how to read its messages.

    ``decode_all``: many CopyData messages at once, which is quicker; None where they are to be read one by one.
    ``publication``: one that must be there, with nothing in it, before the slot is made. ``outbox``: the option that
    says which outbox it is for.
    """

    name: str
    options: tuple[tuple[str, str], ...]
    decode: Decode
    decode_all: Callable[[Sequence[bytes | memoryview]], DecodedBatch | None]
    outbox: str
    publication: str | None = None


XLOGDATA = rb"w([\x00-\xff]{8})[\x00-\xff]{16}"
"""What stands before the plugin's message: a regular expression with a group, the position, big-endian."""


def is_keepalive(data: bytes | memoryview) -> bool:
    """By its first byte; whether it is a whole one, ``parse`` knows."""
    return len(data) > 0 and data[0] == _K


def head(data: bytes | memoryview) -> memoryview:
    """A copy of it as far as its position: what ``parse`` then returns is an empty message."""
    return memoryview(bytes(data[: _XLOGDATA.size]))


def parse(data: bytes | memoryview) -> tuple[int, bytes | memoryview | None, bool]:
    """(position, the plugin's message or None for a keepalive, reply requested).

    The position is the message's own, or the server's end of WAL. A bare int: one Lsn is made for a whole batch.
    """
    # An unpack_from cannot read past the end: it raises.
    try:
        kind, position, _, _ = _XLOGDATA.unpack_from(data)
        if kind == b"w":
            return position, data[_XLOGDATA.size :], False
    except struct.error:
        pass  # shorter than any message; a keepalive is
    return _keepalive(data)


def _keepalive(data: bytes | memoryview) -> tuple[int, None, bool]:
    try:
        kind, wal_end, _, reply_requested = _KEEPALIVE.unpack(data)
    except struct.error:
        kind = b""
    if kind != b"k" or reply_requested > 1:
        raise ProtocolError(f"{len(data)} bytes that are neither a replication message nor a keepalive")
    return wal_end, None, bool(reply_requested)


def status_update(confirmed: Lsn, *, unix_s: float, ping: bool) -> bytes:
    """What we have read. ``ping`` asks for an answer: an idle server sends a client that does not ask not one byte."""
    clock_us = int((unix_s - _EPOCH_UNIX_S) * 1_000_000)
    return _STATUS.pack(b"r", confirmed, confirmed, confirmed, clock_us, ping)


def unix_s(clock_us: int) -> float:
    """A server's clock as unix seconds."""
    return _EPOCH_UNIX_S + clock_us / 1_000_000
