"""What somebody has paused, and what that means for one consumer's handlers. Pure.

Theory
------
Order is kept by key, and a key has one type. So what is held is a *type*, whole, or one *key* of it: a pause of a
handler holds every type that the handler gets a change of. Were only the handler's own operations held, the next change
of the key would have to wait behind one that stays fresh, and each read would have to find that out.

A held type is one without room (``scheduler``): the read planner gives it cursors of its own, which rest, due reads
leave it out, and nothing of it is in memory. A held key has a watermark, like one that is blocked by a waiting change.
Both are read again when they are resumed, in order; no attempt is counted and nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from cdc.core.admission import Admission
from cdc.core.model import Change, Key, Operation
from cdc.core.over_limit import OverLimit
from cdc.core.router import ANY, Router
from cdc.core.type_filter import EVERYTHING, TypeFilter

PAUSES_MAX = 1_000
"""Of an outbox at a time. Each consumer has all of them in memory, and a watermark for each key."""
_DUE_MAX = 2_000
"""Waiting changes of held keys that are due and not read again. Those beyond are read with each read of due changes."""
_UNNAMED = "\0"
"""Stands for a type that no handler names; a type of the database cannot have it."""


@dataclass(frozen=True, slots=True)
class Pause:
    """None: whatever it is. ``entity_id``: of one key; then ``entity_type`` is given, and no handler.

    ``age_s``: how old it was when it was read. ``ends_in_s``: None where only somebody ends it.
    """

    id: int
    subscription: str | None = None
    entity_type: str | None = None
    handler: str | None = None
    entity_id: str | None = None
    because: str = ""
    set_by: str = ""
    age_s: float = 0.0
    ends_in_s: float | None = None

    @property
    def scope(self) -> str:
        """What it is about: key, handler, type or everything."""
        if self.entity_id is not None:
            return "key"
        if self.handler is not None:
            return "handler"
        return "everything" if self.entity_type is None else "type"

    def __str__(self) -> str:
        """What it holds, without the key: that is row content."""
        what = {
            "key": f"a key of {self.entity_type}",
            "handler": f"the handler {self.handler}",
            "type": f"the type {self.entity_type}",
            "everything": "everything",
        }[self.scope]
        if self.handler is not None and self.entity_type is not None:
            what += f", for the type {self.entity_type}"
        return what if self.subscription is None else f"{what} in the subscription {self.subscription}"


class Pauses:
    """``all``: those in force. False where there is none."""

    __slots__ = ("_include", "_named", "all", "everything", "going", "keys")

    def __init__(self, pauses: Sequence[Pause] = (), router: Router | None = None) -> None:
        self.all = tuple(pauses)
        self.everything = any(pause.scope == "everything" for pause in pauses)
        self.going = _going(pauses, router or Router())
        """The types of which not all is held."""
        self.keys: Collection[Key] = frozenset(
            (pause.entity_type, pause.entity_id)
            for pause in pauses
            if pause.entity_type is not None and pause.entity_id is not None
        )
        self._named, self._include = frozenset(self.going.types), self.going.include

    def __bool__(self) -> bool:
        return bool(self.all)

    def holds(self, entity_type: str) -> bool:
        """Whether nothing of the type may be taken in or started."""
        return self.everything or (entity_type in self._named) != self._include

    def hold(self, key: Key) -> bool:
        """Whether nothing of the key may be."""
        return key in self.keys or self.holds(key[0])


def _going(pauses: Sequence[Pause], router: Router) -> TypeFilter:
    named = {entity_type for entity_type, _ in router.handlers} - {ANY}
    held, others_held = set[str](), False
    for pause in pauses:
        if pause.scope == "type" and pause.entity_type is not None:
            held.add(pause.entity_type)
        elif pause.handler is not None:
            asked = named if pause.entity_type is None else {pause.entity_type}
            held |= {entity_type for entity_type in asked if _gets(router, pause.handler, entity_type)}
            others_held |= pause.entity_type is None and _gets(router, pause.handler, _UNNAMED)
    if others_held:
        return TypeFilter(tuple(sorted(named - held)), include=True)
    return EVERYTHING.without(sorted(held))


def _gets(router: Router, handler: str, entity_type: str) -> bool:
    matched = (router.match(entity_type, operation) for operation in Operation)
    return any(found is not None and found.name == handler for found in matched)


NONE: Final = Pauses()


class Held:
    """What is held at present, for the scheduler."""

    __slots__ = ("due", "over", "pauses")

    def __init__(self) -> None:
        self.pauses = NONE
        self.over: OverLimit | None = None
        """What is over a limit of a handler; None: no handler has one over all consumers."""
        self.due: set[int] = set()
        """The numbers of waiting changes of held keys that a read of due changes has brought."""

    def holds(self, entity_type: str) -> bool:
        """Whether nothing of the type may be taken in or started."""
        return self.pauses.holds(entity_type)

    def become(self, pauses: Pauses) -> Collection[Key]:
        """Hold these from now on. Returns the keys that are held no more."""
        before, self.pauses = self.pauses, pauses
        self.due.clear()
        return [key for key in before.keys if key not in pauses.keys]

    def admission(self, change: Change, *, due: bool) -> Admission | None:
        """What becomes of a row; None: it is not held."""
        if self.pauses.holds(change.entity_type):
            return Admission.REJECT
        if change.key not in self.pauses.keys:
            return None
        if not due:
            return Admission.DEFER_BLOCKED
        if len(self.due) < _DUE_MAX:
            self.due.add(change.seq)
        return Admission.RUNS_LATER
