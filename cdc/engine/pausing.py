"""Takes what is paused to the scheduler: what is queued goes back to the table, and what is resumed is read again.

On the event loop, except ``all`` and ``read_at``. See ``core.pauses``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from cdc.core.model import Key
from cdc.core.pauses import Pause, Pauses
from cdc.core.router import Router
from cdc.core.scheduler import KeyScheduler
from cdc.runtime.deadline import deadline, unless, wait_within

log = logging.getLogger("cdc.consumer")

_POLL_S, _SOON_S = 1.0, 0.2
"""Between two polls: at most, and where something may be paused or resumed."""


class Pausing:
    """``give_back``: what was taken for a call and is not called yet, of the keys for which its argument is true.

    ``reread``: the outbox, from the beginning.
    """

    def __init__(
        self,
        scheduler: KeyScheduler,
        router: Router,
        *,
        give_back: Callable[[Callable[[Key], bool]], None],
        reread: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._router = router
        self._give_back = give_back
        self._reread = reread
        self._may_have_changed = asyncio.Event()
        self.read_at = 0.0
        """When it was read last, by time.monotonic(): ages and times left are those of that moment."""

    @property
    def all(self) -> Pauses:
        """What is paused, as far as this consumer knows."""
        return self._scheduler.held.pauses

    def ask_soon(self) -> None:
        """Something may be paused or resumed."""
        self._may_have_changed.set()

    async def until_asked(self, stopping: asyncio.Event) -> bool:
        """Until the next poll is due. Whether somebody has asked for it."""
        await wait_within(stopping, _SOON_S)
        with contextlib.suppress(TimeoutError):
            async with deadline(_POLL_S - _SOON_S):
                await unless(stopping, self._may_have_changed.wait())
        asked = self._may_have_changed.is_set()
        self._may_have_changed.clear()
        return asked

    def became(self, found: Sequence[Pause]) -> None:
        """These are in force: others than before, or a new session reads them for the first time."""
        before, now = {pause.id: pause for pause in self.all.all}, {pause.id: pause for pause in found}
        for id_ in now.keys() - before.keys():
            pause = now[id_]
            log.warning("paused: %s, by %s: %s", pause, pause.set_by, pause.because, extra={"event": "paused"})
        for id_ in before.keys() - now.keys():
            log.info("resumed: %s", before[id_], extra={"event": "resumed"})
        self.read_at = time.monotonic()
        held = Pauses(found, self._router)
        self._scheduler.hold(held)
        if before.keys() != now.keys():
            self._give_back(held.hold)
            self._reread()
