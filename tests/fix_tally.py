"""A proxy that counts: the statements that pass to the server, and the bytes both ways.

A statement is a Query, or an Execute of the extended protocol. What a replication connection reports is none.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from psycopg.conninfo import make_conninfo

from tests.fix_proxy import Proxy

_STATEMENTS = b"QE"
_HEAD = struct.Struct("!cI")


class Passed(NamedTuple):
    statements: int
    sent: int
    received: int

    def since(self, before: Passed) -> Passed:
        return Passed(*(now - then for now, then in zip(self, before, strict=True)))


class Tally(Proxy):
    """``tally.dsn`` leads through it. ``passed`` is what has passed since the start, of all connections together."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        # In the clear, or there would be nothing to count; and the first message is the start-up then.
        self.dsn = make_conninfo(self.dsn, sslmode="disable", gssencmode="disable")
        self._counting = threading.Lock()
        self._heads: dict[threading.Event, _Messages] = {}
        self._passed = Passed(0, 0, 0)

    @property
    def passed(self) -> Passed:
        with self._counting:
            return self._passed

    def _says(self, piece: bytes, last_words: threading.Event) -> bool:
        with self._counting:
            messages = self._heads.setdefault(last_words, _Messages())
            self._add(statements=messages.statements(piece), sent=len(piece))
        return super()._says(piece, last_words)

    def _answers(self, piece: bytes, last_words: threading.Event) -> bool:
        with self._counting:
            self._add(received=len(piece))
        return super()._answers(piece, last_words)

    def _add(self, statements: int = 0, sent: int = 0, received: int = 0) -> None:
        old = self._passed
        self._passed = Passed(old.statements + statements, old.sent + sent, old.received + received)


class _Messages:
    """What one client says, in pieces that end anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0
        self._started = False

    def statements(self, piece: bytes) -> int:
        """How many begin in this piece."""
        count = 0
        data = self._rest + piece
        at = min(self._skip, len(data))
        self._skip -= at
        while not self._skip and len(data) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(data, at)
            if self._started:
                count += kind in _STATEMENTS
                end = at + 1 + length
            else:  # the start-up has no kind
                self._started = True
                end = at + int.from_bytes(data[at : at + 4])
            self._skip, at = max(0, end - len(data)), min(end, len(data))
        self._rest = data[at:]
        return count


@pytest.fixture
def tally(outbox: str) -> Iterator[Tally]:
    """In front of the test's own outbox."""
    running = Tally(outbox)
    running.start()
    yield running
    running.stop()
