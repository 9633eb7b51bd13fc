"""When is looked again for what is due."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

import pytest

from cdc.core.read_planner import ReadPlanner
from cdc.core.router import Router
from cdc.core.scheduler import KeyScheduler
from cdc.core.shard_ownership import Acquired
from cdc.engine import reader
from cdc.engine.reader import Reader
from cdc.observability.metrics import Metrics
from cdc.postgres.outbox import FIRST_TYPE
from cdc.postgres.pages import DuePage


class _Store:
    """Nothing is due yet; a look takes ``took_s`` of the clock."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.took_s = 0.0
        self.looks = 0
        self.starts: list[int] = []
        self.go_on: int | None = None

    async def due(
        self,
        _reader: object,
        _shards: Iterable[int],
        _limit: int,
        _without: Iterable[str] = (),
        *,
        start: int,
        in_window: Iterable[int],
    ) -> DuePage:
        assert list(in_window) == []
        self.looks += 1
        self.clock += self.took_s
        self.starts.append(start)
        return DuePage([], 0.05, self.go_on)

    async def advance(self, _reader: object) -> bool:
        return False


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> _Store:
    made = _Store()
    monkeypatch.setattr(reader, "_now", lambda: made.clock)
    return made


async def _look(store: _Store, scheduler: KeyScheduler | None = None) -> Reader:
    planner = ReadPlanner(sweep_interval_s=3600.0)
    assert planner.next(0.0, 1, 1) is None  # the next sweep is an hour off
    scheduler = scheduler or KeyScheduler(100)
    scheduler.ownership.acquire(Acquired([0]))
    made = Reader(
        scheduler, planner, store, store, Metrics("cdc", Router()),  # type: ignore[arg-type]
        sweep_interval_s=3600.0, poll_interval_s=3600.0,
    )  # fmt: skip
    reader: Any = None
    session: Any = None
    assert await made.once(reader, session)
    assert store.looks == 1
    return made


async def test_what_is_due_next_is_looked_for_when_it_is_due(store: _Store) -> None:
    made = await _look(store)
    assert made.wait_s() == pytest.approx(0.05)


async def test_looks_that_take_long_leave_time_for_other_reads(store: _Store) -> None:
    store.took_s = 0.1
    made = await _look(store)
    assert made.wait_s() == pytest.approx(0.4)


async def test_a_process_that_was_stopped_during_a_look_makes_no_retry_wait_for_that(store: _Store) -> None:
    store.took_s = 60.0
    made = await _look(store)
    assert made.wait_s() <= 1.0


async def test_types_beyond_the_first_look_are_looked_at_next_and_what_they_wait_for_is_not_forgotten(
    store: _Store,
) -> None:
    store.go_on = 7
    made = await _look(store)
    assert made.wait_s() == 0, "not all types were looked at"
    store.go_on = None
    reader: Any = None
    session: Any = None
    store.clock = 0.01
    assert await made.once(reader, session)
    assert store.starts == [FIRST_TYPE, 7]
    assert made.wait_s() == pytest.approx(0.04), "what the first look found will be due"


async def test_freed_room_is_waited_for_only_while_the_window_has_little(store: _Store) -> None:
    scheduler = KeyScheduler(100)
    made = await _look(store, scheduler)
    assert made.wait_s() < inf
    assert not made.next.wants_room
    scheduler.window.acquire("a", 80)
    assert made.wait_s() < inf
    assert made.next.wants_room
    scheduler.window.acquire("a", 20)
    assert made.wait_s() == inf
    assert made.next.wants_room
