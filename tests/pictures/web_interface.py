"""docs/pictures/ui-*.png: the web interface of a shop whose mails fail. ``make pictures`` takes them.

Needs Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import psycopg
from playwright.sync_api import sync_playwright

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.pauses import Pause
from cdc.postgres import migrations
from cdc.postgres.controls import Controls
from tests.fix_ui import ALONE, failed, serving

FOLDER = Path(__file__).resolve().parents[2] / "docs/pictures"
_PUBLISH = "SELECT publish_change(%s, n::text, new_data => '{\"total\": 12.5}') FROM generate_series(1, %s) AS n"


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium: deploy/debian-setup --with-browser installs it")
    with TempServer(durable=False) as server, psycopg.connect(server.dsn(), autocommit=True) as db:
        migrations.install(db, "public")
        failed(db, 70)
        db.execute(_PUBLISH, ["order", 30])
        Controls("public").pause(
            db, Pause(0, handler="send_mail", because="550 from the provider since 14:05", set_by="anna")
        )
        with serving(server.dsn(), ALONE) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 760})
            page.goto(address)
            page.screenshot(path=FOLDER / "ui-overview.png")
            page.set_viewport_size({"width": 1100, "height": 520})
            page.goto(f"{address}/changes?type=mail&error=SMTPError")
            page.get_by_role("button", name="Retry all that match").click()
            page.get_by_label("Why?").fill("the provider is back")
            page.screenshot(path=FOLDER / "ui-confirm.png")
            browser.close()


if __name__ == "__main__":
    main()
