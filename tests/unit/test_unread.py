"""The marks that stand for what memory does not hold."""

from __future__ import annotations

from cdc.unread import Resume, Unread


def _everywhere(_: str) -> bool:
    return True


def test_a_mark_stands_at_the_lowest_number_and_is_held_if_anything_holds_it() -> None:
    unread = Unread(10)
    unread.note(("a", "1"), 7, 0, held=False)
    unread.note(("a", "1"), 5, 0, held=True)
    unread.note(("a", "1"), 9, 0, held=False)
    mark = unread.get(("a", "1"))
    assert mark is not None
    assert (mark.seq, mark.held, len(unread)) == (5, True, 1)


def test_one_type_does_not_take_all_the_memory_there_is_for_marks() -> None:
    unread = Unread(30, sole=False)
    for number in range(30):
        if unread.has_room(("a", str(number))):
            unread.note(("a", str(number)), number, 0, held=True)
    assert len(unread) == 24
    assert unread.has_room(("a", "3")), "it has one"
    assert unread.has_room(("b", "1"))
    unread.forget([("a", "3")])
    assert unread.has_room(("a", "30"))


def test_a_key_is_told_once_and_types_without_room_are_told_when_they_have_some() -> None:
    unread = Unread(10)
    for entity_type in ("a", "b"):
        for number in (1, 2):
            unread.note((entity_type, str(number)), number, 0, held=False)
            unread.resume((entity_type, str(number)))
    assert unread.resumes(1, lambda entity_type: entity_type == "b") == [Resume(("b", "1"), 0, 1)]
    assert unread.resumes(5, _everywhere) == [Resume(("a", "1"), 0, 1), Resume(("a", "2"), 0, 2)]
    assert unread.resumes(5, _everywhere) == [Resume(("b", "2"), 0, 2)]
    assert unread.resumes(5, _everywhere) == []


def test_what_is_forgotten_is_not_read_on() -> None:
    unread = Unread(10)
    unread.note(("a", "1"), 1, 3, held=False)
    unread.resume(("a", "1"))
    assert list(unread.of_shards({3})) == [("a", "1")]
    unread.forget([("a", "1")])
    assert unread.resumes(5, _everywhere) == []
