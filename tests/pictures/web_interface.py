"""docs/pictures/ui-*.png: the web interface of a shop whose mails fail. ``make pictures`` takes them.

Needs Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import psycopg
from playwright.sync_api import Browser, sync_playwright

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.limits import Limit, LimitSetting
from cdc.core.model import SHARDS
from cdc.core.pauses import Pause
from cdc.core.router import Router
from cdc.postgres import migrations
from cdc.postgres.controls import Controls
from cdc.postgres.limit_admin import LimitAdmin
from cdc.postgres.shard_locks import lock_class
from cdc.postgres.subscriptions import Subscriptions
from tests.fix_ui import ALONE, failed, serving

FOLDER = Path(__file__).resolve().parents[2] / "docs/pictures"
_PUBLISH = "SELECT publish_change(%s, n::text, new_data => '{\"total\": 12.5}') FROM generate_series(1, %s) AS n"
# In the last minute, each some milliseconds after its change.
_PROCESS = """
UPDATE entity_changes SET processed = true, processed_at = now(),
  changed_at = now() - make_interval(secs => 0.004 + 0.03 * (seq % 17) / 17)
WHERE NOT processed AND dead_at IS NULL
"""
_ATTEMPTS = """
INSERT INTO change_attempts (seq, subscription, attempt, handler, started_at, ended_at, outcome, error_kind,
                             error_class, error_text, frames)
SELECT c.seq, 'default', a, 'send_mail', now() - interval '40 s' * (4 - a), now() - interval '40 s' * (4 - a),
       CASE a WHEN 3 THEN 'dead' ELSE 'retried' END, 'SMTPError', 'smtplib.SMTPError', '550 mailbox unavailable',
       ARRAY['handlers.py:41 in send_mail', 'smtplib.py:908 in sendmail']
FROM entity_changes AS c CROSS JOIN generate_series(1, 3) AS a WHERE c.dead_at IS NOT NULL ORDER BY a, c.seq
"""
_CONSUMERS = (26, 19, 19)
"""Shards of each."""


def _router() -> Router:
    router = Router()
    for entity_type, name in (("mail", "send_mail"), ("order", "invoice"), ("product", "index")):
        router.on(entity_type, name=name)(lambda _change: None)
    return router


def _shop(db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    for entity_type, count in (("order", 240), ("product", 96)):
        db.execute(_PUBLISH, [entity_type, count])
    db.execute(_PROCESS)
    failed(db, 70)
    db.execute(_ATTEMPTS)
    db.execute(_PUBLISH, ["order", 30])
    Subscriptions("public").create(db, "search", types=["product"], start="beginning")
    Controls("public").pause(
        db, Pause(0, handler="send_mail", because="550 from the provider since 14:05", set_by="anna")
    )
    LimitAdmin("public").set(
        db, LimitSetting(0, "send_mail", Limit("14/s", at_once=50), None, "what the provider allows", "anna")
    )


def _consume(sessions: list[psycopg.Connection]) -> None:
    """What sessions of consumers hold."""
    shard = 0
    for session, shards in zip(sessions, _CONSUMERS, strict=True):
        session.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class("public"), SHARDS])
        for _ in range(shards):
            session.execute("SELECT pg_advisory_lock(%s, %s)", [lock_class("public"), shard])
            shard += 1


def _take(browser: Browser, address: str) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.goto(address)
    page.screenshot(path=FOLDER / "ui-overview.png")
    page.set_viewport_size({"width": 1100, "height": 520})
    page.goto(f"{address}/changes?type=mail&error=SMTPError")
    page.get_by_role("button", name="Retry all that match").click()
    page.get_by_label("Why?").fill("the provider is back")
    page.screenshot(path=FOLDER / "ui-confirm.png")
    dark = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="dark")
    dark.goto(f"{address}/changes")
    dark.locator("tbody td.n a").first.click()
    dark.get_by_role("button", name="Show the payload").click()
    dark.screenshot(path=FOLDER / "ui-change.png", full_page=True)
    phone = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    phone.goto(f"{address}/changes?state=dead")
    phone.screenshot(path=FOLDER / "ui-phone.png")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium: deploy/debian-setup --with-browser installs it")
    with TempServer(durable=False) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        _shop(db)
        sessions = [psycopg.connect(server.dsn(), autocommit=True) for _ in _CONSUMERS]
        _consume(sessions)
        with serving(server.dsn(), ALONE, _router()) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            _take(browser, address)
            browser.close()
        for session in sessions:
            session.close()


if __name__ == "__main__":
    main()
