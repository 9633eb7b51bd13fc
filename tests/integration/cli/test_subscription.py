"""`cdc subscription`, as an operator types it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.core.model import SHARDS
from cdc.postgres.shard_locks import lock_class
from tests.commands import done, refused
from tests.commands_outbox import process, publish
from tests.commands_subscription import create, data, fail, progress, run, taken
from tests.eventually import eventually


@pytest.fixture
def consumer(outbox: str, outbox_db: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A session that is a consumer of the subscription with the number 1, by the lock that it shares."""
    with psycopg.connect(outbox, autocommit=True) as session:
        session.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class("public", 1), SHARDS])
        yield session


def test_one_is_created_listed_shown_and_dropped(outbox: str, outbox_db: psycopg.Connection) -> None:
    said = done(outbox, "subscription", "create", "search", "--type", "order", "--type", "item")
    assert "created search, which takes the types item, order" in said
    assert "cdc run --subscription search" in said
    found = data(outbox, "list")["subscriptions"]
    assert [(each["name"], each["types"], each["state"], each["created_from"]) for each in found] == [
        ("search", ["item", "order"], "no consumer", "now")
    ]
    shown = done(outbox, "subscription", "show", "search")
    assert "item, order" in shown
    assert "dropped search" in done(outbox, "subscription", "drop", "search", "--yes")
    assert data(outbox, "list") == {"subscriptions": []}
    assert "there is none" in run(outbox, "list").stderr


@pytest.mark.parametrize(
    ("start", "takes"),
    [("now", 0), ("beginning", 5), ("4", 2), ("1h", 5), ("2020-01-31T18:00Z", 5), ("2020-01-31", 5)],
)
def test_from_says_where_it_begins(outbox: str, outbox_db: psycopg.Connection, start: str, takes: int) -> None:
    for n in range(5):
        publish(outbox_db, "order", f"{n}")
    number = create(outbox, "search", "--from", start)
    assert len(taken(outbox_db, number)) == takes


@pytest.mark.parametrize("start", ["never", "0", "-1", "9223372036854775808", "٣", "2099-01-01", "7"])
def test_a_beginning_that_is_none_is_refused(outbox: str, outbox_db: psycopg.Connection, start: str) -> None:
    result = run(outbox, "create", "search", "--from", start)
    assert result.exit_code == 2, result.output
    assert data(outbox, "list") == {"subscriptions": []}


@pytest.mark.parametrize("name", ["Search", "a-b", "", "x" * 64, "ä", "a b", 'x"; --', "default", "٣"])
def test_a_name_is_one_that_a_slot_could_have_and_not_that_of_the_default_one(outbox: str, name: str) -> None:
    result = run(outbox, "create", "--", name)
    assert result.exit_code == 2, result.output


def test_one_that_is_there_is_told_apart(outbox: str, outbox_db: psycopg.Connection) -> None:
    number = create(outbox)
    assert "it takes every type" in refused(outbox, "subscription", "create", "search")
    assert "not the types order" in refused(outbox, "subscription", "create", "search", "--type", "order")
    again = data(outbox, "create", "search", "--if-not-exists")
    assert (again["created"], again["subscription"]["number"]) == (False, number)


def test_an_unknown_one_is_not_found_and_the_nearest_is_named(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox)
    for command in (("show",), ("pause",), ("resume",), ("drop", "--yes")):
        result = run(outbox, command[0], "serach", *command[1:])
        assert (result.exit_code, "did you mean search?" in result.stderr) == (4, True), result.output


def test_a_list_says_who_runs_who_is_paused_and_who_holds_back_what(
    outbox: str, outbox_db: psycopg.Connection, consumer: psycopg.Connection
) -> None:
    seqs = [publish(outbox_db, "order", f"{n}") for n in range(3)]
    create(outbox, "search", "--from", "beginning")
    create(outbox, "billing", "--from", "beginning")
    process(outbox_db, *seqs[:2])
    done(outbox, "subscription", "pause", "billing", "--because", "year's end")
    found = {each["name"]: each for each in data(outbox, "list")["subscriptions"]}
    assert (found["search"]["state"], found["search"]["consumers"]) == ("running", 1)
    assert found["billing"]["state"] == "paused"
    assert [each["because"] for each in found["billing"]["pauses"]] == ["year's end"]
    assert found["search"]["pauses"] == []
    assert [(each["behind"], each["held_back"]) for each in found.values()] == [(3, 2), (3, 2)]
    table = run(outbox, "list").stdout
    assert "year's end" in table
    assert "year's end" in done(outbox, "subscription", "show", "billing")
    assert "resumed everything in the subscription billing" in done(outbox, "subscription", "resume", "billing")
    assert progress(outbox, "billing")["state"] == "no consumer"


def test_a_pause_is_that_of_cdc_pause_for_a_time_and_with_a_reason_if_one_is_given(outbox: str) -> None:
    create(outbox)
    done(outbox, "subscription", "pause", "search", "--for", "30m")
    [paused] = progress(outbox)["pauses"]
    assert (paused["subscription"], paused["scope"], paused["because"]) == (
        "search", "everything", "no reason was given"
    )  # fmt: skip
    assert 1_700 < paused["ends_in_s"] <= 1_800
    done(outbox, "pause", "--subscription", "search", "--because", "another", "--by", "anna")
    [paused] = progress(outbox)["pauses"]
    assert (paused["because"], paused["set_by"], paused["until"]) == ("another", "anna", None)
    done(outbox, "pause", "--because", "the disk is full")
    assert "still paused: everything" in done(outbox, "subscription", "resume", "search")
    assert progress(outbox)["state"] == "paused"
    result = run(outbox, "resume", "search")
    assert (result.exit_code, "not paused: everything in the subscription search" in result.stderr) == (4, True)


def test_a_drop_says_what_is_lost_and_asks(outbox: str, outbox_db: psycopg.Connection) -> None:
    seqs = [publish(outbox_db, "order", f"{n}") for n in range(3)]
    number = create(outbox, "search", "--from", "beginning")
    fail(outbox_db, number, seqs[0], dead=True)
    result = run(outbox, "drop", "search")
    assert result.exit_code == 5
    assert "with what is left of it: 2 not handled, 1 dead" in result.stderr
    assert progress(outbox)["behind"] == 2


def test_whoever_listens_is_woken(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("LISTEN entity_change")
    for command in (("create", "search"), ("pause", "search"), ("resume", "search"), ("drop", "search", "--yes")):
        done(outbox, "subscription", *command)
        eventually(lambda: list(outbox_db.notifies(timeout=0.1, stop_after=1)), what=f"{command} wakes")


def test_what_a_role_may_not_do_is_said(outbox: str, outbox_db: psycopg.Connection) -> None:
    role = sql.Identifier(f"reader_{outbox_db.info.dbname}")
    outbox_db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        dsn = make_conninfo(outbox, user=role.as_string().strip('"'))
        said = refused(dsn, "subscription", "create", "search")
        assert "the role may not" in said
        assert "roles.md" in said
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))
