"""The scheduler and the queue of what is to be settled, as ``Settler`` puts them together, without a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdc.core.model import SHARDS, Committed
from cdc.core.read_reconciler import Settlement
from cdc.core.scheduler import KeyScheduler
from cdc.core.settle_queue import SettleQueue


class SettlingScheduler(KeyScheduler):
    """What finishes is queued; ``take_finished`` gives it, and ``settled`` says that it is in the table."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.to_settle = SettleQueue()

    def finished(self, batch: Sequence[Settlement]) -> list[Settlement]:
        to_settle = super().finished(batch)
        self.to_settle.add(*to_settle)
        return to_settle

    def take_finished(self, limit: int) -> list[Settlement]:
        return self.to_settle.take(limit)

    def settled(self, batch: Sequence[Settlement]) -> None:
        written = self.to_settle.written(one for one in batch if not isinstance(one.outcome, Committed))
        super().settled([one for one in batch if isinstance(one.outcome, Committed) or one in written])

    def lost(self) -> None:
        """Nothing is kept: its shards are others' by now."""
        self.to_settle.park()
        self.to_settle.drop(range(SHARDS))
        super().lost()
