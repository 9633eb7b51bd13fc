"""What the statements of ``outbox.Store`` return, and a row of them as a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from cdc.core.admission import Row
from cdc.core.fast_change import fast_make, read_change
from cdc.core.model import Change, ChangeState, WakeUp
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Scanned, Snapshot
from cdc.core.units import format_duration

COUNT_BOUND = 10_001
"""Where a count ends that is read every few seconds."""

_ROW = fast_make(Row)


class OutboxPage(NamedTuple):
    """Rows of a read, in seq order within a shard, and the snapshot that showed them."""

    rows: list[Row]
    snapshot: Snapshot
    scanned: Mapping[int, Scanned] | None = None
    """For a sweep of some types, or one that was cut: the last seq examined in each shard."""
    others: frozenset[int] = frozenset()
    """For a fetch: the seqs of changes that exist and are of types outside the scope."""
    cut: Sequence[WakeUp] = ()
    """Changes that exist and did not fit into the page: none of their columns were read."""


class DuePage(NamedTuple):
    """Due changes, the seconds until more are due, and where to go on if not all types were visited.

    It holds all types between ``start`` and there. ``more``: more changes are due than were read.
    """

    rows: list[Row]
    next_due_s: float | None
    go_on: int | None
    more: bool = False


class KeyPage(NamedTuple):
    """Further changes of a key. ``cut``: there are more, which did not fit into the page."""

    rows: list[Row]
    cut: bool


class Place(NamedTuple):
    """Where to go on reading marked changes: a moment, and the place in the table of the last row that has it."""

    at: datetime
    row: str = "(0,0)"


class Marked(NamedTuple):
    """``now``: the database's clock. Changes, each with when it was marked, earliest first. None: there are no more."""

    now: datetime
    marks: list[tuple[Change, datetime]]
    go_on: Place | None


class Settled(NamedTuple):
    """``missed``: those of the batch that another session had settled. ``at`` is the database's clock.

    ``locked``: keys of which nothing was written, because another session holds one of their changes.
    """

    missed: int
    at: datetime
    locked: Sequence[Settlement] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts end at 10,001, which means "more".

    ``blocked_keys``: keys with a waiting change, or a dead letter that pauses. ``notify_queue_usage``: of the whole
    server, 0 to 1. ``truncate_age_s``: for how long a TRUNCATE has held back its type, of which nothing could run.
    ``dead_age_s``: how long the oldest dead letter has been dead.
    """

    fresh: int
    waiting: int
    dead: int
    oldest_ready_age_s: float
    table_bytes: int
    dead_tuples: int
    blocked_keys: int
    notify_queue_usage: float
    truncate_age_s: float
    dead_age_s: float


@dataclass(frozen=True, slots=True)
class DueLater:
    """Events that are due later. ``count`` ends at COUNT_BOUND, which means "more".

    ``next_s``: in how many seconds the first is due, below 0 where it is overdue; None: there is none.
    """

    count: int = 0
    next_s: float | None = None

    @property
    def overdue_s(self) -> float:
        return max(0.0, -(self.next_s or 0.0))

    def __str__(self) -> str:
        """``3, the first in 2 h``."""
        if self.next_s is None:
            return "none"
        count = f"{COUNT_BOUND - 1}+" if self.count >= COUNT_BOUND else str(self.count)
        if self.overdue_s:
            return f"{count}, the first overdue by {format_duration(self.overdue_s)}"
        return f"{count}, the first in {format_duration(self.next_s)}"


@dataclass(frozen=True, slots=True)
class Barrier:
    """A TRUNCATE or SCHEMA that holds back its type. ``clear``: all before it is settled, so it may start."""

    operation: str
    entity_type: str
    seq: int
    state: ChangeState
    age_s: float
    clear: bool


def cut_short(page: OutboxPage) -> dict[int, Scanned]:
    """How far a sweep got in the shards in which its page was full before the last change that it found."""
    if not page.cut:
        return {}
    last = {row.change.shard: row.change.seq for row in page.rows}
    return {shard: Scanned(last.get(shard, 0), more=True) for _, shard in page.cut}


_PAGE, _SNAPSHOT, _NO_OTHERS = fast_make(OutboxPage), fast_make(Snapshot), frozenset[int]()


def page_of(records: Sequence[Any], first_column: int = 2) -> OutboxPage:
    """A page from the rows of a read, whose changes begin with this column: the snapshot stands before them."""
    xmin, next_xid = records[0][:2]
    # Every row carries the snapshot. Without any change it comes in one row, with nulls.
    there = records if records[0][first_column] is not None else []
    rows = [change_row(record[first_column:]) for record in there if record[first_column + 2] is not None]
    cut: Sequence[WakeUp] = ()
    if len(rows) < len(there):
        numbers = slice(first_column, first_column + 2)
        cut = [WakeUp(*record[numbers]) for record in there if record[first_column + 2] is None]
    return _PAGE((rows, _SNAPSHOT((xmin, next_xid)), None, _NO_OTHERS, cut))


def change_row(record: Sequence[Any], *, requeued: bool = False) -> Row:
    """A change from what the block ``columns`` of outbox.sql gives."""
    (seq, shard, id_, entity_type, entity_id, table_schema, table, operation, old, new, metadata, changed_at, failures,
     crashed, caused_by, depth, replay_of, held, barred) = record  # fmt: skip
    change = read_change(
        id_, seq, shard, entity_type, entity_id, table_schema, table, operation, old, new, metadata,
        changed_at, failures + crashed + 1, requeued, crashed, caused_by, depth or 0, replay_of, None,
        len(old or b"") + len(new or b"") + len(metadata or b""), 1,
    )  # fmt: skip
    return _ROW((change, held, barred))
