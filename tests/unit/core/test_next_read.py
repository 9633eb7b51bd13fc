"""Which read is made next: keys, due changes and what is planned take turns, and a full window waits."""

from __future__ import annotations

from math import inf

from cdc.core.due_reads import DueReads
from cdc.core.model import WakeUp
from cdc.core.next_read import DueRead, NextRead, Read
from cdc.core.page_size import PageSize
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.scheduler import KeyScheduler
from cdc.core.shard_cursor import Snapshot
from cdc.core.shard_ownership import Acquired
from tests.changes import row


class _Reads:
    """One shard, and nothing in the outbox."""

    def __init__(self, capacity: int = 100) -> None:
        self.scheduler = KeyScheduler(capacity)
        self.planner = ReadPlanner(sweep_interval_s=3600.0, room_for=self.scheduler.room_for)
        self.scheduler.ownership.subscribe(self.planner)
        self.due = DueReads(self.scheduler.room_for, sweep_interval_s=3600.0, poll_interval_s=60.0)
        self.next = NextRead(self.scheduler, self.planner, self.due, PageSize())
        self.xid = 100

    def own(self) -> None:
        self.scheduler.ownership.acquire(Acquired([0]))
        self.planner.streaming(connected=True)

    def answer(self, read: Read | None, now: float) -> None:
        self.xid += 100
        match read:
            case Sweep():
                self.planner.swept(read, [], {}, Snapshot(self.xid, self.xid), now)
            case Fetch():
                self.planner.fetched(read, [seq for seq, _ in read.wakeups], Snapshot(self.xid, self.xid), now)
            case DueRead():
                self.due.done(now, rejected=[], next_due_s=None, go_on=None, more=False)

    def until_idle(self, now: float) -> float:
        while read := self.next.next(now):
            self.answer(read, now)
            now += 1.0
        return now


def test_nothing_is_read_without_a_shard_nor_without_room() -> None:
    reads = _Reads()
    assert reads.next.next(0.0) is None
    assert reads.next.wait_s(0.0, read=True) == inf
    reads.own()
    reads.scheduler.window.acquire("a", 100)
    assert reads.next.next(0.0) is None
    assert reads.next.wait_s(0.0, read=True) == inf
    assert reads.next.wants_room


def test_a_takeover_sweeps_and_looks_for_due_changes_and_then_there_is_nothing() -> None:
    reads, kinds = _Reads(), set[type]()
    reads.own()
    now = 0.0
    while read := reads.next.next(now):
        kinds.add(type(read))
        reads.answer(read, now)
        now += 1.0
    assert kinds == {Sweep, DueRead}
    assert reads.next.wait_s(now, read=True) > 60.0
    assert not reads.next.wants_room


def test_kinds_take_turns_however_many_wakeups_come() -> None:
    reads = _Reads()
    reads.own()
    now, kinds = reads.until_idle(0.0), list[type]()
    for seq in range(1, 7):
        reads.planner.notified([WakeUp(seq, 0)])
        reads.due.within(0.0, now)
        read = reads.next.next(now)
        kinds.append(type(read))
        reads.answer(read, now)
        now += 10.0
    assert kinds.count(DueRead) == kinds.count(Fetch) == 3


def test_to_restart_forgets_what_was_deferred_and_reads_all_shards_from_the_first_change_on() -> None:
    reads = _Reads()
    reads.own()
    now = reads.until_idle(0.0)
    reads.next.restart(now)
    assert reads.next.wait_s(now, read=False) == 0.0
    kinds = list[Read]()
    while read := reads.next.next(now):
        kinds.append(read)
        reads.answer(read, now)
        now += 1.0
    [sweep] = [read for read in kinds if isinstance(read, Sweep)]
    assert [position.cursor for position in sweep.positions.values()] == [0]


def test_a_page_of_due_changes_reaches_beyond_those_in_the_window() -> None:
    reads = _Reads()
    reads.own()
    reads.until_idle(0.0)
    reads.scheduler.admit([row(seq, str(seq)) for seq in range(1, 31)])
    reads.due.within(0.0, 100.0)
    read = reads.next.next(100.0)
    assert isinstance(read, DueRead)
    assert read.limit == min(100, 30 + PageSize().rows)
