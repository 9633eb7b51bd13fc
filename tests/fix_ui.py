"""cdc ui beside the test, and a real Chromium that looks at it."""

from __future__ import annotations

import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, sync_playwright
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.ui.access import Doors
from cdc.contrib.ui.operations import Source
from cdc.contrib.ui.serve import make_app
from cdc.core.router import Router
from cdc.diagnostics.facts import Subject
from cdc.postgres import grants
from cdc.postgres.grants import Grantee
from cdc.runtime import web_server
from tests.eventually import eventually

ALONE = Doors(alone="anna")


@contextmanager
def serving(dsn: str, doors: Doors = ALONE, router: Router | None = None) -> Iterator[str]:
    """The interface on a port of its own; its address."""
    subject = Subject(dsn=dsn, stream_dsn=dsn, schema="public", slot="cdc", streams=False)
    source = Source(dsn, "public", slot="cdc", subject=subject, router=router)
    with web_server.listening("127.0.0.1", 0, options="") as listener:
        server = uvicorn.Server(web_server.configured(make_app(source, doors)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            eventually(lambda: server.started, what="the interface answers")
            yield f"http://{web_server.address(listener)}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture
def interface(outbox: str) -> Iterator[str]:
    with serving(outbox) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer: while it is there, a loop runs in this thread, and no test may start another one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CDC_REQUIRE_CHROMIUM"):
            raise AssertionError("there is no Chromium: deploy/debian-setup --with-browser installs it")
        pytest.skip("there is no Chromium")
    with sync_playwright() as playwright:
        # No sandbox: the tests run as root in a container, and look at pages of our own.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """What a page says to the console, or a script that would run, is an error."""
    context = browser.new_context()
    opened, said = context.new_page(), list[str]()

    def dismissed(dialog: Dialog) -> None:
        said.append(f"a script ran: {dialog.message}")
        dialog.dismiss()

    def noted(message: ConsoleMessage) -> None:
        if "Content Security" in message.text:
            said.append(message.text)

    opened.on("dialog", dismissed)
    opened.on("console", noted)
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    context.close()
    assert said == []


def because(page: Page, reason: str, button: str) -> None:
    page.get_by_label("Why?").fill(reason)
    page.get_by_role("button", name=button, exact=True).click()


@contextmanager
def granted(dsn: str, db: psycopg.Connection, kind: Callable[[str], Grantee]) -> Iterator[str]:
    """The DSN of a role of this kind, which is dropped in the end."""
    [(name,)] = db.execute("SELECT 'granted_' || current_database()").fetchall()
    role = sql.Identifier(name)
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        grants.grant(db, "public", [kind(name)])
        yield make_conninfo(dsn, user=name)
    finally:
        db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


@pytest.fixture
def reader(outbox: str, outbox_db: psycopg.Connection) -> Iterator[str]:
    """The DSN of a role that was granted --readonly."""
    with granted(outbox, outbox_db, grants.reader) as dsn:
        yield dsn


def ask(
    address: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, raw: bytes | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Status, what JSON says or the text, and the headers."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        address + path, data, {**({"Content-Type": "application/json"} if data else {}), **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, text, said = answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as refused:
        status, text, said = refused.code, refused.read().decode(), dict(refused.headers)
    is_json = said.get("Content-Type", said.get("content-type", "")).startswith("application/json")
    return status, json.loads(text) if is_json else text, said


def failed(db: psycopg.Connection, count: int, entity_type: str = "mail", error: str = "SMTPError") -> None:
    """So many dead letters, each of a key of its own: k0, k1, ..."""
    db.execute(
        'SELECT publish_change(%s, \'k\' || n, \'UPDATE\', \'{"to": "ada", "n": 1.10}\', \'{"to": "bob"}\')'
        " FROM generate_series(0, %s - 1) AS n",
        [entity_type, count],
    )
    db.execute(
        "UPDATE entity_changes SET dead_at = now(), error_count = 3, error_kind = %s, error_summary = %s,"
        " last_error = %s WHERE NOT processed AND dead_at IS NULL AND entity_type = %s",
        [error, f"{error} at f.py:1", f"{error}: 550 no", entity_type],
    )
