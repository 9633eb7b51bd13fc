"""docs/reference/metrics.md, from the registry of a consumer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from prometheus_client import Metric

from cdc.core.model import Change
from cdc.core.pauses import Pause
from cdc.core.router import Router
from cdc.observability.largest_types import LARGEST, NAMES_MAX
from cdc.observability.metrics import NO_HANDLER, OTHER, Metrics
from cdc.observability.snapshots import (
    BreakerStatus,
    ConsumerStatus,
    LimitStatus,
    OutboxStatus,
    PollerStatus,
    PoolStatus,
    ProcessStatus,
    SlotStatus,
    StreamStatus,
    SubscriptionsStatus,
    SubscriptionStatus,
    TypeStatus,
)
from cdc.observability.status_metrics import StatusMetrics
from tests.reference.markdown import WRITTEN, code, table

_HEAD = """\
# Metrics

{written}
Which question each answers is in [monitoring](../operations/monitoring.md#metrics).

Label values come from closed sets, and where they are known beforehand they are listed. `SLOT` is the configured name
of the slot, `HANDLER` the name of a handler, `SUBSCRIPTION` that of a subscription beside the default one (the 100 that
are furthest behind), `TYPE` an entity type that a rule names; all other types are `{other}`,
and a change without a handler has `{none}`. Of `cdc_outbox_type_changes` it is one of the {largest} types with the most
unprocessed changes, and a process shows {names} names in its life. Prometheus adds `job` and `instance`. Counters and
states are there from the start, as 0; timestamps and the figures of the database when they have a value. Those of slot
and outbox are read every 15 seconds, never in a scrape, and vanish when they cannot be read. Those of delivery are
there where something is delivered.
"""
_GROUPS = {
    "Slot": ("cdc_slot_",),
    "Outbox": ("cdc_outbox_", "cdc_notify_"),
    "Subscriptions": ("cdc_subscription",),
    "Stream": ("cdc_stream_",),
    "Wake-ups": ("cdc_wakeup", "cdc_relay_", "cdc_fetch_", "cdc_visibility_"),
    "Changes and handlers": (
        "cdc_changes_", "cdc_change_", "cdc_handler_", "cdc_settle_", "cdc_transaction_", "cdc_window_", "cdc_limit_",
    ),
    "Delivery over HTTP or to a broker": ("cdc_delivery_",),
    "Observing": ("cdc_observed_",),
    "Consumer": ("cdc_",),
    "Process": ("process_", "python_"),
}  # fmt: skip
"""By the first that fits."""


@cache
def everything() -> list[Metric]:
    """All that a consumer can show, each metric with a value."""
    router = Router()

    @router.on("TYPE", name="HANDLER")
    def handle(change: Change) -> None: ...

    metrics = Metrics("SLOT", router, delivers=True)
    now = 1.0
    status = ProcessStatus(
        consumer=ConsumerStatus(
            last_iteration=dict.fromkeys(("consumer", "shards", "settle"), now), limits={"HANDLER": LimitStatus()},
            pauses=[Pause(1, entity_type="TYPE"), Pause(2, handler="HANDLER")],
        ),
        stream=StreamStatus(loop_last_iteration=now, last_byte_monotonic=now),
        poller=PollerStatus(
            last_iteration_at=now,
            outbox=OutboxStatus(changes={}, oldest_ready_age_s=0, table_bytes=1, dead_tuples=1),
            types=(TypeStatus("TYPE", {}), TypeStatus(OTHER, {})),
            slot=SlotStatus(
                present=True, wal_status="reserved", retained_wal_bytes=1, confirmed_lag_bytes=1, safe_wal_bytes=1,
                catalog_xmin_age=1, spilled_bytes=1,
            ),
            subscriptions=SubscriptionsStatus(count=1, known=(SubscriptionStatus(
                name="SUBSCRIPTION", changes={}, oldest_age_s=1, held_back=1, paused=False, consumers=1),)),
            success=dict.fromkeys(("slot", "outbox", "subscriptions"), True),
        ),
        pools=dict.fromkeys(("async", "sync"), PoolStatus()),
        breakers={"HANDLER": BreakerStatus()},
    )  # fmt: skip
    metrics.registry.register(StatusMetrics("SLOT", lambda: status, delivery="HANDLER", names=("TYPE", "HANDLER")))
    metrics.shadow.saw("TYPE", "HANDLER")
    metrics.shadow.others_took("TYPE", 1)
    return list(metrics.registry.collect())


def page() -> str:
    head = _HEAD.format(written=WRITTEN, other=OTHER, none=NO_HANDLER, largest=LARGEST, names=NAMES_MAX)
    return head + "".join(f"\n## {title}\n\n{_table(metrics)}" for title, metrics in _grouped())


def _grouped() -> Iterator[tuple[str, list[Metric]]]:
    left = everything()
    for title, prefixes in _GROUPS.items():
        yield title, [metric for metric in left if metric.name.startswith(prefixes)]
        left = [metric for metric in left if not metric.name.startswith(prefixes)]
    assert not left, left


def _table(metrics: Sequence[Metric]) -> str:
    rows = [[code(_name(metric)), metric.type, _labels(metric), metric.documentation] for metric in metrics]
    return table(["name", "type", "labels", ""], rows)


def _name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _labels(metric: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in metric.samples:
        for label, value in sample.labels.items():
            if label != "le" and (value or "empty") not in values.setdefault(label, []):
                values[label].append(value or "empty")
    if metric.name.startswith(("cdc_build", "python_")):  # of this machine
        return ", ".join(f"`{label}`" for label in values)
    return "; ".join(f"`{label}`: {', '.join(found)}" for label, found in values.items())
