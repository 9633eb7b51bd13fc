"""Limits what an application may send before its answer begins, and reads that answer even if garbage follows it.

Theory
------
The client library parses at once all that it reads. From an endless sequence of ``100 Continue`` it makes objects as
fast as they come. After an answer without a body it takes the next byte for a broken second answer, and drops the
first. So this class splits the input at the end of each head, and passes the heads on one by one:

    interim (1xx) ──up to a few──> interim ... ──> the answer's head ──> all the rest as it comes
"""

from __future__ import annotations

import re
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

INTERIM_MAX = 8
"""103 (early hints) may come a few times; no server has a reason for more."""
HEAD_MAX = 65_536
"""Bytes of the interim answers together, and of an answer's status line and headers. Other clients allow 8 to 64 kB."""

_HEAD_END = re.compile(rb"\n\r?\n")
_INTERIM = re.compile(rb"HTTP/\d\.\d 1(?!01)\d\d\b")


class TooMuchError(aiohttp.ClientError):
    """The application sends more than the limits, and its answer has not begun."""


class Protocol(ResponseHandler):
    """A connection to the application. The request fails with TooMuchError when no answer begins within the limits."""

    _held = b""
    _heads = _said = 0
    _begun = False

    def set_response_params(self, **parameters: Any) -> None:
        """Called when a request is about to be answered."""
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
        """Pass on the part of a head that will not be completed: the library raises the error for it."""
        rest, self._held = self._held, b""
        if rest:
            super().data_received(rest)

    def _give_up(self) -> None:
        self._held = b""
        if self.transport is not None:
            self.transport.abort()
        self.set_exception(TooMuchError("too many bytes came before an answer began"))
