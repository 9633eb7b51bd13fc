"""Many consumers of one process look at the database together: at rest they ask for little, and miss nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import psycopg
import pytest

import cdc
from cdc.app import config
from cdc.app.consumers import Consumers
from cdc.postgres.shared_look import Seen, SharedLook
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import slot_name
from tests.fix_tally import Tally
from tests.subscriptions import is_done, kept, subscribe

pytestmark = pytest.mark.server
_MANY = 12
_END_LOOK = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc: look'"


class _Looks:
    """How often was looked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fails = False
        look = SharedLook.look

        async def counted(
            this: SharedLook, connection: psycopg.AsyncConnection, subscriptions: Collection[int]
        ) -> Seen | None:
            if self.fails:
                raise psycopg.OperationalError
            self.count += 1
            return await look(this, connection, subscriptions)

        monkeypatch.setattr(SharedLook, "look", counted)


@pytest.fixture(autouse=True)
def _figures_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their reader says that it rests: the test need not wait for long."""
    monkeypatch.setattr("cdc.engine.stats_poller._EVERY_S", 1.0)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> _Looks:
    return _Looks(monkeypatch)


@pytest.fixture
def numbers(outbox_db: psycopg.Connection) -> dict[str, int]:
    return {name: subscribe(outbox_db, name) for name in (f"s{number}" for number in range(_MANY))}


class _Handled(dict[str, list[int]]):
    """By subscription, the numbers of what its handler got."""

    def router(self, name: str) -> cdc.Router:
        router = cdc.Router()
        self[name] = []

        @router.on("x")
        async def handle(change: cdc.Change) -> None:
            self[name].append(change.seq)

        return router


@contextlib.asynccontextmanager
async def _consuming(dsn: str, names: Collection[str], handled: _Handled, **settings: Any) -> AsyncIterator[Consumers]:
    options = {"dsn": dsn, "http_port": 0, "slot_name": slot_name(), **settings}
    chosen = [(config.from_options({**options, "subscription": name}), handled.router(name)) for name in names]
    consumers = await Consumers.make(chosen)
    work = asyncio.create_task(consumers.run())
    try:
        yield consumers
        if work.done():
            work.result()
    finally:
        consumers.stop()
        await work


async def _until(condition: Callable[[], object], what: str, within_s: float = 30.0) -> None:
    async def check() -> object:
        return condition()

    await eventually_async(check, what=what, within_s=within_s)


async def _at_rest(consumers: Consumers) -> None:
    """Nothing is open for any of them."""
    await _until(
        lambda: all(app.status.consumer.owned_shards == 64 for app in consumers.apps.values()),
        "they own all shards",
        60,
    )
    rests = [app.components.poller.rest for app in consumers.apps.values()]
    await _until(lambda: all(rest.on for rest in rests[1:]), "nothing is to be asked for", 90)


def _publish(db: psycopg.Connection, key: str = "1") -> int:
    [(seq,)] = db.execute("SELECT publish_change('x', %s)", [key]).fetchall()
    return int(seq)


async def test_idle_consumers_of_a_process_ask_less_than_each_of_them_once_a_look(
    tally: Tally, numbers: dict[str, int], looks: _Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each for itself would ask more than twice."""
    monkeypatch.setattr("cdc.engine.stats_poller._EVERY_S", 15.0)  # of who leads, which does not rest
    async with _consuming(tally.dsn, numbers, _Handled()) as consumers:
        await _at_rest(consumers)
        before, passed = looks.count, tally.passed
        await _until(lambda: looks.count >= before + 20, "twenty looks", 120)
        statements, count = tally.passed.since(passed).statements, looks.count - before
    assert statements < 0.6 * _MANY * count, f"{statements} statements in {count} looks"


@pytest.mark.parametrize("streams", [True, False])
async def test_what_is_written_while_they_rest_is_handled_by_each(
    outbox: str, outbox_db: psycopg.Connection, numbers: dict[str, int], streams: bool
) -> None:
    """Also what is in a transaction that was open before they came to rest, and whose number is the lower one."""
    handled = _Handled()
    async with _consuming(outbox, list(numbers)[:4], handled, stream=streams) as consumers:
        await _at_rest(consumers)
        first = _publish(outbox_db)
        await _until(lambda: all(seqs == [first] for seqs in handled.values()), "each has handled it")
        with psycopg.connect(outbox) as late:
            overtaken = _publish(late, "late")
            second = _publish(outbox_db)
            await _until(
                lambda: all(seqs == [first, second] for seqs in handled.values()), "each has handled the second"
            )
            late.commit()
        await _until(lambda: all(overtaken in seqs for seqs in handled.values()), "each has handled the late one")
        await _at_rest(consumers)
        assert all(seqs == [first, second, overtaken] for seqs in handled.values())
        for name in handled:
            await _until(lambda number=numbers[name]: not kept(outbox_db, number), f"{name} keeps nothing")  # type: ignore[misc]


