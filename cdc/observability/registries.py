"""The metrics of several consumers in one process, each of a subscription, as one registry.

A series that a consumer has gets the label ``subscription``. What a process has once stays as it is: its memory, its
stream, the slot, and the series that have that label already, which tell of subscriptions and not of a consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.samples import Sample

LABEL = "subscription"
_ONCE = ("process_", "python_", "cdc_build_info", "cdc_stream_", "cdc_slot_", "cdc_subscription", "cdc_notify_")
"""How the names of families begin that a process shows once: those of the first consumer that has the series."""


class Registries(CollectorRegistry):
    """``read``: the registries by subscription, as they are at each scrape; the first has what a process has once."""

    def __init__(self, read: Callable[[], Mapping[str, CollectorRegistry]]) -> None:
        super().__init__(auto_describe=False)
        self._read = read

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        seen = set[tuple[str, tuple[tuple[str, str], ...]]]()
        for name, registry in self._read().items():
            for family in registry.collect():
                kept = families.get(family.name)
                if kept is None:
                    kept = families[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
                if not family.name.startswith(_ONCE):
                    kept.samples += [Sample(s.name, {**s.labels, LABEL: name}, *s[2:]) for s in family.samples]
                    continue
                for sample in family.samples:
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    if key not in seen:
                        seen.add(key)
                        kept.samples.append(sample)
        return families.values()
