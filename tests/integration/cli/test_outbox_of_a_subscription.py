"""`cdc outbox ... --subscription`: its own states and decisions, and nothing of another's."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

import cdc
from cdc.postgres.admin import Filter
from cdc.postgres.subscription_admin import SubscriptionAdmin
from cdc.postgres.subscriptions import Subscriptions
from tests.commands_outbox import data, die, numbers, process, publish, row, run
from tests.commands_subscription import create, fail, finish, taken
from tests.eventually import eventually_async
from tests.fix_consumer import consuming

OF_SEARCH = ("--subscription", "search")


@pytest.fixture
def search(outbox: str, outbox_db: psycopg.Connection) -> int:
    """A subscription that begins before the first change; its number."""
    return create(outbox, "search", "--from", "beginning")


def rows(db: psycopg.Connection, number: int) -> list[tuple[Any, ...]]:
    return db.execute(
        "SELECT seq, next_attempt_at <= now(), dead_at IS NOT NULL, type_hash IS NOT NULL, tried ->> 'count'"
        " FROM cdc_subscription_changes WHERE subscription = %s ORDER BY seq", [number]
    ).fetchall()  # fmt: skip


def test_states_are_its_own(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    waiting, blocked, dead, paused, held, done, fresh = (
        publish(outbox_db, "order", key) for key in ("a", "a", "b", "c", "c", "d", "e")
    )
    process(outbox_db, waiting, blocked, dead, paused)
    die(outbox_db, fresh)
    fail(outbox_db, search, waiting)
    fail(outbox_db, search, dead, dead=True)
    fail(outbox_db, search, paused, pauses=True)
    outbox_db.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard) SELECT seq, %s, shard FROM entity_changes"
        " WHERE seq = %s", [search, done]
    )  # fmt: skip
    assert numbers(outbox, *OF_SEARCH) == [paused, dead, waiting]
    assert numbers(outbox, *OF_SEARCH, "--state", "waiting") == [waiting]
    assert numbers(outbox, *OF_SEARCH, "--state", "fresh") == [blocked, held, fresh]
    assert numbers(outbox, *OF_SEARCH, "--state", "blocked") == [blocked, held]
    assert numbers(outbox, *OF_SEARCH, "--state", "dead", "--key", "b") == [dead]
    assert numbers(outbox) == [fresh], "the default one's"
    assert numbers(outbox, "--subscription", "default") == [fresh]
    shown = {seq: data(outbox, "show", str(seq), *OF_SEARCH)["change"] for seq in range(waiting, fresh + 1)}
    states = {seq: (each["state"], each["blocked_by"], each["pauses_key"]) for seq, each in shown.items()}
    assert states == {
        waiting: ("waiting", None, False),
        blocked: ("fresh", waiting, False),
        dead: ("dead", None, False),
        paused: ("dead", None, True),
        held: ("fresh", paused, False),
        done: ("processed", None, False),
        fresh: ("fresh", None, False),
    }
    failed = shown[dead]
    assert (failed["error_count"], failed["last_error"], failed["error_summary"]) == (3, "Failed: x", "Failed")
    found = data(outbox, "stats", *OF_SEARCH)
    [of_type] = found["types"]
    assert [of_type[name] for name in ("fresh", "blocked", "waiting", "dead", "blocked_keys")] == [3, 2, 1, 2, 2]
    assert of_type["oldest_ready_age_s"] is not None


def test_a_retry_makes_it_due_with_all_its_attempts(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    waiting, dead = publish(outbox_db, "order", "a"), publish(outbox_db, "order", "b")
    fail(outbox_db, search, waiting)
    fail(outbox_db, search, dead, pauses=True)
    assert run(outbox, "retry", f"{waiting}", f"{dead}", *OF_SEARCH).exit_code == 0
    assert rows(outbox_db, search) == [(waiting, True, False, True, "3"), (dead, True, False, True, "0")]
    assert row(outbox_db, dead)["next_attempt_at"] is None, "nothing of the default one"


def test_a_discard_leaves_nothing_where_the_position_says_it(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    below, above = publish(outbox_db, "order", "a"), publish(outbox_db, "order", "b")
    outbox_db.execute("UPDATE cdc_positions SET seq = %s", [below])
    fail(outbox_db, search, below, above, dead=True)
    assert run(outbox, "discard", f"{below}", f"{above}", *OF_SEARCH).exit_code == 0
    assert rows(outbox_db, search) == [(above, None, False, False, None)]
    assert taken(outbox_db, search) == []
    assert not row(outbox_db, above)["processed"], "the default one has it still"


def test_filters_choose_among_its_dead_letters(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    orders = [publish(outbox_db, "order", f"{n}") for n in range(3)]
    items = [publish(outbox_db, "item", f"{n}") for n in range(3)]
    process(outbox_db, *orders)
    fail(outbox_db, search, *orders, *items[:2], dead=True)
    fail(outbox_db, search, items[2])
    die(outbox_db, *items)
    assert data(outbox, "retry", "--type", "order", "--dry-run", *OF_SEARCH) == {"matching": 3}
    assert data(outbox, "retry", "--type", "order", "--yes", *OF_SEARCH) == {"retried": 3, "left": 0}
    assert data(outbox, "discard", "--error", "Failed", "--yes", *OF_SEARCH) == {"discarded": 2, "left": 0}
    waiting = ("--all", "--state", "waiting", "--key", "2", "--type", "item", "--yes")
    assert data(outbox, "discard", *waiting, *OF_SEARCH) == {"discarded": 1, "left": 0}
    assert [seq for seq, due, *_ in rows(outbox_db, search) if due] == orders
    assert sorted(numbers(outbox, "--state", "dead")) == items, "the default one's are as they were"


def test_the_settings_may_name_it(
    outbox: str, outbox_db: psycopg.Connection, search: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = publish(outbox_db, "order", "a")
    fail(outbox_db, search, seq, dead=True)
    monkeypatch.setenv("CDC_SUBSCRIPTION", "search")
    assert numbers(outbox) == [seq]
    assert numbers(outbox, "--subscription", "default") == []


def test_of_another_one_nothing_is_decided(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    seq = publish(outbox_db, "order", "a")
    billing = create(outbox, "billing", "--from", "beginning")
    fail(outbox_db, search, seq, dead=True)
    fail(outbox_db, billing, seq, dead=True)
    run(outbox, "retry", "--all", "--yes", "--subscription", "billing")
    assert rows(outbox_db, search) == [(seq, None, True, True, "3")]
    assert rows(outbox_db, billing) == [(seq, True, False, True, "0")]


def test_what_is_fresh_or_done_is_refused_and_what_is_being_worked_on(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    fresh = publish(outbox_db, "order", "a")
    assert "it is fresh" in run(outbox, "retry", f"{fresh}", *OF_SEARCH).stderr
    finish(outbox_db, search)
    assert "it is processed already" in run(outbox, "retry", f"{fresh}", *OF_SEARCH).stderr
    fail(outbox_db, search, fresh)
    with psycopg.connect(outbox) as working:
        working.execute("SELECT FROM cdc_subscription_changes FOR UPDATE")
        result = run(outbox, "discard", f"{fresh}", *OF_SEARCH)
    assert (result.exit_code, "another session is at work on it" in result.stderr) == (5, True)


async def test_what_a_handler_in_a_transaction_works_on_is_refused(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    seq = publish(outbox_db, "order", "a")
    fail(outbox_db, search, seq)
    began, release = asyncio.Event(), asyncio.Event()
    router = cdc.Router()

    @router.on("order")
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        began.set()
        await release.wait()

    outbox_db.execute("UPDATE cdc_subscription_changes SET next_attempt_at = now()")
    async with consuming(outbox, router, stream=False, subscription="search"):
        await asyncio.wait_for(began.wait(), 20)
        for command in (("retry", f"{seq}"), ("discard", f"{seq}")):
            result = await asyncio.to_thread(run, outbox, *command, *OF_SEARCH)
            assert (result.exit_code, "another session is at work on it" in result.stderr) == (5, True), result.output
        release.set()

        async def done() -> bool:
            return taken(outbox_db, search) == [] and not [each for each in rows(outbox_db, search) if each[3]]

        await eventually_async(done, what="it is done")


def test_what_is_nothing_to_it_is_not_found(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox, "search", "--type", "item", "--from", "beginning")
    seq = publish(outbox_db, "order")
    result = run(outbox, "show", f"{seq}", *OF_SEARCH)
    assert (result.exit_code, "it takes the types item" in result.stderr) == (4, True), result.output
    assert numbers(outbox, *OF_SEARCH, "--state", "fresh") == []
    assert run(outbox, "list", "--subscription", "serach").exit_code == 4


def test_what_it_has_not_is_refused(outbox: str, search: int) -> None:
    assert run(outbox, "list", "--state", "processed", *OF_SEARCH).exit_code == 2
    assert run(outbox, "discard", "--type", "x", "--before", "now", "--yes", *OF_SEARCH).exit_code == 2
    assert run(outbox, "replay", "--error", "ValueError", *OF_SEARCH).exit_code == 2


def test_reads_are_by_index_also_by_the_statistics_of_empty_tables(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    outbox_db.execute("ANALYZE")
    seqs = [publish(outbox_db, "order", f"{n}") for n in range(2_000)]
    process(outbox_db, *seqs[:1_500])
    fail(outbox_db, search, *seqs[:1_000])
    admin = SubscriptionAdmin("public", Subscriptions("public").named(outbox_db, "search"))
    with psycopg.connect(outbox, autocommit=True) as reading, reading.transaction():
        found = admin.find(reading, "waiting", Filter(), 10)
        admin.named(reading, [each.id for each in found.entries])
        admin.named(reading, [seqs[-1]])
        admin.stats(reading)
        read = reading.execute("SELECT relname, seq_scan FROM pg_stat_xact_user_tables WHERE seq_scan > 0").fetchall()
    assert read == []
    assert len(found.entries) == 10
