"""The name of the topic, subject, stream or routing key that a change goes to: a template's, or a function's. Pure.

``cdc.{type}`` of an ``order`` is ``cdc.order``. What stands for a placeholder comes from the data, so a character that
the protocol does not allow there becomes ``_``. What is written between them must be right, or it is refused at the
start. A function's names are its own: one that the protocol does not allow makes its change a dead letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Protocol

from cdc.core.deliveries import RejectedError
from cdc.core.model import Change

PLACEHOLDERS = ("type", "schema", "table", "operation")
_REMEMBERED = 10_000
"""Names are made once for each combination. Types come from the data: nothing else bounds them."""


@dataclass(frozen=True, slots=True)
class NameRules:
    """What a protocol allows. ``kind`` is what its names are called, ``bytes_max`` their greatest length.

    ``illegal``: one character that a value must not have; ``wrong``: found in a name that is none as a whole.
    """

    kind: str
    bytes_max: int
    illegal: re.Pattern[str]
    wrong: re.Pattern[str]

    def fault(self, name: str) -> str | None:
        """What is wrong with a whole name, without quoting it; None if nothing is."""
        if not name or self.wrong.search(name) or len(name.encode()) > self.bytes_max:
            return f"the {self.kind} has characters that are not allowed there, is empty, or is too long"
        return None


NameFunction = Callable[[Change], str | None]
"""In Python: the name for a change, or None for the template's."""


class Names(Protocol):
    """Of a protocol's ``rules``."""

    @property
    def rules(self) -> NameRules: ...

    def all_known(self, types: Sequence[str]) -> list[str]:
        """Those that are known before a change of these types (none: of any type) comes."""

    def name(self, change: Change) -> str:
        """Raises RejectedError for one that is none, or too long."""


class NameTemplate:
    """Raises ValueError for a template that makes no good name, without quoting it."""

    def __init__(self, text: str, rules: NameRules) -> None:
        self.text = text
        self.rules = rules
        self._names: dict[tuple[str, str | None, str, str], str] = {}
        try:
            parts = list(Formatter().parse(text))
        except ValueError:
            raise ValueError(f"the {rules.kind} has a brace without its other half") from None
        for _, field, form, conversion in parts:
            if field is not None and (field not in PLACEHOLDERS or form or conversion):
                known = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
                raise ValueError(f"the {rules.kind} has a placeholder that does not exist; there are {known}")
        self._fields = {field for _, field, _, _ in parts if field is not None}
        sample = self._made("x", "x", "x", "x")
        if wrong := rules.fault(sample):
            raise ValueError(wrong)

    def known(self, entity_type: str) -> str | None:
        """The name for all changes of the type, or for an INSERT of it where the operation decides, too.

        None if the table decides, or the type is "" and it decides.
        """
        if self._fields - {"type", "operation"} or ("type" in self._fields and not entity_type):
            return None
        return self._made(entity_type or "_", "_", "_", "insert")

    def all_known(self, types: Sequence[str]) -> list[str]:
        """See ``known``: of these types (none: of any type), each once."""
        return [*dict.fromkeys(filter(None, map(self.known, types or ("",))))]

    def name(self, change: Change) -> str:
        """Raises RejectedError for one that is too long, or none as a whole: a topic of a dot, a subject of ``$JS``."""
        parts = (change.entity_type, change.table_schema, change.table, change.operation.lower())
        found = self._names.get(parts)
        if found is None:
            found = self._made(*parts)
            if len(found.encode()) > self.rules.bytes_max:
                raise RejectedError(f"its {self.rules.kind} would be longer than {self.rules.bytes_max} bytes")
            if self.rules.wrong.search(found):  # as a whole: each value is right by itself
                raise RejectedError(f"its {self.rules.kind} has characters that are not allowed there")
            if len(self._names) < _REMEMBERED:
                self._names[parts] = found
        return found

    def _made(self, entity_type: str, schema: str | None, table: str, operation: str) -> str:
        values = zip(PLACEHOLDERS, (entity_type, schema or "_", table, operation), strict=True)
        return self.text.format(**{name: self.rules.illegal.sub("_", value) or "_" for name, value in values})


class ChosenNames:
    """Those of ``function``, which is called once for each attempt; where it returns None, those of ``template``."""

    def __init__(self, function: NameFunction, template: NameTemplate) -> None:
        self.rules = template.rules
        self._function = function
        self._template = template
        self._right: set[str] = set()

    def all_known(self, _types: Sequence[str]) -> list[str]:
        """None: the function decides for each change."""
        return []

    def name(self, change: Change) -> str:
        """Raises RejectedError for one that is none, TypeError for what is no text, and what the function raises."""
        found = self._function(change)
        if found is None:
            return self._template.name(change)
        if not isinstance(found, str):
            raise TypeError(f"the function for names returned {type(found).__name__}, not a text or None")
        if found not in self._right:
            if wrong := self.rules.fault(found):
                raise RejectedError(f"the function's name for it cannot be one: {wrong}")
            if len(self._right) < _REMEMBERED:
                self._right.add(found)
        return found
