"""``cdc whatsapp serve``: the web application with its database, on uvicorn, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette

from cdc.contrib.whatsapp.adapter import Adapter
from cdc.contrib.whatsapp.web import Checks, make_app
from cdc.runtime import web_server

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 10
_CONNECTION_LIMIT_S = 5.0
_ASKED_AGAIN_S = 1.0


def serve(arguments: Mapping[str, Any], *, schema: str, checks: Checks, host: str, port: int) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; requests being answered get ten seconds. ``port`` 0: any free one.

    ``arguments`` are those of psycopg's connect, for autocommit connections. The database may be unavailable at the
    start. Raises CdcError where the address cannot be used.
    """
    with web_server.listening(host, port, options="--whatsapp-host or --whatsapp-port") as listener:
        pool = AsyncConnectionPool(
            "", kwargs=dict(arguments), min_size=1, max_size=_CONNECTIONS_MAX, timeout=_CONNECTION_LIMIT_S, open=False,
            # One round trip, so that after an outage of the server no request fails for each stale connection.
            check=AsyncConnectionPool.check_connection,
        )  # fmt: skip
        web_server.serve(_app(pool, schema, checks, listener), listener)


def _app(pool: AsyncConnectionPool, schema: str, checks: Checks, listener: socket.socket) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await pool.open()
        log.info("webhooks on http://%s/webhook", web_server.address(listener))
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
