"""The marks that stand for what memory does not hold."""

from __future__ import annotations

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
