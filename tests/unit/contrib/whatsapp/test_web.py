"""The endpoint, driven as an ASGI server would, with an adapter that needs no database."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg_pool import PoolTimeout

from cdc.cli import cdc
from cdc.contrib.whatsapp.adapter import Adapter, Result
from cdc.contrib.whatsapp.events import InvalidEventError
from cdc.contrib.whatsapp.web import Checks, make_app

SECRET = b"s3cret"
CHECKS = Checks(app_secret=SECRET, verify_token="tökén", body_max=1_000)


class Scripted(Adapter):
    """Remembers what it was given; raises ``error``, if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.given: list[object] = []

    async def process_webhook(self, payload: object, now: object = None) -> Result:
        self.given.append(payload)
        if self.error:
            raise self.error
        return Result.STORED


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def request(
    adapter: Adapter,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    chunks: Iterable[bytes | None] = (b"",),
    *,
    leaves: bool = False,
    checks: Checks = CHECKS,
) -> Answer:
    """A chunk of None never comes. ``leaves``: the client does, before the body has ended."""
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(), "http_version": "1.1",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
    }  # fmt: skip
    answer = Answer()

    async def come() -> AsyncIterator[dict[str, Any]]:
        for chunk in chunks:
            if chunk is None:
                await asyncio.Event().wait()
            yield {"type": "http.request", "body": chunk, "more_body": True}
        yield {"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    async def database_answers() -> None:
        if isinstance(adapter, Scripted) and adapter.error:
            raise adapter.error

    coming = come()
    app = make_app(adapter, checks, database_answers=database_answers)
    await app(scope, lambda: anext(coming), send)
    return answer


def signed(body: bytes, **others: str) -> dict[str, str]:
    signature = "sha256=" + hmac.new(SECRET, body, "sha256").hexdigest()
    return {"Content-Type": "application/json", "X-Hub-Signature-256": signature} | others


async def post(body: bytes, adapter: Adapter | None = None, headers: dict[str, str] | None = None) -> Answer:
    given = signed(body) if headers is None else headers
    return await request(adapter or Scripted(), "POST", "/webhook", given, [body])


async def test_a_signed_event_is_handed_to_the_adapter_and_the_result_answered() -> None:
    adapter = Scripted()
    body = '{"event": "✅"}'.encode()
    half = len(body) // 2
    answer = await request(adapter, "POST", "/webhook", signed(body), [body[:half], b"", body[half:]])
    assert (answer.status, answer.json) == (200, {"result": "stored"})
    assert adapter.given == [{"event": "✅"}]


@pytest.mark.parametrize(
    "signature",
    ["", "sha256=", "sha256=" + "0" * 64, "sha1=" + hmac.new(SECRET, b"{}", "sha1").hexdigest(), "é",
     hmac.new(SECRET, b"{}", "sha256").hexdigest(), "sha256=" + hmac.new(b"other", b"{}", "sha256").hexdigest()],
)  # fmt: skip
async def test_a_body_that_is_not_signed_with_the_secret_goes_no_further(signature: str) -> None:
    adapter = Scripted()
    answer = await post(b"{}", adapter, signed(b"{}") | {"X-Hub-Signature-256": signature})
    assert (answer.status, adapter.given) == (401, [])
    assert "X-Hub-Signature-256" in answer.json["error"]


async def test_one_byte_that_was_changed_on_the_way_is_noticed() -> None:
    assert (await post(b'{"a": 2}', headers=signed(b'{"a": 1}'))).status == 401


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[NaN]", b"[Infinity]", b"\xff", "[]".encode("utf-16"), b"[" * 900, b"1" * 900 + b"x"]
)
async def test_what_is_not_json_in_utf_8_is_said_to_be(body: bytes) -> None:
    answer = await post(body)
    assert (answer.status, answer.json) == (400, {"error": "the body is not JSON in UTF-8"})


@pytest.mark.parametrize("depth", [10_000])
async def test_json_that_is_too_deep_for_the_parser_is_refused_like_any_other(depth: int) -> None:
    body = b"[" * depth + b"]" * depth
    checks = Checks(SECRET, None, body_max=100_000)
    assert (await request(Scripted(), "POST", "/webhook", signed(body), [body], checks=checks)).status == 400


async def test_a_number_of_too_many_digits_is_refused_too() -> None:
    body = b"1" * 10_000
    checks = Checks(SECRET, None, body_max=100_000)
    assert (await request(Scripted(), "POST", "/webhook", signed(body), [body], checks=checks)).status == 400


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {"Content-Type": ""}, {"Content-Type": "application/jsonx"},
     {"Content-Encoding": "gzip"}],
)  # fmt: skip
async def test_another_content_type_is_refused(headers: dict[str, str]) -> None:
    assert (await post(b"{}", headers=signed(b"{}", **headers))).status == 415


async def test_the_charset_may_be_said() -> None:
    assert (
        await post(b"{}", headers=signed(b"{}", **{"Content-Type": "Application/JSON; charset=utf-8"}))
    ).status == 200


