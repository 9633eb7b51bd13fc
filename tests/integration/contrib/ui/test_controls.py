"""Pauses and limits in a real browser: of one, of those chosen, of all that match; each confirmed and recorded."""

from __future__ import annotations

import re
from collections.abc import Callable

import psycopg
import pytest
from playwright.sync_api import Page, expect

from cdc.core.errors import RefusedError
from cdc.core.limits import Limit, LimitSetting
from cdc.core.pauses import Pause
from cdc.core.router import Router
from cdc.postgres import grants
from cdc.postgres.actions import ActionLog
from cdc.postgres.controls import Controls
from cdc.postgres.grants import Grantee
from cdc.postgres.limit_admin import LimitAdmin
from tests.commands_subscription import create
from tests.fix_ui import ask, because, failed, granted, serving


def _router() -> Router:
    router = Router()
    router.on("mail", "UPDATE", name="send_mail")(lambda _change: None)
    router.on("order", "UPDATE", name="invoice")(lambda _change: None)
    return router


def _recorded(db: psycopg.Connection) -> list[tuple[str, int, str | None]]:
    return [(each.action, each.count, each.because) for each in ActionLog("public").latest(db, 10)]


def test_a_limit_is_set_changed_and_removed_and_each_is_confirmed_with_its_count(
    outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 1)
    outbox_db.execute("SELECT publish_change('mail', n::text, 'UPDATE') FROM generate_series(1, 3) AS n")
    outbox_db.execute("SELECT publish_change('order', n::text, 'UPDATE') FROM generate_series(1, 5) AS n")
    with serving(outbox, router=_router()) as address:
        page.goto(f"{address}/limits")
        page.get_by_label("handler", exact=True).select_option("send_mail")
        page.get_by_label("calls for a time").fill("14/s")
        page.get_by_label("how many may run at a time").fill("50")
        because(page, "what the provider allows", "Limit")
        expect(page.get_by_role("heading", level=1)).to_have_text("Limit send_mail to 14/s, 50 at once?")
        expect(page.get_by_text("3 changes of the type mail are not processed now.")).to_be_visible()
        assert LimitAdmin("public").all(outbox_db) == [], "nothing is done before it is confirmed"
        page.get_by_role("button", name="Limit", exact=True).click()
        expect(page.get_by_role("cell", name="what the provider allows")).to_be_visible()
        [made] = LimitAdmin("public").all(outbox_db)
        assert (made.setting.handler, made.setting.limit, made.setting.set_by) == (
            "send_mail", Limit("14/s", at_once=50), "anna"
        )  # fmt: skip
        page.get_by_role("button", name="Change the limit of send_mail").click()
        expect(page.get_by_label("calls for a time")).to_have_value("14/s")
        page.get_by_label("calls for a time").fill("5/s")
        page.get_by_label("for each value of this").fill("new.tenant")
        because(page, "one tenant floods the others", "Limit")
        expect(page.get_by_text("In place of 14/s, 50 at once, which anna set")).to_be_visible()
        page.get_by_role("button", name="Limit", exact=True).click()
        expect(page.get_by_role("cell", name="5/s, 50 at once, for each new.tenant")).to_be_visible()
        page.get_by_role("button", name="Remove the limit of send_mail").click()
        because(page, "over", "Remove")
        expect(page.get_by_text("None is set.")).to_be_visible()
    assert _recorded(outbox_db) == [
        ("clear limit", 1, "over"), ("limit", 1, "one tenant floods the others"),
        ("limit", 1, "what the provider allows"),
    ]  # fmt: skip


def test_all_limits_are_removed_at_once(interface: str, page: Page, outbox_db: psycopg.Connection) -> None:
    for handler in ("send", "post"):
        LimitAdmin("public").set(outbox_db, LimitSetting(0, handler, Limit("1/s"), because="x", set_by="ben"))
    page.goto(f"{interface}/limits")
    page.get_by_role("button", name="Remove all").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Remove all 2 limits?")
    because(page, "over", "Remove")
    expect(page.get_by_text("None is set.")).to_be_visible()


