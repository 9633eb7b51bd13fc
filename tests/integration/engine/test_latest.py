"""One call for all the changes of a key that wait: the first ``old``, the last ``new``, and how many there were."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import cdc
from cdc import testing
from cdc.app.application import App
from cdc.cli import cdc as root_command
from cdc.core.deferred_keys import KeyRead
from cdc.core.latest import Latest
from cdc.postgres import tracking
from cdc.postgres.bulk import Bulk
from cdc.postgres.coalesced import Ask, CoalescedChanges
from cdc.postgres.outbox import Store
from cdc.postgres.tracked_tables import Truncate
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric
from tests.latest import KINDS, declare, got, update

_PROCESSED = "SELECT id FROM entity_changes WHERE processed ORDER BY seq"
_ROWS = """
SELECT seq, processed, dead_at IS NOT NULL, error_count, last_error FROM entity_changes ORDER BY seq
"""


def _at_rest(app: App) -> Callable[[], Awaitable[bool]]:
    async def at_rest() -> bool:
        status = app.consumer.status
        return (status.running, status.queued, status.settling) == (0, 0, 0)

    return at_rest


async def _called(calls: list[Any], times: int) -> None:
    async def enough() -> bool:
        return len(calls) >= times

    await eventually_async(enough, what=f"{times} calls")


@pytest.fixture
def effects(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE effect (seq bigint)")
    return outbox_db


@pytest.mark.parametrize("kind", KINDS)
async def test_one_call_stands_for_all_that_waits_of_a_key(effects: psycopg.Connection, outbox: str, kind: str) -> None:
    calls: list[cdc.Change] = []
    router = cdc.Router()
    declare(router, kind, calls.append)
    of_one, of_other = update(effects, 1, 5), update(effects, 7, 7, "2")
    drained = await testing.drain(outbox, router)
    by_key = {change.entity_id: change for change in calls}
    assert len(calls) == 2
    assert got(by_key["1"]) == ("UPDATE", 0, 5, 5)
    assert got(by_key["2"]) == ("UPDATE", 6, 7, 1)
    assert by_key["1"].seq == of_one[-1]
    [(last,)] = effects.execute("SELECT id FROM entity_changes WHERE seq = %s", [of_one[-1]])
    assert by_key["1"].id == last
    assert (drained.processed, drained.coalesced) == (2, 4)
    text = f"coalesced into seq {of_one[-1]}"
    assert effects.execute(_ROWS).fetchall() == [
        *((seq, True, False, 0, text) for seq in of_one[:-1]),
        (of_one[-1], True, False, 0, None),
        (of_other[0], True, False, 0, None),
    ]
    if "transactional" in kind:
        assert sorted(effects.execute("SELECT seq FROM effect").fetchall()) == [(of_one[-1],), (of_other[0],)]


async def test_a_call_stands_for_replays_alone_or_for_none(outbox_db: psycopg.Connection, outbox: str) -> None:
    """A replay locks no row: what is visible behind one may not be all that was written before."""
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append((got(change), change.replay_of is not None)))
    update(outbox_db, 1, 3)
    outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now()")
    update(outbox_db, 4, 5)
    for _ in Bulk("public").replay(outbox_db, [id_ for (id_,) in outbox_db.execute(_PROCESSED).fetchall()]):
        pass
    update(outbox_db, 6, 7)
    await testing.drain(outbox, router)
    assert calls == [(("UPDATE", 3, 5, 2), False), (("UPDATE", 0, 3, 3), True), (("UPDATE", 5, 7, 2), False)]


async def test_before_a_call_what_is_fresh_before_it_is_asked_for(outbox_db: psycopg.Connection, outbox: str) -> None:
    """That has become visible late. What is behind the call may have been written when it was there."""
    update(outbox_db, 1, 2)
    outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now()")
    originals = [id_ for (id_,) in outbox_db.execute(_PROCESSED).fetchall()]
    late, *_ = update(outbox_db, 4, 6)
    for _ in Bulk("public").replay(outbox_db, originals):
        pass
    fresh = "SELECT id, seq, shard, replay_of FROM entity_changes WHERE NOT processed ORDER BY seq"
    _, live, last_live, replay, last_replay = outbox_db.execute(fresh).fetchall()
    asks = [
        Ask(replace(testing.change("product", "UPDATE", "1", id=i, seq=n, shard=s), replay_of=r), ("UPDATE",), 0.0, 0.0)
        for i, n, s, r in (live, replay)
    ]
    async with await psycopg.AsyncConnection.connect(outbox, autocommit=True) as reader:
        store = Store("public")
        answers = await store.coalesced.ask(reader, asks)
        assert answers == {asks[0]: Latest(asks[0].change, before=late), asks[1]: Latest(asks[1].change, before=late)}
        outbox_db.execute("UPDATE entity_changes SET processed = true WHERE seq = %s", [late])
        of_live, of_replay = (await store.coalesced.ask(reader, asks)).values()
        assert of_live
        assert (of_live.before, of_live.later) == (None, f"{{{last_live[1]}}}")
        assert of_replay == Latest(asks[1].change, before=live[1])
        outbox_db.execute("UPDATE entity_changes SET processed = true WHERE replay_of IS NULL")
        [of_replay] = (await store.coalesced.ask(reader, asks[1:])).values()
        assert of_replay
        assert (of_replay.before, of_replay.later) == (None, f"{{{last_replay[1]}}}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
async def test_what_becomes_visible_before_a_call_is_not_overtaken_by_what_is_written_behind_it_then(
    effects: psycopg.Connection, outbox: str, monkeypatch: pytest.MonkeyPatch, kind: str, fails: bool
) -> None:
    """As a replay may, or a change of a key that is coarser than a row."""
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
                update(effects, 3, 3)
            return await ask(self, reader, asks)

        monkeypatch.setattr(CoalescedChanges, "ask", asked_late)
        update(effects, 2, 2)
        await testing.drain(outbox, router)
    assert calls == ([(1, 2, 1), (0, 1, 1), (1, 3, 2)] if fails else [(0, 3, 3)])


async def test_a_row_that_comes_and_goes_in_between_is_a_delete_without_an_old_row(
    outbox_db: psycopg.Connection, outbox: str
) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)))
    outbox_db.execute("""SELECT publish_change('product', '1', 'INSERT', '{"n": 1}')""")
    outbox_db.execute("""SELECT publish_change('product', '1', 'UPDATE', '{"n": 2}', '{"n": 1}')""")
    outbox_db.execute("""SELECT publish_change('product', '1', 'DELETE', old_data => '{"n": 2}')""")
    await testing.drain(outbox, router)
    assert calls == [("DELETE", None, None, 3)]


async def test_a_change_that_another_handler_gets_is_not_passed_over(
    outbox_db: psycopg.Connection, outbox: str
) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)))

    @router.on("product", "DELETE")
    async def removed(change: cdc.Change) -> None:
        calls.append(("removed", change.seq))

    update(outbox_db, 1, 3)
    [(deleted,)] = outbox_db.execute("""SELECT publish_change('product', '1', 'DELETE', old_data => '{"n": 3}')""")
    update(outbox_db, 4, 5)
    await testing.drain(outbox, router)
    assert calls == [("UPDATE", 0, 3, 3), ("removed", deleted), ("UPDATE", 3, 5, 2)]


async def test_the_filter_is_asked_about_the_change_that_the_call_would_get(
    outbox_db: psycopg.Connection, outbox: str
) -> None:
    calls: list[tuple[Any, ...]] = []
    asked: list[tuple[Any, ...]] = []

    def odd(change: cdc.Change) -> bool:
        asked.append(got(change))
        return bool(change.new["n"] % 2)

    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)), when=odd)
    update(outbox_db, 1, 2, "even")
    update(outbox_db, 1, 3, "odd")
    drained = await testing.drain(outbox, router)
    assert calls == [("UPDATE", 0, 3, 3)]
    assert sorted(asked) == [("UPDATE", 0, 2, 2), ("UPDATE", 0, 3, 3)]
    assert (drained.processed, drained.filtered, drained.coalesced) == (1, 1, 3)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_retry_stands_for_what_has_come_meanwhile_too(
    effects: psycopg.Connection, outbox: str, kind: str
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
    last = update(effects, 1, 2)[-1]
    drained = await testing.drain(outbox, router)
    assert calls == [("UPDATE", 0, 2, 2, 1, False), ("UPDATE", 0, 4, 4, 2, True)]
    assert (drained.processed, drained.retried, drained.coalesced) == (1, 1, 3)
    if "transactional" in kind:
        assert effects.execute("SELECT seq FROM effect").fetchall() == [(last + 2,)]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_of_those_whose_attempts_are_used_up_is_the_dead_letter(
    effects: psycopg.Connection, outbox: str, kind: str
) -> None:
    def handle(change: cdc.Change) -> None:
        raise ValueError

    errors: list[tuple[int, int]] = []
    router = cdc.Router()
    declare(router, kind, handle, max_attempts=2)
    router.on_error(lambda change, error: errors.append((change.seq, change.coalesced)))
    first, second = update(effects, 1, 2)
    drained = await testing.drain(outbox, router, allow_dead=True)
    assert [(entry.seq, entry.error_count) for entry in drained.dead_letters] == [(second, 2)]
    assert errors == [(second, 2)] * 2
    rows = effects.execute(_ROWS).fetchall()
    assert rows[0] == (first, True, False, 1, f"coalesced into seq {second}")
    assert rows[1][:4] == (second, False, True, 2)
    assert effects.execute("SELECT FROM effect").fetchall() == []


async def test_a_discard_is_that_of_the_last_one(outbox_db: psycopg.Connection, outbox: str) -> None:
    def handle(change: cdc.Change) -> None:
        raise cdc.Discard("too old")

    router = cdc.Router()
    declare(router, "sync", handle)
    first, second = update(outbox_db, 1, 2)
    drained = await testing.drain(outbox, router)
    assert (drained.discarded, drained.coalesced) == (1, 1)
    assert outbox_db.execute(_ROWS).fetchall() == [
        (first, True, False, 0, f"coalesced into seq {second}"),
        (second, True, False, 0, "discarded: too old"),
    ]


async def test_the_hook_gets_what_the_handler_got(effects: psycopg.Connection, outbox: str) -> None:
    for kind in ("async", "transactional"):
        processed: list[tuple[Any, ...]] = []
        router = cdc.Router()
        declare(router, kind, lambda change: None)
        router.on_processed(lambda change, seen=processed: seen.append((change.seq, *got(change))))
        last = update(effects, 1, 3)[-1]
        await testing.drain(outbox, router)
        assert processed == [(last, "UPDATE", 0, 3, 3)]


async def test_a_key_is_quiet_before_the_call_and_holds_up_no_other(outbox_db: psycopg.Connection, outbox: str) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)), settle=2)

    @router.on("order")
    async def other(change: cdc.Change) -> None:
        calls.append(("order", change.entity_id))

    async with consuming(outbox, router) as app:
        update(outbox_db, 1, 1)
        outbox_db.execute("SELECT publish_change('order', '1')")
        await _called(calls, 1)
        update(outbox_db, 2, 3)
        outbox_db.execute("SELECT publish_change('order', '2')")
        await _called(calls, 2)
        assert calls == [("order", "1"), ("order", "2")]
        await eventually_async(_at_rest(app), what="nothing in the window")
        [(fresh,)] = outbox_db.execute(
            "SELECT count(*) FROM entity_changes"
            " WHERE entity_type = 'product' AND NOT processed AND next_attempt_at IS NULL"
        )
        assert fresh == 3
        await _called(calls, 3)
    assert calls[2] == ("UPDATE", 0, 3, 3)
    [(waited_s,)] = outbox_db.execute(
        "SELECT extract(epoch FROM max(processed_at) - max(changed_at))::float8 FROM entity_changes"
        " WHERE entity_type = 'product'"
    )
    assert waited_s >= 2
    assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="coalesced") == 2


async def test_a_key_that_never_rests_is_handled_all_the_same(outbox_db: psycopg.Connection, outbox: str) -> None:
    calls: list[cdc.Change] = []
    router = cdc.Router()
    declare(router, "async", calls.append, settle=1, at_most=1.5)
    async with consuming(outbox, router):
        await eventually_async(partial(_is_called_while_written, outbox_db, calls), what="a call")
    assert calls[0].coalesced > 1


async def _is_called_while_written(db: psycopg.Connection, calls: list[cdc.Change]) -> bool:
    update(db, 1, 1)
    return bool(calls)


async def test_a_key_whose_first_change_is_of_a_time_to_come_does_not_stand_still(
    outbox_db: psycopg.Connection, outbox: str
) -> None:
    """The server's clock was set back, or it is another server's by now."""
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)), settle=0.05, at_most=0.2)
    update(outbox_db, 1, 2)
    outbox_db.execute("UPDATE entity_changes SET changed_at = now() + interval '1 hour'")
    await testing.drain(outbox, router, within_s=5)
    assert calls == [("UPDATE", 0, 2, 2)]


async def test_a_call_stands_for_a_bounded_part_of_a_burst(
    outbox_db: psycopg.Connection, outbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.postgres.coalesced.COUNT", 99)
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)[1:]))
    update(outbox_db, 1, 250)
    await testing.drain(outbox, router)
    assert calls == [(0, 100, 100), (100, 200, 100), (200, 250, 50)]


async def test_keys_of_which_a_call_stands_for_all_are_not_read_again(
    outbox_db: psycopg.Connection, outbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that a repass meets while their call runs, on a busy machine."""
    keys = 40
    read: list[int] = []
    read_keys = Store.read_keys

    async def counted(self: Store, reader: psycopg.AsyncConnection, keys: Sequence[KeyRead], per_key: int) -> Any:
        read.append(len(keys))
        return await read_keys(self, reader, keys, per_key)

    monkeypatch.setattr(Store, "read_keys", counted)
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append(got(change)[1:]))
    for key in range(keys):
        update(outbox_db, 1, 5, str(key))
    await testing.drain(outbox, router)
    assert calls == [(0, 5, 5)] * keys
    assert sum(read) < keys / 2


