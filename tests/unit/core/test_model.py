"""The change that a handler gets."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from cdc.core.model import Change, Json, UnreadableDocumentError, read_change
from tests.changes import change as any_change


def change(**documents: object) -> Change:
    return dataclasses.replace(any_change(1), **documents)  # type: ignore[arg-type]


def test_a_document_is_read_when_it_is_asked_for_and_once() -> None:
    read = change(new=Json(b'{"name": "\xc3\xa9", "n": 1.5}'), metadata=Json(b'{"user_id": null}'))
    assert read.new == {"name": "é", "n": 1.5}
    assert read.new is read.new
    assert read.metadata == {"user_id": None}
    assert read.old is None


def test_a_document_that_cannot_be_read_fails_whoever_asks_for_it() -> None:
    digits = change(new=Json(b"1" * 5_000), old=Json(b"{}"))
    assert digits.old == {}
    with pytest.raises(UnreadableDocumentError, match="ValueError"):
        digits.new  # noqa: B018


def test_what_a_change_is_made_with_by_hand_stays_as_it_is() -> None:
    assert change(new=b"1").new == b"1"


def test_one_that_is_read_from_the_table_is_like_one_that_is_made_by_hand() -> None:
    by_hand = change(new={"a": 1}, metadata=None)
    values = {field.name: getattr(by_hand, field.name) for field in dataclasses.fields(Change)}
    read = read_change(*{**values, "new": Json(b'{"a": 1}')}.values())
    assert type(read) is Change
    assert {name: getattr(read, name) for name in values} == values
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.seq = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(read)).new == {"a": 1}
    assert dataclasses.replace(read, attempt=2).attempt == 2


def test_a_change_does_not_change() -> None:
    made = change(new={"a": 1})
    for name in ("new", "seq"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, 2)
    other = dataclasses.replace(change(new=Json(b"[1]")), attempt=2)
    assert (other.new, other.attempt) == ([1], 2)
    assert copy.copy(other).new == [1]
    assert "new" in {field.name for field in dataclasses.fields(Change)}
