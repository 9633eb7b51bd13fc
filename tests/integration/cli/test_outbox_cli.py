"""What an operator sees of the outbox and decides about it, by `cdc outbox`, also beside a running consumer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.cli.outbox import _STATES
from cdc.core.errors import RefusedError, UsageError
from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.postgres import admin, migrations
from cdc.postgres.admin import OutboxAdmin, parse_reference
from cdc.postgres.sql_files import load
from tests.commands_outbox import BRING, data, die, numbers, process, publish, row, run, wait
from tests.commands_subscription import create, fail
from tests.commands_subscription import run as run_subscription
from tests.eventually import eventually_async
from tests.fix_consumer import ROOT, consuming, metric, settled
from tests.fix_outbox import copied_outbox


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CDC_") and not name.startswith("CDC_TEST_")]:
        monkeypatch.delenv(name)


# --- looking -------------------------------------------------------------------------------------------------------


def test_stats_count_by_type_what_is_not_processed_and_what_is_held_back(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    first, *_ = [publish(outbox_db, "order", "a") for _ in range(4)]
    wait(outbox_db, first)
    publish(outbox_db, "order", "b")
    paused, *_ = [publish(outbox_db, "task", "c") for _ in range(3)]
    die(outbox_db, paused, pausing=True)
    skipped, _ = publish(outbox_db, "task", "d"), publish(outbox_db, "task", "d")
    die(outbox_db, skipped)
    process(outbox_db, publish(outbox_db, "done"))
    found = data(outbox, "stats")
    ages = {each["entity_type"]: (each.pop("oldest_ready_age_s"), each.pop("oldest_blocked_age_s"))
            for each in found["types"]}  # fmt: skip
    assert found == {
        "schema_name": "public",
        "types": [
            {"entity_type": "order", "fresh": 4, "blocked": 3, "waiting": 1, "dead": 0, "blocked_keys": 1},
            {"entity_type": "task", "fresh": 3, "blocked": 2, "waiting": 0, "dead": 2, "blocked_keys": 1},
        ],
        "more_fresh": False,
        "more_waiting": False,
        "more_dead": False,
        "unhandled": None,
        "due_later": {"count": 0, "next_s": None},
    }
    assert ages["order"][1] > ages["order"][0] > 0, "the blocked ones are older than the one that could run"
    assert ages["task"][1] > ages["task"][0] > 0
    table = run(outbox, "stats").stdout.splitlines()
    assert [line.split()[:6] for line in table[1:]] == [["order", "4", "3", "1", "0", "1"],
                                                        ["task", "3", "2", "0", "2", "1"]]  # fmt: skip


def test_a_change_that_waits_for_a_later_moment_makes_nothing_ready(outbox: str, outbox_db: psycopg.Connection) -> None:
    wait(outbox_db, publish(outbox_db))
    [found] = data(outbox, "stats")["types"]
    assert (found["waiting"], found["oldest_ready_age_s"], found["oldest_blocked_age_s"]) == (1, None, None)


def test_events_that_are_due_later_are_counted_apart(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("SELECT publish_change('x', 'k', due => now() + interval '3 hours')")
    found = data(outbox, "stats")
    assert (found["types"], found["due_later"]["count"], 0 < found["due_later"]["next_s"] <= 10_800) == ([], 1, True)
    assert "due later: 1, the first in 3 h" in run(outbox, "stats").stderr


def test_stats_of_an_outbox_without_work_say_so(outbox: str, outbox_db: psycopg.Connection) -> None:
    process(outbox_db, publish(outbox_db))
    assert data(outbox, "stats")["types"] == []
    assert "every change is processed" in run(outbox, "stats").stderr


def test_counts_that_end_at_their_bound_are_marked(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_PER_SHARD", 2)
    monkeypatch.setattr(admin, "_SCAN", 2)
    for key in ("a", "b"):
        for _ in range(3):
            publish(outbox_db, key, key)
    wait(outbox_db, publish(outbox_db, "w", "1"))
    die(outbox_db, *(publish(outbox_db, "d", str(n)) for n in range(3)))
    found = data(outbox, "stats")
    assert [found[f"more_{state}"] for state in ("fresh", "waiting", "dead")] == [True, False, True]
    lines = {line.split()[0]: line.split() for line in run(outbox, "stats").stdout.splitlines()[1:]}
    assert (lines["a"][1], lines["w"][3], lines["d"][4]) == ("2+", "1", "2+")


def test_list_shows_dead_and_waiting_changes_and_others_when_asked(outbox: str, outbox_db: psycopg.Connection) -> None:
    waiting, blocked, dead, later_dead, fresh, processed = [
        publish(outbox_db, "x", key) for key in ("k", "k", "d", "e", "f", "p")
    ]
    wait(outbox_db, waiting)
    die(outbox_db, dead)
    die(outbox_db, later_dead)
    process(outbox_db, processed)
    assert numbers(outbox) == [later_dead, dead, waiting]
    by_state = {state: numbers(outbox, "--state", state) for state in _STATES}
    assert by_state == {
        "fresh": [blocked, fresh],
        "blocked": [blocked],
        "waiting": [waiting],
        "dead": [later_dead, dead],
        "processed": [processed],
    }
    [found] = data(outbox, "list", "--state", "blocked")["changes"]
    assert (found["state"], found["blocked"], found["blocked_by"]) == ("fresh", True, waiting)
    namesake = publish(outbox_db, "y", "k")
    shown = {each["seq"]: each["blocked_by"] for each in data(outbox, "list", "--state", "fresh")["changes"]}
    assert shown == {blocked: waiting, fresh: None, namesake: None}


def test_the_states_of_the_command_line_are_those_that_can_be_found() -> None:
    assert tuple(admin.STATES) == _STATES


@pytest.mark.parametrize("state", _STATES)
def test_list_filters_by_type_key_and_age_and_says_when_there_are_more(
    outbox: str, outbox_db: psycopg.Connection, state: str
) -> None:
    keys = [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    if state == "blocked":
        wait(outbox_db, *(publish(outbox_db, *key) for key in keys))
    xa, xb, ya, yb = seqs = [publish(outbox_db, *key) for key in keys]
    BRING[state](outbox_db, *seqs)
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '2 days' WHERE seq = %s", [yb])

    def found(*arguments: str) -> set[int]:
        return set(numbers(outbox, "--state", state, *arguments))

    assert found() == set(seqs)
    assert found("--type", "x") == {xa, xb}
    assert found("--key", "a") == {xa, ya}
    assert found("--since", "1d") == {xa, xb, ya}
    assert found("--since", "3d", "--type", "y", "--key", "b") == {yb}
    assert found("--type", "none") == set()
    assert len(found("--limit", "3")) == 3
    assert not data(outbox, "list", "--state", state, "--limit", "3")["complete"]
    assert data(outbox, "list", "--state", state, "--limit", "4")["complete"]
    assert "there are more" in run(outbox, "list", "--state", state, "--limit", "3").stderr


@pytest.mark.parametrize("state", _STATES)
def test_a_search_that_ends_at_its_bound_says_so(
    outbox: str, outbox_db: psycopg.Connection, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_PER_SHARD", 2)
    monkeypatch.setattr(admin, "_SCAN", 2)
    first, *others = [publish(outbox_db) for _ in range(4)]
    if state == "blocked":
        wait(outbox_db, first)
    BRING[state](outbox_db, first, *others)
    found = data(outbox, "list", "--state", state, "--type", "none")
    assert found == {"changes": [], "complete": False}
    assert "not all were looked at" in run(outbox, "list", "--state", state, "--type", "none").stderr


def test_a_table_shows_the_first_line_of_an_error_and_no_payload(outbox: str, outbox_db: psycopg.Connection) -> None:
    dead = publish(outbox_db)
    die(outbox_db, dead)
    outbox_db.execute("UPDATE entity_changes SET last_error = %s", [f"ValueError: {'x' * 100}\nsecond"])
    shown = run(outbox, "list").stdout
    assert "…" in shown
    assert "second" not in shown
    assert "row content" not in shown
    assert "row content" not in run(outbox, "list", "--json").stdout


@pytest.mark.parametrize(
    "numbers",
    ["10.10", "12345678901234567890.123456789", "1e-7", "9007199254740993", "0.1000", "-0.0", "1" + "0" * 400 + ".5",
     "100000000000000000000000", "[1.50, {\"a\": 2.500}]"],
)  # fmt: skip
def test_a_payload_is_shown_with_the_digits_that_are_stored(
    outbox: str, outbox_db: psycopg.Connection, numbers: str
) -> None:
    document = f'{{"n": {numbers}}}'
    [(seq, stored)] = outbox_db.execute(
        "WITH written AS (SELECT publish_change('x', '1', new_data => %s::jsonb, metadata => %s::jsonb) AS seq)"
        " SELECT seq, (%s::jsonb ->> 'n') FROM written",
        [document] * 3,
    ).fetchall()
    table = run(outbox, "show", str(seq), "--show-payload").stdout
    assert table.count(f'{{"n": {stored}}}') == 2
    shown = run(outbox, "show", str(seq), "--show-payload", "--json").stdout
    assert f'"new": {{"n": {stored}}},' in shown
    assert f'"metadata": {{"n": {stored}}}' in shown
    assert json.loads(shown)["change"]["old"] is None


def test_show_prints_every_field_by_seq_or_id_and_the_payload_only_when_asked(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    paused, blocked = publish(outbox_db), publish(outbox_db)
    die(outbox_db, paused, pausing=True)
    by_seq = data(outbox, "show", str(paused))["change"]
    assert data(outbox, "show", by_seq["id"])["change"] == by_seq
    assert by_seq.items() >= {"seq": paused, "state": "dead", "pauses_key": True, "entity_type": "x", "entity_id": "k",
                              "table": "x", "operation": "INSERT", "error_count": 3, "last_error": "Failed: x",
                              "next_attempt_at": None, "blocked_by": None}.items()  # fmt: skip
    assert data(outbox, "show", str(blocked))["change"]["blocked_by"] == paused
    assert "row content" not in run(outbox, "show", str(paused)).stdout
    assert '{"secret": "row content"}' in run(outbox, "show", str(paused), "--show-payload").stdout
    shown = data(outbox, "show", str(paused), "--show-payload")["change"]
    assert (shown["old"], shown["new"], shown["metadata"]) == (None, {"secret": "row content"}, None)


def cause(db: psycopg.Connection, cause: int, entity_type: str, entity_id: str) -> int:
    """A change that the handler of another one publishes."""
    with db.transaction():
        db.execute(
            "SELECT set_config('cdc.cause', id || ',' || depth, true) FROM entity_changes WHERE seq = %s", [cause]
        )
        return publish(db, entity_type, entity_id)


def test_show_lists_the_chain_of_causes_of_a_change(outbox: str, outbox_db: psycopg.Connection) -> None:
    reaction = publish(outbox_db, "reaction", "r1")
    task = cause(outbox_db, reaction, "task", "17")
    notice, _ = cause(outbox_db, task, "notice", "a\x1b[2J"), cause(outbox_db, task, "other", "1")
    process(outbox_db, reaction)
    die(outbox_db, task)
    shown = data(outbox, "show", str(notice))["change"]
    chain = shown["chain"]
    assert [
        (link["seq"], link["entity_type"], link["entity_id"], link["operation"], link["state"]) for link in chain
    ] == [
        (notice, "notice", "a\x1b[2J", "INSERT", "fresh"),
        (task, "task", "17", "INSERT", "dead"),
        (reaction, "reaction", "r1", "INSERT", "processed"),
    ]
    assert (shown["depth"], shown["caused_by"]) == (2, chain[1]["id"])
    assert [link["caused_by"] for link in chain] == [chain[1]["id"], chain[2]["id"], None]
    assert chain[2]["changed_at"] == data(outbox, "show", str(reaction))["change"]["changed_at"]
    assert "row content" not in run(outbox, "show", str(notice), "--json").stdout
    pictured = run(outbox, "show", str(notice)).stdout.split("\n\n")[1].splitlines()[1:]
    assert [line.split("Z")[1] for line in pictured] == [
        "  notice a\\x1b[2J INSERT", "    task 17 INSERT", "      reaction r1 INSERT",
    ]  # fmt: skip


def test_a_change_that_nobody_caused_is_a_chain_of_itself_and_has_no_picture(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq = publish(outbox_db)
    shown = data(outbox, "show", str(seq))["change"]
    assert ([link["seq"] for link in shown["chain"]], shown["caused_by"], shown["depth"]) == ([seq], None, 0)
    assert "\n\n" not in run(outbox, "show", str(seq)).stdout


def test_a_chain_ends_at_its_bound_and_where_causes_were_removed_and_says_so(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs = [publish(outbox_db)]
    for _ in range(4):
        seqs.append(cause(outbox_db, seqs[-1], "x", "k"))
    newest = str(seqs[-1])
    assert run(outbox, "show", newest).stderr == ""
    monkeypatch.setattr(admin, "_CHAIN_MAX", 3)
    assert [link["seq"] for link in data(outbox, "show", newest)["change"]["chain"]] == seqs[:1:-1]
    assert "is not shown" in run(outbox, "show", newest).stderr
    monkeypatch.undo()
    outbox_db.execute("DELETE FROM entity_changes WHERE seq = %s", [seqs[2]])
    assert [link["seq"] for link in data(outbox, "show", newest)["change"]["chain"]] == seqs[:2:-1]
    assert "is not shown" in run(outbox, "show", newest).stderr


@pytest.mark.parametrize("state", ["fresh", "waiting", "dead", "paused", "processed"])
def test_a_change_is_found_by_its_number_in_whatever_state_it_is(
    outbox: str, outbox_db: psycopg.Connection, state: str
) -> None:
    seq = publish(outbox_db)
    BRING[state](outbox_db, seq)
    assert data(outbox, "show", str(seq))["change"]["seq"] == seq


def test_changes_that_were_marked_without_a_time_do_not_hide_the_number_of_another(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_SCAN", 2)
    timed, *untimed = [publish(outbox_db) for _ in range(5)]
    process(outbox_db, timed)
    outbox_db.execute("UPDATE entity_changes SET processed = true WHERE seq = ANY(%s)", [untimed[2:]])
    assert data(outbox, "show", str(timed))["change"]["seq"] == timed
    assert data(outbox, "show", str(untimed[3]))["change"]["seq"] == untimed[3]


def test_what_names_no_change_is_exit_2_and_what_is_not_there_exit_4(outbox: str) -> None:
    for command in ("show", "retry", "discard"):
        assert run(outbox, command, "seventeen").exit_code == 2
        missing = run(outbox, command, "17")
        assert missing.exit_code == 4
        assert "there is no change 17" in missing.stderr
        unknown = run(outbox, command, "00000000-0000-0000-0000-000000000000")
        assert unknown.exit_code == 4


@pytest.mark.parametrize("text", ["", "-1", "1.5", "²", "9" * 30, "x", "1 2"])
def test_a_reference_is_a_number_or_an_id(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


def test_without_the_table_one_sentence_says_what_to_do(database: str) -> None:
    for command in (("stats",), ("list",), ("show", "1"), ("discard", "1"), ("prune", "--older-than", "7d")):
        result = run(database, *command)
        assert result.exit_code == 1
        assert "cdc db install" in result.stderr
        assert "Traceback" not in result.output


def test_another_schema_has_an_outbox_of_its_own(database: str, db: psycopg.Connection) -> None:
    name = 'Of "ours"'
    migrations.install(db, name)
    seq = publish(db, schema_name=name)
    shown = data(database, "show", str(seq), "--schema", name)
    assert shown["change"]["seq"] == seq
    assert data(database, "stats", "--schema", name)["schema_name"] == name


# --- deciding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pausing", [False, True])
def test_retry_gives_a_dead_letter_all_its_attempts_again_and_sends_a_wake_up(
    outbox: str, outbox_db: psycopg.Connection, pausing: bool
) -> None:
    seq, behind = publish(outbox_db), publish(outbox_db)
    die(outbox_db, seq, pausing=pausing)
    outbox_db.execute("LISTEN entity_change")
    [changed] = data(outbox, "retry", str(seq))["changes"]
    assert (changed["seq"], changed["state"], changed["error_count"]) == (seq, "waiting", 0)
    now = row(outbox_db, seq)
    assert (now["due"], now["dead_at"], now["error_count"], now["last_error"]) == (True, None, 0, "Failed: x")
    [sent] = outbox_db.notifies(timeout=20, stop_after=1)
    assert sent.payload == ""
    assert numbers(outbox, "--state", "blocked") == [behind], "it goes before the later change of its key"


def test_retry_of_a_waiting_change_brings_it_forward_and_keeps_its_attempts(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq = publish(outbox_db)
    wait(outbox_db, seq)
    assert run(outbox, "retry", row(outbox_db, seq)["id"].hex).exit_code == 0
    now = row(outbox_db, seq)
    assert (now["due"], now["error_count"]) == (True, 1)


@pytest.mark.parametrize("command", ["retry", "discard"])
def test_fresh_and_processed_changes_are_refused_and_nothing_is_done_to_the_others(
    outbox: str, outbox_db: psycopg.Connection, command: str
) -> None:
    dead, fresh, processed = publish(outbox_db, "x", "1"), publish(outbox_db, "x", "2"), publish(outbox_db, "x", "3")
    die(outbox_db, dead)
    process(outbox_db, processed)
    for other, why in ((fresh, "it is fresh"), (processed, "processed already")):
        refused = run(outbox, command, str(dead), str(other))
        assert refused.exit_code == 5
        assert f"the change {other}" in refused.stderr
        assert why in refused.stderr
    assert run(outbox, command, str(dead), "4711").exit_code == 4
    assert row(outbox_db, dead)["dead_at"] is not None


def test_a_blocked_change_is_refused_with_the_one_that_holds_it_back(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    paused, blocked = publish(outbox_db), publish(outbox_db)
    die(outbox_db, paused, pausing=True)
    refused = run(outbox, "discard", str(blocked))
    assert refused.exit_code == 5
    assert f"the change {paused} holds it back" in refused.stderr


def test_a_change_that_another_session_is_at_work_on_is_refused_at_once(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq = publish(outbox_db)
    wait(outbox_db, seq)
    with psycopg.connect(outbox) as working:
        working.execute("SELECT FROM entity_changes WHERE seq = %s FOR UPDATE", [seq])
        with pytest.raises(RefusedError, match="at work on it"):
            OutboxAdmin("public").discard(outbox_db, [seq])
    assert not row(outbox_db, seq)["processed"]


def test_naming_a_change_twice_decides_about_it_once(outbox: str, outbox_db: psycopg.Connection) -> None:
    seq = publish(outbox_db)
    die(outbox_db, seq)
    both = [str(seq), str(row(outbox_db, seq)["id"])]
    assert len(data(outbox, "retry", *both)["changes"]) == 1


@pytest.mark.parametrize(("fail", "error"), [(wait, "Failed: x"), (die, "Failed: x"), (wait, None)])
def test_discard_marks_a_change_processed_and_keeps_what_it_failed_for(
    outbox: str, outbox_db: psycopg.Connection, fail: Any, error: str | None
) -> None:
    seq, behind = publish(outbox_db), publish(outbox_db)
    fail(outbox_db, seq)
    outbox_db.execute("UPDATE entity_changes SET last_error = %s WHERE seq = %s", [error, seq])
    outbox_db.execute("LISTEN entity_change")
    result = run(outbox, "discard", str(seq))
    assert (result.exit_code, result.stdout) == (0, "")
    now = row(outbox_db, seq)
    expected = f"discarded by operator: {error}" if error else "discarded by operator"
    assert (now["processed"], now["dead_at"], now["next_attempt_at"], now["last_error"]) == (True, None, None, expected)
    assert now["processed_at"] is not None
    assert len(list(outbox_db.notifies(timeout=20, stop_after=1))) == 1
    assert data(outbox, "show", str(behind))["change"]["blocked_by"] is None


def test_an_operator_needs_the_documented_grants_and_no_more(outbox: str, outbox_db: psycopg.Connection) -> None:
    seqs = [publish(outbox_db, "x", str(n)) for n in range(3)]
    die(outbox_db, *seqs)
    role = f"ops_{uuid4().hex[:12]}"
    outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        section = (ROOT / "docs/operations/roles.md").read_text("utf-8").split("\n## An operator\n")[1]
        documented = section.split("```sql\n")[1].split("```")[0].replace("events", "public")
        outbox_db.execute(documented.replace("TO ops;", f"TO {role};").encode())
        as_operator = make_conninfo(outbox, options=f"-c role={role}")
        retried, discarded, _ = map(str, seqs)
        for command in (
            ["stats"], ["list"], ["show", retried, "--show-payload"], ["retry", retried], ["discard", discarded],
            ["retry", "--all", "--yes"], ["prune", "--older-than", "30d"],
            ["discard", "--type", "x", "--before", "now", "--yes"], ["replay", discarded],
        ):  # fmt: skip
            result = run(as_operator, *command)
            assert result.exit_code == 0, result.output
        number = create(outbox, "search", "--from", "beginning")
        fail(outbox_db, number, *seqs, dead=True)
        for command in (["stats"], ["list"], ["show", retried], ["retry", retried], ["discard", discarded]):
            result = run(as_operator, *command, "--subscription", "search")
            assert result.exit_code == 0, result.output
        for command in (["list"], ["show", "search"], ["pause", "search"], ["resume", "search"]):
            result = run_subscription(as_operator, *command)
            assert result.exit_code == 0, result.output
        assert run_subscription(as_operator, "drop", "search", "--yes").exit_code == 1
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        outbox_db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


# --- beside a running consumer -------------------------------------------------------------------------------------


def _hears(app: Any) -> Any:
    async def check() -> bool:
        return app.status.listening

    return eventually_async(check, what="the consumer listens")


def _until(condition: Any, what: str) -> Any:
    async def check() -> Any:
        return condition()

    return eventually_async(check, what=what)


async def test_retry_while_a_consumer_runs_keeps_the_order_within_the_key(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()
    calls, running, overlapping = list[Any](), list[Any](), list[Any]()
    fixed, gate = asyncio.Event(), asyncio.Event()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change) -> None:
        if running:
            overlapping.append(change.seq)
        running.append(change.seq)
        calls.append(change.seq)
        try:
            if change.seq in bad and not fixed.is_set():
                raise ValueError("not yet")
            if change.seq == gated:
                await gate.wait()
        finally:
            running.clear()

    bad = [publish(outbox_db), publish(outbox_db)]
    gated = publish(outbox_db)
    behind = [publish(outbox_db) for _ in range(20)]
    async with consuming(outbox, router, sweep_interval=3600, poll_interval=3600) as app:
        await _hears(app)
        await _until(lambda: running == [gated], "the later changes of the key are in the consumer's hands")
        await _until(lambda: row(outbox_db, bad[1])["dead_at"], "settled")
        fixed.set()
        OutboxAdmin("public").retry(outbox_db, bad)
        await _until(lambda: metric(app.metrics.registry, "cdc_wakeups_total", source="retry") >= 1, "a wake-up came")
        gate.set()
        await _until(lambda: settled(outbox_db), "every change settled")
    assert overlapping == [], "two changes of one key at a time"
    assert calls == [*bad, gated, *bad, *behind]
    assert numbers(outbox) == []


async def test_discarding_a_waiting_change_frees_the_later_ones_of_its_key_without_a_sweep(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, calls = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append(change.seq)
        if change.seq == first:
            raise cdc.Retry(after=3600)

    first = publish(outbox_db)
    behind = [publish(outbox_db) for _ in range(5)]
    async with consuming(outbox, router, sweep_interval=3600, poll_interval=3600) as app:
        await _hears(app)
        await _until(lambda: row(outbox_db, first)["due"] is False, "it waits")
        behind += [publish(outbox_db) for _ in range(5)]
        assert calls == [first]
        OutboxAdmin("public").discard(outbox_db, [first])
        await _until(lambda: settled(outbox_db), "the key goes on")
    assert calls == [first, *behind]
    assert row(outbox_db, first)["last_error"].startswith("discarded by operator: ")


@pytest.mark.parametrize("decision", ["retry", "discard"])
async def test_a_paused_key_goes_on_in_order_once_its_dead_letter_is_decided_about(
    outbox: str, outbox_db: psycopg.Connection, decision: str
) -> None:
    router, calls = Router(), []

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        calls.append((change.entity_id, change.seq, change.attempt))

    paused, *behind = [publish(outbox_db) for _ in range(6)]
    other = publish(outbox_db, "x", "other")
    die(outbox_db, paused, pausing=True)
    async with consuming(outbox, router, sweep_interval=3600, poll_interval=3600) as app:
        await _hears(app)
        await _until(lambda: row(outbox_db, other)["processed"], "other keys go on")
        assert calls == [("other", other, 1)]
        assert numbers(outbox, "--state", "blocked") == behind
        getattr(OutboxAdmin("public"), decision)(outbox_db, [paused])
        await _until(lambda: settled(outbox_db), "the key goes on")
    expected = [paused, *behind] if decision == "retry" else behind
    assert calls[1:] == [("k", seq, 1) for seq in expected]


# --- bounded, however large the table is ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(admin_dsn: str, migrated_template: str) -> Iterator[psycopg.Connection]:
    """100,000 processed changes; beside them some of every other state, and statistics that know of all.

    For all tests that leave it as it is.
    """
    with copied_outbox(admin_dsn, migrated_template) as dsn, psycopg.connect(dsn, autocommit=True) as db:
        db.execute(
            "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type, new_data, processed,"
            " processed_at) SELECT 'x', 'INSERT', n::text, 'x', jsonb_build_object('text', repeat('y', 100)), true,"
            " now() - n * interval '1 second' FROM generate_series(1, 100000) AS n"
        )
        seqs = [publish(db, "x", str(n % 10)) for n in range(90)]
        wait(db, *seqs[:30])
        die(db, *seqs[30:60])
        db.execute("VACUUM ANALYZE entity_changes")
        yield db


def plan(db: psycopg.Connection, statement: bytes, parameters: dict[str, Any]) -> dict[str, Any]:
    with db.transaction(force_rollback=True), admin.bounded(db):
        [([found],)] = db.execute(b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement, parameters).fetchall()
    return dict(found["Plan"])


def nodes(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *(inner for child in node.get("Plans", []) for inner in nodes(child))]


@pytest.mark.parametrize(
    "statement",
    ["stats", "find_fresh", "find_waiting", "find_dead", "find_processed", "number_unprocessed", "number_processed",
     "look", "payload", "take", "retry", "discard", "discard_before"],
)  # fmt: skip
def test_every_statement_reads_a_small_part_of_a_large_table_by_an_index(
    large: psycopg.Connection, statement: str
) -> None:
    ids = [id_ for (id_,) in large.execute("SELECT id FROM entity_changes WHERE dead_at IS NOT NULL LIMIT 20")]
    parameters = {
        "shards": SHARDS, "per_shard": 100, "bound": 1000, "scan": 1000, "limit": 51, "type": "none", "key": None,
        "age_s": 3e6, "blocked": True, "seqs": [1, 2, 3], "ids": ids, "id": ids[0], "state": None,
        "shard": 1, "after": 0, "before": "now",
    }  # fmt: skip
    [(pages,)] = large.execute("SELECT relpages FROM pg_class WHERE oid = 'entity_changes'::regclass").fetchall()
    assert pages > 2000
    found = plan(large, load("admin.sql", "public")[statement], parameters)
    scans = [node["Node Type"] for node in nodes(found) if node.get("Relation Name") == "entity_changes"]
    assert "Seq Scan" not in scans
    assert found["Shared Hit Blocks"] + found["Shared Read Blocks"] < pages / 2


@pytest.mark.parametrize("name", ["admin", "bulk", "retention"])
def test_every_named_statement_is_described_and_used(name: str) -> None:
    folder = Path(admin.__file__).parent
    statements = folder.joinpath(f"{name}.sql").read_text("utf-8")
    code = folder.joinpath(f"{name}.py").read_text("utf-8")
    blocks = statements.split("-- name: ")[1:]
    assert len(blocks) >= 2
    for block in blocks:
        statement, description, *_ = block.split("\n")
        assert description.startswith("-- "), f"{statement} has no description"
        assert f'"{statement}"' in code or f"{{{statement}}}" in statements, f"{statement} is not used"


def test_fresh_changes_that_somebody_else_has_handled_are_discarded_by_type_and_time(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_DISCARD_BATCH", 2)
    before = [publish(outbox_db, "x", f"k{n % 3}") for n in range(20)]
    other = publish(outbox_db, "y")
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now() WHERE seq = %s", [before[0]])
    # As the end of a process leaves it.
    crashed = "UPDATE entity_changes SET last_error = 'x', error_summary = 'the process ended' WHERE seq = %s"
    outbox_db.execute(crashed, [before[1]])
    [(moment,)] = outbox_db.execute("SELECT clock_timestamp()::text").fetchall()
    after = publish(outbox_db, "x")
    assert run(outbox, "discard", "--type", "x", "--before", moment).exit_code == 5, "not without a confirmation"
    assert data(outbox, "discard", "--type", "x", "--before", moment, "--yes") == {"discarded": 19}
    left = [seq for (seq,) in outbox_db.execute("SELECT seq FROM entity_changes WHERE NOT processed ORDER BY seq")]
    assert left == [before[0], other, after]
    discarded = row(outbox_db, before[1])
    assert (discarded["last_error"], discarded["error_summary"]) == ("discarded by operator", None)


@pytest.mark.parametrize(
    "arguments",
    [["--before", "now"], ["1", "--type", "x", "--before", "now"], ["--type", "x", "--key", "1", "--before", "now"],
     ["--type", "x", "--all", "--before", "now"], ["--type", "x", "--dry-run", "--before", "now"],
     ["--type", "x", "--state", "dead", "--before", "now"]],
)  # fmt: skip
def test_it_is_said_exactly_what_is_to_be_discarded(arguments: list[str], outbox: str) -> None:
    assert run(outbox, "discard", "--yes", *arguments).exit_code == 2


def test_a_time_that_is_none_is_refused_before_anything_is_done(outbox: str) -> None:
    refused = run(outbox, "discard", "--type", "x", "--before", "soon", "--yes")
    assert refused.exit_code == 2
    assert "'soon' is no moment" in refused.stderr


def test_ids_types_and_errors_of_megabytes_are_shown_cut_and_decided_about(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, table_schema, operation, entity_id, last_error, error_count, dead_at)"
        " SELECT repeat('t', 5000000), repeat('s', 5000000), 'INSERT', repeat('k', 5000000) || n, repeat('e', 5000000),"
        " 1, now() FROM generate_series(1, 20) AS n"
    )  # fmt: skip
    found = numbers(outbox)
    assert len(found) == 20
    first, second = map(str, found[:2])
    commands = (
        ["list"], ["list", "--json"], ["show", first], ["show", first, "--json"], ["stats"], ["stats", "--json"],
        ["retry", first], ["retry", second, "--json"], ["discard", first], ["retry", "--all", "--yes"],
    )  # fmt: skip
    for arguments in commands:
        result = run(outbox, *arguments)
        assert result.exit_code == 0, arguments
        assert len(result.output) < 20 * 20_000, arguments
