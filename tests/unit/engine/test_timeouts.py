"""Time limits of calls on the event loop: one timer for many, and nobody else's cancellation is taken for it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from cdc.core.errors import OverrunError
from cdc.engine.timeouts import TimeLimit
from cdc.runtime.cancelling import cancel
from tests.eventually import eventually_async


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def test_a_call_that_takes_too_long_is_cut_off_and_its_task_goes_on() -> None:
    with pytest.raises(OverrunError, match=r"^took longer than 0\.01 s$"):
        await TimeLimit(0.01).call(_for_ever())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_call_that_returns_in_time_gives_what_it_returns() -> None:
    async def waits_a_little() -> str:
        for _ in range(3):
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        return "done"

    async def does_not_wait() -> str:
        return "done"

    for limit in (TimeLimit(60.0), TimeLimit(None)):
        assert await limit.call(waits_a_little()) == "done"
        assert await limit.call(does_not_wait()) == "done"


async def test_calls_overrun_in_the_order_in_which_they_began_and_those_that_ended_do_not() -> None:
    limit, told, go = TimeLimit(0.2), list[int](), asyncio.Event()

    async def call(number: int) -> None:
        try:
            await limit.call(_for_ever() if number % 2 else _until(go))
        except OverrunError:
            told.append(number)

    async def _until(event: asyncio.Event) -> None:
        await event.wait()

    calls = [asyncio.create_task(call(number)) for number in range(6)]

    async def all_wait() -> bool:
        return limit.waiting == len(calls)

    await eventually_async(all_wait)
    go.set()
    await asyncio.gather(*calls)
    assert told == [1, 3, 5]


async def test_one_that_began_later_overruns_later_though_none_comes_after_it() -> None:
    limit, told = TimeLimit(0.2), list[str]()

    async def rest(name: str, ago_s: float) -> None:
        try:
            await limit.call(_for_ever(), started=time.monotonic() - ago_s)
        except OverrunError:
            told.append(name)

    await asyncio.wait_for(asyncio.gather(rest("first", 0.15), rest("second", 0.0)), 30)
    assert told == ["first", "second"]


async def test_one_that_begins_when_another_overruns_has_its_own_time() -> None:
    limit = TimeLimit(0.05)
    for _ in range(2):
        with pytest.raises(OverrunError):
            await limit.call(_for_ever())


async def test_a_cancellation_from_outside_is_none_of_the_limits() -> None:
    limit = TimeLimit(60.0)
    call = asyncio.create_task(limit.call(_for_ever()))

    async def waits() -> bool:
        return limit.waiting == 1

    await eventually_async(waits)
    cancel(call)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert limit.waiting == 0


async def test_who_overruns_and_is_cancelled_besides_is_cancelled() -> None:
    """A stop that comes at the same moment must not be lost."""
    limit = TimeLimit(0.01)
    ended = asyncio.Event()

    async def clings() -> None:
        try:
            await _for_ever()
        finally:
            cancel(call)
            ended.set()

    call = asyncio.create_task(limit.call(clings()))
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


async def test_a_call_that_returns_in_spite_of_its_cancellation_has_returned() -> None:
    async def ignores_cancellation() -> str:
        try:
            await _for_ever()
        except asyncio.CancelledError:
            return "all the same"
        return "never"

    async def task() -> tuple[str, int]:
        returned = await TimeLimit(0.01).call(ignores_cancellation())
        me = asyncio.current_task()
        assert me is not None
        return returned, me.cancelling()

    assert await asyncio.create_task(task()) == ("all the same", 0)


async def test_a_call_that_goes_on_in_spite_of_its_cancellation_is_reported_once_and_one_that_ends_is_not() -> None:
    reported, free = list[object](), asyncio.Event()
    limit = TimeLimit(0.01, reported.append, grace_s=0.02)

    async def goes_on() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await _for_ever()
        await free.wait()

    async def ends() -> None:
        with contextlib.suppress(OverrunError):
            await limit.call(_for_ever(), of="one that ends")

    async def ignores_cancellation() -> None:
        await limit.call(goes_on(), of="one that goes on")

    calls = [asyncio.create_task(ends()), asyncio.create_task(ignores_cancellation())]

    async def is_reported() -> bool:
        return bool(reported)

    await eventually_async(is_reported)
    free.set()
    await asyncio.wait(calls)
    assert reported == ["one that goes on"]


async def test_what_a_call_raises_is_its_own_also_a_timeout() -> None:
    async def raises() -> None:
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        raise TimeoutError("somebody else's")

    with pytest.raises(TimeoutError, match="somebody else's"):
        await TimeLimit(60.0).call(raises())


async def test_a_cancellation_goes_to_the_call_which_may_tidy_up_while_it_waits() -> None:
    told: list[str] = []

    async def tidies_up() -> None:
        try:
            await _for_ever()
        finally:
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)
            told.append("tidy")

    with pytest.raises(OverrunError):
        await TimeLimit(0.01).call(tidies_up())
    assert told == ["tidy"]
