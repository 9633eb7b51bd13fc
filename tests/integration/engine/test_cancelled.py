"""Whoever cancels the task that a handler runs in, or takes a cancellation back: each change has an outcome."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest

import cdc
from cdc.core.router import Router
from cdc.engine.dispatcher import OtherTasks
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled

_ATTEMPTS = 3
_FEW: dict[str, Any] = {
    "threads": 2, "concurrency": 4, "transactions": 2, "max_attempts": _ATTEMPTS,
    "backoff_base": 0.01, "backoff_cap": 0.02,
}  # fmt: skip


def _me() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _returns() -> None:
    _me().cancel()


async def _waits() -> None:
    _me().cancel()
    await asyncio.Event().wait()


async def _catches() -> None:
    _me().cancel()
    try:
        await OtherTasks()
    except asyncio.CancelledError:
        return


async def _fails() -> None:
    _me().cancel()
    raise ValueError


async def _twice() -> None:
    _me().cancel()
    try:
        await OtherTasks()
    finally:
        _me().cancel()


async def _takes_back() -> None:
    _me().cancel()
    _me().uncancel()
    await OtherTasks()


async def _takes_back_what_was_not() -> None:
    for _ in range(3):
        _me().uncancel()


async def _from_a_child() -> None:
    parent = _me()

    async def child() -> None:
        parent.cancel()

    children = [asyncio.create_task(child())]
    await OtherTasks()
    await asyncio.gather(*children)
    await OtherTasks()


async def _from_a_group() -> None:
    parent = _me()

    async def child() -> None:
        parent.cancel()
        await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(child())
        group.create_task(asyncio.Event().wait())


async def _group_fails() -> None:
    async def child() -> None:
        raise ValueError

    async with asyncio.TaskGroup() as group:
        group.create_task(child())
        group.create_task(asyncio.Event().wait())


async def _times_out() -> None:
    async with asyncio.timeout(0.01):
        _me().cancel()
        await asyncio.Event().wait()


async def _cancelled_child() -> None:
    child = asyncio.create_task(asyncio.Event().wait())
    child.cancel()
    await child


async def _overruns() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        _me().cancel()


async def _overruns_and_takes_back() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        _me().uncancel()


async def _raises() -> None:
    raise asyncio.CancelledError


async def _is_cancelled_later() -> None:
    parent = _me()

    asyncio.get_running_loop().call_later(0.01, parent.cancel)


_WAYS: dict[str, Callable[[], Awaitable[None]]] = {
    "returns": _returns,
    "waits": _waits,
    "catches": _catches,
    "fails": _fails,
    "twice": _twice,
    "takes back": _takes_back,
    "takes back what was not": _takes_back_what_was_not,
    "from a child": _from_a_child,
    "from a group": _from_a_group,
    "group fails": _group_fails,
    "times out": _times_out,
    "cancelled child": _cancelled_child,
    "overruns": _overruns,
    "overruns and takes back": _overruns_and_takes_back,
    "raises": _raises,
}
_ENDLESS = {"overruns", "overruns and takes back"}
"""Without a time limit."""
_PROCESSED = {"returns", "catches", "takes back what was not"}


Call = Callable[[cdc.Change], Awaitable[None]]


def _plain(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", timeout=limit)
    async def handle(change: cdc.Change) -> None:
        await call(change)


def _batch(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", batch=5, timeout=limit)
    async def handle(changes: list[cdc.Change]) -> None:
        for change in changes:
            await call(change)


def _transactional(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", group=1, timeout=limit)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT 1")
        await call(change)


def _group(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", group=10, timeout=limit)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await call(change)


def _transactional_batch(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", batch=5, timeout=limit)
    async def handle(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        for change in changes:
            await call(change)


def _thread(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", timeout=limit)
    def handle(change: cdc.Change) -> None:
        asyncio.run(call(change))  # type: ignore[arg-type]  # a coroutine, here


def _transactional_thread(router: Router, call: Call, limit: float | None) -> None:
    @router.on("x", timeout=limit)
    def handle(change: cdc.Change, connection: psycopg.Connection) -> None:
        asyncio.run(call(change))  # type: ignore[arg-type]  # a coroutine, here


_THREADS = (_thread, _transactional_thread)
_KINDS = [_plain, _batch, _transactional, _group, _transactional_batch, *_THREADS]


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("declare", _KINDS)
async def test_a_handler_that_cancels_its_own_task_has_an_outcome_and_ends_nothing_else(
    declare: Callable[[Router, Call, float | None], None],
    limit: float | None,
    outbox: str,
    outbox_db: psycopg.Connection,
) -> None:
    router, calls = Router(), Counter[str]()

    async def call(change: cdc.Change) -> None:
        calls[change.entity_id] += 1
        way, _, _ = change.entity_id.partition(" #")
        if way in _WAYS:
            await _WAYS[way]()

    declare(router, call, limit)
    ways = [way for way in _WAYS if not (way in _ENDLESS and (limit is None or declare in _THREADS))]
    publish = "SELECT publish_change('x', w || ' #' || n) FROM unnest(%s::text[]) w, generate_series(1, 2) n"
    outbox_db.execute(publish, [[way for way in ways if way not in _ENDLESS]])
    outbox_db.execute("SELECT publish_change('x', 'fine #' || n) FROM generate_series(1, 3) n")

    async def all_settled() -> bool:
        return settled(outbox_db)

    async with consuming(outbox, router, **_FEW) as app:
        await eventually_async(all_settled, within_s=100, what="every change processed or dead")
        # A batch that takes too long costs each of its changes an attempt: these run by themselves.
        outbox_db.execute(publish, [[way for way in ways if way in _ENDLESS]])
        await eventually_async(all_settled, within_s=100, what="every change processed or dead")
        outbox_db.execute("SELECT publish_change('x', 'fine #later')")
        await eventually_async(all_settled, within_s=100, what="every change processed or dead")
        assert metric(app.metrics.registry, "cdc_task_ends_total") == 0
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0
        assert metric(app.metrics.registry, "cdc_changes_handled_total", outcome="interrupted") == 0
    found = outbox_db.execute("SELECT split_part(entity_id, ' #', 1), processed FROM entity_changes").fetchall()
    ended = {way: {processed for of, processed in found if of == way} for way in (*ways, "fine")}
    assert ended["fine"] == {True}
    if declare not in _THREADS:
        assert {way for way in ways if ended[way] == {True}} >= _PROCESSED
    assert ended["raises"] == {False}
    assert max(calls.values()) <= 2 * _ATTEMPTS + 1  # in a batch or group, alone after it, and once beside another


@pytest.mark.parametrize("declare", _KINDS)
async def test_a_cancellation_that_comes_after_the_call_ends_no_task_and_leaves_nothing_without_an_outcome(
    declare: Callable[[Router, Call, float | None], None], outbox: str, outbox_db: psycopg.Connection
) -> None:
    """It may hit the call of another change by then, which costs that one an attempt."""
    router = Router()

    async def call(change: cdc.Change) -> None:
        await _is_cancelled_later()

    declare(router, call, None)
    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 30) n")

    async def all_settled() -> bool:
        return settled(outbox_db)

    async with consuming(outbox, router, **_FEW) as app:
        await eventually_async(all_settled, within_s=100, what="every change processed or dead")
        assert metric(app.metrics.registry, "cdc_task_ends_total") == 0
        assert metric(app.metrics.registry, "cdc_interruptions_total") == 0


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_hook_that_cancels_its_own_task_ends_no_other_hook(
    in_thread: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, told = Router(), list[str]()

    @router.on("x")
    async def handle(change: cdc.Change) -> None: ...

    @router.on_processed
    async def hook(change: cdc.Change) -> None:
        told.append(change.entity_id)
        if change.entity_id in _WAYS:
            await _WAYS[change.entity_id]()

    @router.on_processed
    def hook_in_thread(change: cdc.Change) -> None:
        if in_thread and change.entity_id in _WAYS:
            raise asyncio.CancelledError

    ways = [way for way in _WAYS if way not in _ENDLESS]
    outbox_db.execute("SELECT publish_change('x', w) FROM unnest(%s::text[]) w", [[*ways, "fine"]])

    async def all_told() -> bool:
        return sorted(told) == sorted([*ways, "fine"])

    async with consuming(outbox, router, **_FEW) as app:
        await eventually_async(all_told)
        assert metric(app.metrics.registry, "cdc_task_ends_total") == 0
