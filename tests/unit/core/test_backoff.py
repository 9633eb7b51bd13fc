from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.backoff import WAIT_MAX_S, Policy, ceiling_s, delay_s, snooze_s

_POLICIES = st.builds(
    Policy,
    max_attempts=st.integers(1, 50),
    base_s=st.floats(0.001, 3600),
    cap_s=st.floats(0.001, 1e12),
)


@pytest.mark.parametrize(
    ("attempt", "expected"), [(1, 1.0), (2, 2.0), (3, 4.0), (9, 256.0), (10, 300.0), (5_000, 300.0)]
)
def test_the_ceiling_doubles_with_each_attempt_up_to_the_cap(attempt: int, expected: float) -> None:
    assert ceiling_s(Policy(base_s=1.0, cap_s=300.0), attempt) == expected


def test_the_last_attempt_has_no_successor_whatever_the_handler_wishes() -> None:
    assert delay_s(Policy(max_attempts=3), 3, 0.5) is None
    assert delay_s(Policy(max_attempts=3), 3, 0.5, after_s=1.0) is None
    assert delay_s(Policy(max_attempts=3), 2, 0.5) is not None


def test_a_delay_is_a_float_also_where_the_handler_gives_an_int() -> None:
    """A settle sends many delays as one array, and psycopg refuses one of ints and floats."""
    assert isinstance(delay_s(Policy(), 1, 0.5, after_s=0), float)


def test_a_handlers_own_wish_is_taken_as_it_is() -> None:
    assert delay_s(Policy(), 1, 0.99, after_s=30.0) == 30.0
    assert delay_s(Policy(), 1, 0.99, after_s=0.0) == 0.0


@given(_POLICIES, st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_jittered_delay_lies_between_zero_and_the_ceiling(policy: Policy, attempt: int, fraction: float) -> None:
    delay = delay_s(policy, attempt, fraction)
    if attempt >= policy.max_attempts:
        assert delay is None
    else:
        assert delay is not None
        assert 0 <= delay <= ceiling_s(policy, attempt)


@given(st.floats(0, allow_nan=False, allow_infinity=False))
def test_no_delay_is_longer_than_postgresql_can_add_to_a_timestamp(after_s: float) -> None:
    delay = delay_s(Policy(), 1, 0.5, after_s=after_s)
    assert delay is not None
    assert delay <= 10 * 366 * 86_400


@pytest.mark.parametrize(("after_s", "waits_s"), [(1e-9, 0.1), (0.1, 0.1), (3_600, 3_600.0), (1e12, WAIT_MAX_S)])
def test_a_snooze_is_neither_so_short_that_it_keeps_the_database_busy_nor_longer_than_postgresql_can_add(
    after_s: float, waits_s: float
) -> None:
    assert snooze_s(after_s) == waits_s
