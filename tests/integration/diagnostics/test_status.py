"""``cdc status``: what one screen tells of the database, with consumers and without."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql

import cdc
from cdc.cli import cdc as root_command
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.diagnostics.status import summarize
from cdc.postgres.admin import OutboxAdmin
from cdc.postgres.due import DueChanges
from cdc.postgres.shard_locks import lock_class
from tests import handlers_page, servers
from tests.commands import done, refused
from tests.commands_subscription import create, fail
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, slot_name
from tests.fix_outbox import fill
from tests.integration.http.test_status_page import SECRET, publish


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CDC_") and not name.startswith("CDC_TEST_")]:
        monkeypatch.delenv(name)


def run(dsn: str, *arguments: str) -> Result:
    result = CliRunner().invoke(root_command, ["status", *arguments, "--dsn", dsn])
    assert result.exit_code == 0, result.output
    return result


def data(dsn: str, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(dsn, "--json", *arguments).stdout)
    assert found.pop("schema") == 1
    return found


def test_of_an_empty_outbox_without_consumers_it_says_just_that(outbox: str) -> None:
    shown = run(outbox, "--slot-name", "nosuch").stdout
    assert "none: nothing is being handled" in shown
    assert "nothing processed in the last minute" in shown
    assert "there is none named nosuch" in shown
    assert "every change is processed" in shown
    found = data(outbox, "--slot-name", "nosuch")
    assert (found["members"], found["slot"], found["health"]) == ([], None, None)


async def test_it_shows_who_works_how_fast_what_waits_and_the_slot_and_no_row_content(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    slot = slot_name()
    async with consuming(outbox, handlers_page.router, slot_name=slot, slot_mode="temporary", backoff_base=200) as app:
        await asyncio.wait_for(app.consumer.lifecycle.connected.wait(), 20)
        for entity_type in ("good", "good", "dying", "failing"):
            publish(outbox_db, entity_type, secret=SECRET)

        async def complete() -> Any:
            found = await asyncio.to_thread(data, outbox, "--slot-name", slot)
            states = {letter["state"] for letter in found["outbox"]["dead_letters"]}
            return found if states == {"dead", "waiting"} and (found["slot"] or {}).get("active") else None

        found = await eventually_async(complete, what="one died, one waits, the slot is read")
        text = (await asyncio.to_thread(run, outbox, "--slot-name", slot)).stdout
        named = [(member["pid"], member["shards"]) for member in found["members"]]
        [(pid,)] = outbox_db.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc: shards' AND datname = current_database()"
        ).fetchall()
    assert named == [(pid, 64)]
    assert f"1; 64 of 64 shards owned: 64 by process {pid}" in text
    assert "a second processed in the last minute" in text
    assert f"{slot} ({servers.preferred_plugin()}), read by process" in text
    assert found["health"]["fine"]
    assert {(each["entity_type"], each["error"].partition(" at ")[0]) for each in found["outbox"]["dead_letters"]} == {
        ("dying", "ValueError"), ("failing", "KeyError"),
    }  # fmt: skip
    assert SECRET not in text + json.dumps(found)


def test_other_subscriptions_are_named_with_what_is_left_of_each(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 3)
    number = create(outbox, "search", "--from", "beginning")
    fail(outbox_db, number, 1, dead=True)
    create(outbox, "audit")
    done(outbox, "subscription", "pause", "audit")
    said = done(outbox, "status")
    assert "2 subscriptions: search (no consumer, 2 behind, 0 waiting, 1 dead), audit (paused, 0 behind" in said
    found = {each["subscription"]["name"]: each for each in data(outbox)["subscriptions"]}
    assert (found["search"]["behind"], found["search"]["held_back"]) == (2, 3)


async def test_two_consumers_are_two_with_their_shares(outbox: str) -> None:
    settings: dict[str, Any] = {"slot_name": slot_name(), "slot_mode": "temporary"}
    async with consuming(outbox, Router(), **settings), consuming(outbox, Router(), **settings):

        async def shared() -> Any:
            members = (await asyncio.to_thread(data, outbox))["members"]
            return [member["shards"] for member in members] == [32, 32]

        await eventually_async(shared, what="each owns its half")


async def test_the_pace_is_that_of_the_last_minute_and_from_the_write(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()

    @router.on("quick")
    async def quick(change: cdc.Change) -> None:
        pass

    async with consuming(outbox, router, stream=False, poll_interval=0.05):
        for number in range(30):
            publish(outbox_db, "quick", str(number))
        await eventually_async(lambda: asyncio.to_thread(settled, outbox_db), what="all are processed")
    outbox_db.execute("UPDATE entity_changes SET changed_at = processed_at - interval '4 s'")
    fill(outbox_db, 5)  # processed ten days ago
    pace = data(outbox)["pace"]
    assert pace["per_s"] == 30 / 60
    assert (pace["latency_p50_s"], pace["latency_p99_s"]) == (4, 4)


def test_more_in_the_last_minute_than_is_looked_at_is_a_rate_all_the_same(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.postgres.admin._PACE_MAX", 10)
    fill(outbox_db, 100, days=0)
    outbox_db.execute("UPDATE entity_changes SET processed_at = now() - entity_id::int * interval '0.5 s'")
    # Ten of them took five seconds, or a little more: time goes on.
    assert 0.5 < data(outbox)["pace"]["per_s"] <= 2


def test_many_types_and_letters_stay_one_screen(outbox: str, outbox_db: psycopg.Connection) -> None:
    for number in range(30):
        publish(outbox_db, f"type{number:02}")
    fill(outbox_db, 100, state="dead")
    fill(outbox_db, 100, state="waiting")
    shown = run(outbox).stdout
    assert "and 21 types more: cdc outbox stats" in shown
    assert len(shown.splitlines()) <= 35


def test_watching_ends_by_itself_only_with_the_option_and_shows_each_reading(outbox: str) -> None:
    assert run(outbox, "--watch", "--every", "0.1", "--times", "3").stdout.count("consumers ") == 3


def test_another_schema_has_figures_and_consumers_of_its_own(outbox: str, outbox_db: psycopg.Connection) -> None:
    from cdc.postgres import migrations

    migrations.install(outbox_db, "other")
    outbox_db.execute(
        sql.SQL("SELECT {}('elsewhere', 'k', new_data => '{{}}')").format(sql.Identifier("other", "publish_change"))
    )
    assert "elsewhere" in run(outbox, "--schema", "other").stdout
    assert "elsewhere" not in run(outbox).stdout


def test_neither_long_types_nor_many_make_the_answer_large(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("SELECT publish_change(repeat(chr(97 + n), 900), '1') FROM generate_series(0, 9) AS n")
    outbox_db.execute("SELECT publish_change('type ' || n, '1') FROM generate_series(1, 600) AS n")
    outbox_db.execute("UPDATE entity_changes SET dead_at = now() WHERE seq = (SELECT min(seq) FROM entity_changes)")
    found = summarize(outbox_db, OutboxAdmin("public"), DueChanges("public"))
    assert len(found.stats.types) <= 500
    types = [*(each.entity_type for each in found.stats.types), *(each.entity_type for each in found.dead_letters)]
    assert max(map(len, types)) == 200


def test_one_subscription_is_shown_with_its_own_consumers_dead_letters_and_pauses(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    fill(outbox_db, 3)
    number = create(outbox, "search", "--from", "beginning")
    create(outbox, "audit")
    fail(outbox_db, number, 1, dead=True)
    done(outbox, "pause", "--subscription", "search", "--type", "x", "--because", "mended")
    done(outbox, "pause", "--subscription", "audit", "--because", "another one's")
    with psycopg.connect(outbox, autocommit=True) as consumer:
        consumer.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class("public", number), SHARDS])
        consumer.execute("SELECT pg_advisory_lock(%s, 7)", [lock_class("public", number)])
        said = done(outbox, "status", "--subscription", "search")
        assert f"1; 1 of 64 shards owned: 1 by process {consumer.info.backend_pid}" in said
        found = data(outbox, "--subscription", "search")
    assert "the subscription search" in said
    assert "the type x in the subscription search" in said
    assert "another one's" not in said
    assert "audit" not in said
    assert "not known: a subscription keeps no list" in said
    assert [letter["state"] for letter in found["outbox"]["dead_letters"]] == ["dead"]
    assert (found["subscription"], found["pace"], len(found["members"])) == ("search", None, 1)
    assert "none: nothing is being handled" in done(outbox, "status", "--subscription", "audit")
    assert "there is no subscription serach" in refused(outbox, "status", "--subscription", "serach")
