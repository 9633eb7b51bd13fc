"""A messenger that messages are posted to: it remembers them, and answers what a test says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass(frozen=True)
class Received:
    key: str
    authorization: str
    message: dict[str, Any]


@dataclass
class Messenger:
    """``answers``: a status for each of the next requests, with the headers beside it; then 200."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [each.message["text"] for each in self.received]


class _Server(ThreadingHTTPServer):
    """Closed, it leaves no connection open and no thread behind: a client that keeps its connection would keep both."""

    daemon_threads = False  # those that are, are not waited for
    messenger: Messenger

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._links: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._links.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):  # its thread has closed it
                link.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        messenger = self.server.messenger
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, headers = messenger.answers.pop(0) if messenger.answers else (200, {})
        if status < 300:
            key, authorization = self.headers["Idempotency-Key"], self.headers["Authorization"] or ""
            messenger.received.append(Received(key, authorization, message))
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in http.server
        pass


@pytest.fixture
def messenger() -> Iterator[Messenger]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.messenger = Messenger(url=f"http://127.0.0.1:{server.server_port}/messages")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.messenger
    server.shutdown()
    thread.join()
    server.server_close()
