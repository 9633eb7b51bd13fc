"""Wake-ups from outside, on their way to the read planner."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, Counter

from cdc.core.model import SHARDS, WakeUp
from cdc.core.read_planner import ReadPlanner, Sweep
from cdc.core.shard_cursor import Snapshot
from cdc.core.shard_ownership import Acquired
from cdc.engine.notifications import Notifications


def _notifications(owned: set[int]) -> tuple[Notifications, ReadPlanner]:
    planner = ReadPlanner(sweep_interval_s=60.0)
    planner.acquired(Acquired(owned))
    dropped = Counter("dropped", "dropped", registry=CollectorRegistry())
    return Notifications(planner, dropped, owned=owned, sweep_interval_s=60.0, poll_interval_s=1.0), planner


async def test_wake_ups_of_others_shards_are_handed_back_and_do_not_wake() -> None:
    notifications, _ = _notifications({0})
    assert notifications.is_sharing
    assert notifications.notified([WakeUp(7, 1)]) == [WakeUp(7, 1)]
    assert not notifications.due.is_set()
    assert notifications.notified([WakeUp(8, 0), WakeUp(9, 1)]) == [WakeUp(9, 1)]
    assert notifications.due.is_set()


async def test_who_owns_all_shards_hands_none_back_and_notices_when_that_ends() -> None:
    owned = set(range(SHARDS))
    notifications, _ = _notifications(owned)
    assert not notifications.is_sharing
    assert list(notifications.notified([WakeUp(7, 1)])) == []
    owned.remove(1)
    assert notifications.is_sharing
    assert notifications.notified([WakeUp(8, 1)]) == [WakeUp(8, 1)]


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(lambda each: each.missed(), id="wake-ups were missed"),
        pytest.param(lambda each: each.streaming(connected=True), id="the stream is another one"),
        pytest.param(lambda each: each.streaming(connected=False), id="the stream ends"),
    ],
)
async def test_what_may_have_lost_wake_ups_has_every_shard_swept(happens: Callable[[Notifications], None]) -> None:
    notifications, planner = _notifications({3, 4})
    notifications.streaming(connected=True)
    now = time.monotonic()
    for _ in range(2):
        sweep = planner.next(now, 100, 1)
        assert isinstance(sweep, Sweep)
        planner.swept(sweep, [], {}, Snapshot(10, 10), now)
        now += 1.0
    assert planner.live_shards == 2
    assert planner.next(now, 100, 1) is None
    happens(notifications)
    sweep = planner.next(now, 100, 1)
    assert isinstance(sweep, Sweep)
    assert sweep.positions.keys() == {3, 4}
    assert planner.live_shards == 0


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(lambda each: each.captured(), id="captured"),
        pytest.param(lambda each: each.missed(), id="missed"),
        pytest.param(lambda each: each.streaming(connected=True), id="the stream begins"),
        pytest.param(lambda each: each.streaming(connected=False), id="the stream ends"),
    ],
)
async def test_what_may_have_brought_changes_asks_for_a_read_soon(happens: object) -> None:
    notifications, planner = _notifications({0})
    assert callable(happens)
    happens(notifications)
    assert notifications.due.is_set()
    assert planner.wait_s(time.monotonic()) <= 1.0
