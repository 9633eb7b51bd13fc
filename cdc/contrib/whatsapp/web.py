"""The webhook over HTTP, an ASGI application. It checks, calls the adapter, and answers in one sentence.

    POST /webhook   an event, signed as WhatsApp signs: X-Hub-Signature-256, the HMAC of the body
    GET  /webhook   the handshake of a subscription: hub.mode, hub.verify_token, hub.challenge
    GET  /healthz   200, or 503 while the database does not answer

200 means that the event needs nothing more: stored, stale or ignored. 4xx: this request can never succeed. 503: the
database is unavailable; a messenger sends the event again, which is harmless.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import StatelessLifespan

from cdc.contrib.whatsapp.adapter import Adapter
from cdc.contrib.whatsapp.events import InvalidEventError

log = logging.getLogger(__name__)

_CHALLENGE_MAX = 1_000
_PATH_SHOWN = 200
"""Characters of a path in the log: the client may be unknown."""


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of a request. ``verify_token`` of None: no subscription is verified.

    ``body_limit_s``: seconds until the whole body is there; a slower client would hold a connection for nothing.
    """

    app_secret: bytes
    verify_token: str | None
    body_max: int
    body_limit_s: float = 10.0


class _RefusedError(HTTPException):
    """One sentence and a status."""


def make_app(
    adapter: Adapter,
    checks: Checks,
    *,
    database_answers: Callable[[], Awaitable[None]],
    lifespan: StatelessLifespan[Starlette] | None = None,
) -> Starlette:
    """``database_answers`` raises psycopg's error where the database does not answer."""

    async def receive(request: Request) -> Response:
        payload = _decoded(await _signed_body(request, checks))
        try:
            result = await adapter.process_webhook(payload)
        except InvalidEventError as rejected:
            raise _RefusedError(422, str(rejected)) from None
        return JSONResponse({"result": result.value})

    async def verify(request: Request) -> Response:
        return PlainTextResponse(_challenge(request, checks.verify_token))

    async def healthz(request: Request) -> Response:
        await database_answers()
        return PlainTextResponse("ok\n")

    return Starlette(
        routes=[
            Route("/webhook", receive, methods=["POST"]),
            Route("/webhook", verify, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _refuse, psycopg.Error: _be_away, ClientDisconnect: _let_go},
        lifespan=lifespan,
    )


async def _signed_body(request: Request, checks: Checks) -> bytes:
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _RefusedError(415, "the content type is application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _RefusedError(415, "the body is not to be compressed")
    body = await _body(request, checks)
    expected = "sha256=" + hmac.digest(checks.app_secret, body, "sha256").hex()
    given = headers.get("x-hub-signature-256", "")
    # Bytes: compare_digest accepts only ASCII text, and the header may hold more.
    if not hmac.compare_digest(expected.encode(), given.encode()):
        raise _RefusedError(401, "X-Hub-Signature-256 is missing, or does not fit the body")
    return body


async def _body(request: Request, checks: Checks) -> bytes:
    """Counted as it arrives: Content-Length is only the client's claim."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > checks.body_max:
        _too_large(checks.body_max)
    body = bytearray()
    try:
        async with asyncio.timeout(checks.body_limit_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > checks.body_max:
                    _too_large(checks.body_max)
    except TimeoutError:
        raise _RefusedError(408, f"the body did not come within {checks.body_limit_s:g} seconds") from None
    return bytes(body)


def _too_large(body_max: int) -> NoReturn:
    # The rest of the body is not read, so the connection cannot be reused.
    raise _RefusedError(413, f"the body has more than {body_max} bytes", headers={"Connection": "close"})


def _decoded(body: bytes) -> object:
    try:
        return json.loads(body.decode(), parse_constant=_no_json)
    except (ValueError, RecursionError):
        raise _RefusedError(400, "the body is not JSON in UTF-8") from None


def _no_json(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which Python's parser accepts


def _challenge(request: Request, verify_token: str | None) -> str:
    asked = request.query_params
    challenge = asked.get("hub.challenge", "")
    if asked.get("hub.mode") != "subscribe" or not 0 < len(challenge) <= _CHALLENGE_MAX:
        raise _RefusedError(400, "a subscription has hub.mode=subscribe, hub.verify_token and hub.challenge")
    given = asked.get("hub.verify_token", "")
    if verify_token is None or not hmac.compare_digest(verify_token.encode(), given.encode()):
        raise _RefusedError(403, "hub.verify_token is not the one that was agreed on")
    return challenge


async def _refuse(request: Request, error: Any) -> Response:
    log.info("%s %s: %d, %s", request.method, request.url.path[:_PATH_SHOWN], error.status_code, error.detail)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _be_away(request: Request, error: Any) -> Response:
    # Class and SQLSTATE, no text: it may quote the row.
    log.error(
        "%s %s: %s %s", request.method, request.url.path[:_PATH_SHOWN], type(error).__name__, error.sqlstate or ""
    )
    away = "the database cannot be reached, or did not take it; send this again later"
    return JSONResponse({"error": away}, status_code=503, headers={"Retry-After": "5"})


async def _let_go(request: Request, error: Any) -> Response:
    return Response(status_code=400)  # the client is gone
