"""Changes as HTTP requests to an application in any language: the handler of ``cdc run --deliver-to URL``.

    change(s) ──> CloudEvents ──> signed ──> POST ── 2xx ──────────────────────────> done
                                              ├─ 400, 410, 413, 415, 422 ─────> dead
                                              ├─ another status, no answer ───> again later
                                              ├─ 502, 503, 504, broken off ───> away: no attempt, unless it is alone
                                              └─ not even a connection ───────> away: no attempt, nothing was sent

The handler's breaker (``circuit_breaker``) acts on "away". A broken connection may also be the fault of a change that
makes the application fail, while it works for all others: after ten breaks of a change, with others answered in
between, the break counts as a failed attempt of that change.

Delivery is a router like any other: order, concurrency, retries and dead letters are the consumer's.
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
from cdc.core import cloudevents
from cdc.core.circuit_breaker import CircuitBreaker
from cdc.core.cloudevents import OutgoingRequest
from cdc.core.deliveries import HANDLER, AwayError, DeliveryError, RejectedError, UnreachedError
from cdc.core.errors import OverrunError
from cdc.core.lost_transactions import LOSSES_MAX, Losses
from cdc.core.model import Change, Operation
from cdc.core.router import ANY, Router
from cdc.http import webhook_signature
from cdc.http.client_protocol import HEAD_MAX, Protocol
from cdc.http.endpoint_url import Target
from cdc.http.responses import Answer, Disposition
from cdc.observability.metrics import DeliveryMetrics
from cdc.runtime.deadline import deadline

log = logging.getLogger("cdc.deliver")

_BROKEN = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, OSError)
"""The application is absent. An answer that cannot be parsed is a fault of the application instead."""
_CONNECT_S = 5.0
_IDLE_S = 1.5
"""A connection that was idle for longer is not reused: servers close idle connections after 2 s at the earliest
(gunicorn; 5 s are usual), and a request that crosses with the close loses an attempt."""
_BODY_KEPT, _BODY_READ_MAX, _BODY_S = 1_024, 65_536, 5.0
"""For an answer's body: bytes kept; bytes read, so that the connection can be reused; seconds for reading them."""


class OneOfThemError(Exception):
    """The answer to a batch is about one of its changes; the consumer then sends them one by one."""


class Delivery:
    """``router`` delivers changes of ``types`` (empty: all) to the application. Made, opened and closed on the loop.

    ``batch`` above 1: that many changes in one request. ``keys`` returns the keys to sign with. ``timeout_s`` limits
    one request.
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
        """Uses the same connections, and reports when one is made. That makes a request a fifth slower, so it serves
        only requests that find out whether the application is present."""
        self._metrics: DeliveryMetrics | None = None
        self._breaker: CircuitBreaker | None = None
        self._reached: Callable[[], None] = lambda: None
        self._broken = Losses()
        """Changes whose requests found the application away, while others were answered."""
        self._answers = False
        """A request was answered since such a change was last counted."""
        self.router = Router()
        for entity_type in self._types:
            if batch > 1:
                on = partial(self.router.on, batch=batch, linger=linger_s)
                on(entity_type, *Operation, name=HANDLER, timeout=math.inf)(self._many)
            else:
                self.router.on(entity_type, *Operation, name=HANDLER, timeout=math.inf)(self._one)

    def open(self, metrics: DeliveryMetrics | None, breaker: CircuitBreaker, reached: Callable[[], None]) -> None:
        """``breaker`` is that of ``HANDLER``; ``reached`` is called when a connection is made while it is open."""
        self._metrics, self._breaker, self._reached = metrics, breaker, reached
        connector = (
            aiohttp.UnixConnector(self._target.socket, limit=0, keepalive_timeout=_IDLE_S)
            if self._target.socket
            else aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
        )
        # There is no public way. The attribute's type is the class that the library makes by default.
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

    async def check(self) -> None:
        """Nothing is asked of an application before there is a change for it."""

    async def close(self) -> None:
        for session in (self._looking, self._session):
            if session is not None:
                await session.close()

    async def _one(self, change: Change) -> None:
        await self._deliver([change], cloudevents.single(change, self._source))

    async def _many(self, changes: list[Change]) -> None:
        await self._deliver(changes, cloudevents.batch(changes, self._source))

    async def _deliver(self, changes: Sequence[Change], message: OutgoingRequest) -> None:
        """Raises the outcome of the changes, unless the answer is a success."""
        try:
            answer = await self._post(message)
            if answer.meaning is not Disposition.AWAY:
                self._answered(changes)
            _judge(answer, alone=len(changes) == 1)
        except UnreachedError:
            raise
        except AwayError as away:
            if not self._are_to_blame(changes):
                raise
            alone = len(changes) == 1
            raise DeliveryError(away.summary, str(away), away.retry_after) if alone else OneOfThemError from away

    def _answered(self, changes: Sequence[Change]) -> None:
        self._answers = True
        self._broken.forget(changes)

    def _are_to_blame(self, changes: Sequence[Change]) -> bool:
        if not self._answers:
            return False
        self._answers = False
        return self._broken.add(changes) >= LOSSES_MAX

    async def _post(self, message: OutgoingRequest) -> Answer:
        session = self._looking if self._unreached else self._session
        assert session is not None
        signed = webhook_signature.headers(self._keys(), message.id, int(time.time()), message.body)
        headers = {"Content-Type": message.content_type, **signed}
        request = session.post(self._url, data=message.body, headers=headers, allow_redirects=False)
        limit = deadline(self._timeout_s)
        try:
            async with limit, request as response:
                limit.reschedule(None)  # the status suffices; reading the body has its own limit
                self._count(f"{response.status // 100}xx")
                return Answer(response.status, response.headers.get("Retry-After"), await _start(response.content))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._count("unreached")
            raise UnreachedError(f"the application at {self._target} cannot be reached ({_reason(error)})") from error
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            if limit.expired():
                self._count("timeout")
                raise OverrunError(f"took longer than {self._timeout_s:g} s") from error
            self._count("broken")
            summary = f"the connection broke before an answer came ({type(error).__name__})"
            raise AwayError(summary) if isinstance(error, _BROKEN) else DeliveryError(summary) from error

    @property
    def _unreached(self) -> bool:
        """The breaker only waits for a connection to succeed."""
        return self._breaker is not None and self._breaker.certain

    async def _connected(self, _session: Any, _context: SimpleNamespace, _parameters: Any) -> None:
        if self._unreached:
            self._reached()

    def _count(self, result: str) -> None:
        if self._metrics:
            self._metrics.ended(result)


def _judge(answer: Answer, *, alone: bool) -> None:
    """Raises the outcome of the changes, unless the answer is a success."""
    if answer.meaning is Disposition.DONE:
        return
    after_s = answer.retry_after_s(datetime.now(UTC))
    if answer.meaning is Disposition.AWAY:
        raise AwayError(answer.summary, answer.text, after_s)
    if not alone and not answer.about_all:
        raise OneOfThemError
    if answer.meaning is Disposition.DEAD:
        raise RejectedError(answer.summary, answer.text)
    raise DeliveryError(answer.summary, answer.text, after_s)


async def _start(content: aiohttp.StreamReader) -> bytes:
    """The beginning of the body. The rest does not matter, whether it arrives or not."""
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
    """Why no connection was made. The error's own text is not used: it quotes the address."""
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
