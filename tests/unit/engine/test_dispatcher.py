"""The tasks that run handlers: as many as there is work for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cdc.core.admission import Row
from cdc.core.handler_permits import HandlerPermits
from cdc.core.latest import Latest
from cdc.core.limits import Limit
from cdc.core.lost_transactions import LOSSES_MAX, LostCalls
from cdc.core.model import Change, Dead, Outcome, Processed, Suspicion
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import Requirements, Run
from cdc.core.router import Handler, Router
from cdc.core.shard_ownership import Acquired
from cdc.engine.coalescing import Coalescing
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.dispatcher import Dispatcher, OtherTasks
from cdc.engine.executor import Executor
from cdc.postgres.outbox import Store
from cdc.runtime.cancelling import cancel
from tests.changes import change, row
from tests.eventually import eventually_async
from tests.settling import SettlingScheduler


class _Waiting(Executor):
    """Calls no handler: each call waits for ``go``. Its methods have the signatures of the real ones."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.started: list[int] = []
        self.lost = LostCalls()

    def after_crash(self, handler: Handler | None, change: Change, suspicion: Suspicion) -> None:
        return None

    def interrupted(self, run: Run) -> None: ...

    def in_thread(self, change: Change) -> bool:
        return False

    def run_inline(
        self, handler: Handler | None, changes: deque[Change], task: object
    ) -> tuple[list[Settlement], None]:
        return [], None

    async def run(
        self, handler: Handler | None, changes: Sequence[Change], latest: Latest | None = None
    ) -> dict[Change, Outcome]:
        self.started += [change.seq for change in changes]
        await self.go.wait()
        return dict.fromkeys(changes, Processed())


def _dispatcher(
    scheduler: SettlingScheduler, executor: _Waiting, concurrency: int, **named: Mapping[str, HandlerPermits]
) -> Dispatcher:
    def finished(settled: Sequence[Settlement]) -> None:
        scheduler.finished(settled)

    return Dispatcher(
        scheduler, executor, concurrency, connections=1, crash_guard=CrashGuard(Store("public"), 1),
        coalescing=Coalescing(Router(), Store("public")), put_off=lambda: None,
        finished=finished, reread=lambda: None, **named,
    )  # fmt: skip


async def _until(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await eventually_async(holds)


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_there_is_one_worker_for_each_change_however_often_they_are_handed_out() -> None:
    scheduler, executor = SettlingScheduler(100), _Waiting()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    scheduler.admit([row(1, "a"), row(2, "b")])
    for _ in range(3):  # after the read, at the end of the loop, after a settle
        dispatcher.dispatch()
    assert len(dispatcher) == 2
    await _until(lambda: executor.started == [1, 2])
    scheduler.admit([row(3, "c")])
    for _ in range(3):
        dispatcher.dispatch()
    assert len(dispatcher) == 3
    await _until(lambda: executor.started == [1, 2, 3])
    executor.go.set()
    await _until(lambda: len(dispatcher) == 0)


async def test_a_suspect_that_waits_for_a_limit_is_counted_among_what_could_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CrashGuard, "owner_may_be_alive", lambda _self, _change: False)
    router = Router()
    router.on("t", name="send", limit=Limit(rate="1/h"))(_handle)
    [handler] = set(router.handlers.values())
    assert handler.limit is not None
    no_lease = HandlerPermits("send", handler.limit, lambda: 0.0, lambda at: None, lambda: None)
    scheduler, executor = SettlingScheduler(100, needs=lambda c: Requirements(c.entity_type, handler)), _Waiting()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10, permits={"send": no_lease})
    scheduler.admit([Row(replace(change(1), crashed=True))])
    dispatcher.dispatch()
    await _until(lambda: scheduler.ready_queues.over_limit() == {("send", ""): 1})
    await dispatcher.drain(10.0)
    assert scheduler.ready_queues.over_limit() == {}
    assert executor.started == []


async def _handle(change: Change) -> None: ...


@pytest.mark.parametrize("blocked", [False, True])
async def test_what_lost_its_transaction_or_met_an_obstacle_waits_before_it_runs_again_and_others_do_not(
    blocked: bool,
) -> None:
    scheduler, executor = SettlingScheduler(100), _Waiting()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    rows = [row(1, "a"), row(2, "b")]
    executor.lost.transaction_lost([rows[0].change], blocked=blocked)
    scheduler.admit(rows)
    dispatcher.dispatch()
    await _until(lambda: executor.started == [2, 1])