async def test_one_that_has_begun_a_transaction_keeps_what_it_will_commit_from_being_missed(
    outbox: str, outbox_db: psycopg.Connection, numbers: dict[str, int], looks: _Looks
) -> None:
    """Its number is drawn before they come to rest, and nothing draws another one: only that it is open says so."""
    handled = _Handled()
    with psycopg.connect(outbox) as late:
        overtaken = _publish(late, "late")
        async with _consuming(outbox, list(numbers)[:3], handled, stream=False):
            before = looks.count
            await _until(lambda: looks.count >= before + 8, "some looks")
            assert not any(handled.values())
            late.commit()
            await _until(lambda: all(seqs == [overtaken] for seqs in handled.values()), "each has handled it")


async def test_what_an_operator_lets_try_again_by_hand_is_handled_while_they_rest(
    outbox: str, outbox_db: psycopg.Connection, numbers: dict[str, int]
) -> None:
    handled = _Handled()
    async with _consuming(outbox, list(numbers)[:3], handled, stream=False) as consumers:
        seq = _publish(outbox_db)
        await _until(lambda: all(seqs == [seq] for seqs in handled.values()), "each has handled it")
        await _at_rest(consumers)
        number = numbers["s1"]
        outbox_db.execute(
            "INSERT INTO cdc_subscription_changes"
            " (seq, subscription, shard, next_attempt_at, type_hash, key_hash, tried)"
            " SELECT seq, %s, shard, now(), hashtextextended(entity_type, 0),"
            "  hashtextextended(entity_id, hashtextextended(entity_type, 0)), '{\"count\": 1}'"
            " FROM entity_changes WHERE seq = %s",
            [number, seq],
        )
        await _until(lambda: handled["s1"] == [seq, seq], "it is handled once more")
        await _until(lambda: is_done(outbox_db, number), "it is done")
    assert handled["s0"] == handled["s2"] == [seq]


async def test_a_pause_a_drop_and_another_consumer_are_seen_while_they_rest(
    outbox: str, outbox_db: psycopg.Connection, numbers: dict[str, int]
) -> None:
    handled, others = _Handled(), _Handled()
    names = list(numbers)[:3]
    async with _consuming(outbox, names, handled, stream=False) as consumers:
        await _at_rest(consumers)
        apps = consumers.apps
        done(outbox, "subscription", "pause", "s1", "--because", "reindexing")
        await _until(lambda: apps["s1"].consumer.status.paused, "it knows that it is paused")
        assert not apps["s0"].consumer.status.paused
        async with _consuming(outbox, ["s0", "s2"], others, stream=False) as second:
            await _until(
                lambda: all(
                    app.status.consumer.owned_shards == 32 for app in (apps["s0"], apps["s2"], *second.apps.values())
                ),
                "two share the shards",
            )
        await _until(lambda: apps["s0"].status.consumer.owned_shards == 64, "all are back")
        done(outbox, "subscription", "drop", "s2", "--yes")
        await _until(lambda: not apps["s2"].consumer.lifecycle.in_service, "it knows that it was dropped")
        done(outbox, "subscription", "resume", "s1")
        seq = _publish(outbox_db)
        await _until(lambda: handled["s0"] == handled["s1"] == [seq], "the others go on")
    assert handled["s2"] == []


async def test_while_nobody_can_look_for_all_each_looks_for_itself(
    outbox: str, outbox_db: psycopg.Connection, numbers: dict[str, int], looks: _Looks
) -> None:
    handled = _Handled()
    async with _consuming(outbox, list(numbers)[:3], handled, stream=False) as consumers:
        await _at_rest(consumers)
        looks.fails = True
        outbox_db.execute(_END_LOOK)
        seq = _publish(outbox_db)
        await _until(lambda: all(seqs == [seq] for seqs in handled.values()), "each has handled it")
        done(outbox, "subscription", "pause", "s1", "--because", "reindexing")
        await _until(lambda: consumers.apps["s1"].consumer.status.paused, "it knows that it is paused")
