"""``cdc ui``: the pages and the API behind one door, on uvicorn, until a signal."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp

from cdc.contrib.ui.access import Access, Doors
from cdc.contrib.ui.api import make_api, problem
from cdc.contrib.ui.operations import Source
from cdc.contrib.ui.pages import Pages
from cdc.core.errors import RefusedError
from cdc.runtime import web_server

log = logging.getLogger("cdc.contrib.ui")


def make_app(source: Source, doors: Doors, *, listener: socket.socket | None = None) -> ASGIApp:
    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        if listener is not None:
            log.info("the interface is on http://%s/", web_server.address(listener))
        yield

    pages = Pages(source, doors)

    async def refused(request: Request, error: Exception) -> Response:
        # A mount does not match a path with a line break in it.
        return await (problem if request.url.path.startswith("/api/") else pages.refused)(request, error)

    app = Starlette(
        routes=[*pages.routes(), Mount("/api", make_api(source))],
        lifespan=lifespan, exception_handlers={HTTPException: refused},
    )  # fmt: skip
    return Access(app, doors)


def serve(source: Source, doors: Doors, *, host: str, port: int, local: bool) -> None:
    """Until a signal. ``local``: only this machine reaches the host. Raises RefusedError for an open door."""
    if doors.alone is not None and not local:
        raise RefusedError(
            f"cdc ui does not listen on {host} without a login",
            hint="CDC_UI_LOGINS_FILE names a file of lines NAME:SECRET; or --ui-proxy-header with --ui-proxy-networks",
        )
    with web_server.listening(host, port, options="--ui-host or --ui-port") as listener:
        web_server.serve(make_app(source, doors, listener=listener), listener)
