"""A timer whose moment moves often: each wait or answer has its own, and hardly one of them comes round.

To cancel a timer of the event loop and set a new one costs more than most of what happens in between. Here a later
moment is only noted. The loop's timer comes round at the earlier one, finds that there is time left, and is set again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

_EARLY_S = 0.001
"""An event loop may count in whole milliseconds."""


class MovingTimer:
    """Calls ``due`` once, when the moment has come. Times are those of the event loop's clock."""

    def __init__(self, due: Callable[[], None]) -> None:
        self._due = due
        self.moment = inf
        """When ``due`` is called. Set it to inf, and it is not."""
        self._comes_round_at = inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """``due`` is called in so many seconds, and not when it was to be called before."""
        self.moment = moment = loop.time() + seconds
        if moment < self._comes_round_at:
            self._come_round_at(loop, moment)

    def close(self) -> None:
        """The same, and nothing is left with the event loop."""
        self.moment = self._comes_round_at = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _come_round_at(self, loop: asyncio.AbstractEventLoop, moment: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._comes_round_at = moment
        self._timer = loop.call_at(moment, self._come_round, loop)

    def _come_round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._comes_round_at = None, inf
        if self.moment - loop.time() < _EARLY_S:
            self.moment = inf
            self._due()
        elif self.moment < inf:
            self._come_round_at(loop, self.moment)


class TimedEvent:
    """An event that is also set when the time of a wait for it is up. One task waits at a time."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """Where it is waited for; to ask for the running one asks the kernel for the process, before Python 3.12."""
        self._timer = MovingTimer(self.set)

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait_within(self, seconds: float) -> None:
        """Wait until it is set."""
        if self._is_set:
            return
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        self._timer.set(loop, seconds)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._timer.moment = inf

    def close(self) -> None:
        """No more waits come."""
        self._timer.close()
