"""What a handler needs is away: for a moment, for one key, and for ten minutes on a clock that can be moved."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

import cdc
from cdc import testing
from cdc.core.circuit_breaker import KEYS, PAUSE_MAX_S, BreakerState
from cdc.core.router import Router
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, states
from tests.handler_kinds import KINDS, handler

_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05, "max_attempts": 1}
_LONGEST_WAIT = "SELECT coalesce(max(next_attempt_at) < now() + '3 s', true) FROM entity_changes"


def _publish(db: psycopg.Connection, count: int, keys: int, entity_type: str = "x") -> None:
    db.execute(
        "SELECT publish_change(%s, 'k' || n %% %s, 'INSERT', jsonb_build_object('n', n))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, keys, count],
    )


async def _until(condition: Callable[[], Any], what: str = "") -> None:
    async def holds() -> bool:
        return bool(condition())

    await eventually_async(holds, what=what)


class Outside:
    """What handlers need. ``there`` says whether it is; ``calls`` and ``done`` have what they were called for."""

    def __init__(self) -> None:
        self.there = True
        self.calls = 0
        self.done: list[cdc.Change] = []

    def ask(self, changes: Sequence[cdc.Change]) -> None:
        self.calls += 1
        if not self.there:
            raise cdc.Unavailable(reason="nobody listens")
        self.done += changes

    def serve(self, router: Router, kind: str) -> None:
        """A handler of that kind for changes of x."""
        function = handler(kind, self.ask, "INSERT INTO effects VALUES (%s)")
        router.on("x", name="asks", batch=5 if "batch" in kind else None)(function)

    def in_order(self) -> bool:
        by_key: dict[str, list[int]] = defaultdict(list)
        for change in self.done:
            by_key[change.entity_id].append(change.seq)
        return all(seqs == sorted(set(seqs)) for seqs in by_key.values())


async def _called_after(outside: Outside, calls: int) -> None:
    await _until(lambda: outside.calls > calls, "one call finds out")


class Clock:
    """The event loop's, and with it what waits in the table: both can be moved forward together."""

    def __init__(self, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._db, self._ahead_s, self._time = db, 0.0, loop.time
        monkeypatch.setattr(loop, "time", self.now)

    def now(self) -> float:
        return self._time() + self._ahead_s

    def move(self, seconds: float) -> None:
        self._db.execute(
            "UPDATE entity_changes SET next_attempt_at = next_attempt_at - make_interval(secs => %s)"
            " WHERE next_attempt_at < 'infinity'",
            [seconds],
        )
        self._ahead_s += seconds


@pytest.mark.parametrize("kind", KINDS)
async def test_an_outage_of_ten_minutes_costs_no_attempt_and_no_order_and_is_over_within_seconds(
    kind: str,
    outbox: str,
    outbox_db: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "cdc.handlers")
    outbox_db.execute("CREATE TABLE effects (seq bigint)")
    router, outside, others = Router(), Outside(), list[int]()
    outside.serve(router, kind)

    @router.on("other")
    async def works(change: cdc.Change) -> None:
        others.append(change.seq)

    async with consuming(outbox, router, concurrency=10, window=60, transactions=3, max_attempts=1) as app:
        _publish(outbox_db, 40, 20)
        await _until(lambda: len(outside.done) == 40, "all is well at first")
        clock, handled = Clock(outbox_db, monkeypatch), outside.calls
        outside.there = False
        _publish(outbox_db, 300, 20)
        await _until(lambda: app.status.breakers["asks"].rests, "the handler rests")
        ended = clock.now() + 600.0
        while clock.now() < ended:
            before = outside.calls
            clock.move(10.0)
            await _called_after(outside, before)
        calls = outside.calls - handled
        assert calls < 600.0 / PAUSE_MAX_S + 40, "those that were under way, and one at a time"
        assert app.status.consumer.queued <= 60
        assert [str(check) for check in app.readiness() if check.name == "handler.asks"] != []
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="retried") == 0
        assert metric(app.metrics.registry, "cdc_handler_breaker", handler="asks", state="closed") == 0
        _publish(outbox_db, 20, 20, "other")
        await _until(lambda: len(others) == 20, "the other handler goes on")
        outside.there = True
        assert outbox_db.execute(_LONGEST_WAIT).fetchone() == (True,)
        clock.move(PAUSE_MAX_S)
        await _until(lambda: settled(outbox_db), "every change is processed")
        assert app.status.breakers["asks"].state is BreakerState.CLOSED
    assert states(outbox_db) == {"processed": 360}
    assert outbox_db.execute("SELECT sum(error_count) FROM entity_changes").fetchone() == (0,)
    assert {change.attempt for change in outside.done} == {1}
    assert outside.in_order()
    assert len(outside.done) == 340
    if "transactional" in kind:
        assert outbox_db.execute("SELECT count(*), count(DISTINCT seq) FROM effects").fetchone() == (340, 340)
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if line.startswith("handler asks rests: what it needs is away (Unav")]) == 1
    assert len([line for line in told if line.startswith("handler asks works again, after ")]) == 1
    assert "nobody listens" not in caplog.text, "the reason is the handler's words, which may quote the row"


