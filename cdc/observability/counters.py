"""Counters and histograms for what happens with each change or read.

Those of prometheus_client take a lock and check their labels at every step, which cost more than many handlers. Here
one thread counts, the event loop's, and any may scrape: at worst it sees a step's sum before its count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import inf

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cdc.observability.history import Buckets


class Count:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int = 1) -> None:
        self.value += by


class CountTally(Collector):
    """A counter with these labels."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self._family = name, text, None, labels
        self._counts: dict[tuple[str, ...], Count] = {}

    def labels(self, *values: str) -> Count:
        return self._counts.setdefault(values, Count())

    def totals(self, label: int) -> dict[str, int]:
        """By the values of the label at this place, summed over the others; from any thread."""
        totals: dict[str, int] = {}
        for values, count in self._counts.copy().items():
            totals[values[label]] = totals.get(values[label], 0) + count.value
        return totals

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(*self._family)
        for values, count in self._counts.copy().items():
            family.add_metric(values, count.value)
        yield family


class Distribution:
    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def observe_times(self, value: float, times: int) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def observe_each(self, values: Iterable[float]) -> None:
        bounds, counts = self._bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            self.sum += value


class HistogramTally(Collector):
    """A histogram with these labels; ``bounds`` are the upper ends of its buckets, without the infinite one."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> None:
        self._family = name, text, None, None, labels
        self._bounds = bounds
        # The library's own spelling of a bound; it has no types.
        self._names = [floatToGoString(bound) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]
        self._distributions: dict[tuple[str, ...], Distribution] = {}

    def labels(self, *values: str) -> Distribution:
        return self._distributions.setdefault(values, Distribution(self._bounds))

    @property
    def total(self) -> Buckets:
        """Sum over all labels; from any thread."""
        counts = [sum(column) for column in zip(*(d.counts for d in self._distributions.copy().values()), strict=True)]
        return tuple(zip((*self._bounds, inf), accumulate(counts), strict=False))

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(*self._family)
        for values, seen in self._distributions.copy().items():
            family.add_metric(values, list(zip(self._names, accumulate(seen.counts), strict=True)), seen.sum)
        yield family
