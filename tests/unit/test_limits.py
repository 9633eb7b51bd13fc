"""Time limits of calls on the event loop."""

from __future__ import annotations

import asyncio

import pytest

from cdc.limits import OverrunError, within


async def _soon(value: object = None) -> object:
    """Waits for a turn of the loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[object] = loop.create_future()
    loop.call_soon(future.set_result, value)
    return await future


async def test_a_call_that_never_waits_has_no_limit_to_overrun() -> None:
    async def call() -> str:
        return "done"

    assert await within(1e-9, call()) == "done"


async def test_a_call_that_waits_gets_what_it_waits_for_and_its_value_and_error_come_through() -> None:
    async def call(fails: bool) -> list[object]:
        got = [await _soon(1), await _soon(2)]
        if fails:
            raise KeyError(got[1])
        return got

    assert await within(60, call(fails=False)) == [1, 2]
    assert await within(None, call(fails=False)) == [1, 2]
    with pytest.raises(KeyError, match="2"):
        await within(60, call(fails=True))


async def test_a_call_that_overruns_is_cut_off_and_may_clean_up() -> None:
    cleaned = []

    async def call() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await _soon()
            cleaned.append(True)

    with pytest.raises(OverrunError, match=r"longer than 0\.01 s"):
        await within(0.01, call())
    assert cleaned == [True]


async def test_a_timeout_of_the_calls_own_is_no_overrun() -> None:
    async def at_once() -> None:
        raise TimeoutError

    async def later() -> None:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    for call in (at_once, later):
        with pytest.raises(TimeoutError):
            await within(60, call())


async def test_a_cancellation_reaches_the_call_which_may_catch_it() -> None:
    async def call() -> object:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await _soon("caught")
        return "never"

    task = asyncio.create_task(within(60, call()))
    await _soon()
    task.cancel()
    assert await task == "caught"
