"""Which entity types are values of a label: a few, however many there are and whatever they are called. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cdc.core.model import ChangeState
from cdc.observability.metrics import OTHER
from cdc.observability.snapshots import TypeStatus

LARGEST = 20
"""Types shown at a time, so that one consumer has 4 * 21 series at most."""
NAMES_MAX = 100
"""Names shown since the start. Whoever may write changes may call each type otherwise, and a series lives for hours."""


class LargestTypes:
    """Those with the most unprocessed changes by their names, all others as ``other``."""

    def __init__(self) -> None:
        self._names = set[str]()

    def of(self, found: Iterable[TypeStatus]) -> tuple[TypeStatus, ...]:
        """At most LARGEST of them, the largest first, and the sum of the others, if there are any."""
        shown = list[TypeStatus]()
        others, oldest_s = Counter[ChangeState](), 0.0
        for each in sorted(found, key=lambda each: (-sum(each.changes.values()), each.name)):
            if len(shown) < LARGEST and self._may_show(each.name):
                self._names.add(each.name)
                shown.append(each)
            else:
                others.update(each.changes)
                oldest_s = max(oldest_s, each.oldest_ready_age_s)
        return (*shown, TypeStatus(OTHER, others, oldest_s)) if others else tuple(shown)

    def _may_show(self, name: str) -> bool:
        return name in self._names or (name != OTHER and len(self._names) < NAMES_MAX)
