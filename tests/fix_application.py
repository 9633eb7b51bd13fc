"""The application that changes are delivered to: a small HTTP server inside the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """``events`` of a batch are several. ``connection`` is the same object for requests that came in by one."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: object

    @property
    def events(self) -> list[Event]:
        found = json.loads(self.body)
        return found if isinstance(found, list) else [found]


Answering = Callable[[Request], Awaitable[web.StreamResponse]]


async def accept(_request: Request) -> web.StreamResponse:
    return web.Response(status=204)


def answers(*statuses: int, **headers: str) -> Answering:
    """One status after the other, and the last of them from then on."""
    left = list(statuses)

    async def answer(_request: Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(
            status=left.pop(0) if len(left) > 1 else left[0], headers=named, text="said the application"
        )

    return answer


class Application:
    """``requests`` are those that came in. ``answer`` may be replaced at any time."""

    def __init__(self, answer: Answering = accept) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self._runner: web.AppRunner | None = None

    @property
    def events(self) -> list[Event]:
        return [event for request in self.requests for event in request.events]

    @property
    def connections(self) -> int:
        return len({id(request.connection) for request in self.requests})

    async def start(self, port: int = 0, path: Path | None = None, tls: ssl.SSLContext | None = None) -> int:
        """On a TCP port, which is returned, or on the Unix socket ``path``."""
        server = web.Application(client_max_size=1 << 30)
        server.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(server, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        if path:
            await web.UnixSite(self._runner, str(path)).start()
            return 0
        await web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls, reuse_address=True).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """What is under way is broken off."""
        if self._runner:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        found = Request(request.path_qs, request.headers, await request.read(), request.protocol)
        self.requests.append(found)
        return await self.answer(found)


@contextlib.asynccontextmanager
async def listening(answer: Answering = accept, **place: Any) -> AsyncIterator[tuple[Application, str]]:
    """An application, and the URL to deliver to."""
    application = Application(answer)
    port = await application.start(**place)
    try:
        yield application, f"http://127.0.0.1:{port}/changes"
    finally:
        await application.stop()


async def never(_request: Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError
