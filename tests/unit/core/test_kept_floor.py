"""Which number is proved: whatever is drawn and ends, nothing at or below it is still to come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdc.core.kept_floor import KeptFloor
from cdc.core.shard_cursor import Snapshot

_STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "draw", "end", "look"]), st.integers(0, 9), st.booleans()),
    min_size=20,
    max_size=80,
)


@given(_STEPS)
def test_no_transaction_that_is_open_has_drawn_or_will_draw_a_number_that_is_proved(
    steps: list[tuple[str, int, bool]],
) -> None:
    """Any of them draws at any time; between the look-up of the number and the look anything may happen."""
    floor, next_xid, last, known = KeptFloor(), 10, 0, False
    drawn: dict[int, list[int]] = {}
    for step, which, looks_up in steps:
        xid = sorted(drawn)[which % len(drawn)] if drawn else 0
        if step == "begin":
            drawn[next_xid] = []
            next_xid += 1
        elif step == "draw" and drawn:
            last += 1
            drawn[xid].append(last)
        elif step == "end" and drawn:
            del drawn[xid]
        elif step == "look" and known:
            floor.looked(Snapshot(min([*drawn, next_xid]), next_xid))
            known = False
        if looks_up and not known:
            floor.drew(last)
            known = True
        assert floor.proved <= last
        assert all(number > floor.proved for numbers in drawn.values() for number in numbers)


def test_a_number_is_proved_at_the_look_after_the_next_and_waits_no_longer() -> None:
    floor = KeptFloor()
    floor.drew(7)
    floor.looked(Snapshot(20, 20))
    assert (floor.proved, floor.waits) == (0, True)
    floor.drew(7)
    floor.looked(Snapshot(20, 20))
    assert (floor.proved, floor.waits) == (7, False)


def test_a_sequence_that_starts_over_proves_nothing() -> None:
    floor = KeptFloor()
    for last in (7, 7, 3):
        floor.drew(last)
        proved = floor.proved
        floor.looked(Snapshot(20, 20))
    assert proved == 0
    assert (floor.proved, floor.candidate) == (0, 3)