@pytest.mark.parametrize("kind", KINDS)
async def test_of_one_key_it_is_that_keys_affair(kind: str, outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("CREATE TABLE effects (seq bigint)")
    router, outside, failed = Router(), Outside(), list[int]()
    outside.serve(router, kind)
    router.on_error(lambda change, _error: failed.append(change.seq))
    outside.there = False
    _publish(outbox_db, 2, 1)
    async with consuming(outbox, router, **_QUICK) as app:
        await _until(lambda: outside.calls >= 2 * KEYS)
        assert not any(breaker.rests for breaker in app.status.breakers.values())
        outside.there = True
        await _until(lambda: settled(outbox_db))
    assert [change.seq for change in outside.done] == [1, 2]
    assert outbox_db.execute(
        "SELECT processed, error_count, last_error FROM entity_changes WHERE seq = 1"
    ).fetchone() == (True, 0, "unavailable: nobody listens")
    assert failed == [], "no attempt has failed"


async def test_it_waits_as_long_as_the_handler_asks(outbox: str, outbox_db: psycopg.Connection) -> None:
    router = Router()

    @router.on("x")
    async def asks(change: cdc.Change) -> None:
        raise cdc.Unavailable(retry_after=1800)

    _publish(outbox_db, 2, 2)
    async with consuming(outbox, router, **_QUICK):
        await _until(lambda: states(outbox_db) == {"waiting": 2})
    waits = outbox_db.execute(
        "SELECT extract(epoch FROM next_attempt_at - clock_timestamp())::float8, error_count FROM entity_changes"
    ).fetchall()
    assert all(1700 < wait <= 1800 and failures == 0 for wait, failures in waits)


@pytest.mark.parametrize(
    "wrong",
    [
        -1,
        float("nan"),
        float("inf"),
        timedelta(seconds=-1),
        "5",
        True,
        b"5",
        [5],
        Decimal("NaN"),
        Decimal("sNaN"),
        10**400,
    ],
)
def test_a_time_that_is_none_is_refused_where_it_is_raised(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Unavailable\(retry_after=.*seconds or a timedelta, 0 or more"):
        cdc.Unavailable(retry_after=wrong)
    with pytest.raises(ValueError, match=r"Retry\(after=.*seconds or a timedelta, 0 or more"):
        cdc.Retry(after=wrong)


@pytest.mark.parametrize(
    ("given", "seconds"), [(0, 0), (2, 2), (1.5, 1.5), (timedelta(minutes=1), 60), (Decimal("0.5"), 0.5), (None, None)]
)
def test_a_time_is_a_number_of_seconds_or_a_timedelta(given: Any, seconds: float | None) -> None:
    assert (cdc.Unavailable(given).retry_after, cdc.Retry(given).after) == (seconds, seconds)


async def test_of_a_batch_single_changes_may_find_it_away(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, seen, away = Router(), list[int](), {2, 3}

    @router.on("x", batch=10)
    async def asks(changes: list[cdc.Change]) -> None:
        seen.extend(change.seq for change in changes if change.seq not in away)
        if failed := {change: cdc.Unavailable() for change in changes if change.seq in away}:
            away.clear()
            raise cdc.Failed(failed)

    _publish(outbox_db, 6, 6)
    async with consuming(outbox, router, **_QUICK):
        await _until(lambda: settled(outbox_db))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    assert states(outbox_db) == {"processed": 6}
    assert outbox_db.execute("SELECT sum(error_count) FROM entity_changes").fetchone() == (0,)


async def test_a_change_that_fails_while_others_find_it_away_has_an_attempt_less(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, outside = Router(), Outside()

    @router.on("x")
    async def asks(change: cdc.Change) -> None:
        if change.seq == 4:
            raise ValueError
        outside.ask([change])

    outside.there = False
    _publish(outbox_db, 8, 8)
    async with consuming(outbox, router, **_QUICK):
        await _until(lambda: outside.calls > 7)
        outside.there = True
        await _until(lambda: settled(outbox_db))
    assert states(outbox_db) == {"processed": 7, "dead": 1}
    failures = outbox_db.execute("SELECT seq, error_count FROM entity_changes WHERE error_count > 0").fetchall()
    assert failures == [(4, 1)]


async def test_what_waits_for_its_handler_at_a_stop_is_there_for_the_next_consumer(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, outside = Router(), Outside()
    outside.serve(router, "waits")
    outside.there = False
    _publish(outbox_db, 60, 30)
    async with consuming(outbox, router, **_QUICK) as app:
        await _until(lambda: any(breaker.rests for breaker in app.status.breakers.values()))
    assert states(outbox_db).get("processed") is None
    outside.there = True
    async with consuming(outbox, router, **_QUICK):
        await _until(lambda: settled(outbox_db))
    assert states(outbox_db) == {"processed": 60}
    assert outside.in_order()
    assert {(change.attempt, change.crashed) for change in outside.done} == {(1, False)}


async def test_a_drain_waits_for_what_is_away(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, calls = Router(), list[int]()

    @router.on("x")
    async def asks(change: cdc.Change) -> None:
        calls.append(change.seq)
        if len(calls) < 6:
            raise cdc.Unavailable

    _publish(outbox_db, 8, 8)
    drained = await testing.drain(outbox, router)
    assert (drained.processed, drained.retried, drained.dead) == (8, 0, 0)
