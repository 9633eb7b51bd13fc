"""Threads for handlers that are not async.

An executor of our own, for one reason: those of the standard library are joined when the interpreter ends, and a
handler that never returns would keep a stopped consumer alive for ever. These are daemon threads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cdc.engine.calls import EscapedError, as_exception
from cdc.runtime.cancelling import disregard, is_being_cancelled


class Job:
    """A queued or running call. ``future`` brings what it returns or raises."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        call: Callable[[], Any],
        limit_s: float | None,
        overran: Callable[[], None] | None,
    ) -> None:
        self.call = call
        self._loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self._ended: tuple[Any, BaseException | None] | None = None
        self.started_at: float | None = None  # written by the thread, read by the event loop
        self.called_off = False
        self.limit_s = limit_s
        self.overran = overran

    def call_off(self) -> None:
        """The result is not needed, nor the call if it has not begun. A call that has begun goes on to its end."""
        self.called_off = True
        self.future.cancel()

    def ended(self, result: Any, error: BaseException | None) -> None:
        """On the event loop."""
        self._ended = result, error
        _resolve(self.future, result, error)

    async def outcome(self) -> Any:
        """What the call returns or raises.

        A cancelled task goes on to wait, as the call goes on, too, and holds the change's key. Only this program ends
        the wait.
        """
        while True:
            try:
                return await self.future
            except asyncio.CancelledError:
                if is_being_cancelled():
                    self.call_off()
                    raise
                await disregard()
                self.future = self._loop.create_future()
                if self._ended:
                    _resolve(self.future, *self._ended)

    def left_s(self) -> float:
        """Seconds until it overruns; waiting for a free thread does not count."""
        assert self.limit_s is not None
        began = self.started_at
        return self.limit_s if began is None else began + self.limit_s - time.monotonic()


class Threads:
    """Up to ``size`` threads, started as they are needed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._loop: asyncio.AbstractEventLoop | None = None
        """To ask for the running one asks the kernel for the process, before Python 3.12."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._started = 0
        self._busy = 0
        """Queued and running jobs; also a job that was called off, until a thread is done with it."""
        self._limited: set[Job] = set()
        self._timer: asyncio.TimerHandle | None = None
        """One timer for all of them, set for the first that could overrun; most never do."""
        self._timer_s = 0.0
        """How far ahead it was set: what is begun with a longer limit since then overruns later."""
        self._ended: deque[tuple[Job, Any, BaseException | None]] = deque()
        self._notified = False
        """The event loop is about to take in the ended jobs: waking it for each would cost more than many calls."""

    def submit(
        self, call: Callable[[], Any], limit_s: float | None = None, overran: Callable[[], None] | None = None
    ) -> Job:
        """Run ``call`` in a thread, whose context other calls share: foreign code needs one of its own.

        ``overran`` is called, on the event loop, if it is still running at its limit.
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        job = Job(loop, call, limit_s, overran)
        self._busy += 1
        if self._busy > self._started < self._size:
            self._started += 1
            threading.Thread(target=self._run, args=[loop], name=f"cdc-handler-{self._started}", daemon=True).start()
        if limit_s is not None:
            self._limited.add(job)
            self._watch(loop, limit_s)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Let the threads end when the queue is empty."""
        if self._timer:
            self._timer.cancel()
        for _ in range(self._started):
            self._jobs.put(None)

    def _watch(self, loop: asyncio.AbstractEventLoop, left_s: float) -> None:
        if self._timer is not None and left_s >= self._timer_s:
            return
        if self._timer is None or self._timer.when() > loop.time() + left_s:
            if self._timer:
                self._timer.cancel()
            self._timer_s = left_s
            self._timer = loop.call_later(left_s, self._report_overruns, loop)

    def _report_overruns(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for job in [job for job in self._limited if job.left_s() <= 0]:
            self._limited.discard(job)
            if job.overran and not job.called_off:
                job.overran()
        if self._limited:
            self._watch(loop, min(job.left_s() for job in self._limited))

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while job := self._jobs.get():
            result: Any = None
            error: BaseException | None = None
            try:
                if not job.called_off:
                    job.started_at = time.monotonic()
                    result = job.call()
            except BaseException as raised:  # noqa: BLE001 - a handler's SystemExit must not end the thread unnoticed
                error = raised
            self._ended.append((job, result, error))
            if not self._notified:
                self._notified = True
                try:
                    loop.call_soon_threadsafe(self._take_in)
                except RuntimeError:
                    return  # the loop has been closed; no task waits any more

    def _take_in(self) -> None:
        self._notified = False  # before the first look: what ends from here on wakes the loop again
        while self._ended:
            job, result, error = self._ended.popleft()
            self._busy -= 1
            self._limited.discard(job)
            job.ended(result, error)


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, asyncio.CancelledError):
        future.set_exception(EscapedError(error))  # the task that waits was not cancelled
    else:
        future.set_exception(as_exception(error))
