"""One entity type, handler or key that hangs, fails or has a backlog does not keep the others waiting."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.router import Router
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric

_BOUNDED: dict[str, Any] = {
    "concurrency": 20,
    "threads": 5,
    "transactions": 3,
    "window": 500,
    "drain_time": 5,
    "timeout": 0,
}
"""Small, so that there is always more to do than there is room for."""


class Gate:
    """What hangs in front of it goes on when it is opened. For handlers of either kind."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._opened = asyncio.Event()

    def open(self) -> None:
        self._open.set()
        self._opened.set()

    async def pass_(self) -> None:
        await self._opened.wait()

    def pass_in_thread(self) -> None:
        self._open.wait()


class Seen:
    """The numbers of the changes that were handled, by key, and which overtook another."""

    def __init__(self) -> None:
        self.seqs: dict[tuple[str, str], list[int]] = defaultdict(list)

    def note(self, change: cdc.Change) -> None:
        self.seqs[change.key].append(change.seq)

    def count(self, entity_type: str) -> int:
        return sum(len(seqs) for key, seqs in self.seqs.items() if key[0] == entity_type)

    @property
    def in_order(self) -> bool:
        """Of each key, and each once."""
        return all(seqs == sorted(set(seqs)) for seqs in self.seqs.values())


def _publish(db: psycopg.Connection, entity_type: str, changes: int, *, keys: int) -> None:
    db.execute(
        "SELECT publish_change(%s, (n %% %s)::text, 'INSERT', '{}') FROM generate_series(1, %s) AS n",
        [entity_type, keys, changes],
    )


def _left(db: psycopg.Connection, entity_type: str) -> int:
    [(left,)] = db.execute(
        "SELECT count(*) FROM entity_changes WHERE entity_type = %s AND NOT processed", [entity_type]
    ).fetchall()
    return int(left)


async def _until_done(db: psycopg.Connection, *types: str, within_s: float = 60.0) -> None:
    async def check() -> bool:
        return not any(_left(db, entity_type) for entity_type in types)

    await eventually_async(check, within_s=within_s, what=f"every change of {', '.join(types)} is processed")


async def _until(condition: Callable[[], bool], what: str) -> None:
    async def check() -> bool:
        return condition()

    await eventually_async(check, within_s=60.0, what=what)


def _hangs(router: Router, entity_type: str, kind: str, gate: Gate, seen: Seen) -> None:
    """A handler that hangs until the gate is opened."""
    if kind == "async":

        @router.on(entity_type)
        async def on_loop(change: cdc.Change) -> None:
            await gate.pass_()
            seen.note(change)

    elif kind == "sync":

        @router.on(entity_type)
        def in_thread(change: cdc.Change) -> None:
            gate.pass_in_thread()
            seen.note(change)

    elif kind == "transactional":

        @router.on(entity_type)
        async def in_transaction(change: cdc.Change, connection: Any) -> None:
            await gate.pass_()
            seen.note(change)

    elif kind == "transactional sync":

        @router.on(entity_type)
        def in_thread_and_transaction(change: cdc.Change, connection: Any) -> None:
            gate.pass_in_thread()
            seen.note(change)

    else:

        @router.on(entity_type, batch=50, linger=0.01)
        async def in_batches(changes: list[cdc.Change]) -> None:
            await gate.pass_()
            for change in changes:
                seen.note(change)


def _quick(router: Router, entity_type: str, kind: str, seen: Seen) -> None:
    """A handler of that kind that returns at once."""
    opened = Gate()
    opened.open()
    _hangs(router, entity_type, kind, opened, seen)


_KINDS = ["async", "sync", "transactional", "transactional sync", "batch"]


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "sweeping"])
@pytest.mark.parametrize("kind", _KINDS)
async def test_a_type_whose_handler_hangs_does_not_keep_another_waiting(
    outbox: str, outbox_db: psycopg.Connection, kind: str, stream: bool
) -> None:
    router, gate, seen = Router(), Gate(), Seen()
    _hangs(router, "slow", kind, gate, seen)
    _quick(router, "quick", kind, seen)
    _publish(outbox_db, "quick", 10, keys=5)
    _publish(outbox_db, "slow", 2_500, keys=1_000)
    _publish(outbox_db, "quick", 10, keys=5)
    _publish(outbox_db, "slow", 2_500, keys=1_000)
    _publish(outbox_db, "quick", 10, keys=5)
    async with consuming(outbox, router, stream=stream, **_BOUNDED):
        await _until_done(outbox_db, "quick")
        for _ in range(5):
            _publish(outbox_db, "slow", 100, keys=100)
            _publish(outbox_db, "quick", 10, keys=10)
            await _until_done(outbox_db, "quick")
        assert seen.count("slow") == 0
        gate.open()
        await _until_done(outbox_db, "slow")
    assert (seen.count("quick"), seen.count("slow")) == (80, 5_500)
    assert seen.in_order


