"""A handler for the latest in a subscription: one call for what waits of a key there, and nothing of it elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import psycopg
import pytest

import cdc
from cdc import testing
from cdc.core.model import Coalesced, Processed
from cdc.core.read_reconciler import Settlement
from cdc.core.type_filter import TypeFilter
from cdc.postgres import tracking
from cdc.postgres.bulk import Bulk
from cdc.postgres.coalesced import Ask, CoalescedChanges
from cdc.postgres.connect import connect_async
from cdc.postgres.subscription import SubscriptionStore
from cdc.postgres.subscription_admin import SubscriptionAdmin
from cdc.postgres.subscriptions import Subscriptions
from cdc.postgres.tracked_tables import Truncate
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, states
from tests.latest import KINDS, declare, got, update
from tests.subscriptions import is_done, kept, states_of, subscribe

pytestmark = pytest.mark.server
_SETTINGS: dict[str, Any] = {
    "subscription": "search", "stream": False, "poll_interval": 0.02, "backoff_base": 0.01, "backoff_cap": 0.05,
}  # fmt: skip
_TAKEN = """
INSERT INTO cdc_subscription_changes (seq, subscription, shard)
SELECT seq, %s, shard FROM entity_changes WHERE seq = %s
"""


@pytest.fixture
def search(outbox_db: psycopg.Connection) -> int:
    outbox_db.execute("CREATE TABLE effect (seq bigint)")
    return subscribe(outbox_db)


async def _drain(
    dsn: str, db: psycopg.Connection, number: int, router: cdc.Router, **settings: Any
) -> dict[str, float]:
    """Until all of it is done or dead and what is done has no row. How many changes ended in which way."""

    async def at_rest() -> bool:
        dead = sum(state == "dead" for state in states_of(db, number).values())
        return is_done(db, number) and kept(db, number) == dead

    async with consuming(dsn, router, **{**_SETTINGS, **settings}) as app:
        await eventually_async(at_rest, what="all is settled, and nothing of what is done is kept")
        registry = app.metrics.registry
        outcomes = ("processed", "coalesced", "retried", "dead", "discarded")
        found = {name: metric(registry, "cdc_changes_handled_total", outcome=name) for name in outcomes}
    return {name: count for name, count in found.items() if count}


def _effects(db: psycopg.Connection) -> list[int]:
    return [seq for (seq,) in db.execute("SELECT seq FROM effect ORDER BY seq").fetchall()]


@pytest.mark.parametrize("kind", KINDS)
async def test_one_call_stands_for_all_that_waits_of_a_key_in_this_subscription_alone(
    outbox: str, outbox_db: psycopg.Connection, search: int, kind: str
) -> None:
    calls: list[cdc.Change] = []
    router = cdc.Router()
    declare(router, kind, calls.append)
    of_one, of_other = update(outbox_db, 1, 5), update(outbox_db, 7, 7, "2")
    assert await _drain(outbox, outbox_db, search, router) == {"processed": 2, "coalesced": 4}
    by_key = {change.entity_id: change for change in calls}
    assert len(calls) == 2
    assert got(by_key["1"]) == ("UPDATE", 0, 5, 5)
    assert got(by_key["2"]) == ("UPDATE", 6, 7, 1)
    assert by_key["1"].seq == of_one[-1]
    assert states(outbox_db) == {"fresh": 6}, "to the default one nothing has happened"
    assert outbox_db.execute("SELECT count(last_error) FROM entity_changes").fetchall() == [(0,)]
    if "transactional" in kind:
        assert _effects(outbox_db) == [of_one[-1], of_other[0]]


@pytest.mark.parametrize("processed", [False, True])
async def test_it_stands_for_what_others_have_processed_and_what_they_have_not(
    outbox: str, outbox_db: psycopg.Connection, search: int, processed: bool
) -> None:
    """The two halves of what a subscription reads, and a mixture of both."""
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)))
    seqs = update(outbox_db, 1, 9)
    outbox_db.execute(
        "UPDATE entity_changes SET processed = true, processed_at = now() WHERE seq %% 2 = 0 OR %s", [processed]
    )
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now(), error_count = 1 WHERE seq = %s", [seqs[4]])
    await _drain(outbox, outbox_db, search, router)
    assert calls == [("UPDATE", 0, 9, 9)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_retry_stands_for_what_has_come_meanwhile_too(
    outbox: str, outbox_db: psycopg.Connection, search: int, kind: str
) -> None:
    calls: list[tuple[Any, ...]] = []

    def handle(change: cdc.Change) -> None:
        calls.append((*got(change), change.attempt, change.requeued))
        if len(calls) == 1:
            with psycopg.connect(outbox, autocommit=True) as other:
                update(other, 3, 4)
            raise cdc.Retry(after=0.01)

    router = cdc.Router()
    declare(router, kind, handle)
    last = update(outbox_db, 1, 2)[-1]
    assert await _drain(outbox, outbox_db, search, router) == {"processed": 1, "coalesced": 3, "retried": 1}
    assert calls == [("UPDATE", 0, 2, 2, 1, False), ("UPDATE", 0, 4, 4, 2, True)]
    if "transactional" in kind:
        assert _effects(outbox_db) == [last + 2]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_retry_whose_shard_s_position_has_passed_it_leaves_nothing_behind(
    outbox: str, outbox_db: psycopg.Connection, search: int, kind: str
) -> None:
    """A position passes what waits: its row is removed then, and not kept as done for ever."""
    fails = True

    def handle(change: cdc.Change) -> None:
        if fails:
            raise RuntimeError

    router = cdc.Router()
    declare(router, kind, handle, max_attempts=1_000)
    first = update(outbox_db, 1, 1)[0]

    async def passed() -> bool:
        asked = "SELECT p.seq >= n.seq FROM entity_changes n JOIN cdc_positions p USING (shard) WHERE n.seq = %s"
        return outbox_db.execute(asked, [first]).fetchall() == [(True,)]

    async with consuming(outbox, router, **_SETTINGS):
        await eventually_async(passed, what="its position has passed what waits")
    update(outbox_db, 2, 3)
    fails = False
    await _drain(outbox, outbox_db, search, router)
    assert set(states_of(outbox_db, search).values()) == {"done"}


@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_of_those_whose_attempts_are_used_up_is_the_dead_letter(
    outbox: str, outbox_db: psycopg.Connection, search: int, kind: str
) -> None:
    def handle(change: cdc.Change) -> None:
        raise ValueError

    router = cdc.Router()
    declare(router, kind, handle, max_attempts=2)
    first, second = update(outbox_db, 1, 2)
    await _drain(outbox, outbox_db, search, router)
    assert states_of(outbox_db, search) == {first: "done", second: "dead"}
    [(count,)] = outbox_db.execute("SELECT (tried ->> 'count')::int FROM cdc_subscription_changes").fetchall()
    assert count == 2
    assert _effects(outbox_db) == []


async def test_a_discard_is_that_of_the_last_one(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    def handle(change: cdc.Change) -> None:
        raise cdc.Discard("too old")

    router = cdc.Router()
    declare(router, "sync", handle)
    update(outbox_db, 1, 2)
    assert await _drain(outbox, outbox_db, search, router) == {"discarded": 1, "coalesced": 1}


async def test_a_key_is_quiet_before_the_call(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)), settle=2)

    @router.on("order")
    async def other(change: cdc.Change) -> None:
        calls.append(("order", change.entity_id))

    async def are(count: int) -> bool:
        return len(calls) >= count

    async with consuming(outbox, router, subscription="search"):
        update(outbox_db, 1, 1)
        outbox_db.execute("SELECT publish_change('order', '1')")
        await eventually_async(partial(are, 1))
        update(outbox_db, 2, 3)
        outbox_db.execute("SELECT publish_change('order', '2')")
        await eventually_async(partial(are, 2))
        assert calls == [("order", "1"), ("order", "2")]
        await eventually_async(partial(are, 3), what="its call")
    assert calls[2] == ("UPDATE", 0, 3, 3)


async def test_a_call_stands_for_a_bounded_part_of_a_burst(
    outbox: str, outbox_db: psycopg.Connection, search: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.postgres.coalesced.COUNT", 99)
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)[1:]))
    update(outbox_db, 1, 250)
    await _drain(outbox, outbox_db, search, router)
    assert calls == [(0, 100, 100), (100, 200, 100), (200, 250, 50)]


async def test_a_burst_beyond_the_window_is_as_many_calls_as_their_bound_asks_for(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "transactional", lambda change: calls.append(got(change)[1:]))
    update(outbox_db, 1, 12_000)
    await _drain(outbox, outbox_db, search, router, window=100)
    assert calls == [(0, 10_001, 10_001), (10_001, 12_000, 1_999)]


async def test_what_waits_behind_is_not_overtaken(outbox: str, outbox_db: psycopg.Connection, search: int) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append((*got(change)[1:], change.requeued)))
    seqs = update(outbox_db, 1, 4)
    outbox_db.execute(
        "INSERT INTO cdc_subscription_changes (seq, subscription, shard, next_attempt_at, type_hash, key_hash, tried)"
        " SELECT seq, %s, shard, now(), hashtextextended(entity_type, 0),"
        "  hashtextextended(entity_id, hashtextextended(entity_type, 0)), '{\"count\": 1}'"
        " FROM entity_changes WHERE seq = %s",
        [search, seqs[2]],
    )
    await _drain(outbox, outbox_db, search, router)
    assert sorted(calls) == [(0, 2, 2, False), (2, 4, 2, True)]


async def test_a_change_that_another_handler_gets_and_what_is_for_another_subscription_are_as_they_were(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)))

    @router.on("product", "DELETE")
    async def removed(change: cdc.Change) -> None:
        calls.append(("removed", change.seq))

    other = subscribe(outbox_db, "other")
    update(outbox_db, 1, 3)
    for_other = update(outbox_db, 4, 4)
    outbox_db.execute(
        "UPDATE entity_changes SET processed = true, subscription = %s WHERE seq = %s", [other, *for_other]
    )
    [(deleted,)] = outbox_db.execute("""SELECT publish_change('product', '1', 'DELETE', old_data => '{"n": 3}')""")
    update(outbox_db, 4, 5)
    await _drain(outbox, outbox_db, search, router)
    assert calls == [("UPDATE", 0, 3, 3), ("removed", deleted), ("UPDATE", 3, 5, 2)]
    assert states_of(outbox_db, other)[for_other[0]] == "fresh"


async def test_a_call_stands_for_replays_alone_or_for_none(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append((got(change), change.replay_of is not None)))
    update(outbox_db, 1, 3)
    originals = [id_ for (id_,) in outbox_db.execute("SELECT id FROM entity_changes ORDER BY seq").fetchall()]
    await _drain(outbox, outbox_db, search, router)
    calls.clear()
    update(outbox_db, 4, 5)
    admin = SubscriptionAdmin("public", Subscriptions("public").named(outbox_db, "search"))
    for _ in Bulk("public", admin).replay(outbox_db, originals):
        pass
    update(outbox_db, 6, 7)
    await _drain(outbox, outbox_db, search, router)
    assert calls == [(("UPDATE", 3, 5, 2), False), (("UPDATE", 0, 3, 3), True), (("UPDATE", 5, 7, 2), False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
async def test_what_becomes_visible_before_a_call_is_not_overtaken_by_what_is_written_behind_it_then(  # noqa: PLR0917 - fixtures
    outbox: str, outbox_db: psycopg.Connection, search: int, monkeypatch: pytest.MonkeyPatch, kind: str, fails: bool
) -> None:
    calls: list[tuple[Any, ...]] = []

    def handle(change: cdc.Change) -> None:
        calls.append(got(change)[1:])
        if fails and len(calls) == 1:
            raise RuntimeError

    router = cdc.Router()
    declare(router, kind, handle, max_attempts=2)
    ask = CoalescedChanges.ask
    with psycopg.connect(outbox) as late:
        update(late, 1, 1)

        async def asked_late(self: CoalescedChanges, reader: psycopg.AsyncConnection, asks: Sequence[Ask]) -> Any:
            if not late.closed and bool(calls) == fails:
                late.commit()
                late.close()
                update(outbox_db, 3, 3)
            return await ask(self, reader, asks)

        monkeypatch.setattr(CoalescedChanges, "ask", asked_late)
        update(outbox_db, 2, 2)
        await _drain(outbox, outbox_db, search, router)
    assert calls == ([(1, 2, 1), (0, 1, 1), (1, 3, 2)] if fails else [(0, 3, 3)])


@pytest.mark.parametrize("kind", ["transactional", "transactional sync"])
@pytest.mark.parametrize("which", [0, 1, 2])
async def test_what_another_session_has_processed_meanwhile_is_not_done_twice(
    outbox: str, outbox_db: psycopg.Connection, search: int, kind: str, which: int
) -> None:
    calls: list[tuple[Any, ...]] = []

    def handle(change: cdc.Change) -> None:
        calls.append(got(change))
        if len(calls) == 1:
            with psycopg.connect(outbox, autocommit=True) as other:
                other.execute(_TAKEN, [search, seqs[which]])

    router = cdc.Router()
    declare(router, kind, handle, max_attempts=1)
    seqs = update(outbox_db, 1, 3)
    await _drain(outbox, outbox_db, search, router)
    left = [(1, 3), (0, 3), (0, 2)][which]
    assert calls[0] == ("UPDATE", 0, 3, 3)
    assert calls[1] == ("UPDATE", *left, 2)
    assert _effects(outbox_db) == [max(set(seqs) - {seqs[which]})]
    assert set(states_of(outbox_db, search).values()) == {"done"}, "no attempt was lost"


async def test_a_settle_goes_around_a_group_of_which_another_session_has_taken_one(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    """Whichever of the group it is; another one is settled meanwhile."""
    store = _store(outbox_db)
    groups = []
    for key in range(5):
        update(outbox_db, 1, 4, str(key))
        rows = outbox_db.execute(
            "SELECT id, seq, shard FROM entity_changes WHERE entity_id = %s ORDER BY seq", [str(key)]
        ).fetchall()
        first, *behind = [
            testing.change("product", "UPDATE", str(key), id=id_, seq=seq, shard=shard) for id_, seq, shard in rows
        ]
        later = "{" + ",".join(str(each.seq) for each in behind) + "}"
        groups.append(([first, *behind], Settlement(first, Coalesced(behind[-1], later, Processed()))))
    session = await connect_async(outbox, application_name="cdc: test", session=SubscriptionStore.session)
    async with session, await psycopg.AsyncConnection.connect(outbox) as other:
        for place, (changes, _) in enumerate(groups[:4]):
            taken = changes[place]
            cursor = await other.execute(*store.take([taken], taken))
            assert await cursor.fetchall()
        left = await store.settle(session, [each for _, each in groups], around_locks=True)
        assert [each.change.key for each in left.locked] == [changes[0].key for changes, _ in groups[:4]]
        await other.rollback()
        left = await store.settle(session, left.locked, around_locks=True)
        assert left.locked == []
    assert kept(outbox_db, search) == 20


def _store(db: psycopg.Connection) -> SubscriptionStore:
    return SubscriptionStore("public", Subscriptions("public").named(db, "search"), 16, TypeFilter())


async def test_a_call_does_not_stand_for_what_comes_after_a_truncate(
    outbox: str, outbox_db: psycopg.Connection, search: int
) -> None:
    outbox_db.execute("CREATE TABLE products (id int PRIMARY KEY, n int)")
    tracking.track(outbox_db, "public", "products", entity_type="product", truncate=Truncate.EVENT)
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)))

    @router.on("product", "TRUNCATE")
    async def emptied(change: cdc.Change) -> None:
        calls.append(("TRUNCATE",))

    outbox_db.execute("INSERT INTO products VALUES (1, 1)")
    outbox_db.execute("UPDATE products SET n = 2")
    outbox_db.execute("TRUNCATE products")
    outbox_db.execute("INSERT INTO products VALUES (1, 3)")
    outbox_db.execute("UPDATE products SET n = 4")
    await _drain(outbox, outbox_db, search, router)
    assert calls == [("UPDATE", None, 2, 2), ("TRUNCATE",), ("UPDATE", None, 4, 2)]
