"""What the statements of the store return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from cdc.core.model import Change, WakeUp
from cdc.core.read_reconciler import Settlement
from cdc.core.scheduler import Row
from cdc.core.shard_cursor import Scanned, Snapshot


@dataclass(frozen=True, slots=True)
class OutboxPage:
    """Rows of a read, in seq order within a shard, and the snapshot that showed them."""

    rows: list[Row]
    snapshot: Snapshot
    scanned: Mapping[int, Scanned] | None = None
    """Of a sweep of some types, or one that was cut: how far it got in each shard."""
    others: frozenset[int] = frozenset()
    """Of a fetch: the numbers of changes that are there, and of types that are not ours."""
    cut: Sequence[WakeUp] = ()
    """What is there and did not fit into the page: nothing was read of it."""


class DuePage(NamedTuple):
    """What is due, the seconds until more will be, and where to go on if not all types were looked at.

    All of the types between ``start`` and there. ``more``: more is due than was read.
    """

    rows: list[Row]
    next_due_s: float | None
    go_on: int | None
    more: bool = False


class KeyPage(NamedTuple):
    """What was read on of a key. ``cut``: there is more, which did not fit into the page."""

    rows: list[Row]
    cut: bool


class Place(NamedTuple):
    """Where to go on reading what was marked: a moment, and the place in the table of the last one that has it."""

    at: datetime
    row: str = "(0,0)"


class Marked(NamedTuple):
    """``now``: the database's clock. Changes and when each was marked, the first first. None: there is no more."""

    now: datetime
    marks: list[tuple[Change, datetime]]
    go_on: Place | None


@dataclass(frozen=True, slots=True)
class Settled:
    """``missed`` of the batch had been settled by somebody else. ``at`` is the database's clock.

    ``locked``: of these keys nothing was written, as another session holds one of their changes.
    """

    missed: int
    at: datetime
    locked: Sequence[Settlement] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts end at 10,001, which means "more".

    ``blocked_keys``: those of waiting changes and of dead letters that pause. ``notify_queue_usage``: of the whole
    server, 0 to 1.
    """

    fresh: int
    waiting: int
    dead: int
    oldest_ready_age_s: float
    table_bytes: int
    dead_tuples: int
    blocked_keys: int
    notify_queue_usage: float


def ended_by(cut: Sequence[WakeUp], ends: dict[int, Scanned]) -> dict[int, Scanned]:
    """How far a sweep got, where its page was full before these."""
    return ends | {shard: Scanned(ends[shard].seq if shard in ends else 0, more=True) for _, shard in cut}