async def test_three_types_that_hang_leave_room_for_a_fourth(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, gate, seen = Router(), Gate(), Seen()
    for name, kind in (("a", "async"), ("b", "sync"), ("c", "transactional")):
        _hangs(router, name, kind, gate, seen)
        _publish(outbox_db, name, 2_000, keys=500)
    _quick(router, "quick", "sync", seen)
    _publish(outbox_db, "quick", 50, keys=10)
    async with consuming(outbox, router, **_BOUNDED):
        await _until_done(outbox_db, "quick")
        _publish(outbox_db, "quick", 50, keys=10)
        await _until_done(outbox_db, "quick")
        gate.open()
        await _until_done(outbox_db, "a", "b", "c")
    assert seen.in_order


async def test_a_backlog_of_more_keys_than_memory_has_room_for_blocks_no_other_key(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Each key has a change that waits for its retry and one behind it, of which something has to be remembered."""
    router, seen, failing = Router(), Seen(), True

    @router.on("slow", max_attempts=1_000)
    async def handle(change: cdc.Change) -> None:
        if failing:
            raise cdc.Retry(after=2)
        seen.note(change)

    _quick(router, "quick", "async", seen)
    _publish(outbox_db, "slow", 24_000, keys=12_000)
    _publish(outbox_db, "quick", 200, keys=100)
    async with consuming(outbox, router, timeout=0):
        await _until_done(outbox_db, "quick")
        _publish(outbox_db, "quick", 200, keys=100)
        await _until_done(outbox_db, "quick")
        failing = False
        await _until_done(outbox_db, "slow", within_s=100)
    assert seen.count("slow") == 24_000
    assert seen.in_order


async def test_thirty_thousand_keys_of_a_type_that_hangs_are_read_over(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, gate, seen = Router(), Gate(), Seen()
    _hangs(router, "slow", "async", gate, seen)
    _quick(router, "quick", "async", seen)
    _publish(outbox_db, "slow", 30_000, keys=30_000)
    _publish(outbox_db, "quick", 200, keys=100)
    async with consuming(outbox, router, timeout=0) as app:
        await _until_done(outbox_db, "quick")
        await _until(lambda: metric(app.metrics.registry, "cdc_window_throttled_types") == 1, "a type has a backlog")
        gate.open()
        await _until_done(outbox_db, "slow", within_s=100)
        await _until(lambda: metric(app.metrics.registry, "cdc_window_throttled_types") == 0, "no type has a backlog")
    assert seen.count("slow") == 30_000
    assert seen.in_order


async def test_thousands_of_retries_that_are_due_do_not_stand_before_those_of_another_type(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, gate, seen = Router(), Gate(), Seen()
    _hangs(router, "slow", "async", gate, seen)

    @router.on("quick")
    async def handle(change: cdc.Change) -> None:
        if change.attempt == 2:
            raise cdc.Retry(after=0.1)
        seen.note(change)

    _publish(outbox_db, "slow", 5_000, keys=5_000)
    _publish(outbox_db, "quick", 50, keys=50)
    outbox_db.execute(
        "UPDATE entity_changes SET error_count = 1, next_attempt_at ="
        " now() - CASE entity_type WHEN 'slow' THEN interval '1 hour' ELSE interval '1 second' END"
    )
    async with consuming(outbox, router, **_BOUNDED):
        await _until_done(outbox_db, "quick")
        gate.open()
        await _until_done(outbox_db, "slow")
    assert seen.count("slow") == 5_000


async def test_a_key_with_fifty_thousand_changes_that_hangs_keeps_only_itself_waiting(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, gate, seen = Router(), Gate(), Seen()

    @router.on("a")
    async def handle(change: cdc.Change) -> None:
        if change.entity_id == "0":
            await gate.pass_()
        seen.note(change)

    _publish(outbox_db, "a", 50_000, keys=1)
    for key in range(1, 200):
        outbox_db.execute("SELECT publish_change('a', %s, 'INSERT', '{}')", [str(key)])
    async with consuming(outbox, router, timeout=0):
        await _until(lambda: seen.count("a") == 199, "the other keys are handled")
        gate.open()
        await _until_done(outbox_db, "a", within_s=200)
    assert len(seen.seqs["a", "0"]) == 50_000
    assert seen.in_order


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_handler_that_hangs_leaves_workers_to_another_of_the_same_type(
    outbox: str, outbox_db: psycopg.Connection, kind: str
) -> None:
    router, gate, seen = Router(), Gate(), Seen()

    @router.on("a", "DELETE")
    def quick(change: cdc.Change) -> None:
        seen.note(change)

    if kind == "async":

        @router.on("a", "INSERT")
        async def on_loop(change: cdc.Change) -> None:
            await gate.pass_()

    else:

        @router.on("a", "INSERT")
        def in_thread(change: cdc.Change) -> None:
            gate.pass_in_thread()

    _publish(outbox_db, "a", 200, keys=200)
    outbox_db.execute(
        "SELECT publish_change('a', 'deleted ' || n, 'DELETE', NULL, '{}') FROM generate_series(1, 50) AS n"
    )
    async with consuming(outbox, router, **_BOUNDED):
        await _until(lambda: seen.count("a") == 50, "the deletions are handled")
        gate.open()
        await _until_done(outbox_db, "a")


async def test_where_there_is_one_type_only_it_may_use_everything(outbox: str, outbox_db: psycopg.Connection) -> None:
    router, gate, seen = Router(), Gate(), Seen()
    _hangs(router, "a", "async", gate, seen)
    _publish(outbox_db, "a", 100, keys=100)
    async with consuming(outbox, router, concurrency=20, window=50, timeout=0) as app:
        running = lambda: metric(app.metrics.registry, "cdc_window_changes", state="running")  # noqa: E731
        await _until(lambda: running() == 20, "as many run as may")
        gate.open()
        await _until_done(outbox_db, "a")
