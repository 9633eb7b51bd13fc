import pytest

from cdc.engine.reconnecting import next_pause_s


@pytest.mark.parametrize(
    ("before_s", "worked_s", "pause_s"),
    [(0.1, 0, 0.2), (0.2, 9, 0.4), (8, 0, 10), (10, 0, 10), (10, 11, 0.1), (0.1, 3_600, 0.1)],
)
def test_the_pause_doubles_up_to_a_limit_and_is_short_again_after_long_work(
    before_s: float, worked_s: float, pause_s: float
) -> None:
    assert next_pause_s(before_s, worked_s) == pytest.approx(pause_s)
