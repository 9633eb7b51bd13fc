"""A handler is not called more often than its limit says, by however many consumers, and nothing else waits for it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import cdc
from cdc.core.handler_permits import PUT_OFF_MAX
from cdc.engine import crash_guard
from cdc.postgres.limits import Leases
from tests.commands import answer, done, invoke
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import Process, consuming, settled, states

_SMALL: dict[str, Any] = {"window": 100, "concurrency": 10, "transactions": 2, "drain_time": 5}


def _publish(db: psycopg.Connection, entity_type: str, count: int, tenant: str = "a") -> None:
    db.execute(
        "SELECT publish_change(%s, %s || n, 'INSERT', jsonb_build_object('tenant', %s::text))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, tenant, tenant, count],
    )


def _is(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        return condition()

    return ask


def _most_in_any(seconds: float, moments: list[float]) -> int:
    most, window = 0, deque[float]()
    for moment in sorted(moments):
        window.append(moment)
        while window[0] <= moment - seconds:
            window.popleft()
        most = max(most, len(window))
    return most


def test_three_processes_of_which_one_is_killed_never_exceed_a_rate(
    outbox: str,
    outbox_db: psycopg.Connection,
    tmp_path: Path,
    processes: list[Process],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("LIMITED_CALLS", str(calls))
    _publish(outbox_db, "mail", 400)

    def made() -> list[tuple[float, str]]:
        return [(float(at), pid) for at, pid in (line.split() for line in calls.read_text().splitlines())]

    processes += [
        Process(outbox, tmp_path / f"log{n}", handlers="tests.handlers_limited:router", slot_mode="temporary")
        for n in range(3)
    ]
    eventually(lambda: len({pid for _, pid in made()}) == 3 and len(made()) > 60, what="all three make calls")
    processes[1].kill()
    eventually(lambda: settled(outbox_db), what="every change is handled", within_s=90)
    moments = [at for at, _ in made()]
    for seconds in (0.5, 1.0, 2.0, 10.0):
        assert _most_in_any(seconds, moments) <= 20 + 20 * seconds
    assert _most_in_any(0.99, moments) <= 20
    assert states(outbox_db) == {"processed": 400}


async def test_what_is_over_a_limit_is_no_attempt_and_in_nobodys_way(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: Counter[str] = Counter()
    router = cdc.Router()

    @router.on("mail", limit=cdc.Limit(rate="2/h"))
    async def send(change: cdc.Change) -> None:
        calls[change.entity_type] += 1

    @router.on("invoice")
    async def book(change: cdc.Change) -> None:
        calls[change.entity_type] += 1

    _publish(outbox_db, "mail", PUT_OFF_MAX + 500)
    async with consuming(outbox, router, **_SMALL) as app:
        await eventually_async(_is(lambda: calls["mail"] == 2), what="as many calls as the limit allows")
        _publish(outbox_db, "invoice", 500)
        await eventually_async(_is(lambda: calls["invoice"] == 500), what="the other handler's changes are handled")
        assert app.status.consumer.queued <= _SMALL["window"]
    assert calls["mail"] == 2
    [(fresh, failed)] = outbox_db.execute(
        "SELECT count(*) FILTER (WHERE NOT processed AND next_attempt_at IS NULL), sum(error_count)"
        " FROM entity_changes WHERE entity_type = 'mail'"
    ).fetchall()
    assert (fresh, failed) == (PUT_OFF_MAX + 498, 0)


async def test_a_key_of_a_limit_does_not_wait_behind_another_one(outbox: str, outbox_db: psycopg.Connection) -> None:
    calls: Counter[str] = Counter()
    router = cdc.Router()

    @router.on("mail", limit=cdc.Limit(rate="3/h", by=lambda change: change.new["tenant"]))
    async def send(change: cdc.Change) -> None:
        calls[change.new["tenant"]] += 1

    _publish(outbox_db, "mail", 500, "a")
    _publish(outbox_db, "mail", 10, "b")
    _publish(outbox_db, "mail", 1, "c")
    async with consuming(outbox, router, **_SMALL):
        expected = {"a": 3, "b": 3, "c": 1}
        await eventually_async(_is(lambda: calls == expected), what="each tenant has what it may")
    assert calls == expected


async def test_no_more_calls_run_at_once_than_may_and_all_are_made_in_order(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    running, most, order = 0, 0, dict[str, list[int]]()
    router = cdc.Router()

    @router.on("mail", limit=cdc.Limit(at_once=2))
    async def send(change: cdc.Change) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.setdefault(change.entity_id, []).append(change.seq)
        await asyncio.wait_for(asyncio.shield(_soon()), 5)
        running -= 1

    async def _soon() -> None:
        for _ in range(5):
            await asyncio.to_thread(lambda: None)

    for _ in range(3):
        _publish(outbox_db, "mail", 100)
    async with consuming(outbox, router, **_SMALL):
        await eventually_async(_is(lambda: settled(outbox_db)), what="all are handled", within_s=30)
    assert most == 2
    assert all(seqs == sorted(seqs) and len(seqs) == 3 for seqs in order.values())


@pytest.mark.parametrize("limit", [cdc.Limit(rate="5/s"), cdc.Limit(at_once=2)], ids=str)
async def test_what_is_called_alone_after_a_crash_does_not_wait_for_what_waits_for_it(
    limit: cdc.Limit, outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until those that may have crashed it are done, others of their shards are held, and have taken their calls."""
    monkeypatch.setattr(crash_guard, "GRACE_S", 0.0)
    attempts = dict[int, int]()
    router = cdc.Router()

    @router.on("mail", limit=limit)
    async def send(change: cdc.Change) -> None:
        attempts[change.seq] = change.attempt

    _publish(outbox_db, "mail", 30)
    dead = uuid4()
    outbox_db.execute("INSERT INTO cdc_shards (shard, owner) SELECT n, %s FROM generate_series(0, 63) AS n", [dead])
    outbox_db.execute("UPDATE entity_changes SET started_by = %s WHERE seq %% 10 = 0", [dead])
    async with consuming(outbox, router, **_SMALL):
        await eventually_async(_is(lambda: settled(outbox_db)), what="every change is handled")
    assert attempts == {seq: 2 if seq % 10 == 0 else 1 for seq in range(1, 31)}


