"""A time limit for an await, correct on every Python that is supported.

``asyncio.timeout`` of Python 3.11.0 to 3.11.2, which Debian 12 has, distinguishes its own end from a cancellation by
the number of cancellations that the task has seen, not by how many came meanwhile. A task group that failed leaves one
behind, until Python 3.13, and a cleanup follows one: there each limit that passed would end its task, not its wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Timeout(asyncio.Timeout):  # type: ignore[misc]  # final, for type checkers; what it lacks is said above
    async def __aenter__(self) -> asyncio.Timeout:
        self._before = _cancelled()
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        if self.expired() and kind is asyncio.CancelledError and _cancelled() <= self._before:
            raise TimeoutError from error


def _cancelled() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


def deadline(seconds: float | None) -> asyncio.Timeout:
    """``asyncio.timeout``: raises TimeoutError after ``seconds``; None: no limit yet."""
    if sys.version_info >= (3, 11, 3):
        return asyncio.timeout(seconds)
    now = asyncio.get_running_loop().time()
    return _Timeout(None if seconds is None else now + seconds)


async def wait_within(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set or the time is up."""
    with contextlib.suppress(TimeoutError):
        async with deadline(seconds):
            await event.wait()


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The result of the work; None if the event is set first: then the work is cancelled."""
    task, happened = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait([task, happened], return_when=asyncio.FIRST_COMPLETED)
    finally:
        happened.cancel()
        task.cancel()
        await asyncio.wait([task, happened])
    return None if task.cancelled() else task.result()
