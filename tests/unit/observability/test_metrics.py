import os
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from cdc.core.model import Change
from cdc.core.router import Router
from cdc.observability.metrics import NO_HANDLER, OTHER, ROLES, UNAVAILABLE, Metrics


def _router() -> Router:
    router = Router()

    @router.on("task", "INSERT", name="notify")
    def notify(change: Change) -> None: ...

    @router.on("*", name="audit")
    def audit(change: Change) -> None: ...

    return router


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("cdc", _router())


def _fill(metrics: Metrics) -> None:
    metrics.show_slot(
        present=True, active=True, wal_status="extended", retained_wal_bytes=1, confirmed_lag_bytes=2,
        safe_wal_bytes=3, catalog_xmin_age=4, spilled_bytes=5,
    )  # fmt: skip
    metrics.show_outbox(
        changes={"fresh": 6}, oldest_ready_age_s=7.5, table_bytes=8, dead_tuples=9, blocked_keys=10,
        notify_queue_usage=0.25,
    )  # fmt: skip


def _value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def _series(metrics: Metrics) -> set[str]:
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
        ("cdc_lanes_changes", {"state": "settling"}),
        ("cdc_lanes_capacity", {}),
        ("cdc_interruptions_total", {"reason": "connection"}),
        ("cdc_stream_slot_recreations_total", {"slot": "cdc"}),
        ("cdc_transaction_connections", {"kind": "sync", "state": "idle"}),
        ("cdc_transaction_waiting", {"kind": "async"}),
        ("cdc_lanes_limited_types", {}),
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
def test_a_series_exists_with_zero_before_its_first_event(metrics: Metrics, name: str, labels: dict[str, str]) -> None:
    assert _value(metrics, name, **labels) == 0


def test_what_has_no_value_yet_has_no_series(metrics: Metrics) -> None:
    without = {
        "cdc_loop_last_iteration_timestamp_seconds", "cdc_stream_last_byte_timestamp_seconds", "cdc_slot_present",
        "cdc_slot_retained_wal_bytes", "cdc_outbox_changes", "cdc_outbox_oldest_ready_age_seconds",
        "cdc_collector_success",
    }  # fmt: skip
    assert not without & _series(metrics)
    metrics.loop_last_iteration.labels("stream").set(1)
    metrics.stream_last_byte.labels("cdc").set(1)
    _fill(metrics)
    assert without <= _series(metrics)


def test_the_constants_of_the_installation_are_there(metrics: Metrics) -> None:
    assert _value(metrics, "cdc_shards") == 64
    build = next(metric for metric in metrics.registry.collect() if metric.name == "cdc_build_info")
    assert set(build.samples[0].labels) == {"version", "python", "psycopg", "libpq"}
    assert {"process_start_time_seconds", "python_info"} <= _series(metrics)


def test_a_type_without_a_rule_is_counted_as_other(metrics: Metrics) -> None:
    assert metrics.entity_type("task") == "task"
    assert metrics.entity_type("42; DROP TABLE") == OTHER


def test_exactly_one_role_is_in_force(metrics: Metrics) -> None:
    for current in ROLES:
        metrics.set_role(current)
        assert {role: _value(metrics, "cdc_role", role=role) for role in ROLES} == {
            role: float(role == current) for role in ROLES
        }


def test_a_consumer_that_does_not_stream_says_why_and_one_that_does_has_no_reason(metrics: Metrics) -> None:
    for reason in UNAVAILABLE:
        metrics.set_stream(reason)
        assert _value(metrics, "cdc_stream_connected", slot="cdc") == 0
        assert sum(_value(metrics, "cdc_stream_unavailable", reason=one) or 0 for one in UNAVAILABLE) == 1
        assert _value(metrics, "cdc_stream_unavailable", reason=reason) == 1
    metrics.set_stream(None)
    assert _value(metrics, "cdc_stream_connected", slot="cdc") == 1
    assert sum(_value(metrics, "cdc_stream_unavailable", reason=one) or 0 for one in UNAVAILABLE) == 0


def test_the_figures_of_a_reading_are_shown(metrics: Metrics) -> None:
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


def test_the_figures_of_a_failed_reading_are_removed(metrics: Metrics) -> None:
    _fill(metrics)
    metrics.forget_slot()
    assert not {name for name in _series(metrics) if name.startswith("cdc_slot_")}
    assert _value(metrics, "cdc_collector_success", collector="slot") == 0
    assert _value(metrics, "cdc_outbox_table_bytes") == 8
    metrics.forget_outbox()
    assert {name for name in _series(metrics) if name.startswith("cdc_outbox_")} == {"cdc_outbox_pruned_total"}
    assert _value(metrics, "cdc_collector_success", collector="outbox") == 0


def test_a_lost_slot_keeps_no_wal_and_an_unlimited_one_is_safe(metrics: Metrics) -> None:
    _fill(metrics)
    metrics.show_slot(present=True, wal_status="lost")
    assert not {"cdc_slot_retained_wal_bytes", "cdc_slot_safe_wal_bytes"} & _series(metrics)
    assert _value(metrics, "cdc_slot_present", slot="cdc") == 1


def test_creation_times_are_left_out_here_and_left_alone_in_the_rest_of_the_process(metrics: Metrics) -> None:
    others = CollectorRegistry()
    Counter("theirs", "A counter of the program that uses us.", registry=others)
    assert b"theirs_created" in generate_latest(others)
    assert not {name for name in _series(metrics) if name.endswith("_created")}


def test_two_consumers_in_one_process_have_their_own_metrics() -> None:
    one, other = Metrics("one", _router()), Metrics("two", _router())
    one.wakeups_dropped.inc()
    assert _value(other, "cdc_wakeups_dropped_total") == 0


@pytest.mark.parametrize("filled", [True, False])
def test_promtool_finds_no_fault_in_names_and_help_texts(metrics: Metrics, filled: bool) -> None:
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
