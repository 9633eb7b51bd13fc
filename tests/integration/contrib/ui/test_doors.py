"""Who is let in over the network, and what each answer says to a browser."""

from __future__ import annotations

import base64
import socket
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from starlette.datastructures import Headers

from cdc.contrib.ui.access import Doors
from tests.commands import refused
from tests.fix_ui import ask, failed, serving

SECRET = "a-secret-of-some-length"
LOGIN = {"Authorization": "Basic " + base64.b64encode(f"anna:{SECRET}".encode()).decode()}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def test_nobody_gets_anything_without_a_login(outbox: str, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 1)
    with serving(outbox, Doors(logins=lambda: {"anna": SECRET})) as address:
        for path in ("/", "/changes", "/style.css", "/api/changes", "/api/openapi.json", "/nothing"):
            status, said, headers = ask(address, path)
            assert (status, headers["www-authenticate"].partition(" ")[0]) == (401, "Basic"), path
            assert "mail" not in str(said)
            assert ask(address, path, headers=LOGIN)[0] == (404 if path == "/nothing" else 200)
        wrong = {"Authorization": "Bearer wrong"}
        assert ask(address, "/api/changes", headers=wrong)[0] == 401
        assert ask(address, "/api/changes", headers={"Authorization": f"Bearer {SECRET}"})[0] == 200


def test_a_write_of_another_site_or_without_the_token_of_the_form_is_not_done(
    outbox: str, outbox_db: psycopg.Connection, interface: str
) -> None:
    failed(outbox_db, 1)
    form = b"deed=discard&change=1&because=x&at_most=1"
    body = {"changes": [1], "because": "x"}
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"},
                    {"Sec-Fetch-Site": "same-site"}):  # fmt: skip
        assert ask(interface, "/decide", raw=form, headers={**FORM, **foreign})[0] == 403
        assert ask(interface, "/api/changes/discard", body, headers=foreign)[0] == 403
    assert ask(interface, "/decide", raw=form, headers=FORM)[0] == 400, "no token"
    assert ask(interface, "/api/changes/discard", raw=b"{}", headers={"Content-Type": "text/plain"})[0] == 422
    assert outbox_db.execute("SELECT dead_at IS NOT NULL FROM entity_changes").fetchone() == (True,)


def test_only_names_that_are_ours_are_answered_to(outbox: str) -> None:
    with serving(outbox, Doors(alone="me", hosts=("ops.example.org",))) as address:
        for name, status in (("evil.example", 421), ("ops.example.org", 200), ("OPS.example.org:9465", 200),
                             ("localhost", 200), ("127.0.0.1:1", 200)):  # fmt: skip
            assert ask(address, "/", headers={"Host": name})[0] == status, name


def test_every_answer_forbids_scripts_frames_and_caches(interface: str) -> None:
    for path in ("/", "/style.css", "/api/changes", "/nothing", "/changes/none"):
        headers = {name.lower(): value for name, value in ask(interface, path)[2].items()}
        assert "script-src" not in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_what_no_page_of_ours_sends_is_refused_without_a_fault(interface: str) -> None:
    for body in (
        b"x" * 300_000,
        b"&".join(b"a=%d" % n for n in range(5_000)),
        b"\xff\xfe=%00",
        b"change=" + b"1" * 2_000,
    ):
        assert ask(interface, "/confirm", raw=body, headers=FORM)[0] == 400
    for path in ("/changes?state=no", "/changes?after=x", "/changes?since=soon", "/changes/%00", "/actions?before=x"):
        assert ask(interface, path)[0] == 400, path


def test_what_is_no_page_is_said_in_the_form_that_was_asked_for(interface: str) -> None:
    for path in ("/api/changes/a%0Ab", "/api/%0A", "/api/nothing", "/api/changes/1/2"):
        status, said, _ = ask(interface, path)
        assert (status, said["error"]) == (404, "Not Found"), path
    for path in ("/nothing", "/changes/1/2", "/style.css/x"):
        status, said, _ = ask(interface, path)
        assert status == 404
        assert "there is no such page" in said, path
    assert ask(interface, "/decide")[0] == 405


@pytest.mark.parametrize("options", [("--ui-host", "0.0.0.0"), ("--ui-host", "::")])
def test_it_listens_beyond_this_machine_with_a_login_only(outbox: str, options: tuple[str, str]) -> None:
    said = refused(outbox, "ui", "--ui-port", "0", *options)
    assert "without a login" in said
    assert "CDC_UI_LOGINS_FILE" in said


