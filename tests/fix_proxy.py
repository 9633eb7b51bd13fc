"""A TCP proxy in front of the server, to do to a link what networks do.

cut      every connection is reset
refuse   cut, and new connections are reset at once
hold     half-open: nothing passes and nothing closes, for the connections there are and for new ones
swallow  the way to the other end has gone: what either says is taken and lost, but who hangs up is heard
slow     each piece is passed on with a delay
lose     the answer to what the client says next (or next says with certain words in it) is swallowed, and its
         connection reset: the server has done it, and the client cannot know
snap     a connection ends where the server says certain words on it: what it said before arrives, they do not
open     all passes again; held pieces go on, cut connections stay cut
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

_PIECE = 65536
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """``proxy.dsn`` leads through it to the server of ``dsn``. ``port``: its own; 0: any that is free."""

    def __init__(self, dsn: str, port: int = 0) -> None:
        self._target = conninfo_to_dict(dsn)
        self._door = socket.create_server(("127.0.0.1", port))
        self.port = int(self._door.getsockname()[1])
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self.port)
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._passing = threading.Event()
        self._passing.set()
        self._stopping = threading.Event()
        self._refusing = self._swallowing = False
        self._delay_s = 0.0
        self._losing: bytes | None = None
        self._snapping: bytes | None = None
        self.accepted = 0
        """Connections since the start, refused ones included."""
        self.lost = 0
        """Answers swallowed since the start."""

    def start(self) -> None:
        self._spawn(self._accept)

    def stop(self) -> None:
        self._stopping.set()
        self._passing.set()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _reset(end)

    def refuse(self) -> None:
        self._refusing = True
        self.cut()

    def hold(self) -> None:
        self._passing.clear()

    def swallow(self) -> None:
        self._swallowing = True

    def slow(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def lose(self, words: bytes = b"") -> None:
        self._losing = words

    def snap(self, words: bytes) -> None:
        self._snapping = words

    def open(self) -> None:
        self._refusing = self._swallowing = False
        self._delay_s = 0.0
        self._losing = self._snapping = None
        self._passing.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            self.accepted += 1
            if self._refusing:
                _reset(client)
                continue
            try:
                server = self._connect()
            except OSError:  # the server is down
                _reset(client)
                continue
            with self._lock:
                self._pairs.append((client, server))
            last_words = threading.Event()
            self._spawn(self._pump, client, server, self._says, last_words)
            self._spawn(self._pump, server, client, self._answers, last_words)

    def _connect(self) -> socket.socket:
        host, port = str(self._target["host"]), int(self._target.get("port") or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(f"{host}/.s.PGSQL.{port}")
        except OSError:
            server.close()
            raise
        return server

    def _says(self, piece: bytes, last_words: threading.Event) -> bool:
        if self._losing is not None and self._losing in piece:
            last_words.set()
        return True

    def _answers(self, piece: bytes, last_words: threading.Event) -> bool:
        """Whether the client gets it."""
        if last_words.is_set():
            self.lost += 1
        return not last_words.is_set()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        passes: Callable[[bytes, threading.Event], bool],
        last_words: threading.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                self._stopping.wait(self._delay_s)
                self._passing.wait()
                if self._swallowing:
                    continue
                if not passes(piece, last_words):
                    _reset(target)
                    break
                if self._snapping is not None and self._snapping in piece:
                    target.sendall(piece[: piece.index(self._snapping)])
                    break
                target.sendall(piece)
        # Half a close is passed on as a whole one: neither libpq nor the server goes on with half a connection.
        self._passing.wait()
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _spawn(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()


def _reset(end: socket.socket) -> None:
    """RST instead of FIN, and whoever waits on it wakes up."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    """A proxy in front of the test's own database."""
    running = Proxy(database)
    running.start()
    yield running
    running.stop()
