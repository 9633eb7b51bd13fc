"""The page of a running consumer: what it shows, and that it is there when the event loop is not."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

import cdc
from cdc.app.application import App
from cdc.contrib.demo.temp_server import free_port
from cdc.core.router import Router
from cdc.postgres.admin import OutboxAdmin, Stats
from cdc.postgres.outbox import Store
from cdc.postgres.pages import Figures
from tests import handlers_page
from tests.commands_subscription import create
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, metric, slot_name
from tests.fix_outbox import fill

SECRET = "row content"


def ask(port: int, path: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def figures(port: int) -> dict[str, Any]:
    status, _, body = ask(port, "/status.json")
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


async def outbox_of(port: int) -> Any:
    return (await asyncio.to_thread(figures, port))["outbox"]


@asynccontextmanager
async def serving(dsn: str, router: Router, **settings: Any) -> AsyncIterator[tuple[App, int]]:
    """A consumer that answers on a port."""
    port = free_port()
    async with consuming(dsn, router, http_port=port, **settings) as app:
        await asyncio.wait_for(app.consumer.lifecycle.connected.wait(), 20)
        yield app, port


def publish(db: psycopg.Connection, entity_type: str, key: str = "k", **data: Any) -> None:
    db.execute("SELECT publish_change(%s, %s, new_data => %s)", [entity_type, key, json.dumps(data)])


async def test_a_consumer_of_a_subscription_shows_what_is_its_own(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox, "search", "--from", "beginning")
    for entity_type in ("good", "dying"):
        publish(outbox_db, entity_type, secret=SECRET)
    fill(outbox_db, 3, state="dead")
    router = Router()

    @router.on("dying", max_attempts=1)
    async def die(change: cdc.Change) -> None:
        raise ValueError(SECRET)

    @router.on("good")
    @router.on("x")
    async def work(change: cdc.Change) -> None:
        pass

    async with serving(outbox, router, stream=False, subscription="search") as (app, port):

        async def died() -> Any:
            app.components.poller.poll_now(everything=True)
            found = await outbox_of(port)
            return found and found["dead_letters"]

        async def counted() -> Any:
            shown = await asyncio.to_thread(figures, port)
            return shown if any(own["changes"]["dead"] for own in shown["subscriptions"]["known"]) else None

        [letter] = await eventually_async(died, what="the dead letter of search, and none of the default subscription")
        shown = await eventually_async(counted, what="it is counted, too")
    assert letter["entity_type"] == "dying"
    assert (shown["consumer"]["subscription"], shown["consumer"]["paused"]) == ("search", False)
    [own] = shown["subscriptions"]["known"]
    assert (own["name"], own["changes"]["dead"], own["consumers"]) == ("search", 1, 1)
    assert SECRET not in json.dumps(shown)


async def test_it_shows_what_works_waits_and_died_and_no_row_content(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    async with serving(outbox, handlers_page.router, slot_mode="temporary", backoff_base=200) as (app, port):
        for entity_type in ("good", "dying", "failing"):
            publish(outbox_db, entity_type, secret=SECRET)
        publish(outbox_db, "failing", secret=SECRET)

        async def complete() -> Any:
            app.poll_now(everything=True)
            shown = await asyncio.to_thread(figures, port)
            dead = shown["outbox"] and [each for each in shown["outbox"]["dead_letters"] if each["state"] == "dead"]
            # The letters and the counts are two readings.
            counted = {(each["dead"], each["waiting"]) for each in shown["outbox"]["types"]} if dead else set()
            present = shown["slot"] and shown["slot"]["present"]
            return shown if {(1, 0), (0, 1)} <= counted and len(shown["failures"]) == 2 and present else None

        shown = await eventually_async(complete, what="all of it is on the page")
        _, _, text = await asyncio.to_thread(ask, port, "/status.json")
    by_type = {each["entity_type"]: each for each in shown["outbox"]["types"]}
    assert (by_type["dying"]["dead"], by_type["failing"]["waiting"], by_type["failing"]["blocked"]) == (1, 1, 1)
    assert {(each["state"], each["error"].partition(" at ")[0]) for each in shown["outbox"]["dead_letters"]} == {
        ("dead", "ValueError"),
        ("waiting", "KeyError"),
    }
    assert {re.sub(r" at .*", "", each["summary"]) for each in shown["failures"]} == {"ValueError", "KeyError"}
    assert shown["slot"]["health"]["fine"]
    assert (shown["consumer"]["role"], shown["consumer"]["shards"]["owned"]) == ("streaming", 64)
    assert all(check["ok"] for check in shown["consumer"]["checks"])
    assert SECRET not in text


async def test_a_handler_that_blocks_the_event_loop_blocks_neither_the_page_nor_its_figures(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    blocked, seen, answers = threading.Event(), threading.Event(), list[Any]()
    router = Router()

    @router.on("blocking")
    async def block(change: cdc.Change) -> None:
        blocked.set()
        seen.wait(30)

    def look(port: int) -> None:
        if blocked.wait(20):
            answers.extend([ask(port, "/")[0], figures(port)["consumer"]["checks"]])
        seen.set()

    async with serving(outbox, router, stream=False) as (_, port):
        looking = asyncio.create_task(asyncio.to_thread(look, port))
        publish(outbox_db, "blocking")
        await looking
    assert answers[0] == 200
    assert "loop.consumer" in {check["name"] for check in answers[1]}


async def test_off_it_costs_nothing_and_the_root_lists_the_routes(outbox: str) -> None:
    async with serving(outbox, Router(), http_page=False, stream=False) as (_, port):
        status, headers, body = await asyncio.to_thread(ask, port, "/")
        assert (status, body, headers["Content-Type"]) == (
            200,
            "/metrics\n/livez\n/readyz\n",
            "text/plain; charset=utf-8",
        )
        assert (await asyncio.to_thread(ask, port, "/status.json"))[0] == 404
        assert "cdc-page" not in {thread.name for thread in threading.enumerate()}


async def test_without_its_database_the_page_is_there_and_shows_no_old_figures(outbox: str, admin_dsn: str) -> None:
    name = str(conninfo_to_dict(outbox)["dbname"])
    async with serving(outbox, Router(), stream=False) as (app, port):
        await eventually_async(lambda: outbox_of(port), what="a first reading")
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        app.poll_now(everything=True)

        async def gone() -> bool:
            return await outbox_of(port) is None

        await eventually_async(gone, what="the figures go")
        assert (await asyncio.to_thread(ask, port, "/"))[0] == 200
        assert (await asyncio.to_thread(figures, port))["consumer"]["role"] == "sweeping"


async def test_figures_that_cannot_be_read_go_and_the_metrics_stay(
    outbox: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(outbox, Router(), stream=False) as (app, port):
        await eventually_async(lambda: outbox_of(port), what="a first reading")
        monkeypatch.setattr(OutboxAdmin, "stats", lambda self, connection, **bounds: connection.execute("SELECT 1/0"))
        app.poll_now(everything=True)

        async def gone() -> bool:
            return await outbox_of(port) is None

        await eventually_async(gone, what="the figures go")
        assert "no figures of the entity types: DivisionByZero" in caplog.text
        assert metric(app.metrics.registry, "cdc_collector_success", collector="outbox") == 1


async def test_what_takes_long_to_read_is_read_less_often_than_the_rest(
    outbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = list[int](), list[int]()

    def stats(self: OutboxAdmin, connection: psycopg.Connection, **bounds: int) -> Stats:
        threading.Event().wait(0.5)
        slow.append(1)
        return Stats([])

    def figures_counted(self: Store, connection: psycopg.Connection) -> Figures:
        quick.append(1)
        return read(self, connection)

    read = Store.figures
    monkeypatch.setattr(OutboxAdmin, "stats", stats)
    monkeypatch.setattr(Store, "figures", figures_counted)
    async with serving(outbox, Router(), stream=False) as (app, _):

        async def often() -> bool:
            app.poll_now()
            return len(quick) > 20

        await eventually_async(often, what="the metrics are read again and again")
    assert len(slow) == 1


# --- in a browser ----------------------------------------------------------------------------------------------------

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom",
)  # fmt: skip


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert not os.environ.get("CDC_REQUIRE_CHROMIUM"), "CDC_REQUIRE_CHROMIUM is set, and there is no Chromium"
        pytest.skip("no Chromium on the PATH")
    return found


def browse(chromium: str, port: int, profile: Path) -> tuple[str, list[str]]:
    """The page as it is after a moment, and what its console said."""
    done = subprocess.run(
        [chromium, *_FLAGS, f"--user-data-dir={profile}", f"http://127.0.0.1:{port}/"],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@contextmanager
def process(dsn: str, log: Path, port: int) -> Iterator[Process]:
    running = Process(
        dsn, log, handlers="tests.handlers_page:router", http_port=port, slot_name=slot_name(), slot_mode="temporary",
        backoff_base=200,
    )  # fmt: skip
    try:
        yield running
    finally:
        assert running.terminate() == 0


def test_a_browser_shows_the_figures_and_finds_no_fault(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, chromium: str
) -> None:
    port = free_port()
    fill(outbox_db, 3, state="dead")
    for entity_type in ("dying", "failing", *["good"] * 200):
        publish(outbox_db, entity_type, secret=SECRET)
    with process(outbox, tmp_path / "log", port) as running:
        running.wait_for("streaming the slot")
        eventually(lambda: figures(port)["history"]["points"], within_s=40, what="two readings")
        eventually(lambda: len(figures(port)["failures"]) == 2, within_s=40, what="both have failed")
        dom, console = browse(chromium, port, tmp_path / "profile")
    assert console == []
    text = re.sub(r"<(script|style)>.*?</\1>", "", dom, flags=re.DOTALL)
    shown = ("streaming", "well", "64 of 64", "dying", "failing", "ValueError at", "dead letter", "wal2json", "fine")
    for expected in shown:
        assert expected in text, expected
    assert len(re.findall(r'<path class="first"', text)) >= 1, "a line is drawn"
    assert 'hidden="">' in text, "no trouble is told"
    assert SECRET not in dom
