"""The last minutes of a consumer in memory: readings of its counters, and what happened between two of them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

Buckets = tuple[tuple[float, float], ...]
"""(upper bound, how many observations at most so large), as a Prometheus histogram counts; the last bound is inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """``at`` in seconds of any steady clock. Counters only rise; None is a gauge that has no value now."""

    at: float
    processed: float
    failed: float
    latency: Buckets
    oldest_ready_age_s: float | None = None
    retained_wal_bytes: float | None = None
    confirmed_lag_bytes: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What happened between two readings, and the gauges of the later one; ``at`` is its time.

    Rates are per second. A latency is None if nothing was processed.
    """

    at: float
    processed_per_s: float
    failed_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    oldest_ready_age_s: float | None
    retained_wal_bytes: float | None
    confirmed_lag_bytes: float | None


class History:
    """The last ``length`` readings. One thread adds; any may ask for the points."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._readings: tuple[Reading, ...] = ()

    def add(self, reading: Reading) -> None:
        """A reading that is not later than the last is left out."""
        if not self._readings or reading.at > self._readings[-1].at:
            # Replaced whole: another thread sees either the old or the new one.
            self._readings = (*self._readings, reading)[-self._length :]

    def points(self) -> list[Point]:
        """The oldest first; one less than there are readings."""
        return [_between(earlier, later) for earlier, later in pairwise(self._readings)]


def quantile(buckets: Buckets, share: float) -> float | None:
    """The value that ``share`` of the observations do not exceed, taking them as spread evenly within a bucket.

    At most the last finite bound; None if there are no observations.
    """
    total = buckets[-1][1] if buckets else 0
    if total <= 0:
        return None
    wanted, below_bound, below = share * total, 0.0, 0.0
    for bound, count in buckets:
        if below < count >= wanted and not math.isinf(bound):
            return below_bound + (bound - below_bound) * (wanted - below) / (count - below)
        if not math.isinf(bound):
            below_bound, below = bound, count
    return below_bound


def _between(earlier: Reading, later: Reading) -> Point:
    seconds = later.at - earlier.at
    took = _rise(earlier.latency, later.latency)
    return Point(
        at=later.at,
        processed_per_s=(later.processed - earlier.processed) / seconds,
        failed_per_s=(later.failed - earlier.failed) / seconds,
        latency_p50_s=quantile(took, 0.5),
        latency_p99_s=quantile(took, 0.99),
        oldest_ready_age_s=later.oldest_ready_age_s,
        retained_wal_bytes=later.retained_wal_bytes,
        confirmed_lag_bytes=later.confirmed_lag_bytes,
    )


def _rise(earlier: Buckets, later: Buckets) -> Buckets:
    before: dict[float, float] = dict(earlier)
    return tuple((bound, count - before.get(bound, 0.0)) for bound, count in later)
