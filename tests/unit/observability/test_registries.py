"""The metrics of several consumers as one registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cdc.observability.registries import Registries


def _consumer(handled: int, *, of_subscription: str | None = None) -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("cdc_handled", "Handled.", ["outcome"], registry=registry).labels("processed").inc(handled)
    Histogram("cdc_duration_seconds", "How long.", buckets=(1, 2), registry=registry).observe(1.5)
    Gauge("cdc_slot_active", "The slot.", ["slot"], registry=registry).labels("cdc").set(handled)
    if of_subscription:
        Gauge("cdc_subscription_lag", "Lag.", ["subscription"], registry=registry).labels(of_subscription).set(handled)
    return registry


def _shown(*consumers: tuple[str, CollectorRegistry]) -> list[str]:
    lines = generate_latest(Registries(lambda: dict(consumers))).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_each_series_of_a_consumer_says_whose_it_is_and_each_family_is_described_once() -> None:
    shown = _shown(("default", _consumer(1)), ("search", _consumer(2)))
    assert [line for line in shown if line.startswith("cdc_handled_total")] == [
        'cdc_handled_total{outcome="processed",subscription="default"} 1.0',
        'cdc_handled_total{outcome="processed",subscription="search"} 2.0',
    ]
    assert 'cdc_duration_seconds_bucket{le="2.0",subscription="search"} 1.0' in shown
    described = [line for line in shown if line.startswith("# TYPE")]
    assert len(described) == len(set(described)) == 3


def test_what_a_process_has_once_is_that_of_the_first_and_a_label_that_is_there_stays() -> None:
    shown = _shown(("default", _consumer(1, of_subscription="mail")), ("search", _consumer(2, of_subscription="audit")))
    assert [line for line in shown if line.startswith("cdc_slot_active")] == ['cdc_slot_active{slot="cdc"} 1.0']
    assert [line for line in shown if line.startswith("cdc_subscription_lag")] == [
        'cdc_subscription_lag{subscription="mail"} 1.0',
        'cdc_subscription_lag{subscription="audit"} 2.0',
    ]