def test_a_secret_is_never_said(outbox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "logins"
    file.write_text(f"anna:{SECRET}\nben:short")
    monkeypatch.setenv("CDC_UI_LOGINS_FILE", str(file))
    said = refused(outbox, "ui")
    assert "line 2 is not NAME:SECRET" in said
    assert SECRET not in said


def _raw(address: str, line: str, *headers: bytes, body: bytes = b"") -> tuple[int, str]:
    """What is sent as it is, on a connection of its own: the status and the whole answer. Status 0: none came."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as link:
        names = (b"Host: " + address.removeprefix("http://").encode(), *headers)
        if _KEPT not in headers:
            names = (*names, b"Connection: close")
        with suppress(OSError):  # it may have answered, and closed, before all is sent
            link.sendall(line.encode() + b"\r\n" + b"\r\n".join(names) + b"\r\n\r\n" + body)
        said = bytearray()
        with suppress(OSError):
            while piece := link.recv(65_536):
                said += piece
    text = said.decode("utf-8", "replace")
    return (int(text.split(" ", 2)[1]) if text.startswith("HTTP/1.1 ") else 0), text


_KEPT = b"Connection: keep-alive"
_LOGIN = b"Authorization: " + LOGIN["Authorization"].encode()
_DECIDE, _CHUNKED = "POST /decide HTTP/1.1", b"Transfer-Encoding: chunked"
_TEN_MB = b"".join(b"10000\r\n" + b"a" * 65_536 + b"\r\n" for _ in range(160)) + b"0\r\n\r\n"


@pytest.mark.parametrize(("line", "headers", "body", "status"), [
    ("GET / HTTP/1.1", (b"Authorization: Basic \xff\xfe",), b"", 401),
    ("GET / HTTP/1.1", (b"Authorization: Basic YW5uYQ==",), b"", 401),
    ("GET / HTTP/1.1", (b"Authorization: Bearer \xff",), b"", 401),
    ("GET / HTTP/1.1", (b"Authorization: Bearer wrong", _LOGIN), b"", 401),
    ("GET / HTTP/1.1", (b"X-Forwarded-User: root", b"X-Forwarded-For: 10.0.0.1, 10.0.0.2"), b"", 401),
    ("GET / HTTP/1.1", (b"X-Forwarded-User: root", b"Forwarded: for=10.0.0.1"), b"", 401),
    ("GET http://evil.example/ HTTP/1.1", (_LOGIN,), b"", 404),
    ("GET /changes/\0 HTTP/1.1", (_LOGIN,), b"", 400),
    ("GET / HTTP/1.1", (_LOGIN, b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"), b"", 200),
    (_DECIDE, (_LOGIN, b"Origin: http://[", b"Content-Length: 0"), b"", 403),
    (_DECIDE, (_LOGIN, b"Origin: http://\xff\xfe", b"Content-Length: 0"), b"", 403),
    (_DECIDE, (_LOGIN, _KEPT, b"Content-Length: 5", _CHUNKED), b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n", 400),
    (_DECIDE, (_LOGIN, b"Content-Length: 5", b"Content-Length: 50"), b"a" * 5, 400),
    (_DECIDE, (_LOGIN, b"Content-Length: 10000000"), b"a" * 100, 413),
    (_DECIDE, (_LOGIN, _CHUNKED), _TEN_MB, 400),
    ("POST /api/limits HTTP/1.1", (_LOGIN, _CHUNKED, b"Content-Type: application/json"), _TEN_MB, 400),
    *((f"{method} {path} HTTP/1.1", (_LOGIN,), b"", 405) for path in ("/decide", "/changes", "/api/limits")
      for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONE")),
])  # fmt: skip
def test_a_stranger_s_request_gets_a_sentence_and_no_fault(
    *, outbox: str, line: str, headers: tuple[bytes, ...], body: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    doors = Doors(logins=lambda: {"anna": SECRET}, header="X-Forwarded-User", networks=("10.0.0.0/8",))
    with serving(outbox, doors) as address:
        found, said = _raw(address, line, *headers, body=body)
    assert found == status, said[:500]
    assert said.count("HTTP/1.1 ") == 1, "what is behind it is not taken for another request"
    if "Invalid HTTP" not in said:
        assert "content-security-policy: default-src 'none'" in said.lower()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("client", "sent", "who"), [
    ("10.1.2.3", ["ada"], "ada"), ("::ffff:10.1.2.3", ["ada"], "ada"), ("10.1.2.3", ["root", "ada"], None),
    ("10.1.2.3", [], None), ("10.1.2.3", [""], None), ("11.1.2.3", ["ada"], None), ("fd00::1", ["ada"], None),
    ("not an address", ["ada"], None), (None, ["ada"], None),
])  # fmt: skip
def test_the_word_of_a_proxy_is_believed_of_its_network_and_if_it_is_one(
    client: str | None, sent: list[str], who: str | None
) -> None:
    doors = Doors(header="X-Forwarded-User", networks=("10.0.0.0/8",))
    assert doors.person(Headers(raw=[(b"x-forwarded-user", name.encode()) for name in sent]), client) == who
