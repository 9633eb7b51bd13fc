"""What a refused statement is about."""

from __future__ import annotations

import pytest

from cdc.core.sqlstate import About, about


@pytest.mark.parametrize(
    ("told", "codes"),
    [
        (
            About.SESSION,
            (None, "08006", "25006", "25P02", "26000", "28P01", "3D000", "3F000", "42501", "57P01", "57P05"),
        ),
        (About.MOMENT, ("40001", "40P01", "53100", "53200", "55P03", "57014", "58030")),
        (About.ROW, ("22021", "22P05", "23514", "54000", "XX000", "XX001", "P0001", "0A000", "21000")),
    ],
)
def test_the_session_the_moment_or_one_of_the_rows(told: About, codes: tuple[str | None, ...]) -> None:
    assert {about(code) for code in codes} == {told}
