"""Three subscriptions beside the default one, every kind of fault once; then the ledger of each is judged by itself.

One is paused and resumed, one is dropped while it works, and one is created in the middle, from the beginning.
``make chaos`` has subscriptions, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cdc.core.subscription import DEFAULT
from tests.eventually import eventually
from tests.faults import chaos
from tests.faults.chaos import Draw, Fault
from tests.faults.ledger import judge
from tests.faults.stage import Stage

_FIRST: list[tuple[Fault, Draw]] = [
    (chaos.kill, Draw(1, "", False, 0.0)),
    (chaos.cut, Draw(3, "", False, 0.0)),
    (chaos.crash, Draw(0, "", False, 0.0)),
    (chaos.lose_commits, Draw(3, "", False, 0.5)),
    (chaos.kill, Draw(3, "", False, 0.0)),
    (chaos.freeze_and_lose, Draw(2, "", False, 0.5)),
    (chaos.write_odd, Draw(0, "", False, 0.0)),
    (chaos.drop_slot, Draw(0, "", False, 0.0)),
]
_WHILE_PAUSED: list[tuple[Fault, Draw]] = [
    (chaos.kill, Draw(2, "", False, 0.0)),
    (chaos.restart, Draw(0, "", False, 0.0)),
    (chaos.cut_writers, Draw(0, "", False, 0.0)),
    (chaos.lose_writers_commits, Draw(0, "", False, 0.0)),
    (chaos.end_operator, Draw(0, "", False, 0.0)),
]
_LAST: list[tuple[Fault, Draw]] = [
    *((chaos.terminate, Draw(1, connection, True, 0.0)) for connection in chaos.CONNECTIONS),
    (chaos.kill, Draw(3, "", False, 0.4)),
    (chaos.hold_and_lose, Draw(1, "", False, 0.4)),
    (chaos.slow, Draw(2, "", False, 0.5)),
    (chaos.lose_commits, Draw(1, "", False, 0.5)),
    (chaos.lose_answers, Draw(2, "", False, 0.2)),
    (chaos.freeze, Draw(1, "", False, 0.5)),
    (chaos.freeze_beyond_every_limit, Draw(2, "", False, 0.0)),
    (chaos.replace, Draw(2, "", False, 0.0)),
    (chaos.hold, Draw(2, "", False, 0.2)),
    (chaos.lock_row, Draw(0, "", False, 0.5)),
    (chaos.lock_table, Draw(0, "", False, 0.5)),
    (chaos.refuse, Draw(0, "", False, 0.2)),
    (chaos.refuse, Draw(0, "", True, 0.5)),
    (chaos.fill_disk, Draw(0, "", False, 0.3)),
    (chaos.cancel, Draw(0, "", False, 0.3)),
    (chaos.deadlock, Draw(0, "", False, 0.0)),
    (chaos.crowd, Draw(1, "", False, 0.5)),
    (chaos.crash, Draw(0, "", False, 0.0)),
]
_BETWEEN = 25
"""Changes that each has settled between two faults."""


@pytest.mark.timeout(900)  # four minutes on two idle cores
@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
@pytest.mark.promise("G8")
def test_each_subscription_has_a_truth_of_its_own_whatever_happens(tmp_path: Path) -> None:
    places = (DEFAULT, "search", "search", "audit")
    with Stage(tmp_path, seed=3, subscriptions=places, writers=2, keys=20) as stage:
        _play(stage, _FIRST)
        stage.subscriptions.drop("audit")
        of_audit = stage.evidence("audit")
        stage.subscriptions.create("late", place=3)
        stage.subscriptions.pause("search")
        _play(stage, _WHILE_PAUSED)
        stage.subscriptions.resume("search")
        _play(stage, _LAST)
        found = {DEFAULT: chaos.verdict(stage), **chaos.verdicts(stage)}
        # What it began and did not mark before it was dropped is nobody's loss, and nothing of it came after.
        dropped = judge(replace(of_audit, committed=set()))  # what is captured, the others are judged by
        assert stage.evidence("audit").effects == of_audit.effects
    assert {name: verdict.violations for name, verdict in found.items()} == {DEFAULT: [], "late": [], "search": []}
    assert _but_lost(dropped.violations) == []
    captured = {name: verdict.figures["captured"] for name, verdict in found.items()}
    assert captured["late"] == captured["search"] == captured[DEFAULT] > len(_LAST) * _BETWEEN
    for name, verdict in found.items():
        for figure in (
            "repeated", "effects", "in batches", "coalesced", "snoozed", "truncates", "read", "replayed", "dead",
        ):  # fmt: skip
            assert verdict.figures[figure] > 0, (name, figure)
    assert dropped.figures["effects"] > 0


def test_the_schedule_has_every_fault() -> None:
    assert {fault for fault, _ in [*_FIRST, *_WHILE_PAUSED, *_LAST]} == set(chaos.WEIGHTS)


def _play(stage: Stage, schedule: list[tuple[Fault, Draw]]) -> None:
    before = "what was before"
    for fault, draw in schedule:
        _work_on(stage, f"after {before}")
        fault(stage, draw)
        before = fault.__name__
    _work_on(stage, f"after {before}")


def _work_on(stage: Stage, when: str) -> None:
    names = [name for name in stage.subscriptions.names if name not in stage.subscriptions.paused]
    so_far = {name: stage.subscriptions.settled(name) for name in names}
    of_default = stage.processed()

    def goes_on() -> bool:
        stage.watch()
        return stage.processed() >= of_default + _BETWEEN and all(
            stage.subscriptions.settled(name) >= count + _BETWEEN for name, count in so_far.items()
        )

    eventually(goes_on, within_s=90, what=f"work goes on {when}")


def _but_lost(violations: list[str]) -> list[str]:
    return [each for each in violations if not each.startswith(("lost: ", "0 effects instead"))]
