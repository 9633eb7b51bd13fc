"""What a process requires of its consumer, whether it handles changes or only observes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from cdc.core.model import WakeUp
from cdc.observability.snapshots import ConsumerStatus


class ConsumerPort(Protocol):
    """For the event loop, except ``status`` and ``exposed``."""

    connected: asyncio.Event
    """Set at the first connection and never unset."""

    @property
    def status(self) -> ConsumerStatus:
        """From any thread."""

    @property
    def in_service(self) -> bool:
        """There are connections, and a schema."""

    @property
    def is_sharing(self) -> bool:
        """Whether it does not own all shards."""

    def exposed(self) -> bool:
        """A change runs that may end the process; from any thread."""

    async def run(self) -> None:
        """Run until stopped. Raises the error when the very first connection is refused."""

    def stop(self) -> None: ...

    def notified(self, wakeups: Sequence[WakeUp], *, relayed: bool = False) -> Sequence[WakeUp]:
        """These have come in from the slot. Returns those to be relayed: other consumers own their shards.

        ``relayed``: they come from the process that streams, or streamed when it sent them.
        """

    def captured(self) -> None:
        """Changes were captured, and it is not known which."""

    def sweep_now(self) -> None:
        """The table changed without a wake-up for each row."""

    def missed(self) -> None:
        """Wake-ups were lost."""

    def streaming(self, *, connected: bool) -> None:
        """This process's stream has begun, or has ended."""
