"""Changes as HTTP requests to an application in any language: the handler of ``cdc run --deliver-to URL``.

    change(s) ──> CloudEvents ──> signed ──> gate ──> POST ── 2xx ──────────────────> done
                                     ▲         ▲        ├─ 408, 425, 429, 5xx ──────> again later
                                     │         │        ├─ no answer, broken off ───> again later
                                     │         │        ├─ 3xx, other 4xx ──────────> dead
                                     │         │        └─ not even a connection ──┐
                                     └─────────└───────────────────────────────────┘ no attempt: nobody saw it

It is a router like any other: order, concurrency, retries and dead letters are the consumer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import aiohttp
from yarl import URL

from cdc import __version__
from cdc.deadline import deadline
from cdc.deliver import cloudevents, signature
from cdc.deliver.answers import Answer, Meaning
from cdc.deliver.cloudevents import Message
from cdc.deliver.gate import Gate
from cdc.deliver.protocol import HEAD_MAX, Protocol
from cdc.deliver.target import Target
from cdc.errors import Reject, Retry, ToldError
from cdc.limits import OverrunError
from cdc.metrics import REQUESTS, Metrics
from cdc.model import Change
from cdc.routing import ANY, Router

log = logging.getLogger("cdc.deliver")

NAME = "deliver"
"""Of the handler, in metrics and logs."""

_CONNECT_S = 5.0
_IDLE_S = 1.5
"""A connection that was idle for longer is not used again: the shortest time after which servers close one is 2 s
(gunicorn; 5 s are usual), and a request that crosses with the close is an attempt lost."""
_BODY_KEPT, _BODY_READ_MAX, _BODY_S = 1_024, 65_536, 5.0
"""Of an answer: what is kept; up to what size the rest is read, so that the connection can be used again; how long."""


class DeliveryError(ToldError, Retry):
    """Not now. It is about all changes of a batch."""

    def __init__(self, told: str, text: str = "", after: float | None = None) -> None:
        Retry.__init__(self, after, text or told)
        self.told = told


class RejectedError(ToldError, Reject):
    """Never."""

    kind = "rejected"

    def __init__(self, told: str, text: str) -> None:
        Reject.__init__(self, text)
        self.told = told


class OneOfThemError(Exception):
    """The answer to a batch, which is about one of its changes; the consumer then has them sent one by one."""


class _UnreachedError(Exception):
    """No connection could be made."""


class Delivery:
    """``router`` hands changes of ``types`` (empty: of all) to the application. Made, opened and closed on the loop.

    ``batch`` above 1: so many in one request. ``keys`` brings what to sign with. ``timeout_s`` is the limit of one
    request; waiting for an application that is not there has none.
    """

    def __init__(
        self,
        target: Target,
        *,
        types: Sequence[str] = (),
        batch: int = 1,
        linger_s: float = 0.0,
        source: str | None = None,
        keys: Callable[[], Sequence[bytes]] = tuple,
        timeout_s: float | None = None,
    ) -> None:
        self._target = target
        self._url = URL(target.url, encoded=True)
        self._types = tuple(dict.fromkeys(types)) or (ANY,)
        self._source = source
        self._keys = keys
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._looking: aiohttp.ClientSession | None = None
        """On the same connections, and it tells when one is made. A request takes a fifth longer by it, so it is for
        those that find out whether the application is there."""
        self._gate = Gate(str(target), self._show)
        self._metrics: Metrics | None = None
        self.router = Router()
        for entity_type in self._types:
            if batch > 1:
                self.router.on(entity_type, batch=batch, linger=linger_s, name=NAME, timeout=math.inf)(self._many)
            else:
                self.router.on(entity_type, name=NAME, timeout=math.inf)(self._one)

    def open(self, metrics: Metrics) -> None:
        self._metrics = metrics
        metrics.delivers()
        self._show(True)
        connector = (
            aiohttp.UnixConnector(self._target.socket, limit=0, keepalive_timeout=_IDLE_S)
            if self._target.socket
            else aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
        )
        # There is no other way in, and its type there is that of the class it makes by itself.
        connector._factory = partial(Protocol, loop=asyncio.get_running_loop())  # type: ignore[assignment]  # noqa: SLF001
        session = partial(
            aiohttp.ClientSession,
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            max_line_size=HEAD_MAX,
            max_field_size=HEAD_MAX,
            headers={"User-Agent": f"cdc/{__version__}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, connect=min(_CONNECT_S, (self._timeout_s or math.inf) / 2)),
        )
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(self._connected)
        self._session = session()
        self._looking = session(connector_owner=False, trace_configs=[tracing])
        log.info(
            "delivers %s to %s, %s", "every type" if self._types == (ANY,) else ", ".join(self._types), self._target,
            "signed" if self._keys() else "not signed: CDC_DELIVER_SECRET is not set",
        )  # fmt: skip

    async def close(self) -> None:
        for session in (self._looking, self._session):
            if session is not None:
                await session.close()

    def stop(self) -> None:
        """Cut off what waits for the application; requests on their way go on."""
        self._gate.stop()

    @property
    def unreached(self) -> str:
        """Why no connection can be made; "" where nobody knows of a reason. From any thread."""
        return self._gate.shut_by

    async def _one(self, change: Change) -> None:
        answer = await self._delivered(cloudevents.single(change, self._source))
        _judge(answer, alone=True)

    async def _many(self, changes: list[Change]) -> None:
        answer = await self._delivered(cloudevents.batch(changes, self._source))
        _judge(answer, alone=len(changes) == 1)

    async def _delivered(self, message: Message) -> Answer:
        while True:
            await self._gate.enter()
            try:
                return await self._post(message)
            except _UnreachedError as error:
                self._gate.shut(str(error))

    async def _post(self, message: Message) -> Answer:
        session = self._looking if self._gate.shut_by else self._session
        assert session is not None
        signed = signature.headers(self._keys(), message.id, int(time.time()), message.body)
        headers = {"Content-Type": message.content_type, **signed}
        request = session.post(self._url, data=message.body, headers=headers, allow_redirects=False)
        limit = deadline(self._timeout_s)
        try:
            async with limit, request as response:
                limit.reschedule(None)  # the status says all; how long its words take is limited by themselves
                if session is self._looking:
                    self._gate.opened()
                self._count(f"{response.status // 100}xx")
                return Answer(response.status, response.headers.get("Retry-After"), await _start(response.content))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._count("unreached")
            raise _UnreachedError(_reason(error)) from error
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            if limit.expired():
                self._count("timeout")
                raise OverrunError(f"took longer than {self._timeout_s:g} s") from error
            self._count("broken")
            raise DeliveryError(f"the connection broke before an answer came ({type(error).__name__})") from error

    async def _connected(self, _session: Any, _context: SimpleNamespace, _parameters: Any) -> None:
        self._gate.opened()

    def _show(self, reached: bool) -> None:
        if self._metrics:
            self._metrics.delivery_up.set(reached)

    def _count(self, result: str) -> None:
        """One of REQUESTS; a status beyond 599 counts as what it is treated like."""
        if self._metrics:
            self._metrics.delivered(result if result in REQUESTS else "5xx").inc()


def _judge(answer: Answer, *, alone: bool) -> None:
    """Raises what the answer means, if it is not that all is done."""
    if answer.meaning is Meaning.DONE:
        return
    if not alone and not answer.about_all:
        raise OneOfThemError
    if answer.meaning is Meaning.DEAD:
        raise RejectedError(answer.told, answer.text)
    raise DeliveryError(answer.told, answer.text, answer.retry_after_s(datetime.now(UTC)))


async def _start(content: aiohttp.StreamReader) -> bytes:
    """The first of it. What comes after that, or does not come, is of no interest."""
    kept, seen = b"", 0
    if content.at_eof():
        return kept
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with deadline(_BODY_S):
            async for chunk in content.iter_any():
                kept += chunk[: _BODY_KEPT - len(kept)]
                seen += len(chunk)
                if seen > _BODY_READ_MAX:
                    break
    return kept


def _reason(error: aiohttp.ClientError) -> str:
    """Why no connection was made. The error's own text quotes the address."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as cause):
            return f"its certificate: {cause.verify_message}"
        case aiohttp.ClientConnectorDNSError(os_error=OSError(strerror=str(words))):
            return words
        case aiohttp.ClientConnectorError(os_error=OSError(errno=int(number))) if number > 0:
            return os.strerror(number)
        case aiohttp.ConnectionTimeoutError():
            return "no answer to the attempt to connect"
    return type(error).__name__
