"""A server as far as the promises depend on it: rows, transactions, snapshots, sessions with locks, one slot.

Whatever a real one may do late, this one does at a step of its own: a commit becomes visible after its wake-up,
a statement that was sent is executed, the session of a vanished process ends.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from math import inf
from typing import NamedTuple
from uuid import UUID

from cdc.core.admission import Row
from cdc.core.deferred_keys import KeyRead
from cdc.core.kept_floor import KeptFloor
from cdc.core.model import Change, Coalesced, Dead, Operation, Processed, Waiting, WakeUp
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Scanned, Snapshot

SHARDS = 4
TYPES = {"a": "t", "b": "u", "c": "t", "d": "u", "e": "v", "f": "t", "T": "t", "U": "u"}
"""Key -> its entity type. Capital letters are those of TRUNCATEs."""
_SCAN_MAX = 5
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class SessionLostError(Exception):
    """The server has ended the session."""


@dataclass(slots=True)
class Record:
    """A row of the table."""

    seq: int
    key: str
    shard: int
    xid: int
    written_at: float = 0.0
    state: str = "fresh"
    due_at: float = 0.0
    failures: int = 0
    locked_by: object | None = None
    requeued_late: bool = False
    """An operator has requeued the dead letter when later changes of its key had gone on."""
    requeued: bool = False
    """An operator has requeued it; a TRUNCATE may have started since it was dead."""
    replays: int | None = None
    """The processed change that it repeats."""
    committed_at: int | None = None
    visible_at: int | None = None
    """Moments of the server; the second comes later."""
    passed_over: bool = False
    """Its key was read on, from a later one: it has become visible after that, and its wake-up is on its way."""

    @property
    def type(self) -> str:
        return TYPES[self.key]

    @property
    def truncates(self) -> bool:
        return self.key.isupper()

    @property
    def operation(self) -> Operation:
        """One in five is of a backfill: it has a queue of its own among what is ready, and its place in its key."""
        if self.truncates:
            return Operation.TRUNCATE
        return Operation.INSERT if (self.replays or self.seq) % 5 else Operation.READ

    @property
    def settled(self) -> bool:
        return self.state in ("processed", "dead")

    def change(self) -> Change:
        return Change(
            id=UUID(int=self.seq), seq=self.seq, shard=self.shard, entity_type=self.type, entity_id=self.key,
            table_schema="public", table="t", operation=self.operation,
            old=None, new=None, metadata=None, changed_at=EPOCH,
            attempt=self.failures + 1, requeued=self.state == "waiting",
            replay_of=None if self.replays is None else UUID(int=self.replays),
        )  # fmt: skip


@dataclass(eq=False, slots=True)
class Session:
    """A member, the locks it holds, and the settle that was sent on it: executed and answered at later steps."""

    alive: bool = True
    shards: set[int] = field(default_factory=set)
    statement: list[Settlement] | None = None
    answer: list[Settlement] | None = None


@dataclass(eq=False, slots=True)
class Slot:
    """``durable``: it keeps what nobody reads, and what was read last it may send again."""

    durable: bool
    reader: object | None = None
    notifications: deque[WakeUp] = field(default_factory=deque)
    sent: deque[WakeUp] = field(default_factory=lambda: deque(maxlen=5))

    def ring(self, notifications: Iterable[WakeUp]) -> None:
        if self.durable or self.reader:
            self.notifications.extend(notifications)

    def connect(self, reader: object) -> bool:
        if self.reader is None:
            self.reader = reader
            return True
        return False

    def disconnect(self) -> None:
        self.reader = None
        if self.durable:
            self.notifications.extendleft(reversed(self.sent))
        else:
            self.notifications.clear()
        self.sent.clear()

    def read(self, count: int) -> list[WakeUp]:
        read = [self.notifications.popleft() for _ in range(min(count, len(self.notifications)))]
        self.sent.extend(read)
        return read


@dataclass(slots=True)
class _Position:
    """``candidate``: the next one, once no transaction below ``needs`` is open."""

    seq: int = 0
    candidate: int | None = None
    needs: int = 0


class Server:
    """As one reader sees it. Time is ``now``, in seconds, and passes only where the schedule says so.

    ``rings``: of those that share a slot one does.
    """

    def __init__(self, slot: Slot, *, positions: bool = False, rings: bool = True) -> None:
        self.now = 0.0
        self.positions: dict[int, _Position] = {n: _Position() for n in range(SHARDS)} if positions else {}
        """By shard, those of a subscription: what is at or below one is not fresh, whatever its row says."""
        self.floors = dict.fromkeys(range(SHARDS), 0)
        """By shard, where the next owner begins to read, if this is the default subscription."""
        self.rows: dict[int, Record] = {}
        self.unsettled: dict[str, dict[int, Record]] = {}
        """Key -> its rows that are neither processed nor dead, visible or not."""
        self.open: dict[int, set[str]] = {}
        """Transaction id -> keys it has locked. Flushed ones stay in here until they are visible."""
        self.flushed: set[int] = set()
        self._written: dict[int, list[Record]] = {}
        """Transaction id -> its rows."""
        self._skipped: dict[int, list[WakeUp]] = {}
        """Transaction id -> those of its rows that are for another reader."""
        self.sessions: list[Session] = []
        self.slot = slot
        self._rings = rings
        self._moments = count()
        self._next_xid = 10
        self._completed = 9
        self._next_seq = 1

    # --- writers ---------------------------------------------------------------------------------------------------

    def begin(self) -> int:
        xid = self._next_xid
        self._next_xid += 1
        self.open[xid], self._written[xid], self._skipped[xid] = set(), [], []
        return xid

    def write(self, xid: int, key: str) -> None:
        """Under the source row's lock: nobody else may have an open change of the key.

        A TRUNCATE locks all keys of its type, also against one another.
        """
        locked = {each for each in TYPES if TYPES[each] == TYPES[key]} if key.isupper() else {key}
        if any(locked & keys for other, keys in self.open.items() if other != xid):
            return
        self.open[xid] |= locked
        self._insert(xid, key)

    def replay(self, xid: int, numbers: Iterable[int], *, visible: bool) -> None:
        """A round of an operator's replay: processed changes once more, in their order. It locks no key.

        ``visible``: else they are for another reader, and have numbers that nobody here will ever see.
        """
        for number in numbers:
            if visible:
                self._insert(xid, self.rows[number].key, replays=number)
            else:
                self._skipped[xid].append(WakeUp(self._next_seq, _shard(self.rows[number].key)))
                self._next_seq += 1

    def _insert(self, xid: int, key: str, replays: int | None = None) -> None:
        record = Record(self._next_seq, key, _shard(key), xid, self.now, replays=replays)
        self._next_seq += 1
        self.rows[record.seq] = record
        self.unsettled.setdefault(key, {})[record.seq] = record
        self._written[xid].append(record)

    def flush(self, xid: int) -> None:
        """The commit record is on disk: the wake-up is sent, though nobody sees the rows yet."""
        self.flushed.add(xid)
        for record in self._written[xid]:
            record.committed_at = next(self._moments)
        if self._rings:
            written = [WakeUp(row.seq, row.shard) for row in self._written[xid]]
            self.slot.ring(sorted(written + self._skipped[xid]))

    def end(self, xid: int) -> None:
        """What was flushed becomes visible; anything else is rolled back."""
        for record in self._written[xid]:
            if xid in self.flushed:
                record.visible_at = next(self._moments)
            else:
                del self.rows[record.seq], self.unsettled[record.key][record.seq]
        self.flushed.discard(xid)
        del self.open[xid], self._written[xid], self._skipped[xid]
        self._completed = max(self._completed, xid)

    def precedes(self, earlier: Record, later: Record) -> bool:
        """Whether the one with the higher number comes behind the other.

        Who writes a row has its lock, so the next one draws its number when the change is there. A replay has none: it
        comes behind what is there when it is committed, and what is committed when it is there comes behind it. Where
        more of a key waits than the window has of it, none of its changes waits for one that came late in this way.
        """
        if earlier.passed_over:
            return False
        if earlier.replays is None and later.replays is None:
            return True
        there, committed = earlier.visible_at, later.committed_at
        return there is not None and committed is not None and there < committed

    # --- reads -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """As PostgreSQL takes it: xmin is the oldest that runs, or one above the last that has completed."""
        return Snapshot(min([*self.open, self._completed + 1]), self._next_xid)

    def visible(self) -> Iterator[Record]:
        """What is not settled."""
        for rows in self.unsettled.values():
            yield from (row for row in rows.values() if row.xid not in self.open)

    def fetch(self, wakeups: Sequence[WakeUp]) -> list[Row]:
        wanted = {wakeup.seq for wakeup in wakeups}
        return [self._row(record) for record in self._fresh() if record.seq in wanted]

    def sweep(self, sweep: Sweep) -> tuple[list[Row], dict[int, Scanned]]:
        """The rows, and of each shard how far they were looked for."""
        fresh = self._fresh()
        rows: list[Row] = []
        scanned: dict[int, Scanned] = {}
        for shard, (floor, cursor, since) in sweep.positions.items():
            found = [r for r in fresh if r.shard == shard and r.seq > floor and (r.seq > cursor or r.xid >= since)]
            looked_at = found[:_SCAN_MAX]
            page = [r for r in looked_at if sweep.scope.has(TYPES[r.key])][: sweep.per_shard]
            rows += [self._row(record) for record in page]
            if len(page) == sweep.per_shard:
                scanned[shard] = Scanned(page[-1].seq, more=True)
            elif looked_at:
                scanned[shard] = Scanned(looked_at[-1].seq, more=len(looked_at) < len(found))
        return rows, scanned

    def resume(self, resume: KeyRead, per_key: int) -> list[Row]:
        of_key = [record for record in self._fresh() if record.key == resume.key[1]]
        for record in of_key:
            record.passed_over = record.passed_over or record.seq < resume.seq
        return [self._row(record) for record in of_key if record.seq >= resume.seq][:per_key]

    def due(self, shards: Iterable[int], limit: int, without: Iterable[str]) -> tuple[list[Row], float | None]:
        """The waiting ones that are due, and the seconds until the next one will be."""
        owned, left_out = set(shards), set(without)
        waiting = [
            record
            for record in self.visible()
            if record.state == "waiting" and record.shard in owned and TYPES[record.key] not in left_out
        ]
        due = sorted((r for r in waiting if r.due_at <= self.now), key=lambda record: record.due_at)
        later = [record.due_at - self.now for record in waiting if record.due_at > self.now]
        return [self._row(record) for record in due[:limit]], min(later, default=None)

    def _fresh(self) -> list[Record]:
        fresh = (record for record in self.visible() if record.state == "fresh" and not self._is_passed(record))
        return sorted(fresh, key=lambda record: record.seq)

    def _is_passed(self, record: Record) -> bool:
        return bool(self.positions) and record.seq <= self.positions[record.shard].seq

    def move_positions(self, session: Session) -> int:
        """As its owner moves those of its shards, by one snapshot. Returns how many have moved."""
        moved, snapshot = 0, self.snapshot()
        for shard in session.shards if self.positions else ():
            at = self.positions[shard]
            there = [row for row in self.rows.values() if row.shard == shard and row.xid not in self.open]
            fresh = sorted(row.seq for row in there if row.state == "fresh" and row.seq > at.seq)
            if at.candidate is not None and snapshot.xmin >= at.needs:
                before = at.seq
                at.seq = min([at.candidate, *(seq - 1 for seq in fresh[:1])])
                at.candidate = None if at.seq == at.candidate else at.candidate
                moved += at.seq > before
            if at.candidate is None:
                reached = max((row.seq for row in there), default=0)
                at.candidate, at.needs = (reached if reached > at.seq else None), snapshot.next_xid
        return moved

    @property
    def last_drawn(self) -> int:
        return self._next_seq - 1

    def move_floors(self, session: Session, floor: KeptFloor) -> int:
        """As the statement of the default subscription does. Returns how many have moved."""
        self._must_live(session)
        moved, snapshot = 0, self.snapshot()
        proved = floor.candidate if snapshot.xmin >= floor.needs else floor.proved
        for shard in session.shards:
            first = min((row.seq for row in self.visible() if row.state == "fresh" and row.shard == shard), default=inf)
            reached = int(min(proved, first - 1))
            moved += reached > self.floors[shard]
            self.floors[shard] = max(self.floors[shard], reached)
        floor.looked(snapshot)
        return moved

    def _row(self, record: Record) -> Row:
        waits = ("waiting", "paused")
        earlier = (r for r in self.unsettled[record.key].values() if r.seq < record.seq and r.xid not in self.open)
        return Row(record.change(), any(other.state in waits for other in earlier), self.barred(record))

    def barred(self, record: Record) -> bool:
        """A TRUNCATE of its type comes before it; or it is one, and comes after what is neither processed nor dead."""
        return any(
            (earlier.truncates and not earlier.requeued_late) or (record.truncates and earlier.state != "paused")
            for earlier in self.visible()
            if earlier.type == record.type and earlier.seq < record.seq
        )

    # --- sessions --------------------------------------------------------------------------------------------------

    def connect(self) -> Session:
        session = Session()
        self.sessions.append(session)
        return session

    def end_session(self, session: Session) -> None:
        session.alive = False
        session.shards.clear()
        session.statement = None
        if session in self.sessions:
            self.sessions.remove(session)

    def look(self, session: Session) -> tuple[int, int]:
        """(members, free shards)"""
        self._must_live(session)
        return len(self.sessions), len(self._free())

    def acquire_shards(self, session: Session, limit: int, dice: random.Random) -> list[int]:
        self._must_live(session)
        free = self._free()
        taken = dice.sample(free, min(limit, len(free)))
        session.shards.update(taken)
        return taken

    def release_shards(self, session: Session, shards: Iterable[int]) -> None:
        self._must_live(session)
        session.shards.difference_update(shards)

    def _free(self) -> list[int]:
        return sorted(set(range(SHARDS)).difference(*(session.shards for session in self.sessions)))

    def settle(self, session: Session, batch: list[Settlement]) -> None:
        """The statement is on its way."""
        self._must_live(session)
        session.statement = batch

    def execute(self, session: Session) -> list[Settlement]:
        """Run the settle that was sent. Returns those whose row was no longer as the statement wants it."""
        assert session.statement is not None
        session.answer, session.statement = session.statement, None
        return [finished for finished in session.answer if not self._mark(finished)]

    def blocked(self, session: Session) -> bool:
        """Whether the settle that was sent waits for the row lock of a handler's transaction."""
        return any(self.rows[seq].locked_by for finished in session.statement or () for seq in seqs_of(finished))

    def _must_live(self, session: Session) -> None:
        if not session.alive:
            raise SessionLostError

    def _mark(self, finished: Settlement) -> bool:
        change, outcome = finished
        record = self.rows[change.seq]
        plain = isinstance(outcome, Processed) and not change.requeued
        if record.state not in (("fresh",) if plain else ("fresh", "waiting")):
            return False
        match outcome:
            case Processed():
                self._becomes(record, "processed")
            case Coalesced(change=last, outcome=of_last):
                for seq in seqs_of(finished)[:-1]:
                    self._becomes(self.rows[seq], "processed")
                return self._mark(Settlement(self.rows[last.seq].change(), of_last))
            case Dead(pauses=pauses):
                self._becomes(record, "paused" if pauses else "dead")
            case Waiting(delay_s, counted=counted):
                self._becomes(record, "waiting")
                record.due_at = self.now + delay_s
                record.failures += counted
        return True

    def _becomes(self, record: Record, state: str) -> None:
        record.state = state
        if record.settled:
            self.unsettled[record.key].pop(record.seq, None)
        else:
            self.unsettled[record.key][record.seq] = record

    def ask(self, first: Change, most: int, settle_s: float, ours: Callable[[int], bool]) -> Asked:
        """What waits behind a change of its key: up to one that is not ``ours``, that waits itself, or is barred.

        Replays stand with replays, and others with others. What is fresh before it goes first.
        """
        if not _as_read(self.rows[first.seq], first):
            return Asked(gone=True)
        if late := [each.seq for each in self._fresh() if each.key == first.entity_id and each.seq < first.seq]:
            return Asked(before=late[0])
        behind: list[Record] = []
        for record in sorted(self.visible(), key=lambda record: record.seq):
            if record.key == first.entity_id and record.seq > first.seq:
                if record.state != "fresh" or not ours(record.seq) or len(behind) == most or self.barred(record):
                    break
                if (record.replays is None) is not (first.replay_of is None):
                    break
                behind.append(record)
        came_at = max(record.written_at for record in (self.rows[first.seq], *behind))
        return Asked([record.seq for record in behind], max(0.0, came_at + settle_s - self.now) if settle_s else 0.0)

    # --- transactional handlers ------------------------------------------------------------------------------------

    def take(self, changes: Iterable[Change], owner: object) -> bool:
        """Lock the rows if all of them are still as they were read, and nobody else's."""
        rows = [(self.rows[change.seq], change) for change in changes]
        if any(record.locked_by or not _as_read(record, change) for record, change in rows):
            return False
        for record, _ in rows:
            record.locked_by = owner
        return True

    def commit(self, seqs: Iterable[int]) -> None:
        """Mark what was taken, and what its call stood for; the locks end with ``unlock``."""
        for seq in seqs:
            self._becomes(self.rows[seq], "processed")

    def unlock(self, owner: object) -> None:
        for record in self.rows.values():
            if record.locked_by is owner:
                record.locked_by = None

    # --- an operator -----------------------------------------------------------------------------------------------

    def requeue(self, record: Record) -> None:
        """A dead letter is to be tried again."""
        assert record.state in ("dead", "paused")
        record.requeued_late = record.requeued_late or record.state == "dead"
        record.requeued = True
        record.due_at, record.failures = self.now, 0
        self._becomes(record, "waiting")


class Asked(NamedTuple):
    """What a call would stand for. ``gone``: the change is not as it was read. ``later``: the numbers behind it.

    ``before``: the first number of what is to be called before it.
    """

    later: Sequence[int] = ()
    wait_s: float = 0.0
    gone: bool = False
    before: int | None = None


def seqs_of(finished: Settlement) -> list[int]:
    """The rows that its outcome is about, the last one last."""
    change, outcome = finished
    return [change.seq, *(map(int, outcome.later.strip("{}").split(",")) if isinstance(outcome, Coalesced) else ())]


def _shard(key: str) -> int:
    return sum(key.encode()) % SHARDS


def _as_read(record: Record, change: Change) -> bool:
    state = "waiting" if change.requeued else "fresh"
    return record.state == state and record.failures == change.attempt - 1