async def test_what_waits_behind_is_not_overtaken(outbox_db: psycopg.Connection, outbox: str) -> None:
    calls: list[tuple[Any, ...]] = []
    router = cdc.Router()
    declare(router, "async", lambda change: calls.append((*got(change)[1:], change.requeued)))
    seqs = update(outbox_db, 1, 4)
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now(), error_count = 1 WHERE seq = %s", [seqs[2]])
    await testing.drain(outbox, router)
    assert sorted(calls) == [(0, 2, 2, False), (2, 4, 2, True)]


@pytest.mark.parametrize("kind", ["transactional", "transactional sync"])
async def test_what_another_session_has_processed_meanwhile_is_not_done_twice(
    effects: psycopg.Connection, outbox: str, kind: str
) -> None:
    calls: list[tuple[Any, ...]] = []

    def handle(change: cdc.Change) -> None:
        calls.append(got(change))
        if len(calls) == 1:
            with psycopg.connect(outbox, autocommit=True) as other:
                other.execute("UPDATE entity_changes SET processed = true, processed_at = now() WHERE seq = %s", [last])

    router = cdc.Router()
    declare(router, kind, handle)
    last = update(effects, 1, 3)[-1]
    await testing.drain(outbox, router)
    assert calls == [("UPDATE", 0, 3, 3), ("UPDATE", 0, 2, 2)]
    assert effects.execute("SELECT seq FROM effect").fetchall() == [(last - 1,)]


