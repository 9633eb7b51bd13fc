"""One timer of the event loop serves many moments, and each comes when it is due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import Any, cast

import pytest

from cdc.runtime.moving_timer import MovingTimer, TimedEvent


class _Timer:
    def __init__(self, at: float, come_round: Callable[[], None]) -> None:
        self.at = at
        self.come_round = come_round
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class _Loop:
    """An event loop's timers, with a clock that a test moves. ``timers``: all that were set so far."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[_Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, call: Callable[..., None], *arguments: Any) -> _Timer:
        self.timers.append(_Timer(at, lambda: call(*arguments)))
        return self.timers[-1]

    def pass_until(self, moment: float) -> None:
        while due := [timer for timer in self.timers if not timer.is_cancelled and timer.at <= moment]:
            due[0].is_cancelled = True
            self.now = due[0].at
            due[0].come_round()
        self.now = moment

    @property
    def left(self) -> int:
        return sum(not timer.is_cancelled for timer in self.timers)


@pytest.fixture
def loop() -> Any:
    return _Loop()


@pytest.fixture
def came() -> list[float]:
    """The moments at which the timer called."""
    return []


@pytest.fixture
def timer(loop: Any, came: list[float]) -> MovingTimer:
    return MovingTimer(lambda: came.append(loop.now))


def test_it_comes_once_when_its_time_is_up(timer: MovingTimer, loop: Any, came: list[float]) -> None:
    timer.set(loop, 5.0)
    loop.pass_until(4.9)
    assert came == []
    loop.pass_until(20.0)
    assert came == [5.0]


def test_later_moments_cost_no_timer(timer: MovingTimer, loop: Any, came: list[float]) -> None:
    for second in range(100):
        loop.pass_until(second)
        timer.set(loop, 1000.0)
        timer.moment = inf
    assert len(loop.timers) == 1


def test_a_moment_that_was_put_off_comes_then_and_not_before(timer: MovingTimer, loop: Any, came: list[float]) -> None:
    timer.set(loop, 5.0)
    loop.pass_until(3.0)
    timer.set(loop, 5.0)
    loop.pass_until(20.0)
    assert came == [8.0]


def test_an_earlier_moment_comes_when_it_is_due(timer: MovingTimer, loop: Any, came: list[float]) -> None:
    timer.set(loop, 5.0)
    timer.set(loop, 1.0)
    loop.pass_until(20.0)
    assert came == [1.0]
    assert loop.left == 0


def test_a_loop_that_counts_in_milliseconds_does_not_come_round_twice(
    timer: MovingTimer, loop: Any, came: list[float]
) -> None:
    timer.set(loop, 5.0005)
    loop.timers[0].at = 5.0
    loop.pass_until(20.0)
    assert came == [5.0]


def _put_off(timer: MovingTimer) -> None:
    timer.moment = inf


@pytest.mark.parametrize("end", [_put_off, MovingTimer.close])
def test_what_is_cleared_does_not_come_and_can_be_set_again(
    end: Callable[[MovingTimer], None], timer: MovingTimer, loop: Any, came: list[float]
) -> None:
    timer.set(loop, 5.0)
    end(timer)
    loop.pass_until(10.0)
    assert came == []
    timer.set(loop, 5.0)
    loop.pass_until(20.0)
    assert came == [15.0]


def test_nothing_is_left_with_the_loop_after_close(timer: MovingTimer, loop: Any) -> None:
    timer.set(loop, 5.0)
    timer.close()
    assert loop.left == 0


async def test_a_wait_ends_with_its_time_and_the_event_is_set_then() -> None:
    event = TimedEvent()
    async with asyncio.timeout(20):
        await event.wait_within(0.01)
    assert event.is_set()


async def test_a_wait_that_an_event_has_ended_sets_nothing_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    running, stand_in = asyncio.get_running_loop(), _Loop()
    monkeypatch.setattr(running, "call_at", stand_in.call_at)
    event = TimedEvent()
    running.call_soon(event.set)
    await event.wait_within(60.0)
    event.clear()
    cast("Any", stand_in.timers[0]).come_round()
    assert not event.is_set()


async def test_an_event_that_is_set_is_not_waited_for() -> None:
    event = TimedEvent()
    event.set()
    waiting = event.wait_within(3600.0)
    with pytest.raises(StopIteration):
        waiting.send(None)
