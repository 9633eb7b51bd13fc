"""Whether the application takes connections, as all calls that deliver to it share it.

A connection that cannot be made was seen by nobody: it is no attempt at the change. So the call waits in here, and its
change stays as it was. One call at a time goes to see whether it can be made by now, with a growing pause before; when
one can, all of them go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from cdc.cancelling import cancel
from cdc.deadline import deadline

log = logging.getLogger("cdc.deliver")

_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 3.0
_STEADY_S = 10.0
"""An application that comes and goes faster than that is asked at the pace that was reached, and told of at it, too."""


class Gate:
    """``place`` is for the log. ``show`` hears whether it is open."""

    def __init__(self, place: str, show: Callable[[bool], None]) -> None:
        self._place = place
        self._show = show
        self._open = asyncio.Event()
        self._open.set()
        self._turn = asyncio.Lock()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._stopped = False
        self._pause_s = _PAUSE_MIN_S
        self._turned = float("-inf")
        self.shut_by = ""
        """Why it is shut; "" while it is open. Read by the health thread."""

    async def enter(self) -> None:
        """Wait until the application takes connections, or until it is one's turn to find out."""
        if self._open.is_set():
            return
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            if self._stopped:
                cancel(task)
            async with self._turn:
                if not await self._opens_within(self._pause_s):
                    self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
        finally:
            self._waiting.discard(task)

    def shut(self, why: str) -> None:
        """A connection could not be made."""
        if not self._open.is_set():
            return
        now = asyncio.get_running_loop().time()
        if now - self._turned > _STEADY_S:
            self._pause_s = _PAUSE_MIN_S
        self._turned = now
        self._open.clear()
        self.shut_by = why
        self._show(False)
        log.warning(
            "the application at %s cannot be reached (%s): changes wait, and no attempt is counted; start it, or"
            " correct CDC_DELIVER_TO", self._place, why,
        )  # fmt: skip

    def opened(self) -> None:
        """A connection was made."""
        if self._open.is_set():
            return
        now = asyncio.get_running_loop().time()
        log.info("the application at %s is reached again, after %.1f s", self._place, now - self._turned)
        self._turned = now
        self._open.set()
        self.shut_by = ""
        self._show(True)

    def stop(self) -> None:
        """Who waits, or would wait from now on, is cut off: its change stays as it was."""
        self._stopped = True
        if self._waiting:
            log.info("%d calls that waited for the application are cut off", len(self._waiting))
        for task in self._waiting:
            cancel(task)

    async def _opens_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with deadline(seconds):
                await self._open.wait()
        return self._open.is_set()
