import os
import shutil
import subprocess
import time
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from cdc.core.circuit_breaker import BreakerState
from cdc.core.model import Change, ChangeState
from cdc.core.router import Router
from cdc.core.stream_reason import Reason
from cdc.observability.metrics import NO_HANDLER, OTHER, UNAVAILABLE, Metrics
from cdc.observability.snapshots import (
    BreakerStatus,
    ConsumerStatus,
    OutboxStatus,
    PoolStatus,
    ProcessStatus,
    Role,
    SlotStatus,
    StreamStatus,
)
from cdc.observability.status_metrics import StatusMetrics


def _router() -> Router:
    router = Router()

    @router.on("task", "INSERT", name="notify")
    def notify(change: Change) -> None: ...

    @router.on("*", name="audit")
    def audit(change: Change) -> None: ...

    return router


_IDLE = {name: PoolStatus() for name in ("async", "sync")}
_CLOSED = {name: BreakerStatus() for name in ("audit", "notify")}


class _Shown:
    """The metrics of a consumer, which is as ``status`` says."""

    def __init__(self, slot: str = "cdc") -> None:
        self.metrics = Metrics(slot, _router())
        self.registry = self.metrics.registry
        self.status = ProcessStatus(pools=_IDLE, breakers=_CLOSED)
        self.registry.register(StatusMetrics(slot, lambda: self.status))

    def poll(self, **figures: Any) -> None:
        self.status = replace(self.status, poller=replace(self.status.poller, **figures))


@pytest.fixture
def metrics() -> _Shown:
    return _Shown()


def _fill(metrics: _Shown) -> None:
    metrics.poll(
        slot=SlotStatus(
            present=True, active=True, wal_status="extended", retained_wal_bytes=1, confirmed_lag_bytes=2,
            safe_wal_bytes=3, catalog_xmin_age=4, spilled_bytes=5,
        ),
        outbox=OutboxStatus(
            changes={ChangeState.FRESH: 6}, oldest_ready_age_s=7.5, table_bytes=8, dead_tuples=9, blocked_keys=10,
            notify_queue_usage=0.25,
        ),
        success={"slot": True, "outbox": True},
    )  # fmt: skip


def _value(metrics: _Shown, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def _series(metrics: _Shown) -> set[str]:
    return {sample.name for metric in metrics.registry.collect() for sample in metric.samples}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("cdc_role", {"role": "standby"}),
        ("cdc_stream_connected", {"slot": "cdc"}),
        ("cdc_stream_unavailable", {"reason": "wal_level"}),
        ("cdc_stream_messages_total", {"slot": "cdc", "kind": "keepalive"}),
        ("cdc_stream_received_bytes_total", {"slot": "cdc"}),
        ("cdc_stream_disconnects_total", {"slot": "cdc", "reason": "stalled"}),
        ("cdc_wakeups_total", {"source": "sweep"}),
        ("cdc_wakeups_dropped_total", {}),
        ("cdc_wakeup_queue_length", {}),
        ("cdc_wakeup_latency_seconds_count", {}),
        ("cdc_fetch_duration_seconds_count", {}),
        ("cdc_fetch_changes_count", {}),
        ("cdc_visibility_retries_total", {"result": "left_to_sweep"}),
        ("cdc_outbox_pruned_total", {}),
        ("cdc_window_changes", {"state": "settling"}),
        ("cdc_window_capacity", {}),
        ("cdc_interruptions_total", {"reason": "connection"}),
        ("cdc_stream_slot_recreations_total", {"slot": "cdc"}),
        ("cdc_transaction_connections", {"kind": "sync", "state": "idle"}),
        ("cdc_transaction_waiting", {"kind": "async"}),
        ("cdc_window_throttled_types", {}),
        ("cdc_shards_owned", {}),
        ("cdc_members", {}),
        ("cdc_shard_moves_total", {"direction": "lost"}),
        ("cdc_changes_handled_total", {"entity_type": "task", "handler": "notify", "outcome": "dead"}),
        ("cdc_changes_handled_total", {"entity_type": "task", "handler": "audit", "outcome": "retried"}),
        ("cdc_changes_handled_total", {"entity_type": OTHER, "handler": "audit", "outcome": "processed"}),
        ("cdc_changes_handled_total", {"entity_type": OTHER, "handler": NO_HANDLER, "outcome": "skipped"}),
        ("cdc_handler_errors_total", {"handler": "notify", "kind": "timeout"}),
        ("cdc_handler_duration_seconds_count", {"handler": "notify"}),
        ("cdc_settle_duration_seconds_count", {}),
        ("cdc_settle_changes_count", {}),
        ("cdc_settle_skipped_total", {}),
        ("cdc_change_latency_seconds_count", {"entity_type": OTHER}),
    ],
)
def test_a_series_exists_with_zero_before_its_first_event(metrics: _Shown, name: str, labels: dict[str, str]) -> None:
    assert _value(metrics, name, **labels) == 0


