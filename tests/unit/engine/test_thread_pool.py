"""Threads for handlers that are not async: as many as are busy at a time."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cdc.engine.thread_pool import Threads
from cdc.runtime.cancelling import cancel


@pytest.fixture
async def threads() -> Threads:
    return Threads(3)


async def test_calls_that_follow_each_other_share_a_thread(threads: Threads) -> None:
    used = {await threads.submit(threading.get_ident).future for _ in range(5)}
    assert len(used) == 1
    threads.close()


async def test_calls_at_the_same_time_have_a_thread_each_up_to_the_limit(threads: Threads) -> None:
    together = threading.Barrier(3)

    def call() -> int:
        together.wait(30)
        return threading.get_ident()

    jobs = [threads.submit(call) for _ in range(6)]
    assert len(set(await asyncio.gather(*(job.future for job in jobs)))) == 3
    threads.close()


async def test_one_that_is_called_off_before_it_began_is_not_called_and_takes_no_place(threads: Threads) -> None:
    go, called = threading.Event(), list[int]()
    held = [threads.submit(lambda: go.wait(30)) for _ in range(3)]
    off = threads.submit(lambda: called.append(1))
    off.call_off()
    go.set()
    await asyncio.gather(*(job.future for job in held))
    await threads.submit(lambda: None).future
    assert called == []
    assert off.future.cancelled()
    threads.close()


async def test_who_waits_for_a_call_is_cut_off_by_this_program_only(threads: Threads) -> None:
    go, began = threading.Event(), threading.Event()

    def call() -> str:
        began.set()
        go.wait(30)
        return "done"

    first = asyncio.create_task(threads.submit(call).outcome())
    await asyncio.to_thread(began.wait, 30)
    for _ in range(3):
        first.cancel()
        await asyncio.wait([first], timeout=0.01)
    assert not first.done()
    go.set()
    assert await first == "done"
    go.clear()
    second = asyncio.create_task(threads.submit(call).outcome())
    await asyncio.wait([second], timeout=0.01)
    cancel(second)
    with pytest.raises(asyncio.CancelledError):
        await second
    go.set()
    threads.close()


async def test_the_result_of_a_call_that_ends_while_its_caller_is_cancelled_is_kept(threads: Threads) -> None:
    job = threads.submit(lambda: "done")
    waiting = asyncio.create_task(job.outcome())
    await asyncio.wait([waiting], timeout=0)
    waiting.cancel()
    job.ended("done", None)
    assert await waiting == "done"
    threads.close()
