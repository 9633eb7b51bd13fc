"""Who waits for an application that is not there, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cdc.deliver import gate as module
from cdc.deliver.gate import Gate
from tests.eventually import eventually_async


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(module, "_PAUSE_MAX_S", 0.04)


def _true(condition: Callable[[], bool]) -> Awaitable[bool]:
    async def check() -> bool:
        return condition()

    return eventually_async(check)


class _Told:
    def __init__(self) -> None:
        self.shown: list[bool] = []
        self.gate = Gate("http://app/", self.shown.append)


async def test_an_open_gate_holds_nobody_up() -> None:
    told = _Told()
    await told.gate.enter()
    told.gate.opened()
    assert (told.shown, told.gate.shut_by) == ([], "")


async def test_while_it_is_shut_one_after_the_other_goes_to_see_and_when_it_opens_all_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    told = _Told()
    seen: list[int] = []

    async def call(number: int) -> None:
        await told.gate.enter()
        seen.append(number)

    for _ in range(3):
        told.gate.shut("Connection refused")
    assert (told.shown, told.gate.shut_by) == ([False], "Connection refused")
    calls = [asyncio.create_task(call(number)) for number in range(50)]
    await _true(lambda: len(seen) >= 2)
    assert seen == list(range(len(seen)))
    assert len(seen) < 50
    monkeypatch.setattr(module, "_PAUSE_MAX_S", 600)
    told.gate._pause_s = 600  # the rest would wait for hours, one behind the other
    told.gate.opened()
    await asyncio.gather(*calls)
    assert seen == list(range(50))
    assert (told.shown, told.gate.shut_by) == ([False, True], "")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_the_pause_grows_up_to_its_bound_and_begins_anew_only_after_a_steady_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = _Told().gate
    gate.shut("x")
    paces = []
    for _ in range(4):
        paces.append(gate._pause_s)
        await gate.enter()
    assert paces == [0.01, 0.02, 0.04, 0.04]
    gate.opened()
    gate.shut("x")
    assert gate._pause_s == 0.04, "it comes and goes"
    gate.opened()
    monkeypatch.setattr(module, "_STEADY_S", -1)
    gate.shut("x")
    assert gate._pause_s == 0.01


async def test_a_stop_cuts_off_who_waits_and_who_comes_to_wait_and_nobody_else() -> None:
    gate = _Told().gate
    gate.stop()
    await gate.enter()
    gate.shut("x")
    gate._pause_s = 600
    late = [asyncio.create_task(gate.enter()) for _ in range(2)]
    assert [type(one) for one in await asyncio.gather(*late, return_exceptions=True)] == [asyncio.CancelledError] * 2

    gate = _Told().gate
    gate.shut("x")
    gate._pause_s = 600
    waiting = [asyncio.create_task(gate.enter()) for _ in range(3)]
    await _true(lambda: len(gate._waiting) == 3)
    gate.stop()
    assert [type(one) for one in await asyncio.gather(*waiting, return_exceptions=True)] == [asyncio.CancelledError] * 3
    assert gate._waiting == set()


async def test_who_is_cut_off_hands_its_turn_on() -> None:
    gate = _Told().gate
    gate.shut("x")
    gate._pause_s = 600
    first, second = (asyncio.create_task(gate.enter()) for _ in range(2))
    await _true(lambda: len(gate._waiting) == 2)
    gate._pause_s = 0.01
    first.cancel()
    await second
    assert first.cancelled()
