"""Threads for handlers that are not async.

An executor of our own, for one reason: those of the standard library are joined when the interpreter ends, and a
handler that never returns would keep a stopped consumer alive for ever. These are daemon threads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Job:
    """A call on its way. ``future`` brings what it returns or raises."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.started_at: float | None = None  # written by the thread, read by the event loop
        self.called_off = False

    def call_off(self) -> None:
        """Nobody wants the answer, nor the call if it has not begun. One that has begun goes on; nothing stops it."""
        self.called_off = True
        self.future.cancel()

    async def returns_within(self, limit_s: float | None) -> bool:
        """Whether the call ends within so many seconds of its start; waiting for a free thread does not count."""
        while not self.future.done():
            began = self.started_at
            left = limit_s if limit_s is None or began is None else began + limit_s - time.monotonic()
            if left is not None and left <= 0:
                return False
            await asyncio.wait({self.future}, timeout=left)
        return True


class Threads:
    """Up to ``size`` threads, started as they are needed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._started = 0
        self._busy = 0

    def submit(self, call: Callable[[], Any]) -> Job:
        """Run ``call`` in a thread."""
        job = Job(call)
        self._busy += 1
        job.future.add_done_callback(self._returned)
        if self._busy > self._started < self._size:
            self._started += 1
            threading.Thread(target=self._run, name=f"cdc-handler-{self._started}", daemon=True).start()
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Let the threads end when they have nothing left to do."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _returned(self, _future: asyncio.Future[Any]) -> None:
        self._busy -= 1

    def _run(self) -> None:
        while job := self._jobs.get():
            if job.called_off:
                continue
            job.started_at = time.monotonic()
            result: Any = None
            error: BaseException | None = None
            try:
                result = job.call()
            except BaseException as raised:  # noqa: BLE001 - a handler's SystemExit must not end the thread unnoticed
                error = raised
            try:
                job.loop.call_soon_threadsafe(_resolve, job.future, result, error)
            except RuntimeError:
                return  # the loop has been closed; nobody waits any more


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        future.set_exception(error)
    else:
        # What would end the task that waits instead of telling it (SystemExit, GeneratorExit ...), or a future refuses.
        future.set_exception(RuntimeError(f"the handler raised {type(error).__name__}"))
