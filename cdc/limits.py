"""Time limits of calls on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar, cast

from cdc.errors import ToldError

_T = TypeVar("_T")


class OverrunError(ToldError):
    """The handler's time limit passed."""

    kind = "timeout"


async def within(limit_s: float | None, call: Coroutine[Any, Any, _T]) -> _T:
    """Run it under a time limit. One that never waits needs no timer, which costs more than many a handler."""
    started = time.monotonic()
    try:
        waits_for = call.send(None)
    except StopIteration as returned:
        return cast("_T", returned.value)
    return await Begun(call, waits_for, started).within(limit_s)


class Begun(Generic[_T]):
    """Awaiting it goes on with a coroutine that has been sent up to its first wait, in this task.

    ``started`` on the monotonic clock. ``error``: it has failed there, and does so to whoever awaits it.
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, _T], waits_for: Any, started: float, error: BaseException | None = None
    ) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for
        self.started = started
        self._error = error

    async def within(self, limit_s: float | None) -> _T:
        """Go on, under a time limit that counts from the start."""
        try:
            async with asyncio.timeout(
                None if limit_s is None else limit_s - (time.monotonic() - self.started)
            ) as limit:
                return await self
        except TimeoutError as error:
            if not limit.expired():
                raise  # the handler's own
            raise OverrunError(f"took longer than {limit_s:g} s") from error

    def __await__(self) -> Generator[Any, Any, _T]:
        if self._error is not None:
            raise self._error
        waits_for = self._waits_for
        while True:
            try:
                sent = yield waits_for
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - a cancellation above all: it is the coroutine's to handle
                step = partial(self._coroutine.throw, error)
            else:
                step = partial(self._coroutine.send, sent)
            try:
                waits_for = step()
            except StopIteration as returned:
                return cast("_T", returned.value)
