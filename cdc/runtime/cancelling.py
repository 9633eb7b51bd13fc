"""Whether this program has cancelled a task, or foreign code that runs in it.

A handler runs in a task of this program. It may cancel that task (``asyncio.current_task().cancel()``, a child that
cancels its parent, a time limit that ends late), or take a cancellation back (``uncancel()``), so asyncio's count of
cancellations says nothing. This program marks the tasks that it cancels, and only the mark counts: any other
CancelledError is a failure of the call that raised it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

_asked = set[asyncio.Task[Any]]()
"""Tasks that this program has cancelled and that are not done yet."""


def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel the task. It may run on for a while, but it takes up nothing new."""
    if not task.done():
        _asked.add(task)
        task.add_done_callback(_asked.discard)
        task.cancel()


def is_being_cancelled(task: asyncio.Task[Any] | None = None) -> bool:
    """Whether this program has cancelled the task (None: the current one)."""
    return (task or asyncio.current_task()) in _asked


def has_cancellations(task: asyncio.Task[Any] | None = None) -> bool:
    """Whether the current task has any cancellation: one to ``disregard``, or the task is to end.

    ``task``: the current one, where the caller has it.
    """
    task = task or asyncio.current_task()
    assert task is not None
    return task.cancelling() > 0 or task in _asked


async def disregard() -> None:
    """Remove the cancellations that a call of foreign code has left in this task, so that they hit no other call.

    Raises CancelledError if this program has cancelled the task.
    """
    if not has_cancellations():
        return
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(asyncio.CancelledError):
        turned = asyncio.Event()
        asyncio.get_running_loop().call_soon(turned.set)
        await turned.wait()  # a pending cancellation arrives here
    if task in _asked:
        raise asyncio.CancelledError
    while task.uncancel():
        pass
