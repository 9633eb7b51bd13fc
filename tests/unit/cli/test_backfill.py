"""What `cdc backfill` says while it works."""

from __future__ import annotations

from cdc.cli.backfill import Watch
from cdc.core.backfill_pace import Wait
from cdc.postgres.backfill import Progress

_LOCKED, _BACKLOG, _RATE = Wait(0.2, locked=True), Wait(0.5, backlog=True), Wait(0.5)


def _warnings(watch: Watch, wait: Wait, seconds: range) -> list[str]:
    told = (watch.take(Progress(10, 10, waits=wait, unsettled=10), float(now)) for now in seconds)
    return [each for each in told if each]


def test_it_says_once_that_rows_are_locked_by_another_session() -> None:
    watch = Watch("orders", 1_000, 0, 0.0)
    assert watch.take(Progress(10, 10), 1.0) is None
    assert _warnings(watch, _LOCKED, range(2, 11)) == []
    [said] = _warnings(watch, _LOCKED, range(11, 100))
    assert "orders are locked by another session" in said
    assert "pg_locks" in said


def test_a_lock_and_a_backlog_are_each_told() -> None:
    watch = Watch("orders", 1_000, 0, 0.0)
    assert len(_warnings(watch, _LOCKED, range(20))) == 1
    watch.take(Progress(20, 20), 20.0)
    [said] = _warnings(watch, _BACKLOG, range(21, 40))
    assert "is a consumer running" in said


def test_a_wait_for_the_rate_is_not_told() -> None:
    assert _warnings(Watch("orders", 1_000, 0, 0.0), _RATE, range(100)) == []


def test_while_it_waits_no_time_is_left_and_the_rate_is_that_of_the_last_seconds() -> None:
    watch = Watch("orders", 1_000, 0, 0.0)
    for now in range(1, 11):
        watch.take(Progress(now * 10, now * 10), float(now))
    assert watch.line(10.0).endswith("10% 100 of about 1,000, 10 a second, 90 s left")
    for wait in (_LOCKED, _BACKLOG):
        watch.take(Progress(100, 100, waits=wait), 11.0)
        assert "left" in watch.line(11.0)
        assert "left" not in watch.line(12.0)
        watch.take(Progress(100, 100), 12.0)
    for now in range(14, 614):
        watch.take(Progress(100, 100, waits=_LOCKED), float(now))
    for now in range(614, 660):
        watch.take(Progress(100 + (now - 613) * 10, 100), float(now))
    assert watch.line(659.0).endswith("56% 560 of about 1,000, 10 a second, 44 s left")
