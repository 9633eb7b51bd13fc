"""A lock for tasks that is mostly free: to take it then costs no coroutine, where asyncio's costs three."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """``async with``, as with ``asyncio.Lock``: one task has it at a time, in the order in which they came.

    Where even these two steps are too many: set ``taken`` if it is not, else ``wait``, and ``release`` it afterwards.
    """

    __slots__ = ("_waiting", "taken")

    def __init__(self) -> None:
        self.taken = False
        self._waiting = deque[asyncio.Future[None]]()

    async def wait(self) -> None:
        """Wait until it is handed over; whoever releases it does that."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was handed over in the meantime
                self.release()
            raise

    def release(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # a cancelled task does not come
                turn.set_result(None)
                return
        self.taken = False

    async def __aenter__(self) -> None:
        if self.taken:
            await self.wait()
        self.taken = True

    async def __aexit__(self, *_: object) -> None:
        self.release()
