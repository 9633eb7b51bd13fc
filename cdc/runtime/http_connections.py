"""Connections of the endpoint: how long a request may take to arrive, and how many may be arriving.

Theory
------
A connection is *waited for* from its first moment, and from the first byte of each further request, until that request
is complete with its body:

    waited for ──request complete──> answered ──> idle (uvicorn closes it after some seconds) ──byte──> waited for
        └──too long, or pushed out──> closed

A connection that is waited for holds only a descriptor, and only these connections are limited: at the limit, the one
that is waited for the longest is closed for the new one. A request that arrives at once is answered, however many
connections are silent or slow.
"""

from __future__ import annotations

import asyncio
import contextlib

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_LIMIT_S = 15.0
"""Longer than the time limit of a body, which is answered with a sentence."""
CONNECTIONS_MAX = 400
"""A process has 1,024 descriptors by default."""
_COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)


class Connection(H11Protocol):
    waited_since: float | None = None
    """By the loop's clock; None: its request is complete."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # the library's type
        if len(self.connections) >= CONNECTIONS_MAX:
            others = (other for other in self.connections if isinstance(other, Connection))
            waited_for = [(other.waited_since, id(other), other) for other in others if other.waited_since is not None]
            if waited_for:
                min(waited_for)[2].transport.abort()
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_wait()  # part of the next request may have arrived already

    def send_400_response(self, msg: str) -> None:
        """The input is not HTTP. It gets one answer at most, and none where another answer was or is being sent."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        with contextlib.suppress(h11.LocalProtocolError):  # a body may not answer HEAD
            super().send_400_response(msg)
        self.transport.close()

    def _update_wait(self) -> None:
        if self.conn.their_state in _COMPLETE or (self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]):
            self._have()
        elif self.waited_since is None:
            self._wait()

    def _wait(self) -> None:
        self.waited_since = self.loop.time()
        self._timer = self.loop.call_later(REQUEST_LIMIT_S, self.transport.abort)

    def _have(self) -> None:
        self.waited_since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
