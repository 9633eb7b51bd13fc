"""Sockets of libpq that an event loop watches for as long as they are open.

libpq closes a socket when it meets an error, and tells nobody; its number is soon another connection's. A registration
with the event loop outlives that: it could be taken for the other connection's, or end it, and that one would wait for
ever. To register for one answer only is safe, and takes eight system calls with uvloop.

Here the sockets are in a selector of their own, which alone is registered with the event loop. The kernel takes a
socket out of it when its last number is closed. No duplicate is needed, which would keep the link open for the server.
Nor is an error of a socket one of the selector, after which uvloop would report nothing more: it is reported until
somebody has read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary


class SelectorPoll(selectors.DefaultSelector):
    """As ``select.epoll``, for systems that have none."""

    def poll(self, seconds: float) -> Sequence[tuple[int, int]]:
        return [(key.fd, events) for key, events in self.select(seconds)]


_SYSTEM: Callable[[], Any] = getattr(select, "epoll", SelectorPoll)


class Sockets:
    """``watch`` and ``unwatch`` from any thread; what was watched is called on the event loop.

    It is called in each iteration for as long as there is something to read, so it reads, or ends the watch. It may be
    called without cause.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, poll: Callable[[], Any] = _SYSTEM) -> None:
        self._poll = poll()
        self._readable: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        loop.add_reader(self._poll, self._look)

    def watch(self, socket: int, readable: Callable[[], None]) -> None:
        """Whoever watched this number before had a socket that is closed by now."""
        with self._lock:
            self._forget(socket)
            self._poll.register(socket, selectors.EVENT_READ)
            self._readable[socket] = readable

    def unwatch(self, socket: int, readable: Callable[[], None]) -> None:
        """Nothing happens if the number is another's by now."""
        with self._lock:
            if self._readable.get(socket) == readable:
                self._forget(socket)

    def _forget(self, socket: int) -> None:
        if self._readable.pop(socket, None) is not None:
            with contextlib.suppress(OSError):  # it is closed, and the kernel has forgotten it
                self._poll.unregister(socket)

    def _look(self) -> None:
        for socket, _ in self._poll.poll(0):
            if readable := self._readable.get(socket):
                readable()


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Sockets] = WeakKeyDictionary()


def sockets_of(loop: asyncio.AbstractEventLoop) -> Sockets:
    """Those that this event loop watches. Called on the loop."""
    sockets = _of_loops.get(loop)
    if sockets is None:
        sockets = _of_loops[loop] = Sockets(loop)
    return sockets
