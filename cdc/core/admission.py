"""What the scheduler decides about each row that a read brings. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import NamedTuple

from cdc.core.model import Change


class Row(NamedTuple):
    """A change as read. ``blocked``: an earlier one of its key waits. ``barred``, without documents: by a TRUNCATE."""

    change: Change
    blocked: bool = False
    barred: bool = False


class Admission(Enum):
    """The decision about a row."""

    NOTHING = auto()
    """It is in the window, its shard is not owned, or the read is older than what is known."""
    REMEMBERED = auto()
    """The mark of its key stands for it."""
    RUNS_LATER = auto()
    """It is due and cannot run yet; a later read of due changes finds it again."""
    DEFER = auto()
    DEFER_BLOCKED = auto()
    """A mark is made; with blocked, an earlier change of its key waits."""
    PUT_OFF = auto()
    """It is over the limit of its handler: a mark is made, and held."""
    REJECT = auto()
    TAKE = auto()


class Admitted(NamedTuple):
    """How many changes were taken; by entity type and shard the lowest number neither taken nor remembered.

    ``barred``: some of these were kept out by a TRUNCATE.
    """

    taken: int = 0
    rejected: Mapping[str, Mapping[int, int]] = {}
    barred: bool = False
