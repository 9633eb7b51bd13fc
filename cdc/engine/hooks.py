"""The router's hooks: ``on_processed`` and ``on_error``, the documented ``change:processed`` and ``change:error``, and
``on_wakeup``.

They run while the work goes on, one after the other and in threads of their own, and never disturb it: their errors are
logged, a call that takes too long is given up, and when they fall far behind, calls are dropped instead of delaying
the changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from cdc.core.frames import trace
from cdc.core.model import Change, WakeUp
from cdc.core.router import Hook, Router
from cdc.engine.calls import Contexts, EscapedError, call_async
from cdc.engine.thread_pool import Threads
from cdc.runtime.cancelling import is_being_cancelled
from cdc.runtime.deadline import deadline

log = logging.getLogger("cdc.hooks")

_LIMIT_S = 10.0
_BACKLOG_MAX, _BACKLOG_BYTES = 10_000, 16 << 20
"""Calls, and bytes of the documents of their changes, or of numbers."""
_SEQ_BYTES = 40
"""Of a number and its place in a list."""
_THREADS = 4
"""More than one, because a call that was given up may hold its thread for ever."""


class Hooks:
    """Calls the hooks of ``router``."""

    def __init__(self, router: Router) -> None:
        self.for_processed = router.processed_hooks
        """Where there is none, ``processed`` need not be called; nor ``woken``, without ``for_wakeups``."""
        self._failed = router.error_hooks
        self.for_wakeups = router.wakeup_hooks
        self._threads = Threads(_THREADS)
        self._news: asyncio.Queue[tuple[Hook, int, tuple[Any, ...]]] = asyncio.Queue(_BACKLOG_MAX)
        self._overflowing = False
        self._bytes = 0

    def processed(self, changes: Iterable[Change]) -> None:
        for hook in self.for_processed:
            for change in changes:
                self._tell(hook, change.size, change)

    def failed(self, change: Change, error: BaseException) -> None:
        for hook in self._failed:
            self._tell(hook, change.size, change, error)

    def woken(self, wakeups: Sequence[WakeUp]) -> None:
        """Notifications have just come in."""
        seqs, at = [wakeup.seq for wakeup in wakeups], time.monotonic()
        for hook in self.for_wakeups:
            self._tell(hook, _SEQ_BYTES * len(seqs), seqs, at)

    async def run(self) -> None:
        """Call the hooks as calls are queued, until cancelled."""
        while True:
            hook, size, arguments = await self._news.get()
            try:
                await self._call(hook, arguments)
            finally:
                self._bytes -= size
                self._news.task_done()

    async def drain(self, seconds: float) -> None:
        """Wait until all queued calls are made, up to ``seconds``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.join(), seconds)

    def _tell(self, hook: Hook, size: int, *arguments: Any) -> None:
        if not self._news.full() and (self._bytes + size <= _BACKLOG_BYTES or not self._bytes):
            self._news.put_nowait((hook, size, arguments))
            self._bytes += size
            self._overflowing = False
        else:
            if not self._overflowing:
                log.warning("hooks are %d calls behind; calls are dropped until they catch up", self._news.qsize())
            self._overflowing = True

    async def _call(self, hook: Hook, arguments: tuple[Any, ...]) -> None:
        try:
            async with deadline(_LIMIT_S):
                if inspect.iscoroutinefunction(hook):
                    await call_async(hook, *arguments)
                else:
                    call = functools.partial(Contexts.current().new().run, hook, *arguments)
                    await self._threads.submit(call).future
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise
            self._say(hook, error)
        except Exception as error:  # noqa: BLE001 - a hook's failure never disturbs the work
            self._say(hook, error)

    def _say(self, hook: Hook, error: BaseException) -> None:
        name = getattr(hook, "__qualname__", type(hook).__name__)
        log.warning("hook %s: %s; the work goes on", name, where(error, hook))


def where(error: BaseException, function: Any = None) -> str:
    """The error's class and its place. Not its text, which may quote the row.

    ``function``: the place is looked for in its own code, wherever that is installed.
    """
    if isinstance(error, EscapedError):
        error = error.error
    return str(trace(error, function))