async def test_a_body_may_have_so_many_bytes_and_not_one_more() -> None:
    for length, status in ((1_000, 200), (1_001, 413)):
        body = b'"' + b"x" * (length - 2) + b'"'
        assert (await post(body)).status == status


async def test_the_limit_holds_while_the_body_comes_whatever_was_announced() -> None:
    taken = 0

    def endless() -> Iterable[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 100

    for announced in ("10", "99999999999999999999999999999", "-5", "x"):
        answer = await request(
            Scripted(), "POST", "/webhook", signed(b"", **{"Content-Length": announced}), endless()
        )  # fmt: skip
        assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert taken <= 3 * 11, "and no more of it is read"


async def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    checks = replace(CHECKS, body_limit_s=0.01)
    answer = await request(Scripted(), "POST", "/webhook", signed(b"{}"), [b"{", None], checks=checks)
    assert answer.status == 408


async def test_a_client_that_leaves_is_no_error() -> None:
    adapter = Scripted()
    await request(adapter, "POST", "/webhook", signed(b"{}"), [b"{}"], leaves=True)
    assert adapter.given == []


async def test_what_the_adapter_rejects_is_answered_with_its_sentence() -> None:
    answer = await post(b"{}", Scripted(InvalidEventError("key: field required")))
    assert (answer.status, answer.json) == (422, {"error": "key: field required"})


@pytest.mark.parametrize(
    "error", [psycopg.OperationalError("row 4711"), PoolTimeout("x"), psycopg.errors.UndefinedTable("x")]
)
async def test_a_database_that_is_unavailable_is_503_and_nothing_of_the_error_is_shown(error: Exception) -> None:
    answer = await post(b"{}", Scripted(error))
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "4711" not in answer.json["error"]
    assert (await request(Scripted(error), "GET", "/healthz")).status == 503


async def test_healthz_is_fine_while_the_database_answers() -> None:
    assert (await request(Scripted(), "GET", "/healthz")).status == 200


def subscription(**changes: str) -> str:
    asked = {"hub.mode": "subscribe", "hub.verify_token": "tökén", "hub.challenge": "1158201444"} | {
        f"hub.{name}": value for name, value in changes.items()
    }
    return "/webhook?" + "&".join(f"{name}={quote(value)}" for name, value in asked.items())


async def test_a_subscription_is_verified_by_sending_the_challenge_back() -> None:
    answer = await request(Scripted(), "GET", subscription())
    assert (answer.status, answer.body) == (200, b"1158201444")
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"verify_token": "guess"}, 403),
        ({"verify_token": ""}, 403),
        ({"mode": "unsubscribe"}, 400),
        ({"challenge": ""}, 400),
        ({"challenge": "x" * 1_001}, 400),
    ],
)
async def test_a_subscription_that_is_not_in_order_is_refused(changes: dict[str, str], status: int) -> None:
    assert (await request(Scripted(), "GET", subscription(**changes))).status == status


async def test_without_a_verify_token_no_subscription_is_verified() -> None:
    checks = Checks(SECRET, None, 1_000)
    for token in ("", "None"):
        answer = await request(Scripted(), "GET", subscription(verify_token=token), checks=checks)
        assert answer.status == 403


@pytest.mark.parametrize(
    ("method", "path", "status"), [("PUT", "/webhook", 405), ("GET", "/", 404), ("POST", "/healthz", 405)]
)
async def test_everything_else_is_refused_in_json(method: str, path: str, status: int) -> None:
    answer = await request(Scripted(), method, path)
    assert (answer.status, list(answer.json)) == (status, ["error"])


@settings(deadline=None)
@example(b"0", False, {})
@given(st.binary(max_size=1_100), st.booleans(), st.dictionaries(
    st.sampled_from(["Content-Type", "Content-Length", "X-Hub-Signature-256", "Content-Encoding"]),
    st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"])),
))  # fmt: skip
async def test_whatever_is_posted_the_answer_is_one_of_a_few(body: bytes, sign: bool, headers: dict[str, str]) -> None:
    adapter = Scripted()
    answer = await post(body, adapter, (signed(body) if sign else {}) | headers)
    assert answer.status in {200, 400, 401, 413, 415}
    assert (answer.status == 200) == bool(adapter.given)
    assert sign or not adapter.given


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_without_its_libraries_the_endpoint_does_not_start_and_names_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_WHATSAPP_APP_SECRET", "x")
    again = [
        name
        for name in sys.modules
        if name.startswith((f"{missing}.", "cdc.contrib.whatsapp.", "cdc.runtime.web_server", "cdc.runtime.http_"))
    ]
    for module in again:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("cdc.runtime.web_server", raising=False)  # the package has it, too
    monkeypatch.setitem(sys.modules, missing, None)
    refused = CliRunner().invoke(cdc, ["whatsapp", "serve"])
    assert refused.exit_code == 2
    assert f"the endpoint needs {missing}" in refused.stderr
    assert "pip install 'cdc-consumer[whatsapp]'" in refused.stderr
