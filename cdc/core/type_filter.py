"""Which entity types a consumer handles. Pure.

Changes of other types are left as they are: not read, not marked, and they block nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class TypeFilter(NamedTuple):
    """These types only (``include``), or all except these."""

    types: tuple[str, ...] = ()
    include: bool = False

    @property
    def everything(self) -> bool:
        return not self.types and not self.include

    def has(self, entity_type: str) -> bool:
        return (entity_type in self.types) == self.include

    def without(self, others: Iterable[str]) -> TypeFilter:
        """The same filter, without these types."""
        if not self.include:
            return TypeFilter((*self.types, *others))
        left_out = frozenset(others)
        return TypeFilter(tuple(name for name in self.types if name not in left_out), include=True)

    def within(self, other: TypeFilter) -> TypeFilter:
        """The types in both filters."""
        if other.include:
            return TypeFilter(tuple(name for name in other.types if self.has(name)), include=True)
        return self.without(other.types)

    def __str__(self) -> str:
        if self.everything:
            return "every entity type"
        names = ", ".join(self.types)
        if not names:
            return "no entity type"
        return f"only {names}" if self.include else f"every entity type but {names}"


EVERYTHING = TypeFilter()
NOTHING = TypeFilter(include=True)
