"""The change as it is read from the table: its documents are parsed when they are asked for."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from cdc.core.fast_change import Json, document, read_change
from cdc.core.model import Change, UnreadableDocumentError
from tests.changes import change as any_change


def read(**documents: object) -> Change:
    made = any_change(1)
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(Change)}
    return read_change(*{**values, **documents}.values())


def test_a_document_is_parsed_when_it_is_asked_for_and_once() -> None:
    made = read(new=Json(b'{"name": "\xc3\xa9", "n": 1.5}'), metadata=Json(b'{"user_id": null}'))
    assert type(document(made, "new")) is Json
    assert made.new == {"name": "é", "n": 1.5}
    assert made.new is made.new
    assert document(made, "new") is made.new
    assert made.metadata == {"user_id": None}
    assert made.old is None


def test_a_document_that_cannot_be_parsed_fails_whoever_asks_for_it() -> None:
    digits = read(new=Json(b"1" * 5_000), old=Json(b"{}"))
    assert digits.old == {}
    with pytest.raises(UnreadableDocumentError, match="ValueError"):
        digits.new  # noqa: B018


def test_bytes_that_a_change_is_made_with_by_hand_stay_as_they_are() -> None:
    assert dataclasses.replace(any_change(1), new=b"1").new == b"1"


def test_one_that_is_read_is_like_one_that_is_made_by_hand() -> None:
    by_hand = dataclasses.replace(any_change(1), new={"a": 1}, metadata=None)
    values = {field.name: getattr(by_hand, field.name) for field in dataclasses.fields(Change)}
    made = read_change(*{**values, "new": Json(b'{"a": 1}')}.values())
    assert isinstance(made, Change)
    assert {name: getattr(made, name) for name in values} == values
    assert (repr(made), made.key, made.cause) == (repr(by_hand), by_hand.key, by_hand.cause)
    assert made != by_hand, "compared by identity"


@pytest.mark.parametrize("name", ["new", "seq"])
def test_no_change_changes(name: str) -> None:
    for made in (any_change(1), read(new=Json(b"[1]"))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, 2)


@pytest.mark.parametrize("copied", [copy.copy, lambda change: pickle.loads(pickle.dumps(change)), dataclasses.replace])
def test_a_copy_has_the_same_in_it(copied: object) -> None:
    made = copied(read(new=Json(b"[1]"), attempt=2))  # type: ignore[operator]
    assert (made.new, made.attempt) == ([1], 2)
