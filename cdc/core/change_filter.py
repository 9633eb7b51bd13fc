"""Which changes of its type and operation a handler wants: by the columns that changed, and by a function. Pure.

The columns are looked at first, in the documents as they were captured: so a change that is left out need not fit the
handler's model. The function then gets what the handler would.

What cannot be known counts as changed (``Change.changed``), and so does a column that the change does not have, because
its name is misspelt or it is not captured: a filter that is wrong calls the handler too often, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cdc.core.model import Change, differs


class FilteredError(Exception):
    """The handler's filter leaves the change out."""


@dataclass(frozen=True, slots=True)
class ChangeFilter:
    """``columns``: one of them has changed. ``when`` holds for the change. None: any change is wanted.

    ``when`` is the handler's code, and may raise anything.
    """

    columns: frozenset[str] | None = None
    when: Callable[[Change], object] | None = None

    def apply(self, change: Change, given: Callable[[], Change]) -> Change:
        """``given()``, the change as the handler gets it. Raises FilteredError if it is not wanted."""
        if self.columns is not None and not self._any_changed(self.columns, change.old, change.new):
            raise FilteredError
        made = given()
        if self.when is not None and not self.when(made):
            raise FilteredError
        return made

    @staticmethod
    def _any_changed(columns: frozenset[str], old: Any, new: Any) -> bool:
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            return True
        return any(differs(old, new, column) for column in columns)