async def test_a_worker_that_is_cut_off_before_it_began_makes_room_for_another() -> None:
    scheduler, executor = SettlingScheduler(100), _Waiting()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    scheduler.admit([row(1)])
    dispatcher.dispatch()
    [task] = _others()
    task.cancel()
    await _until(lambda: executor.started == [1])


@pytest.mark.parametrize("doubtful", [False, True])
async def test_a_suspect_that_is_cut_off_before_its_task_began_leaves_its_key_open(
    doubtful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def still_suspect(_self: CrashGuard, _change: Change) -> bool:
        return True

    monkeypatch.setattr(CrashGuard, "owner_may_be_alive", lambda _self, _change: doubtful)
    monkeypatch.setattr(CrashGuard, "suspicion", still_suspect)
    scheduler, executor = SettlingScheduler(100), _Waiting()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    scheduler.admit([Row(replace(change(1), crashed=True))])
    dispatcher.dispatch()
    await OtherTasks()  # the worker's only step
    assert len(dispatcher) == 2, "the worker, and beside it the suspect"
    scheduler.ownership.lose()
    await dispatcher.session_lost()
    await _until(lambda: len(dispatcher) == 0)
    assert executor.started == []
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1)])
    dispatcher.dispatch()
    await _until(lambda: executor.started == [1])
    executor.go.set()
    await _until(lambda: len(dispatcher) == 0)


async def test_a_suspect_starts_when_what_became_of_the_one_before_is_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a process that it ends would be counted against that one, too, which had done its work."""

    async def still_suspect(_self: CrashGuard, _change: Change) -> bool:
        return True

    async def written_down(_self: CrashGuard, _changes: Sequence[Change]) -> None: ...

    monkeypatch.setattr(CrashGuard, "suspicion", still_suspect)
    monkeypatch.setattr(CrashGuard, "record_start", written_down)
    scheduler, executor = SettlingScheduler(100), _Waiting()
    executor.go.set()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    scheduler.admit([Row(replace(change(seq, str(seq)), crashed=True)) for seq in (1, 2)])
    dispatcher.dispatch()
    await _until(lambda: scheduler.to_settle.ready == 1)
    for _ in range(10):
        await OtherTasks()
    assert executor.started == [1]
    scheduler.settled(scheduler.take_finished(10))
    dispatcher.settled()
    await _until(lambda: executor.started == [1, 2])
    scheduler.settled(scheduler.take_finished(10))
    dispatcher.settled()
    await _until(lambda: len(dispatcher) == 0)


class _Ending(_Waiting):
    """Ends each attempt with an error, and has no outcome for it."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self._error = error

    async def run(
        self, handler: Handler | None, changes: Sequence[Change], latest: Latest | None = None
    ) -> dict[Change, Outcome]:
        self.started += [change.seq for change in changes]
        raise self._error

    def decide(self, handler: Handler | None, change: Change, error: BaseException) -> Outcome:
        raise AssertionError("the decision fails as well")


@pytest.mark.parametrize("error", [asyncio.CancelledError, ValueError])
async def test_what_ends_without_its_call_and_without_an_outcome_is_tried_ten_times(
    error: type[BaseException],
) -> None:
    """By a cancellation that nobody here has asked for, or a fault of this program."""
    scheduler, executor, ended = SettlingScheduler(100), _Ending(error), list[Settlement]()
    scheduler.ownership.acquire(Acquired([0]))

    def finished(batch: Sequence[Settlement]) -> None:
        scheduler.finished(batch)
        ended.extend(batch)

    def reread() -> None:
        for resume in scheduler.key_reads(10):
            scheduler.admit_key_read(resume, [row(1)], complete=True)

    dispatcher = Dispatcher(
        scheduler, executor, 10, connections=1, crash_guard=CrashGuard(Store("public"), 1),
        coalescing=Coalescing(Router(), Store("public")), put_off=lambda: None,
        finished=finished, reread=reread,
    )  # fmt: skip
    scheduler.admit([row(1)])

    def all_ended() -> bool:
        dispatcher.dispatch()
        return bool(ended)

    await _until(all_ended)
    await _until(lambda: len(dispatcher) == 0)
    assert executor.started == [1] * LOSSES_MAX
    [settled] = ended
    assert isinstance(settled.outcome, Dead)
    assert "10 times in a row" in settled.outcome.error


