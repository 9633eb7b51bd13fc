"""What is to run as long as the process does goes on, whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading

import pytest

from cdc.runtime import supervisor
from cdc.runtime.supervisor import FAILING_AT, Ends, Supervisor
from tests.eventually import eventually, eventually_async


def test_pauses_double_up_to_a_bound_and_start_again_after_a_long_run() -> None:
    ends, pauses = Ends(), []
    for _ in range(12):
        ends = ends.after(1.0)
        pauses.append(ends.pause_s)
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    assert pauses[-1] == 30.0
    assert ends.failing(1.0)
    assert not ends.failing(60.0)
    assert ends.after(60.0) == Ends(1)
    assert not Ends(FAILING_AT - 1).failing(0.0)


async def _until(condition: object) -> None:
    async def holds() -> bool:
        return bool(condition())  # type: ignore[operator]

    await eventually_async(holds)


@pytest.mark.parametrize("how", [RecursionError, MemoryError, asyncio.CancelledError, None])
async def test_a_task_that_ends_is_logged_counted_started_again_and_failing_in_the_end(
    how: type[BaseException] | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_MIN_S", 0.001)
    ended: list[str] = []
    supervised = Supervisor(ended.append)

    async def run() -> None:
        if how:
            raise how("row content")

    task = asyncio.create_task(supervised.keep("listener", run))
    await _until(lambda: len(ended) >= FAILING_AT)
    [(name, times)] = supervised.failing()
    assert (name, set(ended)) == ("listener", {"listener"})
    assert times >= FAILING_AT
    assert "row content" not in caplog.text
    assert f"listener has ended: {how.__name__ if how else 'it returned'}" in caplog.text
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_is_cancelled_ends_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    supervised, began = Supervisor(), asyncio.Event()

    async def run() -> None:
        began.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(supervised.keep("relay", run))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert caplog.text == ""
    assert supervised.failing() == []


def test_a_thread_goes_on_until_it_is_to_stop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_MIN_S", 0.001)
    supervised, stopping, runs = Supervisor(), threading.Event(), 0

    def run() -> None:
        nonlocal runs
        runs += 1
        raise MemoryError

    thread = threading.Thread(target=supervised.keep_here, args=("collector", run, stopping))
    with caplog.at_level(logging.CRITICAL):
        thread.start()
        eventually(lambda: runs > 2)
        stopping.set()
        thread.join()
    assert "collector has ended: MemoryError" in caplog.text


def test_a_thread_that_is_gone_without_a_word_is_failing() -> None:
    def end(*_: object) -> None:
        raise SystemExit

    supervised, stopping = Supervisor(end), threading.Event()  # also where its end is told

    def keep() -> None:
        with contextlib.suppress(SystemExit):
            supervised.keep_here("page", end, stopping)

    thread = threading.Thread(target=keep)
    thread.start()
    thread.join()
    assert supervised.failing() == [("page", 1)]
    stopping.set()
    assert supervised.failing() == []
