"""`cdc outbox replay` and `cdc backfill` for one subscription: what they write is nothing to any other."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import cdc
from cdc.core.errors import RefusedError
from cdc.core.router import Router
from cdc.postgres import bulk, migrations, tracking
from cdc.postgres.backfill import BACKLOG, Backfills
from cdc.postgres.retention import Retention
from cdc.postgres.subscriptions import Subscriptions
from cdc.postgres.tracked_tables import Truncate
from tests.commands import done, invoke, refused
from tests.commands_outbox import data, numbers, process, publish, run, wait
from tests.commands_subscription import create, fail, finish, progress, taken
from tests.eventually import eventually_async
from tests.fix_consumer import ROOT, consuming
from tests.subscriptions import is_done, kept, states_of

pytestmark = pytest.mark.server
FOR_SEARCH = ("--subscription", "search")


@pytest.fixture
def search(outbox: str, outbox_db: psycopg.Connection) -> int:
    """A subscription that begins before the first change; its number."""
    return create(outbox, "search", "--from", "beginning")


def rows(db: psycopg.Connection) -> dict[int, dict[str, Any]]:
    with db.cursor(row_factory=dict_row) as cursor:
        return {row["seq"]: row for row in cursor.execute("SELECT * FROM entity_changes ORDER BY seq").fetchall()}


def replays(db: psycopg.Connection) -> list[int]:
    """What the replays repeat, in the order of the replays."""
    found = rows(db)
    numbers = {row["id"]: seq for seq, row in found.items()}
    return [numbers[row["replay_of"]] for row in found.values() if row["replay_of"]]


def settled(db: psycopg.Connection, number: int, *seqs: int) -> None:
    """It has done these, ahead of its positions."""
    db.execute(
        "INSERT INTO cdc_subscription_changes (subscription, shard, seq)"
        " SELECT %s, shard, seq FROM entity_changes WHERE seq = ANY (%s)",
        [number, list(seqs)],
    )


def orders(db: psycopg.Connection, count: int = 0) -> None:
    db.execute("CREATE TABLE orders (id int PRIMARY KEY, total int)")
    db.execute("INSERT INTO orders SELECT n, n FROM generate_series(1, %s) AS n", [count])
    tracking.track(db, "public", "orders", entity_type="order")


def backfilled(dsn: str, *arguments: str) -> dict[str, Any]:
    result = invoke(dsn, "backfill", *arguments, "--json", "--backlog", "100000")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def collecting(*operations: str, entity_type: str = "order", fails: Sequence[int] = ()) -> tuple[Router, list[Any]]:
    """What a handler has seen: (key, seq, what it repeats)."""
    router, seen = Router(), list[Any]()

    @router.on(entity_type, *operations)
    async def handle(change: cdc.Change) -> None:
        if change.seq in fails:
            raise cdc.Retry(after=3600)
        seen.append((change.entity_id, change.seq, change.replay_of))

    return router, seen


# --- a replay ------------------------------------------------------------------------------------------------------


def test_a_replay_for_one_is_fresh_in_it_and_processed_or_nothing_everywhere_else(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    other = create(outbox, "billing", "--from", "beginning")
    seqs = [publish(outbox_db, "order", key) for key in "ab"]
    finish(outbox_db, search)
    before = rows(outbox_db)
    assert data(outbox, "replay", "--type", "order", "--yes", *FOR_SEARCH) == {"replayed": 2, "left": 0}
    found = rows(outbox_db)
    assert {seq: found[seq] for seq in seqs} == before, "the audit trail is as it was"
    new = [row for seq, row in found.items() if seq not in before]
    assert [row["replay_of"] for row in new] == [before[seq]["id"] for seq in seqs]
    assert [(row["subscription"], row["processed"], row["processed_at"]) for row in new] == [
        (search, True, row["changed_at"]) for row in new
    ]
    assert taken(outbox_db, search) == [row["seq"] for row in new]
    assert taken(outbox_db, other) == seqs
    assert numbers(outbox, "--state", "fresh") == seqs
    assert numbers(outbox, "--state", "fresh", "--subscription", "billing") == seqs
    assert (progress(outbox)["behind"], progress(outbox, "billing")["behind"]) == (2, 2)
    shown = data(outbox, "show", str(new[0]["seq"]), *FOR_SEARCH)["change"]
    assert (shown["state"], shown["subscription"]) == ("fresh", search)
    assert run(outbox, "show", str(new[0]["seq"]), "--subscription", "billing").exit_code == 4
    # Nor to one that is made later, from whenever.
    assert taken(outbox_db, create(outbox, "later", "--from", "beginning")) == seqs
    for start in ("1h", "now"):
        created = create(outbox, f"from_{start}", "--from", start)
        assert taken(outbox_db, created) == (seqs if start == "1h" else [])
        assert kept(outbox_db, created) == 0


def test_what_it_has_done_or_passed_is_found_whatever_the_default_one_has(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    number = create(outbox, "search", "--type", "order", "--type", "cart", "--from", "beginning")
    waiting, dead, passed = (publish(outbox_db, "order", key) for key in "wdp")
    cart, ahead = publish(outbox_db, "cart", "p"), publish(outbox_db, "order", "a")
    publish(outbox_db, "invoice", "of no concern")
    finish(outbox_db, number)
    fail(outbox_db, number, waiting)
    fail(outbox_db, number, dead, dead=True)
    outbox_db.execute("UPDATE cdc_positions SET seq = %s WHERE subscription = %s", [cart, number])
    settled(outbox_db, number, ahead)
    fresh = publish(outbox_db, "order", "f")
    process(outbox_db, dead, fresh)
    wait(outbox_db, passed)

    def count(*arguments: str) -> int:
        return int(data(outbox, "replay", "--dry-run", *arguments, *FOR_SEARCH)["matching"])

    assert count("--all") == 3
    assert count("--type", "cart") == 1
    assert count("--key", "p") == 2
    assert (count("--since", "1h"), count("--until", "1h")) == (3, 0)
    assert replays(outbox_db) == [], "--dry-run changes nothing"
    for change, code in ((waiting, 5), (dead, 5), (fresh, 5), (ahead + 1, 4)):
        assert run(outbox, "replay", str(change), *FOR_SEARCH).exit_code == code
    assert data(outbox, "replay", str(passed), *FOR_SEARCH)["replayed"] == 1
    assert data(outbox, "replay", "--all", "--yes", *FOR_SEARCH)["replayed"] == 3
    assert replays(outbox_db) == [passed, passed, cart, ahead]
    finish(outbox_db, number)
    assert count("--all") == 6, "what a replay says, its original says; and by now it is done with all of them"


def test_the_default_one_replays_nothing_that_is_for_another(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    orders(outbox_db, 3)
    done(outbox, "backfill", "orders", *FOR_SEARCH, "--backlog", "100")
    assert data(outbox, "replay", "--all", "--dry-run") == {"matching": 0}
    assert run(outbox, "replay", str(min(rows(outbox_db)))).exit_code == 5
    assert data(outbox, "replay", "--all", "--dry-run", *FOR_SEARCH) == {"matching": 0}
    finish(outbox_db, search)
    assert data(outbox, "replay", "--all", "--yes", *FOR_SEARCH)["replayed"] == 3


def test_of_each_key_the_last_and_what_has_one_already_is_left_out(
    outbox: str, outbox_db: psycopg.Connection, search: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = create(outbox, "billing", "--from", "beginning")
    seqs = [publish(outbox_db, "order", key) for key in "abcabc"]
    process(outbox_db, *seqs)
    finish(outbox_db, search)
    finish(outbox_db, other)
    latest = ("--type", "order", "--latest-per-key", "--yes")
    assert data(outbox, "replay", *latest, *FOR_SEARCH)["replayed"] == 3
    assert replays(outbox_db) == seqs[3:]
    since = ("--unless-replayed-since", "1h", "--dry-run")
    assert data(outbox, "replay", *latest, *since, *FOR_SEARCH) == {"matching": 0}
    assert data(outbox, "replay", *latest, *since, "--subscription", "billing") == {"matching": 3}
    assert data(outbox, "replay", *latest, *since) == {"matching": 3}, "for all there was none"
    data(outbox, "replay", str(seqs[5]))
    assert data(outbox, "replay", *latest, *since, "--subscription", "billing") == {"matching": 2}, "one for all counts"


async def test_its_consumer_handles_replays_in_order_behind_what_waits_and_no_other_consumer_sees_them(
    outbox: str, outbox_db: psycopg.Connection, search: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_ROUND", 7)
    old = [publish(outbox_db, "order", key) for _ in range(10) for key in "ab"]
    process(outbox_db, *old)
    finish(outbox_db, search)
    waiting = publish(outbox_db, "order", "a")
    fails = [waiting]
    (router, seen), (default, by_default) = collecting(fails=fails), collecting()
    originals = {row["id"]: seq for seq, row in rows(outbox_db).items()}
    async with (
        consuming(outbox, router, subscription="search", sweep_interval=3600, poll_interval=3600),
        consuming(outbox, default),
    ):
        await _until(lambda: "waiting" in states_of(outbox_db, search).values(), "one waits")
        before = publish(outbox_db, "order", "b")
        replayed = await asyncio.to_thread(
            data, outbox, "replay", "--until", rows(outbox_db)[waiting]["changed_at"].isoformat(), "--yes", *FOR_SEARCH
        )
        assert replayed == {"replayed": 20, "left": 0}
        after = [publish(outbox_db, "order", key) for key in "ab"]
        await _until(lambda: sum(key == "b" for key, _, _ in seen) == 12, "the key that nothing blocks")
        assert [key for key, _, _ in seen if key == "a"] == []
        fails.clear()
        await asyncio.to_thread(data, outbox, "retry", str(waiting), *FOR_SEARCH)
        await _until(lambda: is_done(outbox_db, search), "all of it is done")
        await _until(lambda: len(by_default) == 4, "and the default one has what is for all")
    handled = {key: [originals.get(of, seq) for of_key, seq, of in seen if of_key == key] for key in "ab"}
    assert handled["a"] == [waiting, *old[0::2], after[0]]
    assert handled["b"] == [before, *old[1::2], after[1]]
    assert sorted(seq for _, seq, _ in by_default) == sorted([waiting, before, *after])


async def test_a_replayed_truncate_holds_back_what_follows_in_its_own_subscription_alone(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    tracking.track(outbox_db, "public", "orders", entity_type="order", truncate=Truncate.EVENT)
    outbox_db.execute("INSERT INTO orders VALUES (1)")
    outbox_db.execute("TRUNCATE orders")
    [first, truncate] = rows(outbox_db)
    process(outbox_db, first, truncate)
    outbox_db.execute("DELETE FROM cdc_barriers")
    finish(outbox_db, search)
    data(outbox, "replay", "--all", "--yes", *FOR_SEARCH)
    [again, repeated] = list(rows(outbox_db))[2:]
    outbox_db.execute("INSERT INTO orders VALUES (2)")
    last = max(rows(outbox_db))
    assert outbox_db.execute("SELECT count(*) FROM cdc_barriers").fetchall() == [(0,)]
    fails = [repeated]
    (router, seen), (default, by_default) = collecting("INSERT", "TRUNCATE", fails=fails), collecting()
    other_router, by_other = collecting()
    create(outbox, "billing", "--from", str(last))
    async with (
        consuming(outbox, router, subscription="search"),
        consuming(outbox, default),
        consuming(outbox, other_router, subscription="billing"),
    ):
        await _until(lambda: by_default == by_other == [("2", last, None)], "the others are not held back")
        await _until(lambda: "waiting" in states_of(outbox_db, search).values(), "it waits there")
        assert [seq for _, seq, _ in seen] == [again]
        fails.clear()
        await asyncio.to_thread(data, outbox, "retry", str(repeated), *FOR_SEARCH)
        await _until(lambda: is_done(outbox_db, search), "all of it is done")
    assert [seq for _, seq, _ in seen] == [again, repeated, last]


def test_retention_waits_for_the_one_that_it_is_for_and_for_no_other(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    create(outbox, "behind", "--from", "beginning")
    original = publish(outbox_db, "order", "a")
    process(outbox_db, original)
    finish(outbox_db, search)
    data(outbox, "replay", "--all", "--yes", *FOR_SEARCH)
    [_, replay] = rows(outbox_db)
    retention = Retention("public")
    assert list(retention.prune(outbox_db, 0)) == []
    assert retention.prunable(outbox_db, 0) == (0, False)
    settled(outbox_db, search, replay)
    assert list(retention.prune(outbox_db, 0)) == [], "it is done ahead of the position"
    finish(outbox_db, search)
    assert retention.prunable(outbox_db, 0) == (1, False)
    assert list(retention.prune(outbox_db, 0)) == [1]
    assert list(rows(outbox_db)) == [original], "which the one that is behind keeps"
    data(outbox, "replay", "--all", "--yes", *FOR_SEARCH)
    assert list(retention.prune(outbox_db, 0)) == []
    done(outbox, "subscription", "drop", "search", "--yes")
    assert list(retention.prune(outbox_db, 0)) == [1], "nobody takes it any more"


# --- a backfill ----------------------------------------------------------------------------------------------------


async def test_a_backfill_for_one_is_read_by_it_alone_and_waits_for_its_consumer(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    create(outbox, "billing", "--from", "beginning")
    orders(outbox_db, 200)
    (router, seen), (default, by_default), (other, by_other) = collecting(), collecting(), collecting()
    async with consuming(outbox, default), consuming(outbox, other, subscription="billing"):
        began = asyncio.create_task(asyncio.to_thread(done, outbox, "backfill", "orders", *FOR_SEARCH))
        await _until(lambda: len(rows(outbox_db)) >= BACKLOG, "as many are written as may be unsettled")
        assert len(rows(outbox_db)) == BACKLOG
        assert not began.done()
        async with consuming(outbox, router, subscription="search"):
            said = await began
            await _until(lambda: is_done(outbox_db, search), "all of it is done")
        written = publish(outbox_db, "order", "after")
        await _until(lambda: [seq for _, seq, _ in by_default] == [written] == [seq for _, seq, _ in by_other])
    assert "of public.orders for search is done: 200 rows read, 200 written" in said
    assert sorted(key for key, _, _ in seen) == sorted(str(n) for n in range(1, 201))
    assert {row["processed"] for row in rows(outbox_db).values() if row["operation"] == "READ"} == {True}


async def test_a_read_for_one_has_its_place_among_what_is_written_to_its_row(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    """Whatever happens meanwhile, of two changes of a row the one with the higher number has the newer row."""
    orders(outbox_db, 60)
    router, latest = Router(), dict[str, int]()

    @router.on("order")
    async def handle(change: cdc.Change) -> None:
        latest[change.entity_id] = (change.new or {})["total"]

    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(outbox, autocommit=True) as writing:
            while not stop.is_set():
                writing.execute("UPDATE orders SET total = total + 1000 WHERE id % 3 = 0")

    async with consuming(outbox, router, subscription="search"):
        writer = asyncio.create_task(asyncio.to_thread(write))
        await asyncio.to_thread(done, outbox, "backfill", "orders", *FOR_SEARCH)
        stop.set()
        await writer
        await _until(lambda: is_done(outbox_db, search), "all of it is done")
    assert latest == {str(id_): total for id_, total in outbox_db.execute("SELECT id, total FROM orders").fetchall()}


def test_each_subscription_has_one_of_a_table_that_is_not_finished(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    orders(outbox_db, 3)
    backfills, found = Backfills("public"), Subscriptions("public").named(outbox_db, "search")
    for_search = backfills.start(outbox_db, "orders", subscription=found)
    for_all = backfills.start(outbox_db, "orders")
    with pytest.raises(RefusedError, match=f"backfill {for_search.id} of public.orders for search is not finished"):
        backfills.start(outbox_db, "orders", subscription=found)
    assert "several backfills that are not finished: 2 of public.orders, 1 of public.orders for search" in refused(
        outbox, "backfill", "resume", "orders"
    )
    assert backfilled(outbox, "resume", str(for_search.id))["written"] == 3
    assert {row["subscription"] for row in rows(outbox_db).values()} == {search}
    assert backfilled(outbox, "resume", "orders")["id"] == for_all.id
    assert [row["subscription"] for row in rows(outbox_db).values()] == [search] * 3 + [None] * 3
    listed = done(outbox, "backfill", "status")
    assert [line.split()[2] for line in listed.splitlines() if "orders" in line] == ["all", "search"]


def test_a_subscription_that_does_not_take_the_rows_or_was_dropped_is_refused(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox, "carts", "--type", "cart", "--from", "beginning")
    create(outbox, "search", "--type", "order", "--from", "beginning")
    orders(outbox_db, 3)
    assert "the subscription carts does not take the type order of orders" in refused(
        outbox, "backfill", "orders", "--subscription", "carts"
    )
    assert invoke(outbox, "backfill", "orders", "--subscription", "none").exit_code == 4
    found = Subscriptions("public").named(outbox_db, "search")
    begun = Backfills("public").start(outbox_db, "orders", subscription=found)
    done(outbox, "subscription", "drop", "search", "--yes")
    create(outbox, "search", "--from", "beginning")
    assert "which was dropped" in refused(outbox, "backfill", "resume", str(begun.id))
    assert rows(outbox_db) == {}


def test_rows_are_never_written_for_all_by_a_function_of_an_earlier_version(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    orders(outbox_db, 3)
    [(now,)] = outbox_db.execute("SELECT pg_get_functiondef('capture_rows'::regproc)").fetchall()
    without = now.replace("p_options ->> 'subscription'", "NULL").replace("p_options ? 'subscription'", "false")
    assert without != now
    outbox_db.execute(without.encode())
    assert "cdc db upgrade" in refused(outbox, "backfill", "orders", *FOR_SEARCH)
    assert rows(outbox_db) == {}
    migrations.upgrade(outbox_db, "public")
    assert backfilled(outbox, "resume", "orders")["written"] == 3


# --- who -----------------------------------------------------------------------------------------------------------


def test_an_upgrade_keeps_what_there_is_and_passes_on_the_rights_beside_which_the_new_columns_stand(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    role = f"ops_{uuid4().hex[:12]}"
    orders(outbox_db, 5)
    begun = Backfills("public").start(outbox_db, "orders")
    outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        outbox_db.execute("ALTER TABLE entity_changes DROP COLUMN subscription")
        outbox_db.execute("ALTER TABLE cdc_backfills DROP COLUMN subscription, DROP COLUMN subscription_name")
        outbox_db.execute("CREATE UNIQUE INDEX cdc_backfills_unfinished ON cdc_backfills (table_schema, table_name)"
                          " WHERE state = 'running' OR state = 'paused'")  # fmt: skip
        outbox_db.execute("DELETE FROM cdc_migrations WHERE name = 'for_one_subscription'")
        seq = publish(outbox_db)
        outbox_db.execute(
            sql.SQL("GRANT SELECT (replay_of) ON entity_changes TO {0}; GRANT INSERT (rate) ON cdc_backfills TO {0}")
            .format(sql.Identifier(role))
        )  # fmt: skip
        migrations.upgrade(outbox_db, "public")
        assert migrations.verify(outbox_db, "public") == []
        may = "SELECT has_column_privilege(%(role)s, 'entity_changes', 'subscription', 'SELECT'),"
        may += " has_column_privilege(%(role)s, 'entity_changes', 'subscription', 'INSERT'),"
        may += " has_column_privilege(%(role)s, 'cdc_backfills', 'subscription_name', 'INSERT')"
        assert outbox_db.execute(may.encode(), {"role": role}).fetchall() == [(True, False, True)]
        assert rows(outbox_db)[seq]["subscription"] is None
        assert Backfills("public").named(outbox_db, "orders").id == begun.id
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


def test_an_operator_needs_no_more_than_the_documented_rights(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    role = f"ops_{uuid4().hex[:12]}"
    mine = make_conninfo(outbox, options=f"-c role={role}")
    seq = publish(outbox_db, "order", "a")
    finish(outbox_db, search)
    outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        page = (ROOT / "docs/operations/roles.md").read_text("utf-8").partition("## An operator")[2]
        script = page.split("```sql\n")[1].partition("```")[0]
        outbox_db.execute(script.replace("events.", "public.").replace("SCHEMA events", "SCHEMA public")
                          .replace(" TO ops", f" TO {role}").encode())  # fmt: skip
        assert data(mine, "replay", str(seq), *FOR_SEARCH) == {"replayed": 1, "left": 0}
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


async def _until(condition: Any, what: str = "") -> None:
    async def check() -> bool:
        return bool(condition())

    await eventually_async(check, what=what or "it is so")