async def test_an_operator_sets_a_limit_while_it_runs_and_clears_it_again(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    calls: list[int] = []
    router = cdc.Router()

    @router.on("mail", name="send")
    async def send(change: cdc.Change) -> None:
        calls.append(change.seq)

    limit = ["limits", "set", "send", "--rate", "5/h", "--because", "the provider asks for it"]
    async with consuming(outbox, router, **_SMALL) as app:
        await asyncio.to_thread(done, outbox, *limit)
        await eventually_async(_is(lambda: bool(app.status.consumer.limits)), what="the consumer knows of it")
        _publish(outbox_db, "mail", 200)
        await eventually_async(_is(lambda: len(calls) == 5), what="as many as it allows")
        listed = answer(await asyncio.to_thread(invoke, outbox, "controls", "--json"))
        assert [(each["handler"], each["rate"], each["because"]) for each in listed["limits"]] == [
            ("send", "5/h", "the provider asks for it")
        ]
        assert listed["controls"] == []
        assert len(calls) == 5
        await asyncio.to_thread(done, outbox, "limits", "clear", "send")
        await eventually_async(_is(lambda: settled(outbox_db)), what="all are handled without it")
    assert sorted(calls) == sorted(set(calls))


async def test_leases_cost_a_statement_a_second_and_nothing_without_a_limit(
    outbox: str, outbox_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases: list[float] = []
    lease = Leases.lease

    async def counted(*arguments: Any, **named: Any) -> Any:
        leases.append(time.monotonic())
        return await lease(*arguments, **named)

    monkeypatch.setattr(Leases, "lease", counted)
    for limit in (None, cdc.Limit(rate="100/s", at_once=10)):
        router = cdc.Router()
        router.on("mail", limit=limit, name="send")(lambda change: None)
        _publish(outbox_db, "mail", 300)
        async with consuming(outbox, router, **_SMALL):
            await eventually_async(_is(lambda: settled(outbox_db)), what="all are handled", within_s=30)
            renewals = [later - earlier for earlier, later in itertools.pairwise(leases)]
            assert bool(leases) == bool(limit)
            assert all(seconds >= 0.9 for seconds in renewals)
