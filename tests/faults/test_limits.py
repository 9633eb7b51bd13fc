"""A limit is exact over all consumers whatever happens to them, what it allows is used, and keys have their turns.

Three consumers, whose times of day jump, are killed, lose their sessions and the server, and are paused. A ledger of
their calls, by a clock that all share, is judged afterwards.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres import migrations
from tests.commands import done
from tests.eventually import eventually
from tests.fix_consumer import Process, settled, states
from tests.handlers_limits_ledger import AT_ONCE, RATE

_LARGE, _SMALL, _EXPORTS = 700, 250, 300
_NOTICED_S = 5.0
"""A pause is in force within a second; a machine that is busy takes longer."""


class Line(NamedTuple):
    at: float
    call: str
    """The process and a number."""
    what: str
    entity_type: str
    tenant: str
    seq: int


class Stage:
    """A server of its own and three consumers of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "ledger"
        self.ledger.touch()
        self.server = TempServer(durable=True)
        self.consumers: list[Process] = []
        self.killed_at: dict[int, float] = {}
        self._started = 0

    def prepare(self) -> None:
        with self.connect() as db:
            migrations.install(db, "public")

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.server.dsn(), autocommit=True)

    def start(self, place: int | None = None) -> None:
        self._started += 1
        log = self.folder / f"{self._started}.log"
        process = Process(
            self.server.dsn(), log, handlers="tests.handlers_limits_ledger:router", poll_interval=0.5,
            drain_time=5,
        )  # fmt: skip
        if place is None:
            self.consumers.append(process)
        else:
            self.consumers[place] = process

    def kill(self, place: int) -> None:
        process = self.consumers[place]
        process.kill()
        self.killed_at[process.process.pid] = time.monotonic()
        self.start(place)

    def kill_all(self) -> None:
        for each in self.consumers:
            if each.process.poll() is None:
                each.kill()

    def end_sessions(self) -> None:
        with self.connect() as db:
            db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cdc: %'")

    def turn_back_the_servers_clock(self) -> None:
        """As far as a limit goes: what is on record is an hour ahead of its clock then."""
        with self.connect() as db:
            db.execute(
                "UPDATE cdc_limit_leases SET idle_at = idle_at + interval '1 hour', leases = ("
                " SELECT coalesce(jsonb_object_agg(key,"
                "   jsonb_set(value, '{3}', to_jsonb((value ->> 3)::float8 + 3600))), '{}') FROM jsonb_each(leases))"
            )

    def publish(self, entity_type: str, tenant: str, count: int) -> None:
        with self.connect() as db:
            db.execute(
                "SELECT publish_change(%s, %s || n, 'INSERT', jsonb_build_object('tenant', %s::text))"
                " FROM generate_series(1, %s) AS n",
                [entity_type, tenant, tenant, count],
            )

    def lines(self) -> list[Line]:
        found = (line.split() for line in self.ledger.read_text("utf-8").splitlines())
        return sorted(
            Line(float(at), call, what, entity_type, tenant, int(seq))
            for at, call, what, entity_type, tenant, seq in found
        )

    def calls(self) -> int:
        return self.ledger.read_text("utf-8").count(" call ")

    def settled(self) -> bool:
        with self.connect() as db:
            return settled(db)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with ExitStack() as stack:
        stage = Stage(tmp_path)
        monkeypatch.setenv("LIMITS_LEDGER", str(stage.ledger))
        stack.enter_context(stage.server)
        stage.prepare()
        stack.callback(stage.kill_all)
        yield stage


def most_in_any(seconds: float, moments: Sequence[float]) -> int:
    most, window = 0, deque[float]()
    for moment in moments:
        window.append(moment)
        while window[0] <= moment - seconds:
            window.popleft()
        most = max(most, len(window))
    return most


def most_at_once(lines: Sequence[Line], killed_at: dict[int, float]) -> int:
    """A call that has no end ended with its process."""
    ends = {line.call: line.at for line in lines if line.what == "end"}
    edges = list[tuple[float, int]]()
    for line in lines:
        if line.what == "begin":
            end = ends.get(line.call, killed_at.get(int(line.call.split(".")[0]), line.at))
            edges += [(line.at, 1), (end, -1)]
    running = most = 0
    for _, step in sorted(edges):
        running += step
        most = max(most, running)
    return most


def _pause(stage: Stage) -> tuple[float, float]:
    """``send`` is paused for some seconds; when that was."""
    done(stage.server.dsn(), "pause", "--handler", "send", "--because", "the provider is down")
    began = time.monotonic() + _NOTICED_S
    eventually(lambda: time.monotonic() > began + 2, what="some seconds have passed")
    ended = time.monotonic()
    done(stage.server.dsn(), "resume", "--handler", "send")
    return began, ended


def _work_on(stage: Stage) -> None:
    so_far = stage.calls()
    eventually(lambda: stage.calls() >= so_far + 60, within_s=120, what="work goes on")


def test_limits_hold_while_consumers_are_killed_lose_the_server_and_are_paused(stage: Stage) -> None:
    for _ in range(3):
        stage.start()
    for tenant, count in (("large", _LARGE), ("small", _SMALL)):
        stage.publish("mail", tenant, count)
    stage.publish("export", "all", _EXPORTS)
    pauses = list[tuple[float, float]]()
    faults: list[Callable[[], object]] = [
        lambda: stage.kill(0),
        stage.end_sessions,
        lambda: pauses.append(_pause(stage)),
        lambda: stage.kill(1),
        stage.turn_back_the_servers_clock,
        lambda: stage.server.restart("immediate"),
        lambda: stage.kill(2),
    ]
    for fault in faults:
        _work_on(stage)
        fault()
    eventually(stage.settled, within_s=240, what="every change is handled")
    lines = stage.lines()
    sent = [line for line in lines if line.what == "call"]
    for tenant in ("large", "small"):
        moments = [line.at for line in sent if line.tenant == tenant]
        for seconds in (0.5, 1.0, 2.0, 10.0, 60.0):
            assert most_in_any(seconds, moments) <= RATE + RATE * seconds, (tenant, seconds)
        # A call is stamped where it runs, some time after it was let begin.
        assert most_in_any(0.8, moments) <= RATE, tenant
    assert most_at_once(lines, stage.killed_at) <= AT_ONCE
    [(began, ended)] = pauses
    assert not [line for line in sent if began < line.at < ended], "what is paused is not called"
    # The small tenant is never behind the large one, which has work left when it is done.
    last = max(line.at for line in sent if line.tenant == "small")
    assert bisect_left([line.at for line in sent if line.tenant == "large"], last) < _LARGE
    with stage.connect() as db:
        assert states(db) == {"processed": _LARGE + _SMALL + _EXPORTS}
    # A second call is of what was under way when its consumer ended.
    again = Counter(line.seq for line in sent)
    assert set(again) == {line.seq for line in sent}
    assert len(again) == _LARGE + _SMALL
    assert sum(again.values()) - len(again) <= 7 * 3 * RATE


def test_what_exceeds_a_limit_is_found_guilty() -> None:
    assert most_in_any(1.0, [0.0, 0.5, 0.9, 1.0, 1.4]) == 4
    begins = [Line(float(n), f"7.{n}", "begin", "export", "all", n) for n in range(3)]
    assert most_at_once([*begins, Line(0.5, "7.0", "end", "export", "all", 0)], {7: 9.0}) == 2
