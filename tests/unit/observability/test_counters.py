"""The counters and histograms of the hot path, against those of prometheus_client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from cdc.observability.counters import CountTally, HistogramTally

_BOUNDS = (0.001, 0.5, 1, 60)


def _samples(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): round(sample.value, 6)
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([0.0, 0.001, 0.2, 0.5, 1.0, 59.9, 60.1]))))
def test_they_show_what_the_librarys_would(seen: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    count, histogram = CountTally("done", "Text.", "kind"), HistogramTally("took", "Text.", _BOUNDS, "kind")
    ours.register(count)
    ours.register(histogram)
    their_count = Counter("done", "Text.", ["kind"], registry=theirs)
    their_histogram = Histogram("took", "Text.", ["kind"], buckets=_BOUNDS, registry=theirs)
    for kind, value in seen:
        count.labels(kind).inc()
        histogram.labels(kind).observe(value)
        histogram.labels(kind).observe_each([value, 0.3, value])
        histogram.labels(kind).observe_times(0.3, 2)
        their_count.labels(kind).inc()
        for each in (value, value, value, 0.3, 0.3, 0.3):
            their_histogram.labels(kind).observe(each)
    assert _samples(ours) == _samples(theirs)


def test_their_totals_are_summed_over_the_labels() -> None:
    count, histogram = CountTally("done", "Text.", "kind", "how"), HistogramTally("took", "Text.", (1, 2), "kind")
    assert (count.totals(1), histogram.total) == ({}, ())
    count.labels("a", "well").inc(2)
    count.labels("b", "well").inc(3)
    count.labels("b", "badly").inc()
    histogram.labels("a").observe_each([0.5, 1.5])
    histogram.labels("b").observe_each([0.5, 5])
    assert (count.totals(0), count.totals(1)) == ({"a": 2, "b": 4}, {"well": 5, "badly": 1})
    assert histogram.total == ((1, 2), (2, 3), (float("inf"), 4))
