"""`cdc pause`, `cdc resume` and `cdc controls`, as an operator types them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.postgres import grants, migrations
from tests.commands import done, invoke, refused
from tests.commands_outbox import publish

_HOSTILE = """a"b'c%d\\e $1 {x} \n\t;--"""


@pytest.fixture
def role(outbox_db: psycopg.Connection) -> Iterator[str]:
    name = f"role_{uuid.uuid4().hex[:12]}"
    outbox_db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    yield name
    outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def _listed(dsn: str, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done(dsn, "controls", "--json", *options))["controls"]
    return found


def test_a_pause_is_set_listed_with_who_and_why_and_ended(outbox: str) -> None:
    said = done(outbox, "pause", "--type", "order", "--because", "wrong totals", "--by", "anna")
    assert "paused the type order until it is resumed; to go on: cdc resume --type order" in said
    [one] = _listed(outbox)
    assert (one["entity_type"], one["scope"], one["set_by"], one["because"], one["until"]) == (
        "order", "type", "anna", "wrong totals", None,
    )  # fmt: skip
    assert one["role"]
    shown = done(outbox, "controls")
    assert "anna as" in shown
    assert "wrong totals" in shown
    assert "the type order, for 0 s now, by anna: wrong totals" in done(outbox, "status")
    assert "resumed the type order" in done(outbox, "resume", "--type", "order")
    assert _listed(outbox) == []
    assert "nothing is paused" in done(outbox, "controls")


def test_a_pause_of_the_same_replaces_the_one_before(outbox: str) -> None:
    done(outbox, "pause", "--handler", "send", "--because", "first")
    done(outbox, "pause", "--handler", "send", "--because", "second", "--for", "30m")
    [one] = _listed(outbox)
    assert one["because"] == "second"
    assert 1_700 < one["ends_in_s"] <= 1_800
    assert " now, 30 min left, by " in done(outbox, "status")


def test_one_that_is_over_is_gone(outbox: str, outbox_db: psycopg.Connection) -> None:
    done(outbox, "pause", "--type", "a", "--because", "x", "--for", "1h")
    outbox_db.execute("UPDATE cdc_controls SET until = now() - interval '1 second'")
    assert _listed(outbox) == []
    assert "nothing is paused" in refused(outbox, "resume", "--type", "a")
    done(outbox, "pause", "--type", "b", "--because", "x")
    assert outbox_db.execute("SELECT count(*) FROM cdc_controls").fetchone() == (1,)


def test_each_is_ended_alone_or_all_at_once(outbox: str) -> None:
    for target in (
        (),
        ("--type", "a"),
        ("--type", "a", "--key", "1"),
        ("--handler", "h"),
        ("--type", "a", "--handler", "h"),
    ):
        done(outbox, "pause", *target, "--because", "x")
    assert len(_listed(outbox)) == 5
    said = done(outbox, "resume")
    assert "resumed everything" in said
    assert "still paused: the type a, a key of a, the handler h" in said
    assert "not paused: the type b" in refused(outbox, "resume", "--type", "b")
    done(outbox, "resume", "--all")
    assert _listed(outbox) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--key", "1", "--because", "x"],
        ["--key", "1", "--handler", "h", "--type", "t", "--because", "x"],
        ["--type", "*", "--because", "x"],
        ["--type", "", "--because", "x"],
        ["--type", "t"],
        ["--type", "t", "--because", " "],
        ["--type", "t", "--because", "x" * 2_001],
        ["--type", "t", "--because", "x", "--for", "soon"],
    ],
)
def test_what_makes_no_sense_is_refused(outbox: str, arguments: list[str]) -> None:
    result = invoke(outbox, "pause", *arguments)
    assert result.exit_code == 2, result.output
    assert _listed(outbox) == []


def test_a_subscription_must_be_there(outbox: str) -> None:
    assert "there is no subscription search" in refused(outbox, "pause", "--subscription", "search", "--because", "x")
    done(outbox, "subscription", "create", "search")
    done(outbox, "pause", "--subscription", "search", "--because", "x")
    done(outbox, "pause", "--subscription", "default", "--because", "x")
    assert [each["subscription"] for each in _listed(outbox)] == ["search", "default"]


def test_hostile_names_are_names(admin_dsn: str, outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier('o\'dd "50%"')))
    migrations.install(outbox_db, 'o\'dd "50%"')
    options = ("--schema", 'o\'dd "50%"')
    done(outbox, "pause", "--type", _HOSTILE, "--key", _HOSTILE, "--because", _HOSTILE, "--by", _HOSTILE, *options)
    [one] = _listed(outbox, *options)
    assert {one["entity_type"], one["entity_id"], one["set_by"]} == {_HOSTILE}
    done(outbox, "controls", *options)
    done(outbox, "resume", "--type", _HOSTILE, "--key", _HOSTILE, *options)
    assert _listed(outbox, *options) == []


def test_there_is_room_for_a_thousand(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(
        "INSERT INTO cdc_controls (entity_type, entity_id, because, set_by)"
        " SELECT 't', n::text, 'x', 'y' FROM generate_series(1, 1000) AS n"
    )
    assert "no room for more" in refused(outbox, "pause", "--type", "order", "--because", "x")


def test_an_operator_may_pause_and_resume_retry_and_discard_and_a_reader_may_look(
    outbox: str, outbox_db: psycopg.Connection, role: str
) -> None:
    as_role = make_conninfo(outbox, user=role)
    grants.grant(outbox_db, "public", [grants.reader(role)])
    done(outbox, "pause", "--type", "order", "--because", "x")
    assert len(_listed(as_role)) == 1
    assert "--operator ROLE" in refused(as_role, "resume", "--type", "order")
    grants.grant(outbox_db, "public", [grants.operator(role)])
    done(as_role, "resume", "--type", "order")
    done(as_role, "pause", "--handler", "h", "--because", "x")
    assert _listed(as_role)[0]["role"] == role
    publish(outbox_db, "order", "1")
    publish(outbox_db, "order", "2")
    outbox_db.execute("UPDATE entity_changes SET dead_at = now(), error_count = 3")
    first, second = [seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes ORDER BY seq")]
    done(as_role, "outbox", "retry", str(first))
    done(as_role, "outbox", "discard", str(second))


def test_a_consumer_may_see_what_is_paused_and_no_more(outbox: str, outbox_db: psycopg.Connection, role: str) -> None:
    as_role = make_conninfo(outbox, user=role)
    grants.grant(outbox_db, "public", [grants.consumer(role)])
    assert _listed(as_role) == []
    assert "may not" in refused(as_role, "pause", "--because", "x")


def test_an_upgrade_lets_those_see_it_who_mark_changes(outbox: str, outbox_db: psycopg.Connection, role: str) -> None:
    grants.grant(outbox_db, "public", [grants.consumer(role)])
    outbox_db.execute("DROP TABLE cdc_controls; DELETE FROM cdc_migrations WHERE version = 18")
    migrations.upgrade(outbox_db, "public")
    assert _listed(make_conninfo(outbox, user=role)) == []


def test_an_outbox_of_an_earlier_version_says_so(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("DROP TABLE cdc_controls")
    for command in (["controls"], ["resume"], ["pause", "--because", "x"]):
        assert "cdc db upgrade" in refused(outbox, *command)
    assert "paused" not in done(outbox, "status")
