"""Consumers with a limit, each with a clock that is off, and what the database does, played.

A limit holds in any window, though some are killed and some come, and what it allows is used.
"""

from __future__ import annotations

import heapq
import random
from collections import deque

import pytest

from cdc.core.handler_permits import Limits
from cdc.core.limits import LEASE_S, Leased, LeaseRequest, Limit
from cdc.core.model import Change
from cdc.core.router import Router
from tests.changes import change


class Table:
    """What ``limits.sql`` does: the sum of what is leased is never more than there is, by this clock."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, tuple[int, int, int, float, float]]] = {}

    def lease(self, me: str, asks: list[LeaseRequest], now: float) -> list[Leased]:
        answers = []
        for ask in asks:
            row = self.rows.setdefault(ask.key, {})
            others = {name: entry for name, entry in row.items() if name != me}
            permits = sum(entry[0] for entry in others.values() if entry[3] + LEASE_S + entry[4] > now)
            slots = sum(entry[1] for entry in others.values() if entry[3] + LEASE_S > now)
            row[me] = (max(0, min(ask.permits, ask.total - permits)), max(0, min(ask.slots, ask.slots_total - slots)),
                       ask.wants, now, ask.for_s)  # fmt: skip
            live = {name: entry for name, entry in row.items() if entry[3] + LEASE_S > now}
            answers.append(
                Leased(
                    ask.handler, ask.key, now, {name: entry[0] for name, entry in row.items()},
                    {name: entry[1] for name, entry in row.items()}, {name: entry[2] for name, entry in live.items()},
                )
            )  # fmt: skip
        return answers


class Played:
    """Consumers with work without end, each with a clock that is off by some hours, and a database some time away."""

    def __init__(self, limit: Limit, count: int, seed: int) -> None:
        self.now = 1_000.0
        self.dice = random.Random(seed)
        self.table = Table()
        self.calls: list[float] = []
        self.running: list[tuple[float, str, Change]] = []
        self.count = 0
        self.most = 0
        self.dead = set[str]()
        self.limits: dict[str, Limits] = {}
        self.limit = limit
        self.answers: list[tuple[float, int, str, list[Leased], float]] = []
        for _ in range(count):
            self.add()

    def add(self) -> None:
        router = Router()
        router.on("order", name="work", limit=self.limit)(lambda _: None)
        off = self.dice.uniform(-1e5, 1e5)
        self.limits[f"c{len(self.limits)}"] = Limits(router, clock=lambda: self.now + off)

    def play(self, seconds: float, takes_s: float = 0.0) -> None:
        end, at = self.now + seconds, dict.fromkeys(self.limits, self.now)
        while self.now < end:
            self.now += self.dice.uniform(0.0005, 0.004)
            while self.answers and self.answers[0][0] <= self.now:
                _, _, name, leased, asked_at = heapq.heappop(self.answers)
                if name not in self.dead:
                    self.limits[name].leased(name, leased, asked_at)
            while self.running and self.running[0][0] <= self.now:
                _, name, made = heapq.heappop(self.running)
                self.limits[name].of["work"].ended("", made)
            names = [name for name in self.limits if name not in self.dead]
            self.dice.shuffle(names)
            for name in names:
                permits = self.limits[name].of["work"]
                if room := permits.room(""):
                    calls = min(room, self.dice.randint(1, 3))
                    permits.take("", calls)
                    self.calls += [self.now] * calls
                    for _ in range(calls):
                        made = change(len(self.calls))
                        permits.begins("", made)
                        self.count += 1
                        end_at = self.now + takes_s * self.dice.random() * 2 + self.count * 1e-9
                        heapq.heappush(self.running, (end_at, name, made))
                    self.most = max(self.most, len(self.running))
                if self.now >= at.get(name, 0.0):
                    self._lease(name)
                    at[name] = self.now + 1.0

    def _lease(self, name: str) -> None:
        """What is asked arrives a little later, and the answer again."""
        limits = self.limits[name]
        asked_at = limits._clock()  # noqa: SLF001 - the clock of this consumer
        asks = limits.asks(name, {("work", ""): 1_000})
        leased = self.table.lease(name, asks, self.now + self.dice.uniform(0, 0.01))
        entry = (self.now + self.dice.uniform(0.01, 0.05), self.dice.randint(0, 1 << 30), name, leased, asked_at)
        heapq.heappush(self.answers, entry)

    def in_any(self, seconds: float) -> int:
        """The most calls of any such span."""
        most, window = 0, deque[float]()
        for call in self.calls:
            window.append(call)
            while window[0] <= call - seconds:
                window.popleft()
            most = max(most, len(window))
        return most


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [Limit("14/s"), Limit("14/s", burst=20), Limit("10/s", burst=5), Limit("300/m")])
def test_several_consumers_never_exceed_a_rate_and_use_it(limit: Limit, seed: int) -> None:
    played = Played(limit, 3, seed)
    played.play(30)
    played.dead.add("c1")  # kill -9
    played.play(20)
    played.add()
    played.play(70)
    for seconds in (0.1, 1.0, 3.0, 60.0, limit.permits / limit.per_s):
        assert played.in_any(seconds) <= limit.permits + limit.per_s * seconds
    assert played.in_any(limit.permits / limit.per_s) <= limit.permits
    last = [call for call in played.calls if call > played.now - 60]
    assert len(last) >= 0.95 * limit.per_s * 60


@pytest.mark.parametrize("seed", range(5))
def test_no_more_run_at_once_than_may(seed: int) -> None:
    played = Played(Limit(at_once=5), 3, seed)
    played.play(20, takes_s=0.05)
    played.dead.add("c0")
    played.running = [each for each in played.running if each[1] != "c0"]
    heapq.heapify(played.running)
    before = len(played.calls)
    played.play(20, takes_s=0.05)
    assert played.most <= 5
    assert len(played.calls) - before > 0.5 * 20 * 5 / 0.05


def test_each_consumer_has_a_turn_where_there_are_fewer_permits_than_consumers() -> None:
    played = Played(Limit("5/s", burst=1), 3, 1)
    seen = set[str]()
    for _ in range(110):
        played.play(1)
        seen |= {name for name, limits in played.limits.items() if limits.of["work"].leases[""].permits}
    assert seen == {"c0", "c1", "c2"}
