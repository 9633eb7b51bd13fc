"""One text for connections of both kinds: an async one and one that blocks lead a script the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cdc.postgres.script import Script, run, run_async


class _Blocking:
    """Answers with what it is asked, and fails where asked to."""

    def ask(self, question: Any) -> Any:
        return _answer(question)


class _Async:
    async def ask(self, question: Any) -> Any:
        loop = asyncio.get_running_loop()
        arrived = loop.create_future()
        loop.call_soon(arrived.set_result, None)
        await arrived
        return _answer(question)


def _answer(question: Any) -> Any:
    if isinstance(question, BaseException):
        raise question
    return question


def _led(script: Callable[[Any], Script[Any]]) -> list[Any]:
    """What it returned or raised, led by each of the two."""

    def blocking() -> Any:
        return run(script(_Blocking()))

    async def on_a_loop() -> Any:
        return await run_async(script(_Async()))

    return [_ended(blocking), _ended(lambda: asyncio.run(on_a_loop()))]


def _ended(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError as error:
        return type(error), str(error)


def _counts(connection: Any) -> Script[int]:
    return (yield connection.ask(1)) + (yield connection.ask(2))


def _asks_nothing(connection: Any) -> Script[str]:
    return connection and "nothing"
    yield


def _fails(connection: Any) -> Script[None]:
    yield connection.ask(ValueError("the server's"))


def _fails_by_itself(connection: Any) -> Script[None]:
    yield connection.ask(1)
    raise ValueError("the script's own")


def _handles(connection: Any) -> Script[list[Any]]:
    heard: list[Any] = []
    for question in (ValueError("first"), ValueError("second"), 3):
        try:
            heard.append((yield connection.ask(question)))
        except ValueError as error:
            heard.append(str(error))
            heard.append((yield connection.ask("asked while handling")))
    return heard


@pytest.mark.parametrize(
    ("script", "ended"),
    [
        (_counts, 3),
        (_asks_nothing, "nothing"),
        (_fails, (ValueError, "the server's")),
        (_fails_by_itself, (ValueError, "the script's own")),
        (_handles, ["first", "asked while handling", "second", "asked while handling", 3]),
    ],
)
def test_both_kinds_lead_a_script_to_the_same_end(script: Callable[[Any], Script[Any]], ended: Any) -> None:
    assert _led(script) == [ended, ended]


def test_a_cancellation_arrives_at_the_yield_and_what_the_script_asks_then_is_answered() -> None:
    heard: list[Any] = []
    asked = asyncio.Event()

    def cleans_up(connection: Any) -> Script[None]:
        try:
            yield forever()
        finally:
            heard.append((yield connection.ask("cleaned up")))

    async def forever() -> None:
        asked.set()
        await asyncio.Event().wait()

    async def cancelled() -> None:
        task = asyncio.create_task(run_async(cleans_up(_Async())))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert heard == ["cleaned up"]


def test_an_error_that_ended_a_script_holds_no_frame_of_its_driver_in_a_cycle() -> None:
    """It would keep a connection until the next collection."""

    async def failed() -> BaseException:
        try:
            await run_async(_fails(_Async()))
        except ValueError as error:
            return error
        raise AssertionError

    error = asyncio.run(failed())
    frame = error.__traceback__
    drivers = []
    while frame is not None:
        if frame.tb_frame.f_code is run_async.__code__:
            drivers.append(frame.tb_frame)
        frame = frame.tb_next
    assert drivers
    assert all(value is not error for driver in drivers for value in driver.f_locals.values())
