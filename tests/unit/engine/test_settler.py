"""When outcomes are written: those of a moment together, and at once when there are enough."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cdc.core.admission import Row
from cdc.core.model import Change, Processed
from cdc.core.read_reconciler import Settlement
from cdc.core.scheduler import KeyScheduler
from cdc.core.shard_ownership import Acquired
from cdc.engine import settler as module
from cdc.engine.dispatcher import OtherTasks
from cdc.engine.settler import Settler
from cdc.observability.metrics import OutboxMetrics
from cdc.postgres.pages import Settled
from tests.changes import change
from tests.eventually import eventually_async

_WINDOW = 40
_WORTH = _WINDOW // 4


class _Table:
    """What was written, a list for each settle."""

    def __init__(self) -> None:
        self.written: list[list[Change]] = []

    async def settle(self, connection: object, batch: Sequence[Settlement], **_: object) -> Settled:
        self.written.append([finished.change for finished in batch])
        return Settled(0, datetime.now(UTC))

    async def has(self, settles: int) -> None:
        async def are_there() -> bool:
            return len(self.written) == settles

        await eventually_async(are_there, what=f"{settles} settles")


async def test_outcomes_share_a_settle_until_there_are_enough_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of ten minutes, which only the number of outcomes can end."""
    monkeypatch.setattr(module, "_PAUSE_S", 600.0)
    changes = [change(seq, f"k{seq}") for seq in range(1, _WORTH + 3)]
    scheduler = KeyScheduler(_WINDOW)
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([Row(each, False) for each in changes])
    while scheduler.start().changes:
        pass
    table: Any = _Table()
    settler = Settler(
        scheduler, table, OutboxMetrics(CollectorRegistry()), committed=lambda committed: None,
        settled=lambda done, found: None, iterated=lambda *, answered=False: None,
    )  # fmt: skip
    session: Any = SimpleNamespace(writing=asyncio.Lock(), connection=None)
    running = asyncio.create_task(settler.run(session, session))
    ended = [Settlement(each, Processed()) for each in changes]

    settler.put(ended[:1])
    await table.has(1)
    settler.put(ended[1:2])
    for _ in range(20):
        await OtherTasks()
    assert len(table.written) == 1
    settler.put(ended[2:])
    await table.has(2)

    settler.finish()
    await running
    assert table.written == [changes[:1], changes[1:]]
