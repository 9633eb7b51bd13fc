"""The commands of ``make fuzz`` work, and their first rounds hold: the same ones each time."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import TARGETS, fuzz

_SEED = 14
_SECONDS = 3.0


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_sends_first_is_held(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(name, _SECONDS, _SEED) > 0
    assert f"seed {_SEED}: held" in capsys.readouterr().out
