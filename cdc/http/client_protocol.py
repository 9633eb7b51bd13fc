"""How much an application may say before its answer begins, and that its answer is read even if garbage follows.

Theory
------
What the client library reads at once it parses at once: of an endless row of ``100 Continue`` it makes objects as fast
as they come, and behind an answer without a body it takes the next byte for a broken second answer, and then forgets
the first. So the heads are cut off here, where they end, and handed to it one by one:

    interim (1xx) ──up to a few──> interim ... ──> the answer's head ──> all the rest as it comes
"""

from __future__ import annotations

import re
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

INTERIM_MAX = 8
"""103 (early hints) may come a few times; more than that no server has a reason for."""
HEAD_MAX = 65_536
"""Bytes of the interim answers together, and of an answer's status line and headers. Others allow 8 to 64 kB."""

_HEAD_END = re.compile(rb"\n\r?\n")
_INTERIM = re.compile(rb"HTTP/\d\.\d 1(?!01)\d\d\b")


class TooMuchError(aiohttp.ClientError):
    """The application speaks and does not come to its answer."""


class Protocol(ResponseHandler):
    """A connection to the application. Raises TooMuchError to whoever waits for an answer that does not begin."""

    _held = b""
    _heads = _said = 0
    _begun = False

    def set_response_params(self, **parameters: Any) -> None:
        """A request is about to be answered."""
        self._held, self._heads, self._said, self._begun = b"", 0, 0, False
        super().set_response_params(**parameters)

    def data_received(self, data: bytes) -> None:
        if self._begun:
            super().data_received(data)
            return
        self._held += data
        while not self._begun and (end := _HEAD_END.search(self._held)):
            head, self._held = self._held[: end.end()], self._held[end.end() :]
            self._heads += 1
            self._said += len(head)
            if self._heads > INTERIM_MAX or self._said > HEAD_MAX:
                break
            self._begun = _INTERIM.match(head.lstrip()) is None
            super().data_received(head)
        if self._begun:
            rest, self._held = self._held, b""
            if rest:
                super().data_received(rest)
        elif self._heads > INTERIM_MAX or self._said + len(self._held) > HEAD_MAX:
            self._give_up()

    def eof_received(self) -> None:
        self._hand_over()
        super().eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._hand_over()
        super().connection_lost(exc)

    def _hand_over(self) -> None:
        """What has come of a head that will not end: the library knows what to say of it."""
        rest, self._held = self._held, b""
        if rest:
            super().data_received(rest)

    def _give_up(self) -> None:
        self._held = b""
        if self.transport is not None:
            self.transport.abort()
        self.set_exception(TooMuchError("too much was said before an answer began"))
