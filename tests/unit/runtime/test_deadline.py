"""A limit that passes is a TimeoutError, whatever the task has been through before."""

from __future__ import annotations

import asyncio

import pytest

from cdc.runtime.deadline import _Timeout, deadline


async def _end_of_a_group_that_failed() -> None:
    async def fail() -> None:
        raise OSError

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())


async def test_it_ends_the_wait_and_not_the_task_after_a_group_of_tasks_that_failed() -> None:
    await _end_of_a_group_that_failed()
    with pytest.raises(TimeoutError):
        async with deadline(0.001):
            await asyncio.Event().wait()


async def test_it_ends_the_wait_in_a_cleanup_that_follows_a_cancellation() -> None:
    ended: list[str] = []
    begun = asyncio.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            with pytest.raises(TimeoutError):
                async with deadline(0.001):
                    await asyncio.Event().wait()
            ended.append("in time")

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["in time"]


@pytest.mark.parametrize("seconds", [None, 60.0])
async def test_a_cancellation_from_outside_stays_one(seconds: float | None) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        async with _Timeout(None if seconds is None else asyncio.get_running_loop().time() + seconds):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_one_for_older_pythons_ends_a_wait_once_and_says_that_it_has() -> None:
    limit = _Timeout(asyncio.get_running_loop().time() + 0.001)
    with pytest.raises(TimeoutError):
        async with limit:
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert (limit.expired(), task.cancelling()) == (True, 0)