def test_what_has_no_value_yet_has_no_series(metrics: _Shown) -> None:
    without = {
        "cdc_loop_last_iteration_timestamp_seconds", "cdc_stream_last_byte_timestamp_seconds", "cdc_slot_present",
        "cdc_slot_retained_wal_bytes", "cdc_outbox_changes", "cdc_outbox_oldest_ready_age_seconds",
        "cdc_collector_success",
    }  # fmt: skip
    assert not without & _series(metrics)
    metrics.status = replace(metrics.status, stream=StreamStatus(loop_last_iteration=1, last_byte_monotonic=1))
    _fill(metrics)
    assert without <= _series(metrics)


def test_the_constants_of_the_installation_are_there(metrics: _Shown) -> None:
    assert _value(metrics, "cdc_shards") == 64
    build = next(metric for metric in metrics.registry.collect() if metric.name == "cdc_build_info")
    assert set(build.samples[0].labels) == {"version", "python", "psycopg", "libpq"}
    assert {"process_start_time_seconds", "python_info"} <= _series(metrics)


def test_a_type_without_a_rule_is_counted_as_other(metrics: _Shown) -> None:
    handled = "cdc_changes_handled_total"
    for entity_type in ("task", "42; DROP TABLE"):
        metrics.metrics.handlers.handled(entity_type, "audit", "processed")
    for label in ("task", OTHER):
        assert _value(metrics, handled, entity_type=label, handler="audit", outcome="processed") == 1
    assert "42; DROP TABLE" not in generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    ("status", "role", "why"),
    [
        (ProcessStatus(), Role.SWEEPING, Reason.NETWORK),
        (ProcessStatus(stream=None), Role.SWEEPING, Reason.DISABLED),
        (ProcessStatus(stream=StreamStatus(connected=True)), Role.STREAMING, None),
        (ProcessStatus(stream=StreamStatus(reason="slot_busy")), Role.STANDBY, Reason.SLOT_BUSY),
        (ProcessStatus(stream=StreamStatus(reason="wal_level")), Role.SWEEPING, Reason.WAL_LEVEL),
        (ProcessStatus(stream=StreamStatus(reason="stalled")), Role.SWEEPING, Reason.NETWORK),
        (ProcessStatus(stream=StreamStatus(loop_last_iteration=1)), Role.SWEEPING, Reason.NETWORK),
        (ProcessStatus(stream=StreamStatus(stopped=True)), Role.SWEEPING, None),
        (
            ProcessStatus(stream=StreamStatus(connected=True), consumer=ConsumerStatus(observing=True)),
            Role.OBSERVING,
            None,
        ),
    ],
)
def test_exactly_one_role_is_in_force_and_at_most_one_reason_not_to_stream(
    metrics: _Shown, status: ProcessStatus, role: Role, why: Reason | None
) -> None:
    metrics.status = status
    assert [each for each in Role if _value(metrics, "cdc_role", role=each)] == [role]
    reasons = [each for each in UNAVAILABLE if _value(metrics, "cdc_stream_unavailable", reason=each)]
    assert reasons == ([] if why is None else [why])
    connected = status.stream is not None and status.stream.connected
    assert _value(metrics, "cdc_stream_connected", slot="cdc") == connected


def test_an_observer_owns_nothing_and_there_is_nothing_to_own(metrics: _Shown) -> None:
    metrics.status = ProcessStatus(consumer=ConsumerStatus(observing=True))
    assert _value(metrics, "cdc_shards") == 0


def test_what_a_consumer_holds_is_read_at_the_scrape(metrics: _Shown) -> None:
    metrics.status = ProcessStatus(
        consumer=ConsumerStatus(running=1, queued=2, settling=3, window=4, owned_shards=5, members=6),
        pools={"async": PoolStatus(busy=7, idle=8, waiting=9)},
        breakers={"notify": BreakerStatus(BreakerState.OPEN, "away")},
    )
    held = [_value(metrics, "cdc_window_changes", state=state) for state in ("running", "queued", "settling")]
    assert held == [1, 2, 3]
    assert [_value(metrics, name) for name in ("cdc_window_capacity", "cdc_shards_owned", "cdc_members")] == [4, 5, 6]
    assert _value(metrics, "cdc_transaction_connections", kind="async", state="idle") == 8
    assert _value(metrics, "cdc_transaction_waiting", kind="async") == 9
    states = {each: _value(metrics, "cdc_handler_breaker", handler="notify", state=each) for each in BreakerState}
    assert states == {BreakerState.CLOSED: 0, BreakerState.OPEN: 1, BreakerState.HALF_OPEN: 0}


