"""Calls that return without waiting follow each other in one step of a worker; nobody else is to notice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from pydantic import BaseModel

from cdc.core.backoff import Policy
from cdc.core.errors import Discard, Failed, Unavailable
from cdc.core.handler_limits import HandlerLimits
from cdc.core.model import Change, Dead, Discarded, Filtered, Outcome, Processed, Waiting
from cdc.core.read_reconciler import Settlement
from cdc.core.router import Router
from cdc.core.shard_ownership import Acquired
from cdc.engine import executor
from cdc.engine.circuit_breakers import CircuitBreakers
from cdc.engine.coalescing import Coalescing
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.dispatcher import Dispatcher, OtherTasks
from cdc.engine.error_policy import ErrorPolicy
from cdc.engine.executor import Executor
from cdc.engine.hooks import Hooks
from cdc.engine.thread_pool import Threads
from cdc.engine.transactions import Transactions
from cdc.observability.metrics import Metrics
from cdc.postgres.outbox import Store
from tests.changes import row
from tests.eventually import eventually_async
from tests.settling import SettlingScheduler

Handler = Callable[[Change], Awaitable[object]]


class _Stage:
    """Scheduler, dispatcher and executor, and no table behind them."""

    def __init__(
        self,
        handler: Handler,
        concurrency: int = 100,
        timeout_s: float | None = None,
        model: Any = None,
        other: Handler | None = None,
        *,
        when: Callable[[Change], bool] | None = None,
    ) -> None:
        router = Router()
        router.on("t", model=model, when=when)(handler)
        if other:
            router.on("other")(other)
        self.metrics, hooks = Metrics("slot", router), Hooks(router)
        self.breakers = CircuitBreakers({one.name for one in router.handlers.values()})
        error_policy = ErrorPolicy(
            router.handlers.values(), Policy(), hooks=hooks, metrics=self.metrics.handlers, breakers=self.breakers
        )
        run = Executor(
            router, error_policy=error_policy, timeout_s=timeout_s, threads=Threads(1), metrics=self.metrics.handlers,
            transactions=cast("Transactions", None),
        )  # fmt: skip
        demand = HandlerLimits(router, concurrency=concurrency, threads=1, transactions=1, breakers=self.breakers.of)
        self.scheduler = SettlingScheduler(1_000, ready_queues=demand.ready_queues, needs=demand.needs)
        self.scheduler.ownership.acquire(Acquired([0]))
        self.outcomes: dict[int, Outcome] = {}
        self.dispatcher = Dispatcher(
            self.scheduler, run, concurrency, connections=1, crash_guard=CrashGuard(Store("public"), 1),
            coalescing=Coalescing(Router(), Store("public")), put_off=lambda: None,
            finished=self._finished, reread=lambda: None,
        )  # fmt: skip
        self.breakers.changed = self.dispatcher.breaker_changed

    def _finished(self, batch: Sequence[Settlement]) -> None:
        self.scheduler.finished(batch)
        self.outcomes |= {change.seq: outcome for change, outcome in batch}

    def work(self, changes: int) -> None:
        """A change of each of so many keys."""
        self.scheduler.admit([row(seq, str(seq)) for seq in range(1, changes + 1)])
        self.dispatcher.dispatch()

    async def until_done(self, seqs: Sequence[int]) -> None:
        async def done() -> bool:
            return self.outcomes.keys() >= set(seqs)

        await eventually_async(done)

    def count(self, name: str, outcome: str) -> float:
        labels = {"handler": "handle", "outcome": outcome, "entity_type": "t"}
        wanted = labels if outcome else {"handler": "handle"}
        return self.metrics.registry.get_sample_value(name, wanted) or 0.0


async def test_calls_that_return_at_once_follow_each_other_in_one_step_of_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor, "_AT_ONCE_S", 60.0)  # however busy the machine is

    async def handle(change: Change) -> None: ...

    stage = _Stage(handle)
    stage.work(50)
    await OtherTasks()
    assert list(stage.outcomes) == list(range(1, 51))
    assert set(stage.outcomes.values()) == {Processed()}
    assert stage.count("cdc_changes_handled_total", "processed") == 50
    assert stage.count("cdc_handler_duration_seconds_count", "") == 50


async def test_one_that_waits_holds_up_no_other_of_its_run() -> None:
    go = asyncio.Event()

    async def handle(change: Change) -> None:
        if change.seq == 3:
            await go.wait()

    stage = _Stage(handle)
    stage.work(20)
    await stage.until_done([*range(1, 3), *range(4, 21)])
    assert stage.scheduler.running == 1
    go.set()
    await stage.until_done([3])
    assert stage.count("cdc_handler_duration_seconds_count", "") == 20


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_no_more_wait_at_a_time_than_may_run_and_each_of_those_does(concurrency: int) -> None:
    running, most, go = 0, 0, asyncio.Event()

    async def handle(change: Change) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1

    stage = _Stage(handle, concurrency)
    stage.work(10)

    async def all_wait() -> bool:
        return running == concurrency

    await eventually_async(all_wait)
    go.set()
    await stage.until_done(range(1, 11))
    assert most == concurrency


async def test_what_a_call_raises_at_once_is_judged_and_the_others_go_on() -> None:
    async def handle(change: Change) -> None:
        match change.seq:
            case 2:
                raise ValueError("no")
            case 3:
                raise Discard("nothing to do")
            case 4:
                raise Failed({change: ValueError("it is this one")})
            case 5:
                raise Failed({})
            case 6:
                raise asyncio.CancelledError  # nobody has cancelled it

    stage = _Stage(handle)
    stage.work(7)
    await stage.until_done(range(1, 8))
    kinds = [type(outcome) for _, outcome in sorted(stage.outcomes.items())]
    assert kinds == [Processed, Waiting, Discarded, Waiting, Processed, Waiting, Processed]
    named = stage.outcomes[4]
    assert isinstance(named, Waiting)
    assert named.error == "ValueError: it is this one"


async def test_what_a_filter_leaves_out_is_decided_in_the_same_step_and_says_nothing_about_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor, "_AT_ONCE_S", 60.0)  # however busy the machine is

    async def handle(change: Change) -> None:
        if change.seq == 1:
            raise Unavailable

    stage = _Stage(handle, when=lambda change: change.seq < 2 or change.seq > 30)
    stage.work(30)
    await stage.until_done(range(1, 31))
    assert [type(stage.outcomes[seq]) for seq in range(1, 31)] == [Waiting] + [Filtered] * 29
    assert stage.count("cdc_changes_handled_total", "filtered") == 29
    assert stage.count("cdc_handler_duration_seconds_count", "") == 1
    assert stage.breakers.of["handle"].troubled
    stage.scheduler.admit([row(31, "31")])
    stage.dispatcher.dispatch()
    await stage.until_done([31])
    assert not stage.breakers.of["handle"].troubled


async def test_a_row_that_does_not_fit_the_model_is_dead_and_the_others_are_handled() -> None:
    class Model(BaseModel):
        id: int

    seen: list[Any] = []

    async def handle(change: Change) -> None:
        seen.append(change.new)

    stage = _Stage(handle, model=Model)
    rows = [row(seq, str(seq)) for seq in (1, 2, 3)]
    fitting = [one._replace(change=replace(one.change, new={"id": one.change.seq})) for one in rows[::2]]
    stage.scheduler.admit([fitting[0], rows[1], fitting[1]])
    stage.dispatcher.dispatch()
    await stage.until_done([1, 2, 3])
    assert seen == [Model(id=1), Model(id=3)]
    assert [type(stage.outcomes[seq]) for seq in (1, 2, 3)] == [Processed, Dead, Processed]


async def test_what_takes_long_without_waiting_lets_other_tasks_run_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_AT_ONCE_S", 1e-9)
    told: list[str] = []

    async def handle(change: Change) -> None:
        told.append("handler")

    async def other() -> None:
        for _ in range(5):
            told.append("other")
            await OtherTasks()

    stage = _Stage(handle)
    stage.work(5)
    await asyncio.gather(other(), stage.until_done(range(1, 6)))
    assert told == ["handler", "other"] * 5


async def test_what_was_started_and_not_called_at_a_stop_is_left_to_the_next_consumer() -> None:
    async def handle(change: Change) -> None:
        if change.seq == 2:
            await asyncio.Event().wait()

    stage = _Stage(handle)
    stage.work(5)
    await OtherTasks()
    assert stage.scheduler.running == 4
    await stage.dispatcher.drain(0.0)
    assert stage.outcomes == {1: Processed()}
    assert stage.scheduler.running == 0


async def test_what_was_put_off_meanwhile_goes_to_its_own_handler() -> None:
    got: list[tuple[str, str]] = []

    async def handle(change: Change) -> None:
        got.append(("handle", change.entity_type))

    async def other(change: Change) -> None:
        got.append(("other", change.entity_type))

    stage = _Stage(handle, other=other)
    stage.scheduler.admit([row(1, "1", entity_type="other"), row(2, "2"), row(3, "3")])
    handler, [put_off] = stage.scheduler.start()
    # As after a crash whose suspect has just ended: there is no other way to this moment.
    stage.dispatcher._quarantine.freed.append((handler, put_off))  # noqa: SLF001
    stage.dispatcher._handler, run = stage.scheduler.start()  # noqa: SLF001
    assert len(run) == 2
    stage.dispatcher._started.extend(run)  # noqa: SLF001 - the rest of a run, of which one waits
    stage.dispatcher.dispatch()
    await stage.until_done([1, 2, 3])
    assert sorted(got) == [("handle", "t"), ("handle", "t"), ("other", "other")]


async def test_a_call_that_waits_beyond_its_limit_fails_counted_from_its_first_step() -> None:
    async def handle(change: Change) -> None:
        await asyncio.Event().wait()

    stage = _Stage(handle, timeout_s=0.01)
    stage.work(1)
    await stage.until_done([1])
    outcome = stage.outcomes[1]
    assert isinstance(outcome, Waiting)
    assert outcome.error == "took longer than 0.01 s"


class _Answer:
    """Something to await that is no coroutine."""

    def __await__(self):
        yield from OtherTasks().__await__()


async def test_a_handler_may_give_back_whatever_can_be_awaited() -> None:
    class Wrapped:
        @staticmethod
        async def func(change: Change) -> None: ...

        __qualname__ = "handle"

        def __call__(self, change: Change) -> _Answer:
            return _Answer()

    stage = _Stage(cast("Handler", Wrapped()))
    stage.work(1)
    await stage.until_done([1])
    assert stage.outcomes[1] == Processed()
