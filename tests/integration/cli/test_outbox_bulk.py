"""Decisions about many changes at once: `cdc outbox retry` and `discard` with filters."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

import cdc
from cdc.cli import cdc as root_command
from cdc.core.model import ChangeState
from cdc.core.router import Router
from cdc.postgres import bulk
from cdc.postgres.bulk import Bulk, Round, Wanted
from tests.commands_outbox import data, die, numbers, process, publish, row, run, wait
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled

_DECISIONS = ["retry", "discard"]
_DONE = {"retry": "retried", "discard": "discarded"}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CDC_") and not name.startswith("CDC_TEST_")]:
        monkeypatch.delenv(name)


def dead(dsn: str) -> set[int]:
    return set(numbers(dsn, "--state", "dead"))


# --- which ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", _DECISIONS)
def test_dead_letters_are_decided_about_by_type_and_key(
    outbox: str, outbox_db: psycopg.Connection, decision: str
) -> None:
    xa, xb, ya = (publish(outbox_db, *key) for key in (("x", "a"), ("x", "b"), ("y", "a")))
    waiting, fresh = publish(outbox_db, "x", "w"), publish(outbox_db, "x", "f")
    die(outbox_db, xa, xb, ya)
    wait(outbox_db, waiting)
    assert data(outbox, decision, "--type", "x", "--key", "a", "--yes") == {_DONE[decision]: 1, "left": 0}
    assert dead(outbox) == {xb, ya}
    assert data(outbox, decision, "--type", "x", "--yes") == {_DONE[decision]: 1, "left": 0}
    assert dead(outbox) == {ya}
    assert data(outbox, decision, "--all", "--yes") == {_DONE[decision]: 1, "left": 0}
    assert dead(outbox) == set()
    assert not row(outbox_db, waiting)["due"], "what waits keeps its time"
    assert not row(outbox_db, fresh)["processed"]


@pytest.mark.parametrize("decision", _DECISIONS)
def test_what_waits_is_decided_about_when_it_is_asked_for(
    outbox: str, outbox_db: psycopg.Connection, decision: str
) -> None:
    waiting, other, dead_one = (publish(outbox_db, entity_type, "k") for entity_type in ("x", "y", "x"))
    wait(outbox_db, waiting, other)
    die(outbox_db, dead_one)
    done = data(outbox, decision, "--type", "x", "--state", "waiting", "--yes")
    assert done == {_DONE[decision]: 1, "left": 0}
    now = row(outbox_db, waiting)
    assert now["processed"] if decision == "discard" else (now["due"], now["error_count"]) == (True, 1)
    assert (row(outbox_db, other)["due"], dead(outbox)) == (False, {dead_one})


@pytest.mark.parametrize(
    ("failed", "asked", "found"),
    [
        (("ValueError at app.py:3 in f", "ValueError: x"), "ValueError", 1),
        (("ValueErrorGroup at app.py:3 in f", "ValueErrorGroup: x"), "ValueError", 0),
        (("rejected it", "KeyError: a reason that a handler gave"), "KeyError", 0),
        (("rejected it", "no such customer"), "rejected", 1),
        (("the row does not fit the model Order", "1 validation error"), "the row does not fit", 1),
        (("ValueError at app.py:3 in f", "ValueError: x"), "Value_rror", 0),
        (("ValueError", "ValueError: x"), "%", 0),
        ((None, "ValueError: of an older version"), "ValueError", 1),
        ((None, "KeyError"), "ValueError", 0),
        ((None, None), "ValueError", 0),
    ],
)
def test_they_are_found_by_the_class_of_their_error(
    outbox: str, outbox_db: psycopg.Connection, failed: tuple[str | None, str | None], asked: str, found: int
) -> None:
    die(outbox_db, publish(outbox_db))
    outbox_db.execute("UPDATE entity_changes SET error_summary = %s, last_error = %s", failed)
    assert data(outbox, "retry", "--error", asked, "--dry-run") == {"matching": found}


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_they_are_found_by_when_they_were_changed(
    outbox: str, outbox_db: psycopg.Connection, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTZ", zone)
    monkeypatch.setenv("TZ", zone)
    old, new = publish(outbox_db, "x", "1"), publish(outbox_db, "x", "2")
    die(outbox_db, old, new)
    change = "UPDATE entity_changes SET changed_at = '2026-01-31T18:00Z' WHERE seq = %s"
    outbox_db.execute(change, [old])

    def count(*arguments: str) -> int:
        return int(data(outbox, "discard", "--dry-run", *arguments)["matching"])

    assert count("--since", "1h") == 1
    assert count("--until", "1h") == 1
    assert count("--since", "2026-01-31") == 2
    assert count("--since", "2026-01-31T18:00", "--until", "2026-01-31T18:00:01") == 1
    assert count("--since", "2026-01-31T19:00:00+01:00", "--until", "2026-01-31T18:00:00.000001Z") == 1
    assert count("--until", "2026-01-31T18:00Z") == 0


@pytest.mark.parametrize("option", ["--since", "--until"])
@pytest.mark.parametrize("decision", _DECISIONS)
def test_a_time_that_is_none_is_refused_before_anything_is_done(decision: str, option: str, database: str) -> None:
    refused = run(database, decision, option, "soon", "--yes")
    assert refused.exit_code == 2, "before it is asked whether there is an outbox"
    assert "'soon' is no moment" in refused.stderr


def test_they_are_found_by_the_handler_that_gets_them(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bulk_handlers.py").write_text(
        "import cdc\n"
        "router = cdc.Router()\n"
        "@router.on('order', 'INSERT', name='invoice')\n"
        "def one(change): ...\n"
        "@router.on('order', name='mail')\n"
        "def two(change): ...\n"
        "@router.on('*', 'INSERT', name='audit')\n"
        "def three(change): ...\n"
        "router.ignore('note')\n"
    )
    keys = [("order", "INSERT"), ("order", "UPDATE"), ("order", "DELETE"), ("task", "INSERT"), ("task", "UPDATE"),
            ("note", "INSERT")]  # fmt: skip
    for entity_type, operation in keys:
        outbox_db.execute("SELECT publish_change(%s, %s, %s)", [entity_type, operation, operation])
    outbox_db.execute("UPDATE entity_changes SET dead_at = now()")
    named = ["--handlers", "bulk_handlers:router"]
    counts = {
        name: data(outbox, "retry", *named, "--handler", name, "--dry-run")["matching"]
        for name in ("invoice", "mail", "audit")
    }
    assert counts == {"invoice": 1, "mail": 2, "audit": 1}
    unknown = run(outbox, "retry", *named, "--handler", "nobody", "--dry-run")
    assert (unknown.exit_code, "there are audit, invoice, mail" in unknown.stderr) == (2, True)
    nameless = run(outbox, "retry", "--handler", "mail", "--dry-run")
    assert (nameless.exit_code, "--handlers" in nameless.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [[], ["1", "--all"], ["1", "--type", "x"], ["1", "--dry-run"], ["--dry-run"], ["1", "--state", "dead"],
     ["--state", "waiting"]],
)  # fmt: skip
@pytest.mark.parametrize("decision", _DECISIONS)
def test_changes_are_either_named_or_described(outbox: str, decision: str, arguments: list[str]) -> None:
    assert run(outbox, decision, *arguments, "--yes").exit_code == 2


# --- how many ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", _DECISIONS)
def test_it_is_said_how_many_before_anything_is_changed(
    outbox: str, outbox_db: psycopg.Connection, decision: str
) -> None:
    seqs = {publish(outbox_db, "x", str(n)) for n in range(3)}
    die(outbox_db, *seqs)
    counted = run(outbox, decision, "--type", "x", "--dry-run")
    assert (counted.exit_code, counted.stdout) == (0, "")
    assert "dead letters with --type x: 3; nothing was changed" in counted.stderr
    refused = run(outbox, decision, "--type", "x")
    assert refused.exit_code == 5, "a program says --yes"
    assert f"{decision} 3 dead letters with --type x: not without a confirmation" in refused.stderr
    assert dead(outbox) == seqs
    assert f"dead letters that are {_DONE[decision]}: 3" in run(outbox, decision, "--all", "--yes").stderr
    assert dead(outbox) == set()


@pytest.mark.parametrize(("answer", "code"), [("n\n", 5), ("y\n", 0)])
def test_on_a_terminal_it_asks(
    outbox: str, outbox_db: psycopg.Connection, answer: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(outbox_db, seq := publish(outbox_db))
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    result = CliRunner().invoke(root_command, ["outbox", "retry", "--all", "--dsn", outbox], input=answer)
    assert result.exit_code == code, result.output
    assert "retry 1 dead letters?" in result.stderr
    assert (dead(outbox) == {seq}) == bool(code)


@pytest.mark.parametrize("decision", _DECISIONS)
def test_a_filter_that_finds_nothing_says_so_and_asks_nothing(outbox: str, decision: str) -> None:
    nothing = run(outbox, decision, "--type", "none")
    assert nothing.exit_code == 0
    assert f"dead letters with --type none that are {_DONE[decision]}: 0" in nothing.stderr
    assert data(outbox, decision, "--type", "none") == {_DONE[decision]: 0, "left": 0}


# --- in rounds -----------------------------------------------------------------------------------------------------


def test_each_round_is_a_transaction_and_has_its_keys_whole(
    outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_ROUND", 4)
    keys = {key: [publish(outbox_db, "x", key) for _ in range(3)] for key in "abcdef"}
    die(outbox_db, *(seq for seqs in keys.values() for seq in seqs))
    done = 0
    with Bulk("public").selected(outbox_db, ChangeState.DEAD, Wanted()) as selection:
        assert selection.count == 18
        for each in selection.decide("retry"):
            done += each.done
            assert each == Round(6, 6)
            moved = [sum(row(outbox_db, seq)["dead_at"] is None for seq in seqs) for seqs in keys.values()]
            assert sum(moved) == done
            assert set(moved) <= {0, 3}, "a key is whole"
    assert done == 18


def test_of_a_key_with_very_many_a_round_takes_the_first(
    outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_KEY_MAX", 2)
    monkeypatch.setattr(bulk, "_ROUND", 1)
    seqs = [publish(outbox_db) for _ in range(5)]
    die(outbox_db, *seqs)
    with Bulk("public").selected(outbox_db, ChangeState.DEAD, Wanted()) as selection:
        rounds = selection.decide("retry")
        assert next(rounds) == Round(2, 2)
        assert [row(outbox_db, seq)["due"] for seq in seqs] == [True, True, None, None, None]
        assert list(rounds) == [Round(2, 2), Round(1, 1)]


def test_what_was_counted_is_what_is_decided_about(outbox_db: psycopg.Connection) -> None:
    first = publish(outbox_db, "x", "1")
    die(outbox_db, first)
    with Bulk("public").selected(outbox_db, ChangeState.DEAD, Wanted()) as selection:
        later = publish(outbox_db, "x", "2")
        die(outbox_db, later)
        assert list(selection.decide("discard")) == [Round(1, 1)]
    assert row(outbox_db, later)["dead_at"] is not None
    with Bulk("public").selected(outbox_db, ChangeState.DEAD, Wanted()) as selection:
        assert selection.count == 1, "given again, it finds what is left"


def test_what_changed_its_state_or_is_locked_meanwhile_is_left_and_counted(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    retried, locked, free = (publish(outbox_db, "x", str(n)) for n in range(3))
    die(outbox_db, retried, locked, free)
    with (
        psycopg.connect(outbox) as other,
        Bulk("public").selected(outbox_db, ChangeState.DEAD, Wanted()) as selection,
    ):
        outbox_db.execute("UPDATE entity_changes SET dead_at = NULL, next_attempt_at = now() WHERE seq = %s", [retried])
        other.execute("SELECT FROM entity_changes WHERE seq = %s FOR UPDATE", [locked])
        assert list(selection.decide("discard")) == [Round(3, 1)]
    assert [row(outbox_db, seq)["processed"] for seq in (retried, locked, free)] == [False, False, True]


def test_progress_is_said_while_it_works(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_ROUND", 1)
    monkeypatch.setattr("cdc.cli.bulk._PROGRESS_EVERY_S", -1.0)
    die(outbox_db, *(publish(outbox_db, "x", str(n)) for n in range(3)))
    said = run(outbox, "retry", "--all", "--yes").stderr
    assert "retried 1 of 3 so far" in said
    assert "retried 3 of 3 so far" in said


# --- beside a running consumer -------------------------------------------------------------------------------------


async def test_dead_letters_of_a_key_run_in_order_and_before_its_later_changes(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls, gate = Router(), [], asyncio.Event()

    @router.on("*")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.seq == gated:
            await gate.wait()

    dead_ones = [publish(outbox_db) for _ in range(6)]
    die(outbox_db, *dead_ones)
    gated = publish(outbox_db)
    behind = [publish(outbox_db) for _ in range(5)]
    async with consuming(outbox, router, sweep_interval=3600, poll_interval=3600) as app:

        async def begun() -> bool:
            return app.status.listening and calls == [gated]

        await eventually_async(begun, what="the key to be at work")
        assert (await asyncio.to_thread(data, outbox, "retry", "--all", "--yes"))["retried"] == 6

        async def woken() -> bool:
            return metric(app.metrics.registry, "cdc_wakeups_total", source="retry") >= 1

        await eventually_async(woken, what="the wake-up to come in")
        gate.set()

        async def over() -> bool:
            return settled(outbox_db)

        await eventually_async(over, what="every change settled")
    assert calls == [gated, *dead_ones, *behind]


def test_discarding_many_keeps_what_they_failed_for_and_leaves_the_processed_alone(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq, done = publish(outbox_db, "x", "1"), publish(outbox_db, "x", "2")
    die(outbox_db, seq)
    process(outbox_db, done)
    before = row(outbox_db, done)
    assert data(outbox, "discard", "--error", "Failed", "--yes") == {"discarded": 1, "left": 0}
    assert row(outbox_db, seq)["last_error"] == "discarded by operator: Failed: x"
    assert row(outbox_db, done) == before
