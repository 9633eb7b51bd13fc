"""How the web interface writes what it shows."""

from __future__ import annotations

import pytest

from cdc.contrib.ui.rendering import environment


@pytest.mark.parametrize(("seconds", "shown"), [
    (None, ""), (0.0, "0 ms"), (0.0341, "34.1 ms"), (0.9, "900 ms"), (2.04, "2.0 s"), (59.9, "59.9 s"),
    (90.0, "90 s"), (7_200.0, "2 h"),
])  # fmt: skip
def test_a_latency_is_shown_as_closely_as_it_matters(seconds: float | None, shown: str) -> None:
    assert environment().filters["latency"](seconds) == shown
