"""Who is let in, and what every answer says to a browser.

    Host ──none of ours──> 421        credentials ──nobody's──> 401        a write from another site ──> 403
      └──> who is it? ──> is it ours? ──> the application

A person is known by a login (HTTP Basic, or its secret as a bearer token) or by the header of a proxy that is
believed. Without either everybody is who runs this process: then it listens on a loopback address only.

A browser sends a login with whatever another site makes it send. So a write says where it comes from
(``Sec-Fetch-Site``, ``Origin``), and a form has a token besides, which is of this process and this person. DNS
rebinding needs a name, and only names that are ours are answered to.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cdc.http.server import answers_to

_READS = {"GET", "HEAD", "OPTIONS"}
_REFUSED_AFTER_S = 0.5
"""A secret is guessed twice a second by each of some hundred connections, if at all."""
_NAME_MAX = 200
_BODY_MAX = 1 << 20
"""Of a request: a thousand ids, and some room."""
_ALWAYS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Doors:
    """``logins``: name to secret at the moment. ``header``: of proxies in ``networks``. ``alone``: who it is else."""

    logins: Callable[[], Mapping[str, str]] = dict
    header: str | None = None
    networks: Sequence[str] = ()
    hosts: Collection[str] = ()
    alone: str | None = None
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def person(self, headers: Headers, client: str | None) -> str | None:
        """Who asks; None: nobody who is known."""
        if self.header and self._is_proxy(client) and (names := headers.getlist(self.header)):
            # A proxy that adds its word to that of its client has not said who it is.
            return names[0][:_NAME_MAX] or None if len(names) == 1 else None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            return self._of_basic(given)
        if kind.lower() == "bearer":
            return next((name for name, secret in self.logins().items() if _same(secret, given.strip())), None)
        return self.alone

    def _of_basic(self, given: str) -> str | None:
        try:
            name, _, password = base64.b64decode(given.strip(), validate=True).decode().partition(":")
        except ValueError:  # it is no base64, or not of UTF-8
            return None
        # One that is not there takes as long as one that is, and has a secret that nobody knows.
        return name if _same(self.logins().get(name, self.key.hex()), password) else None

    def _is_proxy(self, client: str | None) -> bool:
        try:
            address = ipaddress.ip_address(client or "")
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address  # as a socket of IPv6 has those of IPv4
        return any(address in ipaddress.ip_network(each) for each in self.networks)

    def token(self, person: str) -> str:
        """Of this person's forms."""
        return hmac.digest(self.key, person.encode(errors="replace"), "sha256").hex()

    def is_token(self, person: str, given: str) -> bool:
        return _same(self.token(person), given)


class Access:
    """ASGI around the application, which finds ``person`` and ``token`` in the state of its request."""

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        self._app = app
        self._doors = doors
        self._names = frozenset(name.lower() for name in doors.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", "the server knows no other protocol"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        answer = _refused_length(headers) or self._refused_name(headers)
        if answer is None:
            person = self._doors.person(headers, scope["client"][0] if scope.get("client") else None)
            answer = await self._refused(scope["method"], headers, person)
            if answer is None:
                assert person is not None
                scope.setdefault("state", {}).update(person=person, token=self._doors.token(person))
        await (answer or self._app)(scope, _bounded(receive), send_with_headers)

    def _refused_name(self, headers: Headers) -> Response | None:
        if answers_to(headers.get("host"), self._names):
            return None
        hint = "ask by an address or as localhost, or allow the name: ui.hosts, --ui-hosts, CDC_UI_HOSTS"
        return PlainTextResponse(f"this interface has no such name; {hint}\n", 421)

    async def _refused(self, method: str, headers: Headers, person: str | None) -> Response | None:
        if person is None:
            if "authorization" in headers:
                await asyncio.sleep(_REFUSED_AFTER_S)
            ask = {"WWW-Authenticate": 'Basic realm="cdc", charset="UTF-8"'} if self._doors.logins() else {}
            return PlainTextResponse("who are you? log in, or give a bearer token\n", 401, ask)
        if (announced := headers.get("content-length", "0")).isdecimal() and int(announced[:20]) > _BODY_MAX:
            return PlainTextResponse(f"a request has {_BODY_MAX} bytes at most\n", 413, {"Connection": "close"})
        if method not in _READS and not _is_ours(headers):
            return PlainTextResponse("this came from another site, and is not done\n", 403)
        return None


def _refused_length(headers: Headers) -> Response | None:
    """Whoever stands before us may have read another length, and what is behind it as ours (RFC 9112, 6.3)."""
    if "transfer-encoding" in headers and "content-length" in headers:
        return PlainTextResponse("a request has one length\n", 400, {"Connection": "close"})
    return None


def _bounded(receive: Receive) -> Receive:
    """Content-Length is only the client's claim. Who sends more than it may is gone for the application."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return {"type": "http.disconnect"} if received > _BODY_MAX else message

    return counted


def _is_ours(headers: Headers) -> bool:
    """Whether a write comes from our own page, or from no browser."""
    if headers.get("sec-fetch-site", "none") not in {"same-origin", "none"}:
        return False
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    except ValueError:  # it is no URL
        return False


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))
