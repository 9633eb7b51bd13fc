"""Order and completeness under any schedule. A failing seed replays: ``Simulation(seed).run()``."""

from __future__ import annotations

import os

import pytest

from tests.simulation import Simulation

_SEEDS = int(os.environ.get("CDC_TEST_SEEDS", "2000"))
_BATCH = 100


@pytest.mark.parametrize("first", range(0, _SEEDS, _BATCH))
def test_no_schedule_loses_a_change_or_hands_one_out_before_its_predecessor(first: int) -> None:
    for seed in range(first, first + _BATCH):
        try:
            Simulation(seed).run()
        except AssertionError as broken:
            raise AssertionError(f"seed {seed}: {broken}") from broken
