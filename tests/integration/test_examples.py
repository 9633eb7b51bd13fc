"""The programs in examples/, each in its folder, as its README says. The receivers: test_receivers.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from cdc.cli import cdc as command
from cdc.contrib.demo.temp_server import free_port
from tests.eventually import eventually

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
