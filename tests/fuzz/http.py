"""Bytes on the metrics port and on the webhook's: broken requests, slow ones, and many at once that say nothing."""

from __future__ import annotations

import contextlib
import hmac
import json
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.fix_webhook import APP_SECRET
from tests.fuzz.stage import Stage

_REQUESTS, _SILENT = 60, 40
_LIMIT_S = 15.0
_EVENT = {
    "event": "messages.upsert", "key": "m-1", "content": "hello", "from": "ada", "chat_id": "chat",
    "timestamp": 1767225600,
}  # fmt: skip
_PATHS = (
    "/",
    "/metrics",
    "/livez",
    "/readyz",
    "/status.json",
    "/webhook",
    "/healthz",
    "//",
    "/%1b%5d0;",
    "/" + "a" * 9_000,
)
_METHODS = ("GET", "POST", "PUT", "HEAD", "TRACE", "OPTIONS", "G\x00T", "", "A" * 300)
_HEADERS = (
    "Host: localhost", "Host: evil.example", "Host:", "Content-Length: -1", "Content-Length: 99999999999999999999",
    "Content-Length: \u0663", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Expect: 100-continue",
    "Connection: close", "Content-Encoding: gzip", "X-Hub-Signature-256: sha256=00", "Upgrade: websocket", ": x",
    "A" * 9_000,
)  # fmt: skip


@contextmanager
def stage() -> Iterator[Stage]:
    with Stage("UTF8", webhook=True) as made:
        yield made


def attack(stage: Stage, dice: random.Random) -> int:
    assert stage.endpoint is not None
    ports = (stage.ports["UTF8"], stage.endpoint.port)
    with ExitStack() as silent:
        for _ in range(_SILENT):
            with contextlib.suppress(OSError):
                link = silent.enter_context(socket.create_connection(("127.0.0.1", dice.choice(ports)), _LIMIT_S))
                link.sendall(b"GET / HT"[: dice.randrange(9)])
        for _ in range(_REQUESTS):
            _send(dice.choice(ports), _request(dice))
    return _REQUESTS + _SILENT


def check(stage: Stage) -> None:
    endpoint = stage.endpoint
    assert endpoint is not None
    assert endpoint.process.poll() is None, f"the endpoint has ended: {endpoint.log[-3000:]}"
    status, _ = endpoint.post(_EVENT)
    assert status == 200, f"a webhook that is well signed is answered {status}"
    assert "Traceback" not in endpoint.log, endpoint.log[-3000:]
    stage.holds("UTF8")


def _request(dice: random.Random) -> bytes:
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(3_000))
    body = _body(dice)
    headers = dice.sample(_HEADERS, dice.randrange(5))
    if dice.random() < 0.7:
        headers += [
            "Host: localhost", f"Content-Length: {len(body)}",
            "X-Hub-Signature-256: sha256=" + hmac.new(APP_SECRET.encode(), body, "sha256").hexdigest(),
        ]  # fmt: skip
    line = f"{dice.choice(_METHODS)} {dice.choice(_PATHS)} HTTP/{dice.choice(('1.1', '1.0', '9', ''))}"
    whole = "\r\n".join([line, *headers, "", ""]).encode() + body
    return whole[: dice.randrange(len(whole) + 1)] if dice.random() < 0.2 else whole


def _body(dice: random.Random) -> bytes:
    values: tuple[Any, ...] = (None, "", 0, 1e308, 10**400, "x" * 3_000, "\x00", "\ud800", [], {}, True, "✅", -1)
    event = {**_EVENT, **{dice.choice([*_EVENT, "more"]): dice.choice(values) for _ in range(dice.randrange(4))}}
    text = json.dumps(event)
    match dice.randrange(5):
        case 0:
            text = "[" * dice.choice((100, 100_000))
        case 1:
            text = text.replace(":", dice.choice((": NaN,", ":", "", "::")), 1)
    return text.encode()


def _send(port: int, request: bytes) -> None:
    """What is answered is not looked at: the answer may be none. That it ends is what counts."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), _LIMIT_S) as link:
        link.sendall(request)
        link.shutdown(socket.SHUT_WR)
        while link.recv(65_536):
            pass
