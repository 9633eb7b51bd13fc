"""The acknowledgements of messages that were sent together: waited for together, without a future for each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from cdc.core.deliveries import LostError

Result = Exception | None
"""None: acknowledged. Otherwise what happened to the message instead."""


class Acks:
    """Of ``count`` messages, by their place. Made and used on the event loop."""

    def __init__(self, count: int) -> None:
        self._results: dict[int, Result] = {}
        self._count = count
        self._all = asyncio.get_running_loop().create_future()
        if not count:
            self._all.set_result(None)

    def ended(self, place: int, result: Result = None) -> None:
        """The first result of a message holds."""
        self._results.setdefault(place, result)
        if len(self._results) == self._count and not self._all.done():
            self._all.set_result(None)

    def lost(self, error: Exception) -> None:
        """Nothing more comes: ``error`` is what happened to all others."""
        for place in list(self.open()):
            self.ended(place, error)

    def open(self) -> Iterator[int]:
        return (place for place in range(self._count) if place not in self._results)

    async def results(self, timeout_s: float) -> list[Result]:
        """In the order of the messages. One without an acknowledgement in time counts as lost with its broker."""
        await asyncio.wait([self._all], timeout=timeout_s)
        if not self._all.done():
            self.lost(LostError(f"no acknowledgement came within {timeout_s:g} s"))
        return [self._results[place] for place in range(self._count)]
