"""The log of actions: who has done what, to what, why and when, in the transaction of the deed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.core.errors import SchemaError
from cdc.postgres import grants, migrations
from cdc.postgres.actions import KEPT_S, ActionLog, Actor, named
from cdc.postgres.admin import OutboxAdmin
from tests.commands import answer, done, invoke, refused
from tests.fix_outbox import fill

BECAUSE = "the provider is back"


def actions(dsn: str, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer(invoke(dsn, "actions", "--json", *options))["actions"]
    return found


class Role:
    """One of the test's own. ``dsn``: to log in as it."""

    def __init__(self, db: psycopg.Connection, dsn: str) -> None:
        self._db = db
        [(self.name,)] = db.execute("SELECT 'ops_' || current_database()").fetchall()
        self.dsn = make_conninfo(dsn, user=self.name)
        self.do("CREATE ROLE {} LOGIN")

    def grant(self, grantee: Callable[[str], grants.Grantee]) -> str:
        grants.grant(self._db, "public", [grantee(self.name)])
        return self.dsn

    def do(self, statement: str) -> None:
        self._db.execute(sql.SQL(statement).format(sql.Identifier(self.name)))


@pytest.fixture
def role(outbox_db: psycopg.Connection, outbox: str) -> Iterator[Role]:
    made = Role(outbox_db, outbox)
    yield made
    made.do("DROP OWNED BY {}")
    made.do("DROP ROLE {}")


class Deed(NamedTuple):
    """``commands`` against five changes in ``state``; the last of them is the action, done so many ``times``."""

    action: str
    state: str
    target: dict[str, Any]
    times: int
    commands: tuple[str, ...]


_DEEDS = [
    Deed("retry", "dead", {"changes": [1, 2]}, 2, ("outbox retry 1 2",)),
    Deed("retry", "dead", {"state": "dead", "type": "x"}, 5, ("outbox retry --type x --yes",)),
    Deed("discard", "waiting", {"state": "waiting"}, 5, ("outbox discard --all --state waiting --yes",)),
    Deed("replay", "processed", {"changes": [3]}, 1, ("outbox replay 3",)),
    Deed("replay", "processed", {"key": "4"}, 1, ("outbox replay --key 4 --yes",)),
    Deed("prune", "processed", {"older_than_s": 432_000}, 5, ("outbox prune --older-than 5d",)),
    Deed("pause", "fresh", {"handler": "mail", "for_s": 1_800}, 1, ("pause --handler mail --for 30m",)),
    Deed("resume", "fresh", {"type": "x"}, 1, ("pause --type x", "resume --type x")),
    Deed("resume", "fresh", {"all": True}, 1, ("pause", "resume --all")),
    Deed("subscription create", "fresh", {"subscription": "s", "from": "now"}, 1, ("subscription create s",)),
    Deed(
        "subscription drop", "fresh", {"subscription": "s"}, 1, ("subscription create s", "subscription drop s --yes")
    ),
]
_EXPLAINED = ("outbox retry", "outbox discard", "outbox replay", "pause", "resume")


@pytest.mark.parametrize("deed", _DEEDS)
def test_what_an_operator_does_is_recorded_with_it(outbox: str, outbox_db: psycopg.Connection, deed: Deed) -> None:
    fill(outbox_db, 5, state=deed.state)
    explained = deed.commands[-1].startswith(_EXPLAINED)
    for command in deed.commands:
        done(outbox, *command.split(), *(["--because", BECAUSE] if explained else []))
    [last, *before] = actions(outbox)
    assert (last["action"], last["target"], last["count"]) == (deed.action, deed.target, deed.times)
    assert (last["because"], last["via"], bool(last["person"])) == (BECAUSE if explained else None, "cli", True)
    assert len(before) == len(deed.commands) - 1
    [(role, login)] = outbox_db.execute("SELECT current_user::text, session_user::text").fetchall()
    assert (last["role"], last["login"]) == (role, login)


def test_a_command_of_many_transactions_is_one_action(outbox: str, outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 2_500, state="dead")
    done(outbox, "outbox", "retry", "--all", "--yes")
    [only] = actions(outbox)
    assert only["count"] == 2_500
    assert outbox_db.execute("SELECT count(*) > 1 FROM cdc_actions").fetchone() == (True,)
    assert "retry" in done(outbox, "actions")


def test_what_was_done_to_nothing_or_was_refused_is_no_action(outbox: str, outbox_db: psycopg.Connection) -> None:
    done(outbox, "outbox", "retry", "--all", "--yes")
    fill(outbox_db, 1, state="fresh")
    refused(outbox, "outbox", "retry", "1")
    assert actions(outbox) == []
    assert "nobody" in done(outbox, "actions")


