"""What is paused starts nothing, stays as it is, is in nobody's way, and goes on in order when it is resumed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

import cdc
from cdc.app.application import App
from cdc.core.pauses import Pause
from cdc.core.router import Router
from cdc.postgres.controls import Controls
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states

_SMALL: dict[str, Any] = {"window": 100, "concurrency": 5, "transactions": 2, "drain_time": 5}


class Calls:
    """The numbers of the changes that handlers were called with, by type, in that order."""

    def __init__(self) -> None:
        self.seqs: dict[str, list[int]] = defaultdict(list)
        self.keys: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.attempts: list[int] = []
        self.fails = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def call(self, change: cdc.Change) -> None:
        self.seqs[change.entity_type].append(change.seq)
        self.keys[change.key].append(change.seq)
        self.attempts.append(change.attempt)
        if self.fails:
            raise RuntimeError("fails")
        await self.gate.wait()

    @property
    def in_order(self) -> bool:
        return all(seqs == sorted(set(seqs)) for seqs in self.keys.values())


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def router(calls: Calls) -> Router:
    """``mail`` and ``invoice`` have a handler each; ``letter`` and ``parcel`` share one."""
    router = cdc.Router()

    @router.on("mail")
    async def send(change: cdc.Change) -> None:
        await calls.call(change)

    @router.on("invoice")
    async def book(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await calls.call(change)

    @router.on("letter")
    @router.on("parcel")
    async def post(changes: list[cdc.Change]) -> None:
        for change in changes:
            await calls.call(change)

    return router


def _publish(db: psycopg.Connection, entity_type: str, count: int = 10, *, keys: int = 3) -> None:
    db.execute(
        "SELECT publish_change(%s, (n %% %s)::text, 'INSERT', '{}') FROM generate_series(1, %s) AS n",
        [entity_type, keys, count],
    )


def _pause(
    db: psycopg.Connection,
    entity_type: str | None = None,
    *,
    handler: str | None = None,
    entity_id: str | None = None,
    subscription: str | None = None,
    for_s: float | None = None,
) -> Pause:
    pause = Pause(0, subscription, entity_type, handler, entity_id, because="a test", set_by="somebody")
    return Controls("public").pause(db, pause, for_s).pause


def _resume(db: psycopg.Connection, pause: Pause) -> None:
    Controls("public").resume(db, pause)


def _fresh(db: psycopg.Connection, entity_type: str) -> int:
    """Those that nobody has touched."""
    [(count,)] = db.execute(
        "SELECT count(*) FROM entity_changes WHERE entity_type = %s AND NOT processed AND next_attempt_at IS NULL"
        " AND dead_at IS NULL AND error_count = 0 AND started_by IS NULL", [entity_type],
    ).fetchall()  # fmt: skip
    return int(count)


async def _until(condition: Callable[[], object], what: str) -> None:
    async def check() -> object:
        return condition()

    await eventually_async(check, what=what)


async def _until_known(app: App, count: int = 1) -> None:
    await _until(lambda: len(app.status.consumer.pauses) == count, f"the consumer knows {count} pauses")


async def _polls(app: App) -> None:
    """For two polls of the shards, a second or two: due reads and sweeps come more often here."""
    for _ in range(2):
        before = app.status.consumer.last_iteration["shards"]
        await _until(lambda: app.status.consumer.last_iteration["shards"] > before, "the shards are polled")  # noqa: B023


@asynccontextmanager
async def _consuming(dsn: str, router: Router, **settings: Any) -> AsyncIterator[App]:
    async with consuming(dsn, router, **{**_SMALL, **settings}) as app:
        await _until(lambda: app.status.consumer.owned_shards, "it owns shards")
        yield app


@pytest.mark.parametrize("entity_type", ["mail", "invoice", "letter"])
async def test_a_paused_type_stays_fresh_and_goes_on_in_order_while_others_are_handled(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls, entity_type: str
) -> None:
    async with _consuming(outbox, router) as app:
        pause = _pause(outbox_db, entity_type)
        await _until_known(app)
        _publish(outbox_db, entity_type, 500, keys=7)
        _publish(outbox_db, "parcel", 300, keys=7)
        await _until(lambda: len(calls.seqs["parcel"]) == 300, "the others are handled")
        assert _fresh(outbox_db, entity_type) == 500
        assert not calls.seqs[entity_type]
        assert app.status.consumer.queued == 0
        assert all(check.ok for check in app.readiness()), app.readiness()
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "what was paused is handled")
    assert calls.in_order
    assert set(calls.attempts) == {1}


async def test_a_pause_of_a_handler_holds_all_its_types_and_no_other(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    async with _consuming(outbox, router) as app:
        pause = _pause(outbox_db, handler="post")
        await _until_known(app)
        for entity_type in ("letter", "parcel", "mail"):
            _publish(outbox_db, entity_type)
        await _until(lambda: len(calls.seqs["mail"]) == 10, "the other handler's are handled")
        assert (_fresh(outbox_db, "letter"), _fresh(outbox_db, "parcel")) == (10, 10)
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "all are handled")
    assert calls.in_order


async def test_a_paused_key_waits_alone_and_keeps_its_order(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    async with _consuming(outbox, router) as app:
        pause = _pause(outbox_db, "mail", entity_id="1")
        await _until_known(app)
        _publish(outbox_db, "mail", 300, keys=3)
        await _until(lambda: len(calls.seqs["mail"]) == 200, "the other keys are handled")
        assert not calls.keys["mail", "1"]
        await _until(lambda: _fresh(outbox_db, "mail") == 100, "they are marked")
        _publish(outbox_db, "mail", 30, keys=3)
        await _until(lambda: len(calls.seqs["mail"]) == 220, "the other keys go on")
        assert not calls.keys["mail", "1"]
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "the key goes on")
    assert calls.in_order
    assert len(calls.keys["mail", "1"]) == 110


async def test_a_pause_of_everything_reads_nothing_and_the_consumer_stays_ready(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    async with _consuming(outbox, router) as app:
        pause = _pause(outbox_db)
        await _until_known(app)
        read = metric(app.metrics.registry, "cdc_fetch_duration_seconds_count")
        for entity_type in ("mail", "invoice", "letter"):
            _publish(outbox_db, entity_type)
        await _polls(app)
        assert not calls.attempts
        assert metric(app.metrics.registry, "cdc_fetch_duration_seconds_count") == read
        assert all(check.ok for check in [*app.readiness(), *app.liveness()])
        assert app.status.consumer.owned_shards == 64
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "all are handled")
    assert calls.in_order


@pytest.mark.parametrize(
    "target", [{}, {"entity_type": "mail"}, {"handler": "send"}, {"entity_type": "mail", "entity_id": "1"}]
)
async def test_a_consumer_that_starts_meanwhile_starts_nothing_of_it(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls, target: dict[str, Any]
) -> None:
    outbox_db.execute("SELECT publish_change('mail', '1', 'INSERT', '{}') FROM generate_series(1, 10)")
    pause = _pause(outbox_db, **target)
    async with _consuming(outbox, router) as app:
        await _until_known(app)
        _publish(outbox_db, "invoice")
        if target:
            await _until(lambda: len(calls.seqs["invoice"]) == 10, "others are handled")
        assert not calls.seqs["mail"]
        assert _fresh(outbox_db, "mail") == 10
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "all are handled")
    assert calls.in_order


@pytest.mark.parametrize("entity_id", [None, "1"])
async def test_waiting_changes_of_what_is_paused_are_not_tried(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls, entity_id: str | None
) -> None:
    calls.fails = True
    async with _consuming(outbox, router, max_attempts=1_000, backoff_base=0.05, backoff_cap=0.1) as app:
        _publish(outbox_db, "mail", 3, keys=1)
        outbox_db.execute("SELECT publish_change('mail', '1', 'INSERT', '{}')")
        await _until(lambda: len(calls.attempts) > 5, "they fail and are tried again")
        pause = _pause(outbox_db, "mail", entity_id=entity_id)
        await _until_known(app)
        key = ("mail", "1")
        await _until(lambda: app.status.consumer.running == 0 or entity_id, "what ran has ended")
        await _polls(app)
        tried = len(calls.keys[key])
        _publish(outbox_db, "invoice")
        await _polls(app)
        assert len(calls.keys[key]) == tried
        calls.fails = False
        await _until(lambda: states(outbox_db).get("processed", 0) >= 3, "others are handled")
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "all are handled")


async def test_what_runs_ends_as_usual_and_what_waits_for_a_worker_goes_back(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    calls.gate.clear()
    async with _consuming(outbox, router) as app:
        _publish(outbox_db, "mail", 400, keys=200)
        await _until(lambda: len(calls.attempts) >= 3, "some run")
        pause = _pause(outbox_db, "mail")
        await _until_known(app)
        begun = len(calls.attempts)
        calls.gate.set()
        await _until(lambda: states(outbox_db).get("processed") == begun, "these end as usual")
        assert app.status.consumer.queued == 0
        _publish(outbox_db, "parcel", 300, keys=7)
        await _until(lambda: len(calls.seqs["parcel"]) == 300, "others have room")
        assert len(calls.seqs["mail"]) == begun
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "all are handled")
    assert calls.in_order
    assert set(calls.attempts) == {1}


async def test_a_pause_for_a_time_ends_by_itself(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    _pause(outbox_db, "mail", for_s=3)
    async with _consuming(outbox, router) as app:
        _publish(outbox_db, "mail")
        await _until(lambda: settled(outbox_db), "all are handled")
        [(late,)] = outbox_db.execute(
            "SELECT (SELECT min(processed_at) FROM entity_changes) >= (SELECT until FROM cdc_controls)"
        ).fetchall()
        assert late
        assert not app.status.consumer.pauses
        assert Controls("public").all(outbox_db) == []


async def test_a_pause_holds_for_all_consumers(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    async with _consuming(outbox, router) as first, _consuming(outbox, router) as second:
        await _until(lambda: second.status.consumer.owned_shards >= 30, "they share the shards")
        pause = _pause(outbox_db, "mail")
        await _until_known(first)
        await _until_known(second)
        _publish(outbox_db, "mail", 200, keys=100)
        _publish(outbox_db, "invoice", 50, keys=25)
        await _until(lambda: len(calls.seqs["invoice"]) == 50, "others are handled")
        assert _fresh(outbox_db, "mail") == 200
        _resume(outbox_db, pause)
        await _until(lambda: settled(outbox_db), "all are handled")
    assert calls.in_order


async def test_pauses_overlap_and_each_is_ended_alone(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    async with _consuming(outbox, router) as app:
        of_key, of_type = _pause(outbox_db, "mail", entity_id="1"), _pause(outbox_db, "mail")
        await _until_known(app, 2)
        _publish(outbox_db, "mail", 30)
        _resume(outbox_db, of_type)
        await _until(lambda: len(calls.seqs["mail"]) == 20, "the other keys go on")
        assert not calls.keys["mail", "1"]
        _resume(outbox_db, of_key)
        await _until(lambda: settled(outbox_db), "all are handled")
    assert calls.in_order


async def test_pauses_of_other_subscriptions_are_nothing_to_the_default_one(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    _pause(outbox_db, "mail", subscription="search")
    async with _consuming(outbox, router):
        _publish(outbox_db, "mail")
        await _until(lambda: settled(outbox_db), "all are handled")


async def test_a_subscription_heeds_its_own_pauses_and_those_of_all(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls
) -> None:
    done(outbox, "subscription", "create", "search")
    everywhere, here, _ = (
        _pause(outbox_db, "mail"),
        _pause(outbox_db, "letter", subscription="search"),
        _pause(outbox_db, "invoice", subscription="default"),
    )
    async with _consuming(outbox, router, subscription="search") as app:
        await _until_known(app, 2)
        for entity_type in ("mail", "letter", "invoice"):
            _publish(outbox_db, entity_type)
        await _until(lambda: len(calls.seqs["invoice"]) == 10, "what is paused elsewhere is handled")
        assert not calls.seqs["mail"]
        assert not calls.seqs["letter"]
        _resume(outbox_db, everywhere)
        _resume(outbox_db, here)
        await _until(lambda: len(calls.seqs["mail"]) == len(calls.seqs["letter"]) == 10, "all are handled")
    assert calls.in_order


_OF_MAIL: list[dict[str, Any]] = [{}, {"entity_type": "mail"}, {"entity_type": "mail", "entity_id": "1"}]


@pytest.mark.parametrize(
    "target", [{**target, "subscription": name} for name in ("default", "search") for target in _OF_MAIL]
)
async def test_what_is_paused_is_no_backlog_of_its_subscription(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls, target: dict[str, Any]
) -> None:
    done(outbox, "subscription", "create", "search")
    calls.fails = True
    settings = {
        "subscription": target["subscription"],
        "max_attempts": 1_000,
        "backoff_base": 0.01,
        "backoff_cap": 0.01,
    }
    async with _consuming(outbox, router, **settings) as app:

        def old_s() -> float:
            app.components.poller.poll_now()
            return metric(app.metrics.registry, "cdc_outbox_oldest_ready_age_seconds")

        outbox_db.execute("SELECT publish_change('mail', '1', 'INSERT', '{}') FROM generate_series(1, 3)")
        await _until(lambda: calls.attempts, "one fails")
        pause = _pause(outbox_db, **target)
        await _until_known(app)
        await _until(lambda: app.status.consumer.running == 0, "what ran has ended")
        outbox_db.execute("UPDATE entity_changes SET changed_at = now() - interval '1 hour'")
        outbox_db.execute(
            "UPDATE cdc_subscription_changes SET next_attempt_at = now() - interval '1 hour'"
            " WHERE next_attempt_at > now()"
        )
        await _until(lambda: old_s() == 0, "nothing could run")
        _resume(outbox_db, pause)
        await _until_known(app, 0)
        await _until(lambda: old_s() > 0 or len(calls.attempts) > 3, "it could run")


async def test_an_outbox_without_the_table_or_the_right_is_consumed_all_the_same(
    outbox: str, outbox_db: psycopg.Connection, router: Router, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    outbox_db.execute("DROP TABLE cdc_controls")
    async with _consuming(outbox, router):
        _publish(outbox_db, "mail")
        await _until(lambda: settled(outbox_db), "all are handled")
    assert "cdc db upgrade" in caplog.text
