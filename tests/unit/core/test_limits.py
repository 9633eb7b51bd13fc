"""A limit holds in any window, whoever calls, dies or is slow; and what it allows is used."""

from __future__ import annotations

import heapq
import random
from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cdc
from cdc import testing
from cdc.core.errors import UsageError
from cdc.core.handler_permits import Limits
from cdc.core.limits import LEASE_S, Leased, LeaseRequest, Limit, LimitSetting, along, shares
from cdc.core.model import Change
from cdc.core.router import Router
from tests.changes import change


@pytest.mark.parametrize(
    ("limit", "permits", "rest_s"),
    [
        (Limit("14/s"), 14, 1.0),
        (Limit("14/s", burst=28), 28, 2.0),
        (Limit("100/m", burst=1), 1, 0.6),
        (Limit("5/10s"), 5, 10.0),
        (Limit("0.5/s"), 1, 2.0),
        (Limit(at_once=3), 0, 0.0),
    ],
)
def test_a_limit_is_permits_that_rest(limit: Limit, permits: int, rest_s: float) -> None:
    assert limit.permits == permits
    assert rest_s <= limit.rest_s <= rest_s * 1.01


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"burst": 3}, {"rate": "14"}, {"rate": "0/s"}, {"rate": "14/y"}, {"rate": "20000/s"},
        {"rate": "1/d", "burst": 2},
        {"at_once": 0}, {"at_once": True}, {"rate": "1/s", "burst": 0}, {"rate": "1/s", "by": 3}, {"rate": "3/0s"},
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused_with_a_hint(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        Limit(**fields)
    assert refused.value.hint


def test_a_path_leads_into_the_change() -> None:
    one = testing.change("order", "INSERT", "1", new={"tenant": {"id": 7}})
    assert along(one, "new.tenant.id") == 7
    assert along(one, "new.owner.id") is None
    assert Limit("1/s", by="new.tenant.id").key(one) == "7"
    assert Limit("1/s", by=lambda change: change.new["nothing"]).key(one) == "?"


@given(
    st.integers(0, 200), st.dictionaries(st.text("abc", min_size=1), st.integers(0, 60), max_size=8), st.integers(0, 99)
)
def test_shares_are_all_there_is_and_fair(total: int, wants: dict[str, int], turn: int) -> None:
    got = shares(total, wants, turn)
    assert sum(got.values()) == (total if wants else 0)
    for one, count in got.items():
        for other in got:
            if wants[other] > got[other]:  # nobody who wants less than another has more than that one, but for a rest
                assert count <= max(got[other] + 1, wants[one])
                assert not (count > wants[one]), "more than it wants, while another one wants more"


# --- several consumers, and what the database does, played ------------------------------------------------------------


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


def test_an_operators_limit_takes_the_place_of_the_one_in_the_code() -> None:
    router = Router()
    router.on("order", name="work", limit=Limit("1/s"))(lambda _: None)
    limits = Limits(router, clock=lambda: 0.0)
    assert limits.become([LimitSetting(1, "work", Limit("2/s")), LimitSetting(2, "other", Limit("3/s"))])
    assert {name: each.limit.rate for name, each in limits.of.items()} == {"work": "2/s"}
    assert limits.become([])
    assert limits.of["work"].limit.rate == "1/s"
    assert not limits.become([])


def test_a_limit_is_part_of_the_public_interface() -> None:
    assert cdc.Limit is Limit
