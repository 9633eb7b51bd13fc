"""`cdc outbox replay`: processed changes are handled once more, as new changes that name the old ones."""

from __future__ import annotations

import asyncio
import json
import os
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import cdc
from cdc import testing
from cdc.core import cloudevents
from cdc.core.errors import RefusedError
from cdc.core.router import Router
from cdc.observability.snapshots import Role
from cdc.postgres import bulk, grants, migrations
from cdc.postgres.bulk import Bulk, Round, Wanted
from tests.commands_outbox import data, die, process, publish, run, wait
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled

_COPIED = (
    "table_schema", "table_name", "operation", "entity_id", "entity_type", "old_data", "new_data", "metadata", "shard",
    "caused_by", "depth",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CDC_") and not name.startswith("CDC_TEST_")]:
        monkeypatch.delenv(name)


def replays(db: psycopg.Connection) -> list[int]:
    """What the replays repeat, in the order of the replays."""
    found = db.execute(
        "SELECT original.seq FROM entity_changes AS replay JOIN entity_changes AS original"
        " ON original.id = replay.replay_of ORDER BY replay.seq"
    ).fetchall()
    return [seq for (seq,) in found]


def rows(db: psycopg.Connection) -> dict[int, dict[str, object]]:
    with db.cursor(row_factory=dict_row) as cursor:
        return {row["seq"]: row for row in cursor.execute("SELECT * FROM entity_changes ORDER BY seq").fetchall()}


def id_of(db: psycopg.Connection, seq: int) -> UUID:
    [(found,)] = db.execute("SELECT id FROM entity_changes WHERE seq = %s", [seq]).fetchall()
    return UUID(str(found))


# --- what is written -----------------------------------------------------------------------------------------------


def test_a_replay_is_a_fresh_change_with_all_that_the_old_one_said_and_its_name(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric, user_id int)")
    outbox_db.execute(
        "CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON orders FOR EACH ROW"
        " EXECUTE FUNCTION capture_entity_change('order')"
    )
    with outbox_db.transaction():
        outbox_db.execute("SELECT set_config('cdc.cause', %s, true)", [f"{uuid4()},3"])
        outbox_db.execute("INSERT INTO orders VALUES (1, 1.50, 7)")
    outbox_db.execute("UPDATE orders SET total = 12345678901234567890.10")
    outbox_db.execute("DELETE FROM orders")
    outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now(), error_count = 2,"
                      " last_error = 'ValueError: x', error_summary = 'ValueError'")  # fmt: skip
    old = rows(outbox_db)
    assert data(outbox, "replay", "--type", "order", "--yes") == {"replayed": 3, "left": 0}
    everything = rows(outbox_db)
    assert {seq: row for seq, row in everything.items() if seq in old} == old, "the audit trail is as it was"
    new = [row for seq, row in everything.items() if seq not in old]
    for before, after in zip(old.values(), new, strict=True):
        assert {name: after[name] for name in _COPIED} == {name: before[name] for name in _COPIED}
        assert after["replay_of"] == before["id"]
        assert (after["processed"], after["next_attempt_at"], after["dead_at"]) == (False, None, None)
        assert (after["error_count"], after["last_error"], after["error_summary"]) == (0, None, None)
        assert after["changed_at"] > before["changed_at"]  # type: ignore[operator]
    assert [row["depth"] for row in new] == [4, 0, 0]


def test_what_is_captured_replays_nothing(outbox_db: psycopg.Connection) -> None:
    publish(outbox_db)
    assert outbox_db.execute("SELECT replay_of FROM entity_changes").fetchall() == [(None,)]


def test_it_rings_for_each_replay_and_wakes_whoever_listens(outbox: str, outbox_db: psycopg.Connection) -> None:
    process(outbox_db, *(publish(outbox_db, "x", str(n)) for n in range(3)))
    slot = f"replay_{uuid4().hex[:8]}"
    outbox_db.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    outbox_db.execute("LISTEN entity_change")
    try:
        data(outbox, "replay", "--all", "--yes")
        [(seqs,)] = outbox_db.execute(
            "SELECT array_agg(seq || ',' || shard ORDER BY seq) FROM entity_changes WHERE replay_of IS NOT NULL"
        ).fetchall()
        peeked = outbox_db.execute("SELECT data FROM pg_logical_slot_peek_changes(%s, NULL, NULL)", [slot]).fetchall()
        messages = [line for (line,) in peeked if "entity_change:public" in line]
        assert [line.rpartition("content:")[2] for line in messages] == seqs
    finally:
        outbox_db.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    assert [notify.payload for notify in outbox_db.notifies(timeout=20, stop_after=1)] == [""]