@pytest.mark.parametrize(("fields", "said"), [
    ({"handler": "x"}, "a limit names a rate"), ({"handler": "x", "calls": "fast"}, "rate="),
    ({"handler": "*", "calls": "1/s"}, "which handler?"),
    ({"handler": "x", "calls": "1/s", "for each": "no.path"}, "is no path"),
])  # fmt: skip
def test_what_is_no_limit_is_refused_in_a_sentence(
    interface: str, page: Page, outbox_db: psycopg.Connection, fields: dict[str, str], said: str
) -> None:
    page.goto(f"{interface}/limits")
    for label, value in fields.items():
        page.get_by_label(re.compile(f"^{label}")).fill(value)
    because(page, "a test", "Limit")
    expect(page.locator(".note")).to_contain_text(said)
    assert LimitAdmin("public").all(outbox_db) == []


def test_what_consumers_have_leased_is_shown(interface: str, page: Page, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(
        "INSERT INTO cdc_limit_leases (subscription, handler, key, leases, idle_at) SELECT 'default', 'send', key, "
        " jsonb_build_object('a', jsonb_build_array(5, 1, 20, extract(epoch FROM now()), 1, 14, 3),"
        " 'b', jsonb_build_array(9, 2, 10, extract(epoch FROM now()), 1, 14, 3),"
        " 'gone', jsonb_build_array(9, 2, 10, extract(epoch FROM now()) - 100, 1, 14, 3)), now() + interval '1 h'"
        " FROM unnest(ARRAY['k1', 'k2']) AS key"
    )
    page.goto(f"{interface}/limits")
    cells = page.get_by_role("region", name="In use now").locator("tbody td").all_inner_texts()
    assert cells == ["send", "default", "2", "2", "28 of 28", "6 of 6", "60"]


def test_the_keys_of_changes_that_were_chosen_are_paused_in_one_step(
    interface: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 4)
    page.goto(f"{interface}/changes")
    for seq in (1, 3):
        page.get_by_label(f"choose {seq}").check()
    page.get_by_role("button", name="Pause their keys").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Pause 2 keys?")
    page.get_by_label("for how long").fill("30m")
    because(page, "both are looked into", "Pause 2")
    expect(page.get_by_role("cell", name="both are looked into")).to_have_count(2)
    found = outbox_db.execute("SELECT entity_type, entity_id, set_by, until IS NOT NULL FROM cdc_controls ORDER BY 2")
    assert found.fetchall() == [("mail", "k0", "anna", True), ("mail", "k2", "anna", True)]
    assert _recorded(outbox_db) == [("pause", 2, "both are looked into")]


def test_pauses_that_were_chosen_are_ended_and_no_other(
    interface: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    made = [
        Controls("public").pause(outbox_db, Pause(0, entity_type=name, because="x", set_by="ben")).pause.id
        for name in ("mail", "order", "task")
    ]
    page.goto(f"{interface}/pauses")
    for number in made[:2]:
        page.get_by_role("checkbox", name=f"number {number}").check()
    page.get_by_role("button", name="Resume those chosen").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("End 2 pauses?")
    because(page, "mended", "Resume")
    expect(page.get_by_role("heading", level=1)).to_have_text("Pauses")
    assert [each.pause.entity_type for each in Controls("public").all(outbox_db)] == ["task"]
    assert _recorded(outbox_db)[0] == ("resume", 2, "mended")


def test_too_many_keys_are_not_paused_and_none_of_them_is(interface: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(
        "INSERT INTO cdc_controls (entity_type, entity_id, because, set_by)"
        " SELECT 'x', n::text, 'y', 'z' FROM generate_series(1, 999) AS n"
    )
    failed(outbox_db, 2)
    controls = Controls("public")
    with pytest.raises(RefusedError, match="more than 1000 pauses"):
        controls.pause_keys(outbox_db, [Pause(0, None, "mail", None, f"k{n}", "x", "y") for n in range(2)])
    assert outbox_db.execute("SELECT count(*) FROM cdc_controls").fetchone() == (999,)


def test_a_change_says_which_pause_holds_it_and_ends_it(outbox: str, page: Page, outbox_db: psycopg.Connection) -> None:
    failed(outbox_db, 1)
    for pause in (Pause(0, handler="send_mail", because="550", set_by="ben"),
                  Pause(0, entity_type="order", because="other", set_by="ben")):  # fmt: skip
        Controls("public").pause(outbox_db, pause)
    with serving(outbox, router=_router()) as address:
        page.goto(f"{address}/changes/1")
        expect(page.locator(".note")).to_have_count(1)
        page.get_by_role("button", name="Resume the handler send_mail").click()
        because(page, "it is back", "Resume")
        page.goto(f"{address}/changes/1")
        expect(page.locator(".note")).to_have_count(0)
        for name, label, value in (("Pause its type", "type", "mail"), ("Pause its handler", "handler", "send_mail"),
                                   ("Limit its handler", "handler", "send_mail")):  # fmt: skip
            page.goto(f"{address}/changes/1")
            page.get_by_role("button", name=name).click()
            expect(page.get_by_label(label, exact=True)).to_have_value(value)


def test_all_that_match_are_paused_by_their_type_or_handler(
    outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 1)
    with serving(outbox, router=_router()) as address:
        for query, button, label, value in (
            ("type=mail", "Pause all of the type", "type", "mail"),
            ("type=mail&key=k0", "Pause all of the key", "key, of that type", "k0"),
            ("handler=send_mail", "Pause all of the handler", "handler", "send_mail"),
            ("handler=send_mail", "Limit the handler", "handler", "send_mail"),
        ):
            page.goto(f"{address}/changes?{query}")
            page.get_by_role("button", name=button).click()
            expect(page.get_by_label(label, exact=True)).to_have_value(value)


def test_a_subscription_that_is_not_there_is_neither_paused_nor_limited(
    interface: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "search")
    for path, named in (("/api/pauses", {}), ("/api/limits", {"handler": "x", "rate": "1/s"})):
        for subscription, status in (("none", 404), ("search", 200), ("default", 200)):
            asked = {**named, "subscription": subscription, "because": "a test"}
            assert ask(interface, path, asked)[0] == status, (path, subscription)


def test_a_reader_sees_limits_and_may_not_set_one(reader: str, page: Page, outbox_db: psycopg.Connection) -> None:
    LimitAdmin("public").set(outbox_db, LimitSetting(0, "send", Limit("1/s"), because="why not", set_by="ben"))
    with serving(reader) as address:
        page.goto(f"{address}/limits")
        expect(page.get_by_role("cell", name="why not")).to_be_visible()
        assert page.get_by_role("button").count() == 0
        asked = {"handler": "send", "rate": "9/s", "because": "x"}
        assert ask(address, "/api/limits", asked)[0] == 403
        assert ask(address, "/api/limits/clear", {"all": True, "because": "x"})[0] == 403


def test_a_subscription_is_paused_and_resumed_where_its_progress_is(
    interface: str, outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "search")
    create(outbox, "billing")
    page.goto(f"{interface}/subscriptions")
    page.get_by_role("button", name="Pause search").click()
    expect(page.get_by_label("subscription")).to_have_value("search")
    because(page, "its index is rebuilt", "Pause")
    page.get_by_role("button", name="Pause", exact=True).click()
    expect(page.get_by_role("cell", name="its index is rebuilt")).to_be_visible()
    page.goto(f"{interface}/subscriptions")
    expect(page.get_by_role("row", name="search paused")).to_be_visible()
    expect(page.get_by_role("row", name="billing no consumer")).to_be_visible()
    page.get_by_role("button", name="Resume everything in the subscription search").click()
    because(page, "it is there", "Resume")
    assert outbox_db.execute("SELECT count(*) FROM cdc_controls").fetchone() == (0,)


def test_a_subscription_is_dropped_once_with_what_is_left_of_it_and_recorded(
    interface: str, outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    failed(outbox_db, 3)
    create(outbox, "search", "--from", "beginning")
    create(outbox, "billing")
    for tab in (page, other := page.context.new_page()):
        tab.goto(f"{interface}/subscriptions")
        tab.get_by_role("button", name="Drop search").click()
        expect(tab.get_by_text("3 not handled, 0 waiting, 0 dead")).to_be_visible()
    because(page, "nobody searches", "Drop it")
    expect(page.get_by_role("row", name="billing")).to_be_visible()
    assert page.get_by_role("row", name="search").count() == 0
    because(other, "the same", "Drop it")
    expect(other.get_by_text("search")).to_be_visible()
    assert outbox_db.execute("SELECT name FROM cdc_subscriptions").fetchall() == [("billing",)]
    assert ("subscription drop", 1, "nobody searches") in _recorded(outbox_db)
    assert "the same" not in [why for _, _, why in _recorded(outbox_db)]


def test_a_subscription_created_again_is_not_dropped_for_the_one_before(
    interface: str, outbox: str, page: Page, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "search")
    page.goto(f"{interface}/subscriptions")
    page.get_by_role("button", name="Drop search").click()
    assert ask(interface, "/api/subscriptions/search/drop", {"because": "moved"})[0] == 200
    create(outbox, "search")
    because(page, "nobody searches", "Drop it")
    expect(page.get_by_text("another one has its name")).to_be_visible()
    assert outbox_db.execute("SELECT name FROM cdc_subscriptions").fetchall() == [("search",)]


@pytest.mark.parametrize("kind", [grants.operator, grants.reader])
def test_who_does_not_own_the_outbox_is_not_offered_to_drop_a_subscription_and_cannot(
    outbox: str, outbox_db: psycopg.Connection, page: Page, kind: Callable[[str], Grantee]
) -> None:
    create(outbox, "search")
    with granted(outbox, outbox_db, kind) as dsn, serving(dsn) as address:
        page.goto(f"{address}/subscriptions")
        assert page.get_by_role("button", name="Drop").count() == 0
        assert ask(address, "/api/subscriptions/search/drop", {"because": "x"})[0] == 403
    assert outbox_db.execute("SELECT name FROM cdc_subscriptions").fetchall() == [("search",)]


def test_a_role_that_is_granted_operator_may_do_all_of_it_and_replay_nothing(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "search", "--from", "beginning")
    failed(outbox_db, 4)
    outbox_db.execute(
        "INSERT INTO cdc_subscription_changes (subscription, shard, seq, dead_at)"
        " SELECT 1, shard, seq, now() FROM entity_changes WHERE seq <= 2"
    )
    outbox_db.execute(
        "INSERT INTO cdc_backfills (table_schema, table_name, key_columns, key_order, estimate, backlog)"
        " VALUES ('public', 't', '{id}', '', 1, 1)"
    )
    why = {"because": "a test"}
    with granted(outbox, outbox_db, grants.operator) as dsn, serving(dsn) as address:
        for path in ("/api/subscriptions", "/api/backfills", "/api/changes", "/api/limits"):
            status, found, _ = ask(address, path)
            assert (status, bool(next(iter(found.values()))) or path == "/api/limits") == (200, True), (path, found)
        for path, body in (
            ("/api/changes/retry", {"changes": [1]}), ("/api/changes/discard", {"changes": [2]}),
            ("/api/changes/retry", {"changes": [1], "subscription": "search"}),
            ("/api/changes/discard", {"changes": [2], "subscription": "search"}),
            ("/api/pauses", {"subscription": "search"}), ("/api/pauses/resume", {"subscription": "search"}),
            ("/api/limits", {"handler": "x", "rate": "1/s"}), ("/api/limits/clear", {"all": True}),
            ("/api/backfills/1/pause", {}), ("/api/backfills/1/cancel", {}),
        ):  # fmt: skip
            status, said, _ = ask(address, path, {**body, **why})
            assert status == 200, (path, said)
        assert ask(address, "/api/changes/replay", {"changes": [2], **why})[0] == 403
        assert ask(address, "/api/changes/1?payload=true")[0] == 403
    assert [each.via for each in ActionLog("public").latest(outbox_db, 20)].count("api") == 10