def test_pages_follow_each_other_without_a_gap(outbox: str, outbox_db: psycopg.Connection) -> None:
    log = ActionLog("public")
    for number in range(7):
        log.record(outbox_db, "retry", named([number]), actor=Actor())
    first = actions(outbox, "--limit", "3")
    second = actions(outbox, "--limit", "10", "--before", str(first[-1]["id"]))
    assert [each["target"]["changes"][0] for each in [*first, *second]] == [6, 5, 4, 3, 2, 1, 0]


def test_an_operator_adds_to_the_log_and_changes_nothing_in_it(outbox_db: psycopg.Connection, role: Role) -> None:
    dsn = role.grant(grants.operator)
    fill(outbox_db, 1, state="dead")
    done(dsn, "outbox", "retry", "1")
    [only] = actions(dsn)
    assert (only["role"], only["login"]) == (role.name, role.name)
    with psycopg.connect(dsn, autocommit=True) as operator:
        values = (
            "(command, person, via, action, target, count, {}) VALUES (gen_random_uuid(), '', '', '', '{{}}', 1, {})"
        )
        forged = [f"INSERT INTO cdc_actions {values.format(*each)}" for each in (("role", "'x'"), ("at", "now()"))]
        for attempt in ("UPDATE cdc_actions SET count = 0", "DELETE FROM cdc_actions", "TRUNCATE cdc_actions", *forged):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                operator.execute(attempt)


@pytest.mark.parametrize("lost", ["REVOKE INSERT (command, count) ON cdc_actions FROM {}", "DROP TABLE cdc_actions"])
def test_what_cannot_be_recorded_is_not_done(outbox_db: psycopg.Connection, role: Role, lost: str) -> None:
    dsn = role.grant(grants.operator)
    fill(outbox_db, 1, state="dead")
    role.do(lost)
    said = refused(dsn, "outbox", "retry", "1")
    assert "cdc db " in said, "what to do now"
    assert outbox_db.execute("SELECT dead_at IS NOT NULL FROM entity_changes").fetchone() == (True,)


def test_a_reader_reads_it_and_who_could_act_before_it_was_there_still_can(
    outbox_db: psycopg.Connection, role: Role
) -> None:
    dsn = role.grant(partial(grants.consumer, retention=True))
    outbox_db.execute("DROP TABLE cdc_actions; DELETE FROM cdc_migrations WHERE version = 25")
    migrations.upgrade(outbox_db, "public")
    fill(outbox_db, 3, state="processed")
    fill(outbox_db, 1, state="dead")
    done(dsn, "outbox", "discard", "4")
    done(dsn, "outbox", "prune", "--older-than", "5d")
    assert [each["action"] for each in actions(dsn)] == ["prune", "discard"]
    with psycopg.connect(dsn, autocommit=True) as consumer, pytest.raises(psycopg.errors.InsufficientPrivilege):
        consumer.execute("UPDATE cdc_actions SET count = 0")
    role.do("REVOKE ALL ON cdc_actions FROM {}")
    role.grant(grants.reader)
    assert len(actions(dsn)) == 2


def test_what_is_older_than_is_kept_goes_with_old_changes(outbox: str, outbox_db: psycopg.Connection) -> None:
    log = ActionLog("public")
    for _ in range(3):
        log.record(outbox_db, "retry", {})
    outbox_db.execute("UPDATE cdc_actions SET at = now() - make_interval(secs => %s) WHERE id <= 2", [KEPT_S + 60])
    done(outbox, "outbox", "prune", "--older-than", "1d")
    assert [each["id"] for each in actions(outbox)] == [3]


def test_a_record_is_bounded_and_holds_no_zero_byte(outbox_db: psycopg.Connection) -> None:
    log = ActionLog("public", Actor("ä" * 1_000, because="é" * 5_000))
    log.record(outbox_db, "retry", {"key": "k\0" * 100_000, **named(range(100_000))})
    [only] = log.latest(outbox_db, 1)
    assert (len(only.target["key"]), len(only.target["changes"]), only.target["of"]) == (250, 100, 100_000)
    assert len((only.because or "").encode()) == 2_000


def test_library_code_is_recorded_too(outbox_db: psycopg.Connection) -> None:
    fill(outbox_db, 1, state="dead")
    OutboxAdmin("public").discard(outbox_db, [1])
    [only] = ActionLog("public").latest(outbox_db, 10)
    assert (only.via, only.person) == ("python", "")
    outbox_db.execute("DROP TABLE cdc_actions")
    with pytest.raises(SchemaError, match="no table of what operators do"):
        ActionLog("public").latest(outbox_db, 10)
