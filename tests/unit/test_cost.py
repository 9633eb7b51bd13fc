"""What a change costs in the pure core, counted in bytecode instructions: no clock, so that it is the same everywhere.

A loop over what is queued, owned or waiting, where there should be a look-up, shows as a multiple. The bounds are twice
what was counted on Python 3.11; what a later one counts differs by a fifth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from cdc.core.admission import Row
from cdc.core.model import SHARDS, Processed, WakeUp
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import Requirements
from cdc.core.shard_cursor import Snapshot
from cdc.core.shard_ownership import Acquired
from tests.changes import row
from tests.settling import SettlingScheduler

_SNAPSHOT = Snapshot(1_000, 1_000)
_BATCH = 250


def instructions(work: Callable[[], object]) -> int:
    """How many bytecode instructions it takes."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def rows(first: int, count: int, keys: int) -> list[Row]:
    return [row(seq, f"key {seq % keys}", shard=seq % keys % SHARDS) for seq in range(first, first + count)]


def scheduler_with(queued: int, keys: int, run: int = 1) -> SettlingScheduler:
    """Lanes that own everything, with so many changes queued; the keys of what comes later are others."""
    scheduler = SettlingScheduler(
        100_000, key_capacity=100_000, needs=lambda change: Requirements(change.entity_type, run=run)
    )
    scheduler.ownership.acquire(Acquired(range(SHARDS)))
    scheduler.admit([row(seq, f"queued {seq % keys}", shard=seq % keys % SHARDS) for seq in range(1, queued + 1)])
    return scheduler


def through(scheduler: SettlingScheduler, found: list[Row]) -> None:
    """Admitted, started, finished, settled."""
    with scheduler.reading:
        scheduler.admit(found)
    to_start = len(found)
    while to_start > 0:
        run = scheduler.start().changes
        to_start -= len(run)
        scheduler.finished([Settlement(change, Processed()) for change in run])
    scheduler.settled(scheduler.take_finished(len(found)))


# 999 were counted for changes that start one by one, and 700 for those that start in runs.
@pytest.mark.parametrize(("keys", "run", "bound"), [(_BATCH, 1, 1_900), (10, 1, 1_900), (_BATCH, 100, 1_400)])
def test_a_change_goes_through_the_lanes_in_so_many_instructions(keys: int, run: int, bound: int) -> None:
    scheduler, found = scheduler_with(0, 1, run), rows(1, _BATCH, keys)
    assert instructions(lambda: through(scheduler, found)) < bound * _BATCH


@pytest.mark.parametrize("keys", [10, 2_000])
def test_what_is_queued_already_makes_no_change_dearer(keys: int) -> None:
    few, many = scheduler_with(20, 10), scheduler_with(20_000, keys)
    found = rows(50_000, _BATCH, _BATCH)
    alone, beside = instructions(lambda: through(few, found)), instructions(lambda: through(many, found))
    assert beside < 1.2 * alone


def planner_live() -> ReadPlanner:
    """All shards owned, swept and live, the slot streaming."""
    planner = ReadPlanner(sweep_interval_s=1_000.0)
    planner.acquired(Acquired(range(SHARDS)))
    planner.streaming(connected=True)
    for now in (0.0, 0.1):  # the second pass sees what the first may have missed
        request = planner.next(now, 1_000, 1)
        assert isinstance(request, Sweep)
        planner.swept(request, [], {}, _SNAPSHOT, now)
    assert planner.live_shards == SHARDS
    return planner


def fetch(planner: ReadPlanner, wakeups: list[WakeUp]) -> None:
    """A wake-up came, and it was asked for and found."""
    planner.notified(wakeups)
    request = planner.next(1.0, len(wakeups), 1)
    assert isinstance(request, Fetch)
    planner.fetched(request, {wakeup.seq for wakeup in request.wakeups}, _SNAPSHOT, 1.0)


# 174 were counted for a wake-up in a batch, and 467 for one alone; a look at all shards would be a thousand more.
def test_a_wakeup_is_fetched_in_so_many_instructions() -> None:
    planner = planner_live()
    many = [WakeUp(seq, seq % SHARDS) for seq in range(1, _BATCH + 1)]
    assert instructions(lambda: fetch(planner, many)) < 350 * _BATCH
    fetch(planner, [WakeUp(999, 1)])
    assert instructions(lambda: fetch(planner, [WakeUp(1_000, 1)])) < 940
