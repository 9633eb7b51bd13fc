"""Makes the values of the hot path cheaply: changes as they were read, and named tuples. Pure.

A ``Change`` is a frozen dataclass for handlers, with its documents as ``old``, ``new`` and ``metadata``. Two steps are
too slow to be done for each change that is read, so they are done differently here:

- *Parsing.* Most documents are never used, or are passed on unparsed. So a read makes a ``ReadChange``, whose
  documents are ``Json`` until their first use.
- *Making.* The constructor of a frozen dataclass sets each field by a call, 6 us for all. That of a class with the
  same slots that is not frozen takes 0.6 us, and an object may change to a class of the same layout.
  ``object.__new__`` and the setters of the slots, without a second class, take 1.3 us.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, make_dataclass
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

from cdc.core.model import Change, UnreadableDocumentError

Json = bytes
"""A document that has not been parsed yet; no parsed one is bytes."""


_scan = json.JSONDecoder(parse_float=Decimal).raw_decode
"""jsonb keeps the digits of a number, which a float would not."""

_SLOTS: dict[str, Any] = {name: Change.__dict__[name] for name in ("old", "new", "metadata")}


def _parsed_when_asked(name: str) -> property:
    slot = _SLOTS[name]

    def read(change: Change) -> Any:
        value = slot.__get__(change)
        if type(value) is Json:
            try:
                value, _ = _scan(value.decode())
            except (ValueError, RecursionError) as error:
                raise UnreadableDocumentError(f"{name!r} cannot be read by Python: {type(error).__name__}") from error
            slot.__set__(change, value)
        return value

    # With a setter: the constructor, which copies take, sets fields by name.
    return property(read, slot.__set__)


class ReadChange(Change):
    """A change whose documents may be Json, each parsed at its first use. Otherwise like any other change."""

    __slots__ = ()

    old = _parsed_when_asked("old")
    new = _parsed_when_asked("new")
    metadata = _parsed_when_asked("metadata")


_Draft = make_dataclass("_Draft", [field.name for field in fields(Change)], eq=False, slots=True)


def read_change(*values: Any) -> ReadChange:
    """A change from the values of all its fields, in the order of ``Change``; its documents may be Json."""
    change: Any = _Draft(*values)
    change.__class__ = ReadChange
    return change  # type: ignore[no-any-return]  # cast() would be a call for each change


def document(change: Change, name: str) -> Any:
    """``old``, ``new`` or ``metadata`` of the change as it is stored: Json until its first use."""
    return _SLOTS[name].__get__(change)


_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])


def fast_make(kind: type[_Tuple]) -> Callable[[tuple[Any, ...]], _Tuple]:
    """Does what ``_make`` of a NamedTuple does. That is a function in Python and takes twice as long."""
    return partial(tuple.__new__, kind)
