"""Each failed attempt is on record: which, whose, when, how it ended and why; bounded, and gone with its change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

import cdc
from cdc import testing
from cdc.core.attempts import KEPT
from cdc.engine import crash_guard
from cdc.postgres.retention import Retention
from tests.commands_outbox import data, numbers, run
from tests.commands_subscription import create
from tests.eventually import eventually_async
from tests.fix_consumer import consuming

_WRITE = "SELECT publish_change('order', %s, 'INSERT', '{}')"


def _attempts(db: psycopg.Connection) -> list[dict[str, Any]]:
    with db.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM change_attempts ORDER BY id").fetchall()


def _count_is(db: psycopg.Connection, count: int) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        return len(_attempts(db)) == count

    return ask


def _failing(*errors: BaseException) -> cdc.Router:
    """Raises these, one after the other, and the last one again."""
    router, left = cdc.Router(), list(errors)

    @router.on("order", max_attempts=3, name="bill")
    async def bill(_: cdc.Change) -> None:
        raise left.pop(0) if len(left) > 1 else left[0]

    return router


async def test_a_row_says_which_attempt_whose_when_how_and_why(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(_WRITE, ["1"])
    await testing.drain(outbox, _failing(ValueError("no such customer"), cdc.Retry(0.1, "later")), allow_dead=True)
    first, second, third = _attempts(outbox_db)
    [(seq,)] = outbox_db.execute("SELECT seq FROM entity_changes").fetchall()
    assert [each["attempt"] for each in (first, second, third)] == [1, 2, 3]
    assert [each["outcome"] for each in (first, second, third)] == ["retried", "retried", "dead"]
    assert {each["seq"] for each in (first, second, third)} == {seq}
    assert {each["subscription"] for each in (first, second, third)} == {"default"}
    assert {each["handler"] for each in (first, second, third)} == {"bill"}
    assert isinstance(first["consumer"], UUID)
    assert (first["error_kind"], first["error_class"]) == ("ValueError", "ValueError")
    assert first["error_text"] == "ValueError: no such customer"
    assert any("in bill" in frame for frame in first["frames"])
    assert (second["error_class"], second["error_text"], second["frames"]) == ("Retry", "later", [])
    assert all(each["started_at"] <= each["ended_at"] for each in (first, second, third))
    assert first["ended_at"] < second["ended_at"] < third["ended_at"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("x"), "KeyError"),
        (cdc.Reject("never"), "rejected"),
        (TimeoutError("of a library"), "TimeoutError"),
    ],
)
async def test_the_kind_of_the_error_is_a_column_by_which_filters_find_the_change(
    error: BaseException, kind: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(_WRITE, ["1"])
    await testing.drain(outbox, _failing(error), allow_dead=True)
    assert outbox_db.execute("SELECT error_kind FROM entity_changes").fetchall() == [(kind,)]
    # The column is what is asked, whatever the words are.
    outbox_db.execute("UPDATE entity_changes SET error_summary = 'some words', last_error = 'others'")
    assert data(outbox, "retry", "--error", kind, "--dry-run")["matching"] == 1
    assert data(outbox, "retry", "--error", kind[:-1], "--dry-run")["matching"] == 0
    assert data(outbox, "retry", "--error", "some", "--dry-run")["matching"] == 1


async def test_what_is_unavailable_is_on_record_and_a_snooze_is_no_failure(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(_WRITE, ["1"])
    router = _failing(cdc.Unavailable(0.1, "shut"), cdc.Snooze(0.1, "early"), cdc.Discard("enough"))
    await testing.drain(outbox, router)
    [only] = _attempts(outbox_db)
    assert (only["attempt"], only["outcome"], only["error_kind"]) == (1, "unavailable", "unavailable")
    assert only["error_text"] == "unavailable: shut"


async def test_of_many_attempts_the_last_ones_are_kept(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(_WRITE, ["1"])
    router = cdc.Router()

    @router.on("order", max_attempts=KEPT + 5)
    def fail(_: cdc.Change) -> None:
        raise cdc.Retry(0)

    await testing.drain(outbox, router, allow_dead=True)
    assert [each["attempt"] for each in _attempts(outbox_db)] == list(range(6, KEPT + 6))


async def test_they_go_with_their_change_and_not_before(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(_WRITE, ["1"])
    outbox_db.execute(_WRITE, ["2"])
    await testing.drain(outbox, _failing(ValueError("no")), allow_dead=True)
    kept = outbox_db.execute("SELECT max(seq) FROM entity_changes").fetchone()
    outbox_db.execute(
        "UPDATE entity_changes SET processed = true, processed_at = now() - interval '1 hour' WHERE entity_id = '1'"
    )
    assert sum(Retention("public").prune(outbox_db, 60)) == 1
    assert {(each["seq"],) for each in _attempts(outbox_db)} == {kept}
    assert len(_attempts(outbox_db)) == 3


async def test_show_has_them_for_people_and_for_programs(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(_WRITE, ["1"])
    await testing.drain(outbox, _failing(ValueError("no such customer")), allow_dead=True)
    [seq] = numbers(outbox)
    shown = data(outbox, "show", str(seq))["change"]
    assert shown["error_kind"] == "ValueError"
    assert [(each["attempt"], each["outcome"], each["error"]) for each in shown["attempts"]] == [
        (1, "retried", "ValueError"), (2, "retried", "ValueError"), (3, "dead", "ValueError"),
    ]  # fmt: skip
    table = run(outbox, "show", str(seq)).stdout
    assert table.count("ValueError: no such customer") == 4  # with last_error
    assert table.count("\n         ") >= 3  # the frames of each, below it


async def test_a_subscription_has_its_own(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox, "search")
    outbox_db.execute(_WRITE, ["1"])
    await testing.drain(outbox, _failing(KeyError("here")), allow_dead=True)
    async with consuming(outbox, _failing(cdc.Reject("there")), subscription="search"):
        await eventually_async(_count_is(outbox_db, 4), what="an attempt of the other subscription")
    assert [(each["subscription"], each["error_kind"]) for each in _attempts(outbox_db)] == [
        *[("default", "KeyError")] * 3, ("search", "rejected"),
    ]  # fmt: skip
    [seq] = numbers(outbox, "--subscription", "search")
    shown = data(outbox, "show", str(seq), "--subscription", "search")["change"]
    assert shown["error_kind"] == "rejected"
    assert [each["text"] for each in shown["attempts"]] == ["rejected: there"]
    assert data(outbox, "retry", "--error", "rejected", "--dry-run", "--subscription", "search")["matching"] == 1
    assert data(outbox, "retry", "--error", "KeyError", "--dry-run", "--subscription", "search")["matching"] == 0


@pytest.mark.parametrize("subscription", ["default", "search"])
async def test_a_crash_is_an_attempt_of_the_process_that_died(
    subscription: str, outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_guard, "GRACE_S", 0.0)
    dead = uuid4()
    outbox_db.execute(_WRITE, ["1"])
    if subscription == "default":
        outbox_db.execute("INSERT INTO cdc_shards (shard, owner) SELECT n, %s FROM generate_series(0, 63) AS n", [dead])
        outbox_db.execute("UPDATE entity_changes SET started_by = %s", [dead])
    else:
        create(outbox, "search")
        outbox_db.execute("UPDATE cdc_positions SET owner = %s, owned_since = now()", [dead])
        outbox_db.execute(
            "INSERT INTO cdc_subscription_changes"
            " (seq, subscription, shard, next_attempt_at, type_hash, key_hash, tried)"
            " SELECT c.seq, s.subscription, c.shard, '-infinity', hashtextextended('order', 0),"
            " hashtextextended('1', hashtextextended('order', 0)),"
            " jsonb_build_object('count', 0, 'started_by', %s::uuid)"
            " FROM entity_changes AS c, cdc_subscriptions AS s",
            [dead],
        )
    async with consuming(outbox, _failing(cdc.Reject("enough")), subscription=subscription):
        await eventually_async(_count_is(outbox_db, 2), what="the attempt that crashed, and the one after it")
    crashed, rejected = _attempts(outbox_db)
    assert (crashed["attempt"], crashed["consumer"], crashed["outcome"]) == (1, dead, "crashed")
    assert (crashed["handler"], crashed["error_kind"], crashed["started_at"]) == ("bill", "crash", None)
    assert (rejected["attempt"], rejected["outcome"]) == (2, "dead")
    assert rejected["consumer"] not in (None, dead)
