"""Which changes of its type and operation a handler wants: by the columns that changed, and by a function. Pure.

The columns are looked at first, in the documents as they were captured: so a change that is left out need not fit the
handler's model. The function then gets what the handler would.

What cannot be known counts as changed (``Change.changed``), and so does a column that the change does not have, because
its name is misspelt or it is not captured: a filter that is wrong calls the handler too often, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cdc.core.model import Change, differs


@dataclass(frozen=True, slots=True)
class ChangeFilter:
    """``columns``: one of them has changed. ``when`` holds for the change. None: any change is wanted.

    ``when`` is the handler's code, and may raise anything.
    """

    columns: frozenset[str] | None = None
    when: Callable[[Change], object] | None = None

    def apply(self, validate: Callable[[Change], Change] | None, change: Change) -> Change | None:
        """The change as the handler gets it, by ``validate``. None: it is left out."""
        if self.columns is not None and not _any_changed(self.columns, change.old, change.new):
            return None
        given = change if validate is None else validate(change)
        return given if self.when is None or self.when(given) else None


def _any_changed(columns: frozenset[str], old: object, new: object) -> bool:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return True
    return any(differs(old, new, column) for column in columns)
