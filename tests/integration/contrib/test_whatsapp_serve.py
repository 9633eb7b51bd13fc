"""The endpoint as a process, with a database that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc
from cdc.contrib.whatsapp.serve import Lately
from cdc.postgres import migrations
from tests.eventually import eventually
from tests.fix_proxy import Proxy
from tests.fix_webhook import Endpoint

EVENT = {
    "event": "messages.upsert", "key": "m-1", "content": "hello", "from": "ada", "chat_id": "chat",
    "timestamp": 1767225600,
}  # fmt: skip


@pytest.fixture
def tables(outbox_db: psycopg.Connection) -> psycopg.Connection:
    migrations.install(outbox_db, "public", ["whatsapp"])
    return outbox_db


def test_an_event_is_stored_captured_and_answered_and_a_stop_is_exit_0(
    outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    endpoint = Endpoint(outbox, tmp_path / "log")
    endpoints.append(endpoint)
    assert endpoint.post(EVENT) == (200, {"result": "stored"})
    assert endpoint.post(EVENT) == (200, {"result": "stale"})
    assert endpoint.post(EVENT | {"key": ""})[0] == 422
    assert tables.execute("SELECT entity_type, entity_id FROM entity_changes").fetchall() == [("message", "m-1")]
    assert endpoint.ask("/healthz") == 200
    endpoint.process.send_signal(signal.SIGTERM)
    assert endpoint.process.wait(20) == 0, endpoint.log
    assert "hello" not in endpoint.log
    assert "Traceback" not in endpoint.log


def test_a_role_needs_no_more_than_the_tables_that_are_written(
    outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    """The statements of docs/guides/whatsapp.md."""
    granted = (Path(__file__).parents[3] / "docs/guides/whatsapp.md").read_text().partition("CREATE ROLE webhook")[2]
    tables.execute("DROP ROLE IF EXISTS webhook")
    tables.execute(("CREATE ROLE webhook" + granted.partition("```")[0]).encode())
    try:
        endpoint = Endpoint(make_conninfo(outbox, user="webhook"), tmp_path / "log")
        endpoints.append(endpoint)
        reaction = EVENT | {"event": "messages.reaction", "message_id": "m-1", "reaction": "✅"}
        for event in (EVENT, reaction, reaction | {"reaction": "", "timestamp": 1767225601}):
            assert endpoint.post(event) == (200, {"result": "stored"}), endpoint.log
    finally:
        tables.execute("DROP OWNED BY webhook CASCADE; DROP ROLE webhook")


def test_while_the_database_is_away_events_are_503_and_afterwards_the_first_one_is_stored(
    outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    proxy = Proxy(outbox)
    proxy.start()
    try:
        endpoint = Endpoint(proxy.dsn, tmp_path / "log")
        endpoints.append(endpoint)
        assert endpoint.post(EVENT)[0] == 200
        proxy.refuse()
        status, answer = endpoint.post(EVENT | {"key": "m-2"})
        assert status == 503
        assert "send this again later" in answer["error"]
        assert endpoint.ask("/healthz") == 503
        proxy.open()
        eventually(lambda: endpoint.ask("/healthz") == 200)
        assert endpoint.post(EVENT | {"key": "m-2"}) == (200, {"result": "stored"})
    finally:
        proxy.stop()


def test_a_request_that_never_ends_does_not_keep_others_waiting(
    outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    endpoint = Endpoint(outbox, tmp_path / "log")
    endpoints.append(endpoint)
    with socket.create_connection(("127.0.0.1", endpoint.port)) as slow:
        slow.sendall(
            b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert endpoint.post(EVENT)[0] == 200
        endpoint.process.send_signal(signal.SIGTERM)
        assert endpoint.process.wait(40) == 0, endpoint.log


def test_without_a_secret_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CDC_WHATSAPP_APP_SECRET", raising=False)
    refused = CliRunner().invoke(cdc, ["whatsapp", "serve"])
    assert refused.exit_code == 2
    assert "CDC_WHATSAPP_APP_SECRET" in refused.stderr


def test_an_address_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_WHATSAPP_APP_SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = CliRunner().invoke(cdc, ["whatsapp", "serve", "--whatsapp-port", str(port)])
    assert refused.exit_code == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in refused.stderr


@pytest.mark.parametrize("host", ["\u202e", "x" * 5_000, "nosuch.invalid"])
def test_a_host_that_is_none_is_one_sentence(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_WHATSAPP_APP_SECRET", "x")
    refused = CliRunner().invoke(cdc, ["whatsapp", "serve", "--whatsapp-host", host])
    assert refused.exit_code == 1
    assert "no host has such a name" in refused.stderr


def test_the_settings_show_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter\n")
    monkeypatch.setenv("CDC_WHATSAPP_APP_SECRET", "hunter")
    monkeypatch.setenv("CDC_WHATSAPP_SENDER_TOKEN_FILE", str(tmp_path / "token"))
    for arguments in (["config", "show"], ["config", "show", "--json"]):
        shown = CliRunner().invoke(cdc, arguments)
        assert shown.exit_code == 0
        assert "(secret)" in shown.stdout
        assert "hunter" not in shown.output


@pytest.mark.parametrize(
    "said",
    [b"", b"POST /webhook HTTP/1.1\r\nHost: x\r\n", b"POST /webhook HTTP/1.1\r\nContent-Length: 9\r\nHost: x\r\n\r\n{"],
)
def test_webhooks_are_taken_beside_any_number_of_connections_that_do_not_come_to_a_request(
    outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path, said: bytes
) -> None:
    endpoint = Endpoint(outbox, tmp_path / "log")
    endpoints.append(endpoint)
    crowd = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) for _ in range(450)]
    try:
        for each in crowd:
            each.send(said)
        for number in range(5):
            assert endpoint.post(EVENT | {"key": f"m-{number}"}) == (200, {"result": "stored"})
        assert endpoint.ask("/healthz") == 200
        assert len(list(Path(f"/proc/{endpoint.process.pid}/fd").iterdir())) < 450
        for each in crowd[-10:]:
            with contextlib.suppress(ConnectionResetError):
                while each.recv(1000):
                    pass
    finally:
        for each in crowd:
            each.close()


def test_requests_that_follow_one_another_on_a_connection_have_their_time_each(
    outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    endpoint = Endpoint(outbox, tmp_path / "log")
    endpoints.append(endpoint)
    asked = b"GET /webhook HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as link:
        for pieces in ([asked], [asked[:20], asked[20:]], [asked + asked[:30], asked[30:]]):
            for piece in pieces:
                link.sendall(piece)
        said = b""
        while said.count(b"HTTP/1.1 400") < 4:
            said += link.recv(10_000)
        link.sendall(asked[:20])
        with contextlib.suppress(ConnectionResetError):
            while more := link.recv(10_000):
                said += more
    assert said.count(b"HTTP/1.1") == 4


async def test_the_database_is_asked_once_a_second_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise psycopg.OperationalError("away")

    lately = Lately(ask)
    await asyncio.gather(*(lately() for _ in range(100)))
    assert asked == 1
    monkeypatch.setattr("cdc.contrib.whatsapp.serve._ASKED_AGAIN_S", 0.0)
    with pytest.raises(psycopg.OperationalError):
        await lately()
    monkeypatch.setattr("cdc.contrib.whatsapp.serve._ASKED_AGAIN_S", 60.0)
    with pytest.raises(psycopg.OperationalError):
        await lately()
    assert asked == 2


@pytest.mark.parametrize("asked", ["POST /webhook", "POST /nothing", "HEAD /nothing"])
def test_a_body_that_breaks_the_protocol_is_answered_once_and_logged_in_one_line(
    asked: str, outbox: str, tables: psycopg.Connection, endpoints: list[Endpoint], tmp_path: Path
) -> None:
    """Together with its head, when the request is not answered yet, and after it, when it may be."""
    endpoint = Endpoint(outbox, tmp_path / "log")
    endpoints.append(endpoint)
    head = f"{asked} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for pieces in ([f"{head}no length\r\n"], [head, "no length\r\n"], [f"{head}1\r\n{{\r\n", "no length\r\n"]):
        with socket.create_connection(("127.0.0.1", endpoint.port), 10) as link:
            for number, piece in enumerate(pieces):
                if number and asked != "POST /webhook":
                    link.recv(65_536)  # it is answered before its body has come
                link.sendall(piece.encode())
            received = b""
            with contextlib.suppress(ConnectionError):
                while more := link.recv(65_536):
                    received += more
        assert received.count(b"HTTP/1.1 ") <= 1
    assert endpoint.post(EVENT) == (200, {"result": "stored"})
    assert "Invalid HTTP request received." in endpoint.log
    assert "Traceback" not in endpoint.log
