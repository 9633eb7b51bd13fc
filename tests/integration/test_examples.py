"""The programs in examples/, each in its folder, as its README says. The receivers: test_receivers.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from cdc.cli import cdc as command
from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually
from tests.fix_brokers import NatsServer
from tests.fix_consumer import settled

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_RUN = [sys.executable, "-m", "cdc", "run", "--handlers", "handlers:router", "--http-port", "0"]
_END_S = 30

Start = Callable[[str, list[str]], Callable[[], str]]


@pytest.fixture
def orders(outbox: str, outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute((_EXAMPLES / "orders.sql").read_text())
    tracked = CliRunner().invoke(
        command, ["track", "orders", "--type", "order", "--exclude", "card_number"], env={"CDC_DSN": outbox}
    )
    assert tracked.exit_code == 0, tracked.output
    return outbox_db


@pytest.fixture
def start(outbox: str, tmp_path: Path) -> Iterator[Start]:
    """Runs a command in an example's folder and returns what it has said so far; at the end it is to stop in peace."""
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "log"

    def begin(folder: str, arguments: list[str]) -> Callable[[], str]:
        with log.open("w") as said:
            started.append(
                subprocess.Popen(
                    arguments, cwd=_EXAMPLES / folder, env={**os.environ, "CDC_DSN": outbox}, stdout=said, stderr=said
                )
            )
        return log.read_text

    try:
        yield begin
        for process in started:
            process.send_signal(signal.SIGTERM)
            # uvicorn shuts down, and then ends by the signal it was sent.
            assert process.wait(_END_S) in {0, -signal.SIGTERM}, log.read_text()
            assert "Traceback" not in log.read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()


def _order(db: psycopg.Connection, customer: str = "Ada", total: str = "12.50") -> None:
    db.execute("INSERT INTO orders (customer, total, card_number) VALUES (%s, %s, '4111')", [customer, total])


def test_the_quickstart_says_what_comes_in(orders: psycopg.Connection, start: Start) -> None:
    said = start("quickstart", _RUN)
    _order(orders)
    orders.execute("UPDATE orders SET total = 15")
    eventually(lambda: "order 1 now costs 15.00" in said(), what="the update is told")
    assert "new order 1 of Ada" in said()
    assert "4111" not in said()


def test_the_transactional_one_writes_each_invoice_once(orders: psycopg.Connection, start: Start) -> None:
    start("transactional", _RUN)
    for _ in range(20):
        _order(orders)
    invoices = "SELECT count(*), sum(total) FROM invoices"
    eventually(lambda: orders.execute(invoices).fetchone() == (20, 250), what="an invoice for each order")


def test_the_one_for_batches_indexes_all_but_the_bad_ones(orders: psycopg.Connection, start: Start) -> None:
    for customer in ("Ada", " ", "Grace"):
        _order(orders, customer)
    orders.execute("UPDATE orders SET customer = 'Ada Lovelace' WHERE id = 1")
    start("batches", _RUN)
    found = "SELECT array_agg(order_id ORDER BY order_id) FROM order_search WHERE words @@ 'lovelace | grace'"
    eventually(lambda: orders.execute(found).fetchone() == ([1, 3],), what="the good ones are found")
    dead = "SELECT entity_id FROM entity_changes WHERE dead_at IS NOT NULL"
    eventually(lambda: orders.execute(dead).fetchall() == [("2",)], what="the bad one is a dead letter")


def test_the_sink_sends_what_its_handler_made_of_an_order(
    orders: psycopg.Connection, start: Start, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(nats_server.prepare())
    monkeypatch.setenv("BROKER_URL", nats_server.url())
    start("sink", _RUN)
    _order(orders)
    orders.execute("UPDATE orders SET customer = 'Grace'")
    orders.execute("UPDATE orders SET total = 15")
    eventually(lambda: settled(orders), what="all is handled")
    first, second = asyncio.run(nats_server.received())
    assert json.loads(first.body) == {"order": "1", "total": 12.5}
    assert json.loads(second.body) == {"order": "1", "total": 15}


def test_the_embedded_consumer_works_inside_its_program(orders: psycopg.Connection, start: Start) -> None:
    said = start("embedded_asyncio", [sys.executable, "main.py"])
    _order(orders)
    eventually(lambda: "new order 1\n" in said(), what="the order is seen")


def test_the_web_application_shows_what_its_consumer_has_seen(orders: psycopg.Connection, start: Start) -> None:
    port = free_port()
    said = start("fastapi", [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)])
    eventually(lambda: "Uvicorn running on" in said(), what="it listens")
    _order(orders)

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    eventually(lambda: get("/orders/seen") == '["1"]', what="the order is seen")
    assert get("/healthz") == '"ok"'


@pytest.fixture
def posted() -> Iterator[list[dict[str, Any]]]:
    """What a webhook got so far; its address is in WEBHOOK_URL."""
    got: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Webhook) as server, pytest.MonkeyPatch.context() as patch:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        patch.setenv("WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/")
        try:
            yield got
        finally:
            server.shutdown()
            serving.join()


# What a receiver of each tool reads, of an INSERT, an UPDATE and a DELETE of one row, of a READ, and of an UPDATE that
# was published without the old row; the rest differs from run to run.
_NEW, _OLD = {"id": 1, "customer": "Ada", "total": 15.0}, {"id": 1, "customer": "Ada", "total": 12.5}
_PAYLOADS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "hasura": lambda body: (body["event"]["op"], body["event"]["data"]["old"], body["event"]["data"]["new"]),
    "supabase": lambda body: (body["type"], body["old_record"], body["record"]),
    "sequin": lambda body: (body["action"], body["changes"], body["record"]),
    "debezium": lambda body: (body["op"], body["before"], body["after"]),
}
_EXPECTED = {
    "hasura": [
        ("INSERT", None, _OLD),
        ("UPDATE", _OLD, _NEW),
        ("DELETE", _NEW, None),
        ("INSERT", None, _NEW),
        ("UPDATE", None, _NEW),
    ],
    "supabase": [
        ("INSERT", None, _OLD),
        ("UPDATE", _OLD, _NEW),
        ("DELETE", _NEW, None),
        ("INSERT", None, _NEW),
        ("UPDATE", None, _NEW),
    ],
    "sequin": [
        ("insert", None, _OLD),
        ("update", {"total": 12.5}, _NEW),
        ("delete", None, _NEW),
        ("read", None, _NEW),
        ("update", None, _NEW),
    ],
    "debezium": [
        ("c", None, _OLD),
        ("u", _OLD, _NEW),
        ("d", _NEW, None),
        ("r", None, _NEW),
        ("u", None, _NEW),
    ],
}


@pytest.mark.parametrize("shape", _PAYLOADS)
def test_a_receiver_of_another_tool_gets_the_payload_it_knows(
    orders: psycopg.Connection,
    start: Start,
    posted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
) -> None:
    monkeypatch.setenv("SHAPE", shape)
    start("payloads", _RUN)
    _order(orders)
    orders.execute("UPDATE orders SET total = 15")
    orders.execute("DELETE FROM orders")
    for operation in ("READ", "UPDATE"):
        orders.execute("SELECT publish_change('order', '1', %s, %s)", [operation, json.dumps(_NEW)])
    eventually(lambda: len(posted) == 5, what="five changes are posted")
    assert [_PAYLOADS[shape](body) for body in posted] == _EXPECTED[shape]
