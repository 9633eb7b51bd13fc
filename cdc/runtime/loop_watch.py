"""Whether the event loop turns, and what keeps it from turning.

    run     on the loop: notes each turn
    watch   in a thread: looks at these notes, and at what the loop's thread does when there was none for too long

A handler that waits without ``await`` stops all others, the marks and the wake-ups. Nothing on the loop can say so
meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from math import inf

from cdc.core.frames import doing

log = logging.getLogger("cdc")

_TURN_EVERY_S = 1.0
_BLOCKED_S = 5.0
"""Longer than a busy machine makes it wait."""
_LOOK_EVERY_S = 2.5
_SAY_EVERY_S = 60.0


class LoopWatch:
    """Made on the event loop."""

    def __init__(self) -> None:
        self.last_iteration_at = time.monotonic()
        self.stopping = threading.Event()
        """Set, and ``watch`` returns."""
        self._said_at = -inf
        self._of_loop = threading.get_ident()

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            self.last_iteration_at = time.monotonic()
            await asyncio.sleep(_TURN_EVERY_S)

    def watch(self) -> None:
        """Log what blocks the event loop."""
        began = time.monotonic()
        while not self.stopping.wait(_LOOK_EVERY_S):
            now = time.monotonic()
            # If this thread slept as well, the whole process was stopped.
            if now - began < 2 * _LOOK_EVERY_S and (blocks := self.blocks(now)):
                log.warning("%s", blocks)
            began = time.monotonic()

    def blocks(self, now: float) -> str | None:
        """What blocks the event loop, if anything does, once a minute. ``now``: by time.monotonic()."""
        blocked_s = now - self.last_iteration_at
        if blocked_s < _BLOCKED_S or now - self._said_at < _SAY_EVERY_S:
            return None
        frame = sys._current_frames().get(self._of_loop)  # noqa: SLF001 - no public name has it
        if frame is None:
            return None
        self._said_at = now
        return (
            f"the event loop has not turned for {blocked_s:.0f} s, and no other handler runs meanwhile; it is in"
            f" {', '.join(doing(frame))}"
        )
