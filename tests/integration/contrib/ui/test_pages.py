"""The web interface in a real browser: what it shows, and that what one confirms is done, once, and recorded."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.postgres.actions import ActionLog
from cdc.postgres.shard_locks import lock_class
from tests.commands_subscription import create
from tests.fix_consumer import states
from tests.fix_outbox import fill
from tests.fix_ui import ask, because, failed, serving

TURNED = "\u202eabc\u2066\u200f"
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}'


_DEEDS = {
    "Retry": ("dead", {"dead": 3, "waiting": 1_200}), "Discard": ("dead", {"dead": 3, "processed": 1_200}),
    "Replay": ("processed", {"fresh": 1_200, "processed": 1_203}),
}  # fmt: skip


def test_what_is_chosen_is_retried_after_a_confirmation_and_recorded(
    interface: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 5)
    page.goto(f"{interface}/changes")
    page.get_by_label("choose 2").check()
    page.get_by_label("choose 4").check()
    page.get_by_role("button", name="Retry those chosen").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Retry 2 changes?")
    assert states(outbox_db) == {"dead": 5}, "nothing is done before it is confirmed"
    because(page, "the provider is back", "Retry 2")
    expect(page.get_by_role("heading", level=1)).to_have_text("Who has done what")
    assert states(outbox_db) == {"dead": 3, "waiting": 2}
    [only] = ActionLog("public").latest(outbox_db, 10)
    assert (only.person, only.via, only.action, only.count) == ("anna", "ui", "retry", 2)
    assert (only.target, only.because) == ({"changes": [4, 2]}, "the provider is back")


@pytest.mark.parametrize("deed", ["Retry", "Discard", "Replay"])  # fmt: skip
def test_all_that_match_are_decided_about_and_no_other(
    interface: str, page: Page, outbox_db: psycopg.Connection, deed: str
) -> None:
    state, after = _DEEDS[deed]
    failed(outbox_db, 1_200)
    failed(outbox_db, 3, "order")
    if state == "processed":
        outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now(), dead_at = NULL")
    page.goto(f"{interface}/changes?state={state}&type=mail")
    page.get_by_role("button", name=f"{deed} all that match").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"{deed} 1,200 changes?")
    because(page, "mended", f"{deed} 1,200")
    expect(page.get_by_role("heading", level=1)).to_have_text("Who has done what")
    assert states(outbox_db) == after
    [only] = ActionLog("public").latest(outbox_db, 10)
    assert (only.action, only.count, only.target["type"]) == (deed.lower(), 1_200, "mail")


def test_more_than_was_confirmed_is_not_decided_about(
    interface: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 2)
    page.goto(f"{interface}/changes")
    page.get_by_role("button", name="Discard all that match").click()
    failed(outbox_db, 1)
    because(page, "not needed", "Discard 2")
    expect(page.locator(".note")).to_contain_text("3 match now, more than the 2 that were confirmed")
    assert states(outbox_db) == {"dead": 3}


def test_of_two_at_once_one_decides_and_the_other_learns_of_it(
    interface: str, browser: Browser, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 1)
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.goto(f"{interface}/changes/1")
        page.get_by_role("button", name="Discard").click()
    because(pages[0], "mine", "Discard 1")
    because(pages[1], "no, mine", "Discard 1")
    expect(pages[1].locator(".note")).to_contain_text("cannot discard the change 1: it is processed already")
    for page in pages:
        page.context.close()
    assert [each.because for each in ActionLog("public").latest(outbox_db, 10)] == ["mine"]


def test_a_form_that_is_sent_twice_at_once_is_carried_out_once(
    interface: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 1)
    page.goto(f"{interface}/changes/1")
    page.get_by_role("button", name="Replay").click()
    fields = {
        each.get_attribute("name"): each.get_attribute("value")
        for each in page.locator("main input[type=hidden]").all()
    }
    body = urlencode({**fields, "because": "once"}).encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(ask, interface, "/decide", raw=body, headers=form) for _ in range(4)]
    assert sorted(answer.result()[0] for answer in answers) == [200, 409, 409, 409]
    assert states(outbox_db) == {"fresh": 1, "processed": 1}


def test_pauses_are_set_and_ended(interface: str, page: Page, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 2)
    page.goto(f"{interface}/changes/1")
    page.get_by_role("button", name="Pause its key").click()
    expect(page.get_by_label("key, of that type")).to_have_value("k0")
    page.get_by_label("for how long").fill("30m")
    because(page, "Anna looks into it", "Pause")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Pause")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("cell", name="Anna looks into it")).to_be_visible()
    assert outbox_db.execute("SELECT entity_type, entity_id, set_by FROM cdc_controls").fetchall() == [
        ("mail", "k0", "anna")
    ]
    page.get_by_role("button", name=re.compile("^Resume")).click()
    because(page, "done", "Resume")
    expect(page.get_by_text("Nothing is paused.")).to_be_visible()
    assert [each.action for each in ActionLog("public").latest(outbox_db, 10)] == ["resume", "pause"]


def test_the_overview_has_every_consumer_and_subscription_and_what_is_done_and_fails(
    outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "search")
    fill(outbox_db, 6, days=-0.1)  # later than now, so that the minute does not end
    outbox_db.execute(
        "INSERT INTO change_attempts (seq, subscription, attempt, handler, outcome, error_kind, error_class,"
        " error_text) VALUES (1, 'search', 1, 'index', 'dead', 'ConnectionError', 'builtins.ConnectionError', 'x')"
    )
    class_, another = lock_class("public"), lock_class("public", 1)
    for each in (class_, another, another):
        outbox_db.execute("SELECT pg_advisory_lock_shared(%s, %s)", [each, SHARDS])
    [(database,)] = outbox_db.execute("SELECT current_database()").fetchall()
    with serving(outbox) as address:
        page.goto(address)
        header = page.locator("header")
        for text in (database, "schema public", f"port {outbox_db.info.port}"):
            expect(header).to_contain_text(text)
        expect(page.get_by_text("2 consumers", exact=True)).to_be_visible()
        for region, cells in (
            ("Processed, of the last minute", ["x", "INSERT", "0.10"]),
            ("Failed attempts, of the last hour", ["index", "ConnectionError", "search", "1", "1"]),
            ("Subscriptions", ["search", "running", "6", "", "0", "0", "1"]),
            ("Consumers", [str(outbox_db.info.backend_pid), "0"]),
        ):
            row = page.get_by_role("region", name=region, exact=True).locator("tbody tr")
            expect(row).to_have_count(1)
            assert row.locator("td").all_inner_texts()[: len(cells)] == cells, region


def test_pages_follow_each_other_without_a_gap(interface: str, page: Page, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 120)
    seen = list[str]()
    page.goto(f"{interface}/changes")
    while True:
        seen += page.locator("tbody td.n a").all_inner_texts()
        following = page.get_by_role("link", name="Next page")
        if not following.count():
            break
        following.click()
    assert seen == [str(seq) for seq in range(120, 0, -1)]


def test_filters_find_by_type_key_error_text_time_and_handler(
    outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    router = Router()
    router.on("order", "UPDATE", name="invoice")(lambda _change: None)
    failed(outbox_db, 3)
    failed(outbox_db, 2, "order", "KeyError")
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '2 hours' WHERE seq = 5")
    with serving(outbox, router=router) as address:
        for query, found in (
            ("type=mail", ["3", "2", "1"]), ("key=k1", ["5", "2"]), ("error=KeyError", ["5", "4"]), ("text=550+NO", 5),
            ("since=1h&type=order", ["4"]), ("until=1h", ["5"]), ("handler=invoice", ["5", "4"]), ("type=nothing", []),
        ):  # fmt: skip
            page.goto(f"{address}/changes?{query}")
            shown = page.locator("tbody td.n a").all_inner_texts()
            assert (len(shown) if isinstance(found, int) else shown) == found, query


def test_a_change_shows_its_payload_old_against_new_and_its_error(
    interface: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 1)
    page.goto(f"{interface}/changes/1")
    assert "ada" not in page.content(), "only when it is asked for"
    page.get_by_role("button", name="Show the payload").click()
    row = page.get_by_role("row", name="to (changed)")
    expect(row.locator(".old")).to_have_text('"bob"')
    expect(row.locator(".new")).to_have_text('"ada"')
    expect(page.get_by_role("row", name="n (added)")).to_contain_text("1.1")
    expect(page.get_by_text("SMTPError: 550 no")).to_be_visible()


def test_what_others_have_written_is_text_and_nothing_else(
    outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    """Also marks that turn the direction of writing: what is shown is in the order in which it is stored."""
    text = HOSTILE + TURNED
    router = Router()
    router.on(text, "UPDATE", name=text)(lambda _change: None)
    outbox_db.execute("SELECT publish_change(%s, %s, 'UPDATE', jsonb_build_object(%s::text, %s::text))", [text] * 4)
    outbox_db.execute("UPDATE entity_changes SET dead_at = now(), last_error = %s, error_summary = %s", [text] * 2)
    outbox_db.execute(
        "INSERT INTO change_attempts (seq, subscription, attempt, handler, outcome, error_kind, error_class,"
        " error_text, frames) VALUES (1, 'default', 1, %s, %s, %s, %s, %s, ARRAY[%s])", [text] * 6
    )  # fmt: skip
    outbox_db.execute("INSERT INTO cdc_controls (entity_type, because, set_by) VALUES (%s, %s, %s)", [text] * 3)
    outbox_db.execute(
        "INSERT INTO cdc_controls (handler, because, set_by, rate, by_path, subscription)"
        " VALUES (%s, %s, %s, '1/s', %s, %s)", [text] * 5
    )  # fmt: skip
    outbox_db.execute(
        "INSERT INTO cdc_limit_leases VALUES (%s, %s, %s, jsonb_build_object(%s::text, jsonb_build_array(1, 1, 1,"
        " extract(epoch FROM now()) + 9999, 1, 1, 1)), now() + interval '1 h')", [text] * 4
    )  # fmt: skip
    outbox_db.execute(
        "INSERT INTO cdc_backfills (table_schema, table_name, key_columns, key_order, estimate, backlog, started_by)"
        " VALUES (%s, %s, ARRAY[%s], %s, 1, 1, %s)", [text] * 5
    )  # fmt: skip
    outbox_db.execute(
        "INSERT INTO cdc_subscriptions (name, types, created_from) VALUES (%s, ARRAY[%s], %s)", [text] * 3
    )
    ActionLog("public").record(outbox_db, text, {"key": text})
    with serving(outbox, router=router) as address:
        for path in ("/", "/changes", "/changes/1?payload=1", "/pauses", "/limits", "/backfills", "/subscriptions",
                     "/actions"):  # fmt: skip
            page.goto(address + path)
            assert page.locator("main img, main script").count() == 0, path
            shown = page.locator("main").inner_text()
            assert HOSTILE in shown, path
            assert TURNED not in shown, path
        for path in ("/changes", "/pauses", "/limits"):
            page.goto(f"{address}{path}?{urlencode(dict.fromkeys(('type', 'key', 'handler', 'rate', 'text'), text))}")
            assert page.locator("main img, main script").count() == 0, path


def test_a_reader_sees_no_payload_and_no_button_and_may_do_nothing(
    reader: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 1)
    with serving(reader) as address:
        for path in ("/", "/changes", "/changes/1", *_PAGES[4:-1]):
            page.goto(address + path)
            names = page.get_by_role("button").all_inner_texts()
            assert set(names) <= {"Search", "Examine"}, (path, names)
            assert "reads only" in page.content()
        page.goto(f"{address}/changes/1?payload=1")
        assert "ada" not in page.content()


def test_without_the_database_it_says_so_and_goes_on_when_it_is_back(
    outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 1)
    name = sql.Identifier(outbox_db.info.dbname)
    with (
        serving(outbox) as address,
        psycopg.connect(make_conninfo(outbox, dbname="postgres"), autocommit=True) as admin,
    ):
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
        answer = page.goto(f"{address}/changes")
        assert answer is not None
        assert answer.status == 503
        expect(page.locator(".note")).to_contain_text("not currently accepting connections")
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
        page.reload()
        expect(page.get_by_role("link", name="1", exact=True)).to_be_visible()


def test_it_works_by_the_keyboard_alone(interface: str, page: Page, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 1)
    page.goto(f"{interface}/changes/1")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.get_by_role("button", name="Retry").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Why?")).to_be_focused()
    page.keyboard.type("by keyboard")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("cell", name="by keyboard")).to_be_visible()


def test_on_a_phone_nothing_is_wider_than_the_screen(interface: str, page: Page, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 3)
    page.set_viewport_size({"width": 360, "height": 740})
    for path in ("/", "/changes", "/changes/1?payload=1", "/pauses", "/limits", "/actions", "/slot"):
        page.goto(interface + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


_PAGES = (
    "/", "/changes", "/changes?state=processed", "/changes/1?payload=1", "/pauses", "/limits", "/backfills",
    "/subscriptions", "/slot", "/actions", "/changes/none",
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_somebody_from_using_it(
    interface: str, browser: Browser, outbox_db: psycopg.Connection, scheme: Any
) -> None:
    failed(outbox_db, 3)
    fill(outbox_db, 2)
    outbox_db.execute("INSERT INTO cdc_controls (entity_type, because, set_by) VALUES ('x', 'y', 'z')")
    ActionLog("public").record(outbox_db, "retry", {"key": "k"})
    # What axe is made of runs in the page, whose policy allows no script.
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    found: dict[str, Any] = {}
    for path in _PAGES:
        page.goto(interface + path)
        found[path] = [each["id"] for each in Axe().run(page).response["violations"]]
    page.goto(f"{interface}/changes/1")
    page.get_by_role("button", name="Retry").click()
    found["confirm"] = [each["id"] for each in Axe().run(page).response["violations"]]
    context.close()
    assert found == {each: [] for each in (*_PAGES, "confirm")}
