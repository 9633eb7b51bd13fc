"""The marks that stand for what memory does not hold."""

from __future__ import annotations

from math import inf

from cdc.core.deferred_keys import DeferredKeys, KeyRead


def _everywhere(_: str) -> bool:
    return True


def test_a_mark_stands_at_the_lowest_number_and_is_held_if_anything_holds_it() -> None:
    deferred = DeferredKeys(10)
    deferred.defer(("a", "1"), 7, 0, blocked=False)
    deferred.defer(("a", "1"), 5, 0, blocked=True)
    deferred.defer(("a", "1"), 9, 0, blocked=False)
    mark = deferred.watermarks.get(("a", "1"))
    assert mark is not None
    assert (mark.seq, mark.blocked, len(deferred)) == (5, True, 1)


def test_one_type_does_not_take_all_the_memory_there_is_for_marks() -> None:
    deferred = DeferredKeys(30, sole=False)
    for number in range(30):
        if deferred.has_room(("a", str(number))):
            deferred.defer(("a", str(number)), number, 0, blocked=True)
    assert len(deferred) == 24
    assert deferred.has_room(("a", "3")), "it has one"
    assert deferred.has_room(("b", "1"))
    deferred.forget([("a", "3")])
    assert deferred.has_room(("a", "30"))


def test_a_key_is_reported_once_and_types_without_room_are_reported_when_they_have_some() -> None:
    deferred = DeferredKeys(10)
    for entity_type in ("a", "b"):
        for number in (1, 2):
            deferred.defer((entity_type, str(number)), number, 0, blocked=False)
            deferred.request_read((entity_type, str(number)))
    assert deferred.take_reads(1, lambda entity_type: entity_type == "b") == [KeyRead(("b", "1"), 0, 1)]
    assert deferred.take_reads(5, _everywhere) == [KeyRead(("a", "1"), 0, 1), KeyRead(("a", "2"), 0, 2)]
    assert deferred.take_reads(5, _everywhere) == [KeyRead(("b", "2"), 0, 2)]
    assert deferred.take_reads(5, _everywhere) == []


def test_what_is_forgotten_is_not_read_on() -> None:
    deferred = DeferredKeys(10)
    deferred.defer(("a", "1"), 1, 3, blocked=False)
    deferred.request_read(("a", "1"))
    assert list(deferred.of_shards({3})) == [("a", "1")]
    deferred.forget([("a", "1")])
    assert deferred.take_reads(5, _everywhere) == []


def test_a_key_that_is_held_is_read_when_its_time_has_come() -> None:
    deferred = DeferredKeys(10)
    for number, until in ((1, 3.0), (2, 2.0)):
        deferred.defer(("a", str(number)), number, 0, blocked=False)
        deferred.request_read(("a", str(number)))
        deferred.hold(("a", str(number)), until)
    assert deferred.take_reads(10, _everywhere) == []
    assert deferred.held_until == 2.0
    deferred.read_held(1.9)
    assert deferred.take_reads(10, _everywhere) == []
    deferred.read_held(2.0)
    assert deferred.take_reads(10, _everywhere) == [KeyRead(("a", "2"), 0, 2)]
    assert deferred.held_until == 3.0
    deferred.forget([("a", "1")])
    assert deferred.held_until == inf


def test_what_holds_no_more_takes_no_memory() -> None:
    deferred = DeferredKeys(10)
    for number in range(1_000):
        deferred.defer(("a", "1"), number, 0, blocked=False)
        deferred.hold(("a", "1"), 1_000.0 - number)
        deferred.forget([("a", "1")])
    assert len(deferred.held) < 200


def test_a_key_of_which_all_that_was_seen_is_taken_care_of_is_not_read_on() -> None:
    deferred = DeferredKeys(10)
    key = ("a", "1")
    for seq in (5, 6, 9):
        deferred.defer(key, seq, 0, blocked=False, last=seq)
    deferred.handled(key, 4, 8)
    mark = deferred.watermarks[key]
    assert (mark.seq, mark.last) == (9, 9)
    deferred.handled(key, 4, 9)
    assert len(deferred) == 0


def test_a_key_of_which_more_may_have_been_seen_is_read_on_from_there() -> None:
    deferred = DeferredKeys(10)
    deferred.defer(("a", "1"), 5, 0, blocked=False)
    deferred.handled(("a", "1"), 4, 9)
    assert deferred.watermarks[("a", "1")].seq == 10
