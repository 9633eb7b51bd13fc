"""The answers of the probes, by the status of the process."""

from __future__ import annotations

import pytest

from cdc.core.circuit_breaker import BreakerState
from cdc.engine.health_checks import HealthThresholds, liveness, readiness
from cdc.observability.snapshots import BreakerStatus, ConsumerStatus, PollerStatus, ProcessStatus, StreamStatus

NOW = 1_000.0
USUAL = HealthThresholds()
WELL = ConsumerStatus(in_service=True, answered_at=NOW)


def _stream(silent_s: float = 0.0, stall_limit_s: float = 30.0) -> StreamStatus:
    return StreamStatus(
        connected=True, loop_last_iteration=NOW, last_byte_monotonic=NOW - silent_s, stall_limit_s=stall_limit_s
    )


@pytest.mark.parametrize(
    ("status", "red"),
    [
        (ProcessStatus(loop_last_iteration=NOW), []),
        (ProcessStatus(loop_last_iteration=NOW - 31), ["loop.consumer"]),
        (ProcessStatus(loop_last_iteration=NOW, stream=None), []),
        (ProcessStatus(loop_last_iteration=NOW, stream=StreamStatus(loop_last_iteration=NOW - 31)), ["loop.stream"]),
        (ProcessStatus(loop_last_iteration=NOW, stream=_stream(silent_s=100)), ["stream.last_byte"]),
        # It has learnt to be patient: a server that decodes a huge transaction is silent for minutes.
        (ProcessStatus(loop_last_iteration=NOW, stream=_stream(silent_s=100, stall_limit_s=120)), []),
        (ProcessStatus(loop_last_iteration=NOW, failing_tasks={"relay": 4}), ["task.relay"]),
        # Nothing that a restart would fix.
        (ProcessStatus(loop_last_iteration=NOW, consumer=ConsumerStatus(held_up_s=900, answered_at=0)), []),
    ],
)
def test_a_process_is_restarted_for_what_a_restart_mends(status: ProcessStatus, red: list[str]) -> None:
    assert [check.name for check in liveness(status, NOW, USUAL) if not check.ok] == red


@pytest.mark.parametrize(
    ("consumer", "red"),
    [
        (WELL, []),
        (ConsumerStatus(), ["database", "schema"]),
        (ConsumerStatus(in_service=True, answered_at=NOW - 31), ["database"]),
        (ConsumerStatus(in_service=True, answered_at=NOW, held_up_s=31), ["marks"]),
        (ConsumerStatus(in_service=True, answered_at=NOW, unread_s=31), ["reads"]),
        (ConsumerStatus(in_service=True, answered_at=NOW, stopping=True), ["draining"]),
    ],
)
def test_a_consumer_is_ready_when_it_works(consumer: ConsumerStatus, red: list[str]) -> None:
    checks = readiness(ProcessStatus(consumer=consumer), NOW, USUAL)
    assert [check.name for check in checks if not check.ok] == red


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (ProcessStatus(consumer=WELL, stream=StreamStatus(reason="slot_busy")), "ok stream slot_busy"),
        (ProcessStatus(consumer=WELL, poller=PollerStatus(slot_waits_for_standbys=True)), "ok stream standbys_away"),
        (
            ProcessStatus(consumer=WELL, breakers={"ask": BreakerStatus(BreakerState.OPEN, "503")}),
            "ok handler.ask rests: 503",
        ),
    ],
)
def test_without_a_slot_or_with_a_handler_that_rests_it_is_ready_and_says_so(status: ProcessStatus, told: str) -> None:
    checks = readiness(status, NOW, USUAL)
    assert all(check.ok for check in checks)
    assert told in map(str, checks)


def test_one_that_delivers_is_not_ready_while_the_application_is_away() -> None:
    away = ProcessStatus(consumer=WELL, breakers={"deliver": BreakerStatus(BreakerState.OPEN, "refused")})
    assert "fail application refused" in map(str, readiness(away, NOW, USUAL, delivery="deliver"))
    there = ProcessStatus(consumer=WELL, breakers={"deliver": BreakerStatus()})
    assert all(check.ok for check in readiness(there, NOW, USUAL, delivery="deliver"))
