"""An ASGI application on uvicorn, until a signal; slow and silent clients have the bounds of ``http_connections``."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from cdc.core.errors import CdcError
from cdc.runtime import process
from cdc.runtime.http_connections import CONNECTIONS_MAX, Connection

_REQUESTS_MAX = 2 * CONNECTIONS_MAX  # uvicorn would refuse one more, but there are never that many
_GRACE_S = 10


def serve(app: Any, listener: socket.socket) -> None:
    """Until SIGTERM, SIGINT or SIGHUP; requests being answered get ten seconds."""
    server = _Server(configured(app))
    process.hand_over(lambda _: setattr(server, "should_exit", True))
    server.run(sockets=[listener])


def configured(app: Any) -> uvicorn.Config:
    """No compression, no access log, no server name, no word of a proxy; ``http_connections`` limits slow requests."""
    return uvicorn.Config(
        app, lifespan="on", ws="none", http=Connection, log_config=None, log_level="warning", access_log=False,
        server_header=False, proxy_headers=False, limit_concurrency=_REQUESTS_MAX, timeout_graceful_shutdown=_GRACE_S,
    )  # fmt: skip


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's handlers do not know SIGHUP, and take a second SIGTERM for the first."""
        yield


def listening(host: str, port: int, *, options: str) -> socket.socket:
    """``port`` 0: any free one. ``options``: those that name the two. Raises CdcError where they cannot be used."""
    try:
        socket.getaddrinfo(host, port)  # create_server would leave a socket open for an invalid name
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        number = error.errno or 0 if isinstance(error, OSError) else 0  # errors of the name service are below 0
        why = os.strerror(number) if number > 0 else "no host has such a name"
        raise CdcError(f"cannot listen on {host} port {port}: {why}", hint=f"choose another {options}") from None


def address(listener: socket.socket) -> str:
    """As a URL has it."""
    name, number = listener.getsockname()[:2]
    return f"{f'[{name}]' if ':' in name else name}:{number}"
