"""A provider goes down: somebody pauses, mends, resumes, retries, replays. Nothing is lost, nothing is done twice.

The same is in docs/guides/web-interface.md.
"""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from playwright.sync_api import Page, expect

from cdc.postgres.actions import ActionLog
from tests import handlers_outage
from tests.eventually import eventually
from tests.fix_consumer import Process, settled, states

_FAILED, _PAUSED = 20, 10
_PUBLISH = "SELECT publish_change('mail', 'm' || n, new_data => '{}') FROM generate_series(%s::int, %s::int) AS n"


def _because(page: Page, reason: str, button: str) -> None:
    page.get_by_label("Why?").fill(reason)
    page.get_by_role("button", name=button, exact=True).click()


def _pause(page: Page, address: str) -> None:
    page.goto(f"{address}/pauses")
    page.get_by_label("handler").fill("send_mail")
    _because(page, "550 from the provider", "Pause")
    page.get_by_role("button", name="Pause", exact=True).click()
    expect(page.get_by_role("cell", name="550 from the provider")).to_be_visible()


def _resume(page: Page, address: str) -> None:
    page.goto(f"{address}/pauses")
    page.get_by_role("button", name="Resume the handler send_mail").click()
    _because(page, "they are back", "Resume")
    expect(page.get_by_text("Nothing is paused.")).to_be_visible()


def _decide(page: Page, address: str, query: str, deed: str, count: int) -> None:
    page.goto(f"{address}/changes?{query}")
    page.get_by_role("button", name=f"{deed} all that match").click()
    _because(page, "they are back", f"{deed} {count}")
    expect(page.get_by_role("heading", level=1)).to_have_text("Who has done what")


def test_the_incident_of_the_guide(
    *, outbox: str, outbox_db: psycopg.Connection, interface: str, page: Page, processes: list[Process],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    outage = tmp_path / "outage"
    monkeypatch.setenv(handlers_outage.OUTAGE, str(outage))
    outbox_db.execute("CREATE TABLE sent (change uuid PRIMARY KEY, replay_of uuid, mail text NOT NULL)")
    outage.touch()
    consumer = Process(
        outbox, tmp_path / "log", handlers="tests.handlers_outage:router", backoff_base=0.05, options=["--no-stream"],
        poll_interval=0.1,
    )  # fmt: skip
    processes.append(consumer)
    outbox_db.execute(_PUBLISH, [1, _FAILED])
    eventually(lambda: states(outbox_db) == {"dead": _FAILED}, what="the provider's outage has killed all")
    # 1. Stop the bleeding. What comes meanwhile waits, and no attempt is counted.
    _pause(page, interface)
    consumer.wait_for("paused")
    outbox_db.execute(_PUBLISH, [_FAILED + 1, _FAILED + _PAUSED])
    # 2. See what fails and why.
    page.goto(f"{interface}/changes?type=mail&error=ConnectionError")
    page.get_by_role("link", name="1", exact=True).click()
    expect(page.get_by_text("ConnectionError: 550: come back later").first).to_be_visible()
    assert states(outbox_db) == {"dead": _FAILED, "fresh": _PAUSED}
    # 3. It is mended; what was paused goes on.
    outage.unlink()
    _resume(page, interface)
    eventually(lambda: states(outbox_db) == {"dead": _FAILED, "processed": _PAUSED}, what="what was paused is sent")
    # 4. Again what has died; 5. and once more what was handled wrongly.
    _decide(page, interface, "type=mail&error=ConnectionError", "Retry", _FAILED)
    eventually(lambda: settled(outbox_db), what="what had died is sent")
    _decide(page, interface, "state=processed&type=mail&key=m1", "Replay", 1)
    eventually(
        lambda: settled(outbox_db) and states(outbox_db)["processed"] == _FAILED + _PAUSED + 1, what="the replay"
    )
    sent = outbox_db.execute("SELECT mail, count(*), count(replay_of) FROM sent GROUP BY mail").fetchall()
    assert sorted(sent) == sorted(
        (f"m{n}", 2 if n == 1 else 1, int(n == 1)) for n in range(1, _FAILED + _PAUSED + 1)
    ), "none is lost, and each change was sent once"
    # 6. Tell the others.
    assert [(each.action, each.count) for each in ActionLog("public").latest(outbox_db, 10)] == [
        ("replay", 1), ("retry", _FAILED), ("resume", 1), ("pause", 1),
    ]  # fmt: skip
