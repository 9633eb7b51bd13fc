"""What a change did to a row: its old document against the new one, column by column. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_SHOWN = 4_000
"""Characters of a value; the commands show all of it."""
_COLUMNS_MAX = 500


@dataclass(frozen=True, slots=True)
class Column:
    """Its values as JSON; None: it is not there. ``differs``: in both, and not the same."""

    name: str
    old: str | None
    new: str | None

    @property
    def state(self) -> str:
        if self.old is None:
            return "added"
        if self.new is None:
            return "removed"
        return "same" if self.old == self.new else "changed"


def columns(old: object, new: object) -> list[Column] | None:
    """Those that differ first; None where neither is an object. One that is not there has no columns."""
    before, after = _document(old), _document(new)
    if not isinstance(before, dict) and not isinstance(after, dict):
        return None
    one, other = before if isinstance(before, dict) else {}, after if isinstance(after, dict) else {}
    found = [Column(name, _value(one, name), _value(other, name)) for name in dict.fromkeys([*other, *one])]
    return sorted(found, key=lambda each: each.state == "same")[:_COLUMNS_MAX]


def text(document: object) -> str | None:
    """As it is stored, not longer than is shown."""
    if document is None:
        return None
    return _cut(document.decode() if isinstance(document, bytes) else str(document))


def _document(stored: object) -> Any:
    if not isinstance(stored, bytes):
        return None
    return json.loads(stored, parse_float=Decimal)


def _value(row: dict[str, Any], name: str) -> str | None:
    return _cut("".join(_json(row[name]))) if name in row else None


def _cut(shown: str) -> str:
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}… ({len(shown):,} characters)"


def _json(value: Any) -> Iterator[str]:
    """JSON with the digits that are stored."""
    match value:
        case Decimal():
            yield str(value)
        case dict():
            yield "{"
            for number, (name, item) in enumerate(value.items()):
                yield f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: "
                yield from _json(item)
            yield "}"
        case list():
            yield "["
            for number, item in enumerate(value):
                yield ", " if number else ""
                yield from _json(item)
            yield "]"
        case _:
            yield json.dumps(value, ensure_ascii=False)