async def test_an_error_after_an_outcome_was_reported_takes_no_place_twice() -> None:
    scheduler, executor = SettlingScheduler(100), _Waiting()
    executor.go.set()
    scheduler.ownership.acquire(Acquired([0]))

    def fail(batch: Sequence[Settlement]) -> None:
        scheduler.finished(batch)
        raise ValueError

    dispatcher = Dispatcher(
        scheduler, executor, 10, connections=1, crash_guard=CrashGuard(Store("public"), 1),
        coalescing=Coalescing(Router(), Store("public")), put_off=lambda: None,
        finished=fail, reread=lambda: None,
    )  # fmt: skip
    scheduler.admit([row(1)])
    dispatcher.dispatch()
    await _until(lambda: len(dispatcher) == 0)
    assert (scheduler.running, scheduler.settling) == (0, 1)


class _IgnoringCancellation(_Waiting):
    """Its first call catches its cancellation, takes it back, and returns."""

    async def run(
        self, handler: Handler | None, changes: Sequence[Change], latest: Latest | None = None
    ) -> dict[Change, Outcome]:
        try:
            return await super().run(handler, changes)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            return dict.fromkeys(changes, Processed())


async def test_a_worker_that_went_on_after_it_was_cut_off_takes_nothing_more() -> None:
    scheduler, executor = SettlingScheduler(100), _IgnoringCancellation()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 1)
    scheduler.admit([row(1, "a"), row(2, "b")])
    dispatcher.dispatch()
    await _until(lambda: executor.started == [1])
    [task] = _others()

    cancel(task)
    await _until(lambda: executor.started == [1, 2])
    assert task.cancelled()
    assert scheduler.settling == 1
    executor.go.set()
    await _until(lambda: len(dispatcher) == 0)


class _AtOnce(_Waiting):
    """Its calls return without waiting."""

    def run_inline(
        self, handler: Handler | None, changes: deque[Change], task: object
    ) -> tuple[list[Settlement], None]:
        done = [Settlement(change, Processed()) for change in changes]
        self.started += [change.seq for change in changes]
        changes.clear()
        return done, None


async def _one_by_one(scheduler: SettlingScheduler, dispatcher: Dispatcher, executor: _Waiting, *seqs: int) -> None:
    for seq in seqs:
        scheduler.admit([row(seq)])
        dispatcher.dispatch()
        await _until(lambda seq=seq: executor.started[-1:] == [seq] and len(dispatcher) == 0)  # type: ignore[misc]


async def test_changes_that_come_one_by_one_share_a_task_that_rests_in_between() -> None:
    scheduler, executor = SettlingScheduler(100), _AtOnce()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    await _one_by_one(scheduler, dispatcher, executor, 1)
    [task] = _others()
    await _one_by_one(scheduler, dispatcher, executor, 2, 3)
    assert _others() == {task}
    await dispatcher.drain(0.0)
    await _until(lambda: not _others())


async def test_of_many_workers_that_find_nothing_more_one_rests() -> None:
    scheduler, executor = SettlingScheduler(100), _AtOnce()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    scheduler.admit([row(seq, str(seq)) for seq in range(1, 6)])
    dispatcher.dispatch()
    assert len(dispatcher) == 5
    await _until(lambda: len(dispatcher) == 0)
    assert len(_others()) == 1
    await dispatcher.session_lost()
    await _until(lambda: not _others())


async def test_where_the_resting_worker_was_cancelled_by_others_another_takes_its_place() -> None:
    scheduler, executor = SettlingScheduler(100), _AtOnce()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    await _one_by_one(scheduler, dispatcher, executor, 1)
    [task] = _others()
    scheduler.admit([row(2)])
    dispatcher.dispatch()
    task.cancel()  # by a handler that kept it, as it is being woken
    await _until(lambda: executor.started == [1, 2])
    [task] = _others()
    task.cancel()
    await _until(task.done)
    await _one_by_one(scheduler, dispatcher, executor, 3)


async def test_a_worker_whose_call_has_waited_ends_as_it_may_have_been_cancelled_meanwhile() -> None:
    scheduler, executor = SettlingScheduler(100), _Waiting()
    scheduler.ownership.acquire(Acquired([0]))
    dispatcher = _dispatcher(scheduler, executor, 10)
    executor.go.set()
    await _one_by_one(scheduler, dispatcher, executor, 1)
    await _until(lambda: not _others())
