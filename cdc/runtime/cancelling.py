"""Who has cancelled a task: this program, or code that is not ours and runs in it.

A handler runs in a task of this program. It may cancel that task (``asyncio.current_task().cancel()``, a child that
cancels its parent, a time limit that ends late), or take a cancellation back (``uncancel()``), so asyncio's count of
cancellations tells nothing. What this program ends it marks, and only the mark counts: any other CancelledError is a
failure of the call that it comes from.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

_asked = set[asyncio.Task[Any]]()
"""To end, and not done yet."""


def cancel(task: asyncio.Task[Any]) -> None:
    """Ask it to end. What it does then is its own business, but it takes up nothing new."""
    if not task.done():
        _asked.add(task)
        task.add_done_callback(_asked.discard)
        task.cancel()


def is_being_cancelled(task: asyncio.Task[Any] | None = None) -> bool:
    """Whether this program has asked the task (None: the one that runs) to end."""
    return (task or asyncio.current_task()) in _asked


def has_cancellations() -> bool:
    """Whether the task that runs has any on it: then there is something to ``disregard``, or it is to end."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling() > 0 or task in _asked


async def disregard() -> None:
    """After a call of code that is not ours: what it has left of cancellations in this task hits nobody else.

    Raises CancelledError where this program has asked the task to end.
    """
    if not has_cancellations():
        return
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(asyncio.CancelledError):
        turned = asyncio.Event()
        asyncio.get_running_loop().call_soon(turned.set)
        await turned.wait()  # a cancellation on its way arrives here
    if task in _asked:
        raise asyncio.CancelledError
    while task.uncancel():
        pass
