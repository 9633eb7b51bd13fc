"""``cdc whatsapp serve``: the web application with its database, on uvicorn, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import psycopg
import uvicorn
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette

import cdc
from cdc.contrib.whatsapp.adapter import Adapter
from cdc.contrib.whatsapp.connections import CONNECTIONS_MAX, Connection
from cdc.contrib.whatsapp.web import Checks, make_app
from cdc.runtime import process

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 10
_CONNECTION_LIMIT_S = 5.0
_REQUESTS_MAX = 2 * CONNECTIONS_MAX  # uvicorn would refuse one more, but there are never that many
_ASKED_AGAIN_S = 1.0
_GRACE_S = 10


def serve(arguments: Mapping[str, Any], *, schema: str, checks: Checks, host: str, port: int) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; requests being answered get ten seconds. ``port`` 0: any free one.

    ``arguments`` are those of psycopg's connect, for autocommit connections. The database may be unavailable at the
    start. Raises CdcError where the address cannot be used.
    """
    with _listening(host, port) as listener:
        pool = AsyncConnectionPool(
            "", kwargs=dict(arguments), min_size=1, max_size=_CONNECTIONS_MAX, timeout=_CONNECTION_LIMIT_S, open=False,
            # One round trip, so that after an outage of the server no request fails for each stale connection.
            check=AsyncConnectionPool.check_connection,
        )  # fmt: skip
        # No compression, no access log, no server name; ``connections`` limits slow requests.
        config = uvicorn.Config(
            _app(pool, schema, checks, listener), lifespan="on", ws="none", http=Connection, log_config=None,
            log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            limit_concurrency=_REQUESTS_MAX, timeout_graceful_shutdown=_GRACE_S,
        )  # fmt: skip
        server = _WebhookServer(config)
        process.hand_over(lambda _: setattr(server, "should_exit", True))
        server.run(sockets=[listener])


class _WebhookServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's handlers do not know SIGHUP, and take a second SIGTERM for the first."""
        yield


def _app(pool: AsyncConnectionPool, schema: str, checks: Checks, listener: socket.socket) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await pool.open()
        name, number = listener.getsockname()[:2]
        log.info("webhooks on http://%s:%d/webhook", f"[{name}]" if ":" in name else name, number)
        try:
            yield
        finally:
            await pool.close()

    async def database_answers() -> None:
        async with pool.connection() as connection:
            await connection.execute("SELECT 1")

    return make_app(
        Adapter(pool.connection, schema), checks, database_answers=Lately(database_answers), lifespan=lifespan
    )


class Lately:
    """Queries at most once a second, and shares the result: requests may come from unknown clients."""

    def __init__(self, ask: Callable[[], Awaitable[None]]) -> None:
        self._ask = ask
        self._asked_at = -math.inf
        self._error: psycopg.Error | None = None
        self._asking = asyncio.Lock()

    async def __call__(self) -> None:
        async with self._asking:
            now = asyncio.get_running_loop().time
            if now() - self._asked_at >= _ASKED_AGAIN_S:
                self._error = None
                try:
                    await self._ask()
                except psycopg.Error as error:
                    self._error = error
                self._asked_at = now()
            if self._error is not None:
                raise self._error.with_traceback(None)


def _listening(host: str, port: int) -> socket.socket:
    try:
        socket.getaddrinfo(host, port)  # create_server would leave a socket open for an invalid name
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        number = error.errno or 0 if isinstance(error, OSError) else 0  # errors of the name service are below 0
        why = os.strerror(number) if number > 0 else "no host has such a name"
        raise cdc.CdcError(
            f"cannot listen on {host} port {port}: {why}",
            hint="choose another --whatsapp-host or --whatsapp-port",
        ) from None