async def test_a_handlers_own_writes_are_caused_by_the_last_one(effects: psycopg.Connection, outbox: str) -> None:
    router = cdc.Router()

    @router.on("product", latest=True)
    async def index(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT publish_change('indexed', '1')")

    router.ignore("indexed")
    last = update(effects, 1, 3)[-1]
    await testing.drain(outbox, router)
    [(cause,)] = effects.execute(
        "SELECT cause.seq FROM entity_changes AS made JOIN entity_changes AS cause ON cause.id = made.caused_by"
    )
    assert cause == last


async def test_show_names_the_change_that_stood_for_it(outbox_db: psycopg.Connection, outbox: str) -> None:
    router = cdc.Router()
    declare(router, "async", lambda change: None)
    _first, last = update(outbox_db, 1, 2)
    await testing.drain(outbox, router)
    [(first_id,)] = outbox_db.execute("SELECT id FROM entity_changes ORDER BY seq LIMIT 1")
    shown = CliRunner().invoke(root_command, ["outbox", "show", str(first_id), "--dsn", outbox])
    assert shown.exit_code == 0, shown.output
    assert f"coalesced into seq {last}" in shown.output


async def test_a_call_does_not_stand_for_what_comes_after_a_truncate(
    outbox_db: psycopg.Connection, outbox: str
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
    await testing.drain(outbox, router)
    assert calls == [("UPDATE", None, 2, 2), ("TRUNCATE",), ("UPDATE", None, 4, 2)]
