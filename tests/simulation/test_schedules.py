"""Order and completeness under any schedule. A failing seed replays: ``python -m tests.simulation SEED``."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from cdc.core.kept_floor import KeptFloor
from cdc.core.shard_cursor import Snapshot
from tests.simulation.__main__ import broken
from tests.simulation.schedule import Simulation
from tests.simulation.server import Server, Session

_SEEDS = int(os.environ.get("CDC_TEST_SEEDS", "2000"))
_BATCH = 100
_WORTH_PLAYING = {
    "a change started", "a change started without a session", "a batch held several changes of a key",
    "a handler went on without its session", "a shard was given away", "a commit's answer was lost",
    "a change was fetched by its number", "a key was read on", "a row was somebody else's",
    "a type was read apart", "a change did not fit into a page", "a change was snoozed",
    "a TRUNCATE kept a change from starting", "a position moved",
    "a replay started", "a replay overtook what was not there",
    "a call stood for several changes", "a change had been coalesced", "a change was put off",
    "a call waited for what had become visible late",
    "a floor moved", "a shard was read from a kept floor on",
    "a schedule had several readers", "a replay was for one reader",
}  # fmt: skip


@pytest.mark.parametrize("first", range(0, _SEEDS, _BATCH))
def test_no_schedule_of_consumers_loses_a_change_or_doubles_it_or_hands_one_out_before_its_predecessor(
    first: int,
) -> None:
    for seed, error in broken(range(first, first + _BATCH)):
        raise AssertionError(f"python -m tests.simulation {seed}: {error}") from error


def test_a_position_that_does_not_wait_for_late_commits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cursor over a sequence would move: else the schedules prove nothing about it."""
    proved = Server.move_positions

    def careless(server: Server, session: Session) -> int:
        for position in server.positions.values():
            position.needs = 0
        return proved(server, session)

    monkeypatch.setattr(Server, "move_positions", careless)
    assert next(broken(range(1, 200)), None) is not None


def test_a_floor_that_does_not_wait_for_late_commits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = KeptFloor.looked

    def careless(floor: KeptFloor, snapshot: Snapshot) -> None:
        looked(floor, snapshot)
        floor.needs = 0

    monkeypatch.setattr(KeptFloor, "looked", careless)
    assert next(broken(range(1, 400)), None) is not None


@pytest.mark.parametrize("consumers", [1, 3])
def test_nothing_needs_a_second_pass_from_the_first_change_on(consumers: int) -> None:
    for seed in range(100):
        Simulation(seed, consumers=consumers, full_passes=False).run()


def test_a_seed_is_always_the_same_schedule() -> None:
    played: list[list[str]] = [[], []]
    for steps in played:
        simulation = Simulation(7, on_step=steps.append)
        simulation.run()
        steps.extend(repr(row) for reader in simulation.outbox.readers for row in reader.rows.values())
    assert played[0] == played[1]


def test_the_schedules_bring_about_what_the_promises_are_about() -> None:
    happened: Counter[str] = Counter()
    for seed in range(2_000):
        simulation = Simulation(seed)
        simulation.run()
        happened += simulation.happened
        if set(happened) == _WORTH_PLAYING:
            break
    assert set(happened) == _WORTH_PLAYING, happened
