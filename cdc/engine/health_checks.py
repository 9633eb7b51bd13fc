"""Whether a process is healthy, by its status: the answers of the probes. Pure.

Liveness covers only what a restart would fix: never the database, the lag or the role.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cdc.http.server import Check
from cdc.observability.snapshots import ProcessStatus

_HELD_UP_S = 30.0
"""Marks that cannot be written, or changes that cannot be read, for longer make the process not ready."""


@dataclass(frozen=True, slots=True)
class HealthThresholds:
    """When a probe fails. ``turn_s``, ``answer_s``: seconds since a loop's last turn, since the database's last answer.

    ``stall_s``: the silence after which the stream begins again; it grows while a server decodes something huge.
    After ``silences`` times the current limit the watchdog itself has failed.
    """

    turn_s: float = 30.0
    answer_s: float = 30.0
    stall_s: float = 30.0
    silences: float = 3.0


def liveness(status: ProcessStatus, now: float, thresholds: HealthThresholds) -> list[Check]:
    """``now`` by time.monotonic()."""
    checks = [_recent("loop.consumer", now - status.loop_last_iteration, thresholds.turn_s)]
    stream = status.stream
    if stream and stream.loop_last_iteration:  # it has begun
        checks.append(_recent("loop.stream", now - stream.loop_last_iteration, thresholds.turn_s))
        if stream.connected and stream.last_byte_monotonic is not None:
            silence_s = thresholds.silences * stream.stall_limit_s
            checks.append(_recent("stream.last_byte", now - stream.last_byte_monotonic, silence_s))
    for name, times in status.failing_tasks.items():
        checks.append(Check(f"task.{name}", ok=False, detail=f"ended {times} times in a row"))
    return checks


def readiness(
    status: ProcessStatus, now: float, thresholds: HealthThresholds, *, delivery: str | None = None
) -> list[Check]:
    """``now`` by time.monotonic(). ``delivery``: the handler that delivers over HTTP, if it is the only one."""
    return [*_of_consumer(status, now, thresholds), *_of_slot(status), *_of_handlers(status, delivery)]


def _of_consumer(status: ProcessStatus, now: float, thresholds: HealthThresholds) -> Iterator[Check]:
    consumer = status.consumer
    if consumer.observing:
        yield Check("observing", ok=True, detail="runs and marks nothing")
    if consumer.answered_at is None:
        yield Check("database", ok=False, detail="never answered")
    else:
        yield _recent("database", now - consumer.answered_at, thresholds.answer_s)
    yield Check("schema", consumer.in_service, "" if consumer.in_service else "not there yet")
    yield Check("marks", consumer.held_up_s < _HELD_UP_S, f"held up for {consumer.held_up_s:.1f}s")
    yield Check("reads", consumer.unread_s < _HELD_UP_S, f"held up for {consumer.unread_s:.1f}s")
    yield Check("draining", not consumer.stopping, "yes" if consumer.stopping else "no")


def _of_slot(status: ProcessStatus) -> Iterator[Check]:
    """If no slot sends wake-ups though one should, work goes on by sweeping, so the process is ready all the same."""
    if status.stream and (why := "standbys_away" if status.poller.slot_waits_for_standbys else status.stream.reason):
        yield Check("stream", ok=True, detail=why)


def _of_handlers(status: ProcessStatus, delivery: str | None) -> Iterator[Check]:
    """A consumer that only delivers is not ready while its breaker is tripped; of several handlers the others work."""
    resting = {name: breaker.why for name, breaker in sorted(status.breakers.items()) if breaker.rests}
    if delivery is not None:
        yield Check("application", delivery not in resting, resting.get(delivery, ""))
        return
    for name, why in resting.items():
        yield Check(f"handler.{name}", ok=True, detail=f"rests: {why}")


def _recent(name: str, age_s: float, limit_s: float) -> Check:
    return Check(name, age_s < limit_s, f"{age_s:.1f}s")