# --- which ---------------------------------------------------------------------------------------------------------


def test_processed_changes_are_found_by_the_filters_and_replays_are_not(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    xa, xb, ya = (publish(outbox_db, *key) for key in (("x", "a"), ("x", "b"), ("y", "a")))
    process(outbox_db, xa, xb, ya)
    waiting, dead, _fresh = (publish(outbox_db, "x", key) for key in ("w", "d", "f"))
    wait(outbox_db, waiting)
    die(outbox_db, dead)
    outbox_db.execute("UPDATE entity_changes SET error_summary = 'ValueError at f.py:1 in f' WHERE seq = %s", [xb])
    outbox_db.execute(
        "UPDATE entity_changes SET changed_at = now() - interval '2 days', processed_at = now() - interval '1 day'"
        " WHERE seq = %s", [ya])  # fmt: skip

    def count(*arguments: str) -> int:
        return int(data(outbox, "replay", "--dry-run", *arguments)["matching"])

    assert count("--all") == 3
    assert count("--type", "x") == 2
    assert count("--key", "a") == 2
    assert count("--error", "ValueError") == 1
    assert count("--since", "1d") == 2
    assert count("--since", "3d") == 3
    assert count("--until", "1d") == 1
    assert replays(outbox_db) == [], "--dry-run changes nothing"
    assert data(outbox, "replay", "--all", "--yes")["replayed"] == 3
    outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now() WHERE replay_of IS NOT NULL")
    assert count("--all") == 3, "what a replay says, its original says"


def test_of_each_key_the_last_that_is_found_is_replayed_if_that_is_asked_for(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    process(outbox_db, *(publish(outbox_db, *key) for key in [("x", "a"), ("x", "b"), ("y", "a")] * 3))
    seqs = list(rows(outbox_db))
    assert data(outbox, "replay", "--all", "--latest-per-key", "--yes") == {"replayed": 3, "left": 0}
    assert replays(outbox_db) == seqs[-3:]
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '2h' WHERE seq <= %s", [seqs[2]])
    outbox_db.execute("DELETE FROM entity_changes WHERE replay_of IS NOT NULL")
    data(outbox, "replay", "--until", "1h", "--latest-per-key", "--yes")
    assert replays(outbox_db) == seqs[:3]


def test_single_changes_are_replayed_by_their_names_all_or_none(outbox: str, outbox_db: psycopg.Connection) -> None:
    one, two, fresh = (publish(outbox_db, "x", str(n)) for n in range(3))
    process(outbox_db, one, two)
    refused = run(outbox, "replay", str(one), str(fresh))
    assert (refused.exit_code, f"cannot replay the change {fresh}: it is fresh" in refused.stderr) == (5, True)
    assert run(outbox, "replay", "4711").exit_code == 4
    assert replays(outbox_db) == []
    assert data(outbox, "replay", str(two), str(id_of(outbox_db, one))) == {"replayed": 2, "left": 0}
    assert replays(outbox_db) == [one, two]
    [(again,)] = outbox_db.execute(
        "UPDATE entity_changes SET processed = true, processed_at = now() WHERE replay_of = %s RETURNING seq",
        [id_of(outbox_db, two)],
    ).fetchall()
    data(outbox, "replay", str(again))
    assert replays(outbox_db) == [one, two, two], "it names the original"


@pytest.mark.parametrize(
    "arguments",
    [[], ["1", "--all"], ["--latest-per-key"], ["1", "--latest-per-key"], ["1", "--unless-replayed-since", "1h"],
     ["--all", "--unless-replayed-since", "soon"], ["--all", "--unless-replayed-since", ""], ["--since", "soon"]],
)  # fmt: skip
def test_it_is_said_exactly_what_is_to_be_replayed(outbox: str, arguments: list[str]) -> None:
    assert run(outbox, "replay", *arguments, "--yes").exit_code == 2


def test_it_is_said_how_many_before_anything_is_written(outbox: str, outbox_db: psycopg.Connection) -> None:
    process(outbox_db, *(publish(outbox_db, "x", str(n)) for n in range(3)))
    refused = run(outbox, "replay", "--type", "x")
    assert refused.exit_code == 5
    assert "replay 3 processed changes with --type x: not without a confirmation" in refused.stderr
    assert replays(outbox_db) == []
    nothing = run(outbox, "replay", "--type", "none")
    assert (nothing.exit_code, "that are replayed: 0" in nothing.stderr) == (0, True)


# --- in rounds -----------------------------------------------------------------------------------------------------


def test_rounds_keep_the_order_and_end_at_their_bounds_in_rows_and_bytes(
    outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_ROUND", 3)
    monkeypatch.setattr(bulk, "_REPLAYED_BYTES", 20_000)
    seqs = [publish(outbox_db, "x", str(n % 2)) for n in range(8)]
    # What is compressed counts as it is stored.
    outbox_db.execute(
        "UPDATE entity_changes SET new_data = (SELECT jsonb_agg(random()) FROM generate_series(1, 5000))"
        " WHERE seq = ANY (%s)", [seqs[3:5]])  # fmt: skip
    process(outbox_db, *reversed(seqs))
    with Bulk("public").replayable(outbox_db, Wanted()) as found:
        assert found.count == 8
        assert list(found.rounds()) == [Round(3, 3), Round(1, 1), Round(1, 1), Round(1, 1), Round(2, 2)]
    assert replays(outbox_db) == seqs


def test_what_was_removed_meanwhile_is_left_and_counted(outbox_db: psycopg.Connection) -> None:
    kept, removed = publish(outbox_db, "x", "1"), publish(outbox_db, "x", "2")
    process(outbox_db, kept, removed)
    with Bulk("public").replayable(outbox_db, Wanted()) as found:
        outbox_db.execute("DELETE FROM entity_changes WHERE seq = %s", [removed])
        assert list(found.rounds()) == [Round(2, 1)]


@pytest.mark.parametrize("latest", [False, True])
def test_given_again_after_an_interruption_it_writes_the_rest_and_nothing_twice(
    outbox: str, outbox_db: psycopg.Connection, latest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs = [publish(outbox_db, "x", str(n)) for n in range(12)]
    process(outbox_db, *seqs)
    filters = ["--type", "x", *(["--latest-per-key"] if latest else []), "--yes"]
    data(outbox, "replay", *filters)
    process(outbox_db, *rows(outbox_db))
    assert len(replays(outbox_db)) == 12, "an earlier replay is no part of it"
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1h' WHERE replay_of IS NOT NULL")

    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        if len(replays(outbox_db)) == 12 + 6:
            raise KilledError

    monkeypatch.setattr(bulk, "_ROUND", 2)
    monkeypatch.setattr(bulk, "wake", killed)
    interrupted = run(outbox, "replay", *filters)
    assert isinstance(interrupted.exception, SystemExit)
    assert interrupted.exit_code == 1
    [advice] = [line for line in interrupted.stderr.splitlines() if line.startswith("if it is interrupted")]
    monkeypatch.undo()
    # What has been replayed is in every state by then.
    fresh, waiting, dead, paused, *done = sorted(seq for seq, row in rows(outbox_db).items() if not row["processed"])
    wait(outbox_db, waiting)
    die(outbox_db, dead)
    die(outbox_db, paused, pausing=True)
    process(outbox_db, *done)
    process(outbox_db, publish(outbox_db, "x", "later"))
    moments = advice.partition("give it again with ")[2].split()
    assert data(outbox, "replay", *filters, *moments) == {"replayed": 6, "left": 0}
    assert replays(outbox_db) == [*seqs, *seqs]
    assert data(outbox, "replay", *filters, *moments) == {"replayed": 0, "left": 0}
    assert fresh


def test_one_replays_at_a_time(outbox: str, outbox_db: psycopg.Connection) -> None:
    process(outbox_db, publish(outbox_db))
    with psycopg.connect(outbox, autocommit=True) as other:
        with Bulk("public").replayable(other, Wanted()):
            refused = run(outbox, "replay", "--all", "--yes")
            assert (refused.exit_code, "another replay runs" in refused.stderr) == (5, True)
            assert data(outbox, "replay", "--all", "--dry-run") == {"matching": 1}, "to count disturbs nobody"
            with pytest.raises(RefusedError):
                list(Bulk("public").replay_named(outbox_db, [1]))
        assert data(outbox, "replay", "--all", "--yes")["replayed"] == 1


def test_a_replay_that_fails_leaves_room_for_the_next_one(outbox_db: psycopg.Connection) -> None:
    process(outbox_db, publish(outbox_db))
    bulk = Bulk("public")

    def fails() -> None:
        with bulk.replayable(outbox_db, Wanted()) as found:
            raise ZeroDivisionError(found.count)

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="1"):
            fails()
    with psycopg.connect(outbox_db.info.dsn, autocommit=True) as other, bulk.replayable(other, Wanted()) as found:
        assert found.count == 1


# --- who -----------------------------------------------------------------------------------------------------------


def test_an_operator_needs_the_documented_grants_and_a_consumer_may_not(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    seq = publish(outbox_db)
    process(outbox_db, seq)
    operator, consumer = (f"{name}_{uuid4().hex[:12]}" for name in ("ops", "consumer"))
    try:
        for role in (operator, consumer):
            outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        outbox_db.execute(
            sql.SQL(
                "GRANT SELECT, INSERT (table_schema, table_name, operation, entity_id, entity_type, old_data, new_data,"
                " metadata, caused_by, depth, replay_of) ON entity_changes TO {0};"
                " GRANT INSERT (entity_type, seq, id) ON cdc_barriers TO {0};"
                " GRANT SELECT, INSERT (command, person, via, action, target, because, count) ON cdc_actions TO {0}"
            ).format(sql.Identifier(operator))
        )
        grants.grant(outbox_db, "public", [grants.consumer(consumer)])
        assert data(make_conninfo(outbox, options=f"-c role={operator}"), "replay", str(seq))["replayed"] == 1
        refused = run(make_conninfo(outbox, options=f"-c role={consumer}"), "replay", str(seq))
        assert refused.exit_code == 1
        assert "permission denied" in refused.stderr
    finally:
        for role in (operator, consumer):
            outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


def test_an_upgrade_adds_the_column_and_who_read_causes_reads_it(outbox: str, outbox_db: psycopg.Connection) -> None:
    role = f"readonly_{uuid4().hex[:12]}"
    outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        outbox_db.execute("ALTER TABLE entity_changes DROP COLUMN replay_of")
        outbox_db.execute("DELETE FROM cdc_migrations WHERE name = 'replay'")
        seq = publish(outbox_db)
        outbox_db.execute(sql.SQL("GRANT SELECT (caused_by) ON entity_changes TO {}").format(sql.Identifier(role)))
        migrations.upgrade(outbox_db, "public")
        assert migrations.verify(outbox_db, "public") == []
        may = "SELECT has_column_privilege(%s, 'entity_changes', 'replay_of', %s)"
        rights = [outbox_db.execute(may, [role, right]).fetchone() for right in ("SELECT", "UPDATE")]
        assert rights == [(True,), (False,)]
        process(outbox_db, seq)
        assert data(outbox, "replay", "--all", "--yes")["replayed"] == 1
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


# --- what is seen of it --------------------------------------------------------------------------------------------


def test_show_tells_what_a_replay_repeats_and_what_led_to_that(outbox: str, outbox_db: psycopg.Connection) -> None:
    cause = publish(outbox_db, "reaction", "r1")
    with outbox_db.transaction():
        outbox_db.execute("SELECT set_config('cdc.cause', %s, true)", [f"{id_of(outbox_db, cause)},0"])
        original = publish(outbox_db, "task", "17")
    process(outbox_db, cause, original)
    data(outbox, "replay", str(original))
    replay = max(rows(outbox_db))
    shown = data(outbox, "show", str(replay))["change"]
    assert (shown["replay_of"], shown["depth"]) == (str(id_of(outbox_db, original)), 1)
    assert [(link["seq"], link["replay_of"]) for link in shown["chain"]] == [
        (replay, str(id_of(outbox_db, original))), (original, None), (cause, None),
    ]  # fmt: skip
    assert "task 17 INSERT (a replay of the one below)" in run(outbox, "show", str(replay)).stdout
    outbox_db.execute("DELETE FROM entity_changes WHERE seq = %s", [original])
    assert "is not shown" in run(outbox, "show", str(replay)).stderr


async def test_a_handler_sees_what_its_change_repeats(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, seen = Router(), []

    @router.on("*")
    async def handle(change: cdc.Change) -> None:
        seen.append((change.replay_of, change.depth, change.new))

    first = publish(outbox_db)
    await testing.drain(outbox, router)
    await asyncio.to_thread(data, outbox, "replay", "--all", "--yes")
    await testing.drain(outbox, router)
    content = {"secret": "row content"}
    assert seen == [(None, 0, content), (id_of(outbox_db, first), 0, content)]


def test_a_delivery_names_what_its_change_repeats() -> None:
    original = uuid4()
    event = json.loads(cloudevents.event(testing.change("order", replay_of=original), None))
    assert event["replayof"] == str(original)
    assert "replayof" not in json.loads(cloudevents.event(testing.change("order"), None))


# --- beside a running consumer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_replays_run_in_the_order_of_the_old_ones_behind_what_waits_of_their_key(
    outbox: str, outbox_db: psycopg.Connection, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_ROUND", 7)
    router, failing = Router(), [True]
    calls: list[tuple[int, str, UUID | None]] = []

    @router.on("*")
    async def handle(change: cdc.Change) -> None:
        if change.seq == waiting and failing:
            raise cdc.Retry(after=3600)
        calls.append((change.seq, change.entity_id, change.replay_of))

    old = [publish(outbox_db, "x", key) for _ in range(20) for key in "ab"]
    originals = {id_of(outbox_db, seq): seq for seq in old}
    process(outbox_db, *old)
    waiting = publish(outbox_db, "x", "a")
    async with consuming(outbox, router, sweep_interval=3600, poll_interval=3600, stream=stream) as app:

        async def ready() -> bool:
            [(due,)] = outbox_db.execute("SELECT count(next_attempt_at) FROM entity_changes").fetchall()
            return due == 1 and app.status.listening and (not stream or app.status.role is Role.STREAMING)

        await eventually_async(ready, what="the consumer at work, and a change that waits")
        before = [publish(outbox_db, "x", "ab"[n % 2]) for n in range(10)]
        filters = ["--until", outbox_db.execute("SELECT min(changed_at)::text FROM entity_changes WHERE seq = %s",
                                                [waiting]).fetchall()[0][0]]  # fmt: skip
        replayed = await asyncio.to_thread(data, outbox, "replay", *filters, "--yes")
        assert replayed == {"replayed": 40, "left": 0}
        after = [publish(outbox_db, "x", "ab"[n % 2]) for n in range(10)]
        if not stream:
            outbox_db.execute("NOTIFY entity_change")

        async def of_b() -> bool:
            return sum(key == "b" for _, key, _ in calls) == 30

        await eventually_async(of_b, what="the key that nothing blocks")
        assert [key for _, key, _ in calls if key == "a"] == []
        failing.clear()
        await asyncio.to_thread(data, outbox, "retry", str(waiting))

        async def over() -> bool:
            return settled(outbox_db)

        await eventually_async(over, what="every change settled")
        handled = metric(app.metrics.registry, "cdc_changes_handled_total", outcome="processed")
    assert handled == 61
    for key in "ab":
        handled_seqs = [originals.get(replay_of, seq) for seq, of, replay_of in calls if of == key]
        place = "ab".index(key)
        assert handled_seqs == [*([waiting] if key == "a" else []), *before[place::2], *old[place::2], *after[place::2]]
