"""What a captured row costs its writer, counted in instructions: they are the same however busy it is."""

from __future__ import annotations

import os

import pytest

from tests.bench import capture_cost

_THOUSANDS = {
    "INSERT": 260,
    "UPDATE": 298,
    "DELETE": 262,
    "INSERT, key of two columns": 262,
    "INSERT, one column excluded": 265,
    "INSERT, user_id and chat_id": 285,
    "INSERT of 20 rows, each": 235,
    "INSERT, capture_entity_change()": 374,
}
"""In thousands: a twentieth above docs/adr/0040-the-plan-is-the-proof.md, as builds of the server vary."""


@pytest.mark.timeout(1800)  # a server that is watched takes fifty times as long
def test_a_captured_row_costs_its_writer_no_more_than_that() -> None:
    if missing := capture_cost.missing():
        (pytest.fail if os.environ.get("CDC_REQUIRE_VALGRIND") else pytest.skip)(missing)
    counted = {shown: round(each / 1000) for shown, each in capture_cost.above_untracked(short=20, long=60).items()}
    assert {shown: each for shown, each in counted.items() if each > _THOUSANDS[shown]} == {}
