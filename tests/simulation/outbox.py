"""One outbox, and those who read it: what is written is there for all, and what each has done is its own.

Each reader has a ``Server`` of its own with the same transactions and numbers, so that its rows have states of their
own. One slot wakes all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.simulation.server import Server, Slot


class Outbox:
    """``positions``: for each reader, whether it is a subscription, or the default one."""

    def __init__(self, positions: Sequence[bool], *, durable_slot: bool) -> None:
        self.slot = Slot(durable_slot)
        self.readers = [Server(self.slot, positions=each, rings=not place) for place, each in enumerate(positions)]

    @property
    def open(self) -> list[int]:
        """The transactions that have not ended, whether what they wrote is on disk or not."""
        return list(self.readers[0].open)

    @property
    def flushed(self) -> set[int]:
        return self.readers[0].flushed

    @property
    def unflushed(self) -> list[int]:
        return [xid for xid in self.open if xid not in self.flushed]

    def begin(self) -> int:
        [xid] = {reader.begin() for reader in self.readers}
        return xid

    def write(self, xid: int, key: str) -> None:
        for reader in self.readers:
            reader.write(xid, key)

    def replay(self, numbers: Iterable[int], *, only: Server | None) -> int:
        """Write these once more, for all, or for one of them: the others see no row of those numbers, ever."""
        numbers = list(numbers)
        xid = self.begin()
        for reader in self.readers:
            reader.replay(xid, numbers, visible=only in (None, reader))
        return xid

    def flush(self, xid: int) -> None:
        for reader in self.readers:
            reader.flush(xid)

    def end(self, xid: int) -> None:
        for reader in self.readers:
            reader.end(xid)

    def pass_time(self, seconds: float) -> None:
        for reader in self.readers:
            reader.now += seconds

    @property
    def settled(self) -> bool:
        return not any(any(reader.visible()) for reader in self.readers)
