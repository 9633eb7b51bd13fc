"""Metrics that are read from the database: each group by one reading, and gone when it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

Samples = list[tuple[tuple[str, ...], float]]
_Family = GaugeMetricFamily | CounterMetricFamily


class Figures:
    """Values read from the database in one go: shown together, replaced together, gone together."""

    def __init__(self, *families: Callable[[], _Family]) -> None:
        self._families = families
        self._shown: Mapping[str, Samples] = {}

    def show(self, figures: Mapping[str, Samples]) -> None:
        """Replaced whole, by one assignment: a scrape in another thread sees one reading or the other."""
        self._shown = figures

    def describe(self) -> list[_Family]:
        return [family() for family in self._families]

    def collect(self) -> Iterable[Metric]:
        shown = self._shown
        for family in self.describe():
            for labels, value in shown.get(family.name, ()):
                family.add_metric(labels, value)
            yield family


def _figure(name: str, text: str, *labels: str) -> Callable[[], _Family]:
    return partial(GaugeMetricFamily, name, text, labels=labels)


def slot_figures() -> Figures:
    return Figures(
        _figure("cdc_slot_present", "1 if the slot exists.", "slot"),
        _figure("cdc_slot_active", "1 if somebody reads the slot.", "slot"),
        _figure("cdc_slot_wal_status", "State of the slot's WAL; 1 for the one it is in.", "slot", "wal_status"),
        _figure("cdc_slot_retained_wal_bytes", "WAL the server keeps for the slot.", "slot"),
        _figure("cdc_slot_confirmed_lag_bytes", "WAL the reader has not confirmed.", "slot"),
        _figure("cdc_slot_safe_wal_bytes", "WAL that may be written before the slot is lost.", "slot"),
        _figure(
            "cdc_slot_catalog_xmin_age_transactions", "How far the slot holds back vacuum of the catalogs.", "slot"
        ),
        # The server counts it, so it is read, not counted here. The client appends _total.
        partial(CounterMetricFamily, "cdc_slot_spilled_bytes", "Bytes that decoding wrote to disk.", labels=("slot",)),
    )


def outbox_figures() -> Figures:
    return Figures(
        _figure("cdc_outbox_changes", "Unprocessed changes, counted up to a bound.", "state"),
        _figure("cdc_outbox_oldest_ready_age_seconds", "Age of the oldest change that could run now; 0 if none."),
        _figure("cdc_outbox_table_bytes", "Size of entity_changes with indexes and TOAST."),
        _figure("cdc_outbox_dead_tuples", "Row versions of entity_changes that vacuum has not removed."),
        _figure(
            "cdc_outbox_blocked_keys", "Keys held back by a waiting change or a pausing dead letter, up to a bound."
        ),
        _figure(
            "cdc_outbox_unhandled_changes",
            "Fresh changes of types that no handler of this consumer wants, up to a bound.",
        ),
        _figure("cdc_notify_queue_usage_ratio", "How full the server's queue of notifications is."),
    )
