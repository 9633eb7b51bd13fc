"""``cdc run``: the process around its consumers, with its event loop, its signals and its end.

SIGTERM, SIGINT or SIGHUP drains. What hangs then, such as a handler that goes on after its cancellation or a thread
that resolves a name, does not delay the end. If the event loop itself is blocked, a thread ends the process.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from cdc.app.application import App
from cdc.app.consumers import Chosen, Consumers, made
from cdc.observability import logs
from cdc.runtime import process
from cdc.runtime.cancelling import cancel

log = logging.getLogger("cdc")

_CUT_OFF_S = 1.0
"""For tasks that were cancelled at the very end."""
_OBJECTS_OF_EACH = 10
"""That a change has while it is in the window, and the garbage collector counts: itself, its row, its key's queue."""
_OBJECTS_MIN, _OBJECTS_MAX = 10_000, 100_000
_OVERTIME_S = 20.0
"""Beyond the drain time, until a stop has failed; all its steps have limits of their own, which are less."""


def serve(chosen: Sequence[Chosen]) -> None:
    """Log, handle signals, run these consumers until one comes, drain, return. What is for all is in the first."""
    settings, _ = chosen[0]
    logs.setup(settings.log.level, settings.log.format)
    spare_the_garbage_collector(sum(settings.window for settings, _ in chosen))
    loop = _new_loop()
    try:
        loop.run_until_complete(_serve(chosen))
    finally:
        _end(loop)


def spare_the_garbage_collector(changes: int) -> None:
    """For a process that is only consumers, whose windows hold so many changes: it took a twelfth of the time.

    What is loaded by now stays, and need not be scanned. The changes of a window are freed by reference counts: the
    collector begins where there is more than they need, and not later than after some MB of garbage.
    """
    gc.freeze()
    gc.set_threshold(min(max(_OBJECTS_MIN, _OBJECTS_OF_EACH * changes), _OBJECTS_MAX), 10, 10)


def _new_loop() -> asyncio.AbstractEventLoop:
    """The loop of uvloop (``pip install 'cdc-consumer[fast]'``) if it is installed, a faster one."""
    make: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    try:
        import uvloop  # noqa: PLC0415 - it need not be there
    except ImportError:
        return make()
    make = uvloop.new_event_loop
    return make()


async def _serve(chosen: Sequence[Chosen]) -> None:
    settings, _ = chosen[0]
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        loop.call_soon_threadsafe(stop.set)
        late = threading.Timer(settings.drain_time + _OVERTIME_S, _end_now, [number])
        late.daemon = True
        late.start()
        log.info("%s: stopping", signal.Signals(number).name)

    process.hand_over(on_signal)
    consumers = await made(chosen)
    stopping = asyncio.create_task(_stop_at(stop, consumers))
    try:
        await consumers.run()
    finally:
        stopping.cancel()
        if not consumers.connected:  # a thread of a library may still be resolving a name
            process.abandon()


async def _stop_at(stop: asyncio.Event, consumers: App | Consumers) -> None:
    await stop.wait()
    consumers.stop()


def _end_now(number: int) -> None:
    log.critical(
        "not ended long after %s: something blocks the event loop; the process ends now, and what ran will run again",
        signal.Signals(number).name,
    )
    os._exit(1)


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on the loop, and close it. What does not end is abandoned, and the loop with it."""
    left = asyncio.all_tasks(loop)
    for task in left:
        cancel(task)
    if left_over := _not_ended(loop, left):
        log.warning("%d tasks go on after their cancellation; the process ends without them", len(left_over))
        process.abandon()
        return
    loop.run_until_complete(loop.shutdown_asyncgens())
    if _not_ended(loop, [loop.create_task(loop.shutdown_default_executor())]):
        process.abandon()
    else:
        loop.close()


def _not_ended(loop: asyncio.AbstractEventLoop, tasks: Collection[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """The tasks that have not ended after a moment."""
    if not all(task.done() for task in tasks):
        loop.run_until_complete(asyncio.wait(tasks, timeout=_CUT_OFF_S))
    return [task for task in tasks if not task.done()]
