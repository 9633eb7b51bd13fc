from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from cdc.contrib.demo.tracker import Journey, Tracker, percentile
from cdc.core.model import Change, Operation

MARK = ("message", "m-1", "INSERT")


class Clock:
    """Each look is a second later."""

    def __init__(self) -> None:
        self._seconds: Iterator[int] = iter(range(1, 100))

    def __call__(self) -> float:
        return next(self._seconds)


def change(seq: int = 7, *, entity_id: str = "m-1", attempt: int = 1) -> Change:
    return Change(
        id=uuid.uuid4(), seq=seq, shard=1, entity_type="message", entity_id=entity_id, table_schema="public",
        table="whatsapp_messages", operation=Operation.INSERT, old=None, new={}, metadata=None,
        changed_at=datetime.now(UTC), attempt=attempt,
    )  # fmt: skip


@pytest.fixture
def arrived() -> list[Journey]:
    return []


@pytest.fixture
def tracker(arrived: list[Journey]) -> Tracker:
    return Tracker(arrived.append, lambda journey, error: None, clock=Clock())


def sent(tracker: Tracker) -> Journey:
    return tracker.sent(MARK, table="whatsapp_messages", note="", shown=True)


def test_a_change_is_followed_from_the_writer_to_processed(tracker: Tracker, arrived: list[Journey]) -> None:
    journey = sent(tracker)
    tracker.stored(journey)
    tracker.notified([7, 8], 2.5)
    tracker.started(change(), "answer")
    tracker.processed(change())
    assert arrived == tracker.ended == [journey]
    assert [journey.sent, journey.stored, journey.notified, journey.started, journey.processed] == [1, 2, 2.5, 3, 4]
    assert (journey.handler, journey.attempts, journey.source) == ("answer", 1, "wal")


def test_the_writer_may_be_the_last_to_hear_of_its_commit(tracker: Tracker, arrived: list[Journey]) -> None:
    journey = sent(tracker)
    tracker.started(change(), "answer")
    tracker.processed(change())
    assert arrived == []
    tracker.stored(journey)
    assert arrived == [journey]


def test_a_change_without_a_wake_up_was_found_by_sweeping(tracker: Tracker) -> None:
    journey = sent(tracker)
    tracker.started(change(), "answer")
    assert journey.source == "sweep"


def test_a_retried_change_keeps_the_start_of_its_first_attempt(tracker: Tracker) -> None:
    journey = sent(tracker)
    tracker.started(change(), "answer")
    first = journey.started
    tracker.started(change(attempt=2), "answer")
    assert (journey.started, journey.attempts) == (first, 2)


def test_a_writer_need_not_know_the_id_beforehand(tracker: Tracker, arrived: list[Journey]) -> None:
    journey = tracker.sent(("message", "by its title", "INSERT"), table="whatsapp_messages", note="", shown=True)
    tracker.known_as(("message", "by its title", "INSERT"), change())
    tracker.known_as(("message", "by no title", "INSERT"), change(entity_id="m-2"))
    tracker.started(change(), "answer")
    tracker.stored(journey)
    tracker.processed(change())
    assert arrived == [journey]


def test_the_burst_is_over_when_its_last_change_is_processed(tracker: Tracker) -> None:
    tracker.burst_sent(2)
    for n in (1, 2):
        assert not tracker.burst_over.is_set()
        tracker.processed(change(n, entity_id=f"burst-{n}"))
    assert tracker.burst_over.is_set()


def test_changes_of_strangers_are_followed_only_when_visitors_are_expected(
    tracker: Tracker, arrived: list[Journey]
) -> None:
    assert tracker.started(change(), "answer") is None
    tracker.visitors = True
    stranger = tracker.started(change(), "answer")
    tracker.processed(change())
    assert arrived == [stranger], "nobody will note that it is stored"


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 50, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0], 50, 1.0),
        ([float(n) for n in range(1, 101)], 99, 99.0),
        ([float(n) for n in range(1, 101)], 100, 100.0),
    ],
)
def test_a_percentile_is_a_value_that_was_measured(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected
