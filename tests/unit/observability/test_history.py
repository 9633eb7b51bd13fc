import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.observability.history import Buckets, History, Reading, quantile

INF = math.inf


def _reading(at: float, processed: float = 0, failed: float = 0, latency: Buckets = ()) -> Reading:
    return Reading(at=at, processed=processed, failed=failed, latency=latency)


def test_counters_become_rates_by_the_time_that_really_passed() -> None:
    history = History(10)
    for at, processed, failed in ((100, 50, 1), (105, 150, 1), (125, 150, 11)):
        history.add(_reading(at, processed, failed))
    points = history.points()
    assert [(point.at, point.processed_per_s, point.failed_per_s) for point in points] == [(105, 20, 0), (125, 0, 0.5)]


def test_a_gauge_is_that_of_the_later_reading() -> None:
    history = History(10)
    history.add(Reading(at=1, processed=0, failed=0, latency=(), oldest_ready_age_s=7, retained_wal_bytes=1))
    history.add(Reading(at=2, processed=0, failed=0, latency=(), oldest_ready_age_s=9, confirmed_lag_bytes=3))
    [point] = history.points()
    assert (point.oldest_ready_age_s, point.retained_wal_bytes, point.confirmed_lag_bytes) == (9, None, 3)


@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 20))
def test_it_keeps_the_last_readings_and_no_more(times: list[int], length: int) -> None:
    history, kept = History(length), list[int]()
    for at in times:
        history.add(_reading(at))
        if not kept or at > kept[-1]:
            kept.append(at)
    assert [point.at for point in history.points()] == kept[-length:][1:]


def test_latencies_are_those_of_the_time_between_and_not_of_all_time() -> None:
    history = History(10)
    history.add(_reading(0, latency=((0.01, 1000), (1, 1000), (INF, 1000))))
    history.add(_reading(5, latency=((0.01, 1000), (1, 1010), (INF, 1010))))
    history.add(_reading(10, latency=((0.01, 1000), (1, 1010), (INF, 1010))))
    slow, none = history.points()
    assert slow.latency_p50_s == pytest.approx(0.01 + 0.99 / 2)
    assert (none.latency_p50_s, none.latency_p99_s) == (None, None)


@pytest.mark.parametrize(
    ("buckets", "share", "value"),
    [
        ((), 0.5, None),
        (((1, 0), (INF, 0)), 0.5, None),
        (((1, 10), (2, 10), (INF, 10)), 0.5, 0.5),
        (((1, 10), (2, 20), (INF, 20)), 0.5, 1.0),
        (((1, 10), (2, 20), (INF, 20)), 0.75, 1.5),
        (((1, 0), (2, 4), (INF, 4)), 0.5, 1.5),
        (((1, 0), (2, 0), (INF, 4)), 0.5, 2.0),
        (((1, 0), (2, 4), (INF, 4)), 0.0, 1.0),
    ],
)
def test_a_quantile_lies_within_the_bucket_that_reaches_it(buckets: Buckets, share: float, value: float | None) -> None:
    assert quantile(buckets, share) == value


@given(st.lists(st.floats(0, 20), min_size=1), st.floats(0, 1))
def test_a_quantile_is_off_by_no_more_than_its_bucket(values: list[float], share: float) -> None:
    bounds = (0.1, 1.0, 5.0, 10.0)
    buckets = tuple((bound, float(sum(value <= bound for value in values))) for bound in (*bounds, INF))
    found = quantile(buckets, share)
    assert found is not None
    exact = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    upper = next((bound for bound in bounds if exact <= bound), bounds[-1])
    lower = max((bound for bound in (0.0, *bounds) if bound < upper), default=0.0)
    assert lower - 1e-9 <= found <= upper + 1e-9
