"""A lock for tasks, which is taken at once where it is free."""

from __future__ import annotations

import asyncio

import pytest

from cdc.engine.dispatcher import OtherTasks
from cdc.runtime.turns import Turns


async def _have(turns: Turns, name: str, had: list[str], leave: asyncio.Event) -> None:
    async with turns:
        had.append(name)
        await leave.wait()


async def _steps() -> None:
    for _ in range(3):
        await OtherTasks()


async def test_one_task_has_it_at_a_time_in_the_order_in_which_they_came() -> None:
    turns, had, leave = Turns(), list[str](), asyncio.Event()
    turns.taken = True
    tasks = [asyncio.create_task(_have(turns, name, had, leave)) for name in "abc"]
    await _steps()
    assert had == []
    turns.release()
    await _steps()
    assert had == ["a"]
    assert turns.taken, "nobody overtakes those that wait"
    leave.set()
    await asyncio.gather(*tasks)
    assert had == ["a", "b", "c"]
    assert not turns.taken


@pytest.mark.parametrize("handed_over", [False, True], ids=["before its turn", "as its turn comes"])
async def test_a_task_that_is_cancelled_while_it_waits_holds_nobody_up(handed_over: bool) -> None:
    turns, had, leave = Turns(), list[str](), asyncio.Event()
    leave.set()
    turns.taken = True
    cancelled, next_one = (asyncio.create_task(_have(turns, name, had, leave)) for name in "ab")
    await _steps()
    if handed_over:
        turns.release()
        cancelled.cancel()
    else:
        cancelled.cancel()
        await _steps()
        turns.release()
    await next_one
    assert cancelled.cancelled()
    assert had == ["b"]
    assert not turns.taken


async def test_it_is_free_again_after_an_error() -> None:
    turns = Turns()
    with pytest.raises(KeyError):
        async with turns:
            raise KeyError
    assert not turns.taken