def test_times_are_those_of_the_wall_clock(metrics: _Shown) -> None:
    metrics.status = ProcessStatus(consumer=ConsumerStatus(last_iteration={"settle": time.monotonic()}))
    last_iteration = _value(metrics, "cdc_loop_last_iteration_timestamp_seconds", loop="settle")
    assert last_iteration is not None
    assert abs(time.time() - last_iteration) < 60


def test_only_where_something_is_delivered_it_is_said_whether_the_application_is_there(metrics: _Shown) -> None:
    assert "cdc_delivery_up" not in _series(metrics)
    breakers = {"deliver": BreakerStatus()}
    status = ProcessStatus(breakers=breakers)
    registry = CollectorRegistry()
    registry.register(StatusMetrics("cdc", lambda: status, delivery="deliver"))
    assert registry.get_sample_value("cdc_delivery_up") == 1
    breakers["deliver"] = BreakerStatus(BreakerState.HALF_OPEN, "away")
    assert registry.get_sample_value("cdc_delivery_up") == 0


def test_the_figures_of_a_reading_are_shown(metrics: _Shown) -> None:
    _fill(metrics)
    assert _value(metrics, "cdc_slot_wal_status", slot="cdc", wal_status="extended") == 1
    assert _value(metrics, "cdc_slot_wal_status", slot="cdc", wal_status="lost") == 0
    assert _value(metrics, "cdc_slot_spilled_bytes_total", slot="cdc") == 5
    assert _value(metrics, "cdc_outbox_changes", state="fresh") == 6
    assert _value(metrics, "cdc_outbox_changes", state="dead") == 0
    assert _value(metrics, "cdc_outbox_oldest_ready_age_seconds") == 7.5
    assert _value(metrics, "cdc_outbox_blocked_keys") == 10
    assert _value(metrics, "cdc_notify_queue_usage_ratio") == 0.25
    assert _value(metrics, "cdc_collector_success", collector="slot") == 1


def test_the_figures_of_a_failed_reading_are_removed(metrics: _Shown) -> None:
    _fill(metrics)
    metrics.poll(slot=None, success={"slot": False, "outbox": True})
    assert not {name for name in _series(metrics) if name.startswith("cdc_slot_")}
    assert _value(metrics, "cdc_collector_success", collector="slot") == 0
    assert _value(metrics, "cdc_outbox_table_bytes") == 8
    metrics.poll(outbox=None, success={"slot": False, "outbox": False})
    assert {name for name in _series(metrics) if name.startswith("cdc_outbox_")} == {"cdc_outbox_pruned_total"}
    assert _value(metrics, "cdc_collector_success", collector="outbox") == 0


def test_a_lost_slot_keeps_no_wal_and_an_unlimited_one_is_safe(metrics: _Shown) -> None:
    _fill(metrics)
    metrics.poll(slot=SlotStatus(present=True, wal_status="lost"))
    assert not {"cdc_slot_retained_wal_bytes", "cdc_slot_safe_wal_bytes"} & _series(metrics)
    assert _value(metrics, "cdc_slot_present", slot="cdc") == 1


def test_creation_times_are_left_out_here_and_left_alone_in_the_rest_of_the_process(metrics: _Shown) -> None:
    others = CollectorRegistry()
    Counter("theirs", "A counter of the program that uses us.", registry=others)
    assert b"theirs_created" in generate_latest(others)
    assert not {name for name in _series(metrics) if name.endswith("_created")}


def test_two_consumers_in_one_process_have_their_own_metrics() -> None:
    one, other = _Shown("one"), _Shown("two")
    one.metrics.wakeups.dropped.inc()
    assert _value(other, "cdc_wakeups_dropped_total") == 0


@pytest.mark.parametrize("filled", [True, False])
def test_promtool_finds_no_fault_in_names_and_help_texts(metrics: _Shown, filled: bool) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert not os.environ.get("CDC_REQUIRE_PROMETHEUS"), "promtool is not installed"
        pytest.skip("promtool is not installed (package prometheus)")
    if filled:
        _fill(metrics)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
