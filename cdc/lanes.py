"""The heart: which change may run now. A state machine over keys; no clock, no I/O, no handler.

Theory
------
A *lane* holds the changes of one key that are in the window, in ``seq`` order:

    queued ──start──> running ──finished──> settling ──settled──> gone

* One change of a key runs at a time, or one batch of successive ones. Its successor may start when it has
  *finished*: its mark is on its way, and marks reach the table in the order in which they finished, so that after a
  crash a key resumes at its first unsettled change.
* A *fenced* change, one that is marked by its handler's own transaction, starts only when all before it have
  settled: its mark does not queue behind theirs, and a crash in between would leave it marked and them to run again.
* A change that must wait for its retry, or a dead letter that pauses its key, *shuts* its lane: what is queued behind
  it is let go, for the table holds the key back from then on, and memory need not.
* The window is bounded, and so is each lane: a key with a million changes cannot fill the window.

What the window does not hold is remembered by one number a key, ``unread``: from this ``seq`` on, changes of the
key exist that were seen and not admitted. Nothing of the key at or above that number is admitted except by a
*resume*: a read of this key that starts there. That one rule keeps order whatever was dropped, and why: behind a
waiting change (``held``, until that one has settled), or because the lane was full. The memory for these numbers is
bounded too; a change that finds no room there is *refused*, and whoever reads the table may not pass it.

Reads and settles use different sessions, so a read may come back older than a settle that began after it.
``reading`` keeps a journal of what settles meanwhile and ``admit`` corrects the rows by it; without that, a change
settled during a sweep would run a second time, and the successor of a failed one would overtake it.

A consumer that lost its session has lost its shards: ``reset`` forgets everything but the handlers that still run.
They cannot be recalled, so their keys stay shut until they return, and their outcome is not settled.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cdc.model import Change, Committed, Key, Outcome, holds_its_key

_UNREAD_KEYS_MAX = 10_000


class Row(NamedTuple):
    """A change as read. ``held``: an earlier change of its key waits for a retry."""

    change: Change
    held: bool = False


class Resume(NamedTuple):
    """Read on for this key: fresh changes from ``seq`` on."""

    key: Key
    shard: int
    seq: int


class Admitted(NamedTuple):
    """How many changes were taken, and of each shard the lowest ``seq`` that was neither taken nor remembered."""

    taken: int
    refused: dict[int, int]


class Finished(NamedTuple):
    change: Change
    outcome: Outcome


class _Lane:
    __slots__ = ("holding", "orphan", "queue", "running", "settling")

    def __init__(self) -> None:
        self.queue: deque[Change] = deque()
        self.running: list[Change] = []
        self.settling = 0
        self.holding = 0
        """How many of those settling hold the key back; a batch may end with several."""
        self.orphan = False

    @property
    def shut(self) -> bool:
        return self.holding > 0

    @property
    def empty(self) -> bool:
        return not (self.queue or self.running or self.settling)


class _Unread:
    __slots__ = ("held", "seq", "shard")

    def __init__(self, seq: int, shard: int, held: bool) -> None:
        self.seq = seq
        self.shard = shard
        self.held = held


class Lanes:
    """``capacity``: changes in the window. ``lane_capacity``: queued changes of one key. ``fenced``: see above."""

    def __init__(
        self,
        capacity: int,
        lane_capacity: int = 64,
        unread_max: int = _UNREAD_KEYS_MAX,
        *,
        fenced: Callable[[Change], bool] = lambda _: False,
    ) -> None:
        self.capacity = capacity
        self._fenced = fenced
        self._lane_capacity = lane_capacity
        self._unread_max = unread_max
        self._lanes: dict[Key, _Lane] = {}
        self._known: dict[int, Change] = {}
        self._ready: deque[Key] = deque()
        self._finished: list[Finished] = []
        self._settling: dict[int, Finished] = {}
        self._unread: dict[Key, _Unread] = {}
        self._resumes: dict[Key, None] = {}
        self._owned: set[int] = set()
        self._in_flight: dict[int, int] = {}
        self._leaving: set[int] = set()
        self._journal: dict[int, Finished] | None = None

    # --- what is where ---------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more changes the window takes."""
        return self.capacity - len(self._known)

    @property
    def running(self) -> int:
        return sum(self._in_flight.values()) - len(self._finished) - len(self._settling)

    @property
    def settling(self) -> int:
        return len(self._finished) + len(self._settling)

    @property
    def queued(self) -> int:
        return len(self._known) - sum(self._in_flight.values())

    @property
    def ready(self) -> int:
        """How many keys have a change to start."""
        return len(self._ready)

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits to be settled."""
        return not self._in_flight

    @property
    def unread_keys(self) -> int:
        return len(self._unread)

    def knows(self, seq: int) -> bool:
        return seq in self._known

    # --- shards ----------------------------------------------------------------------------------------------------

    def own(self, shards: Iterable[int]) -> None:
        self._owned.update(shards)
        self._leaving -= self._owned

    def forget_unread(self, shards: Iterable[int]) -> None:
        """These shards are about to be swept from their first change on, which finds what the marks stand for.

        Needed because a mark may outlive its change: somebody may have deleted the row, or requeued the one before.
        """
        chosen = set(shards)
        for key in [k for k, mark in self._unread.items() if mark.shard in chosen and k not in self._lanes]:
            self._forget_unread(key)

    def release(self, shards: Iterable[int]) -> None:
        """Take nothing more from these shards and let go what is queued. ``released`` tells when they are quiet."""
        leaving = self._owned & set(shards)
        self._owned -= leaving
        self._leaving |= leaving
        for key, lane in list(self._lanes.items()):
            if lane.queue and lane.queue[0].shard in leaving:
                self._drop_queue(key, lane, remember=False)
        for key in [key for key, mark in self._unread.items() if mark.shard in leaving]:
            self._forget_unread(key)

    def released(self) -> set[int]:
        """The shards asked back that have nothing in flight any more; each is told once."""
        quiet = {shard for shard in self._leaving if not self._in_flight.get(shard)}
        self._leaving -= quiet
        return quiet

    def reset(self) -> list[Change]:
        """The session is lost: forget all but the running handlers, and return the changes these work on."""
        orphans = {key: lane for key, lane in self._lanes.items() if lane.running}
        for lane in orphans.values():
            lane.queue.clear()
            lane.settling = lane.holding = 0
            lane.orphan = True
        self._lanes = orphans
        for forgotten in (self._known, self._ready, self._finished, self._settling, self._unread, self._resumes,
                          self._owned, self._in_flight, self._leaving):  # fmt: skip
            forgotten.clear()
        self._journal = None
        return [change for lane in orphans.values() for change in lane.running]

    # --- in --------------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around a read of the table and the ``admit`` of its answer. One read at a time."""
        self._journal = {}
        try:
            yield
        finally:
            self._journal = None

    def admit(self, rows: Iterable[Row], *, due: bool = False) -> Admitted:
        """Take in what a read found, in its order. ``due``: waiting changes, which need no mark to be found again."""
        return self._admit(rows, resumed=False, due=due)

    def _admit(self, rows: Iterable[Row], *, resumed: bool, due: bool = False) -> Admitted:
        journal = self._journal or {}
        taken = 0
        done_meanwhile = {f.change.key for f in journal.values() if not holds_its_key(f.outcome)}
        wait_meanwhile = {f.change.key: f.change.seq for f in journal.values() if holds_its_key(f.outcome)}
        refused: dict[int, int] = {}
        refused_keys: set[Key] = set()
        for row in rows:
            change, key = row.change, row.change.key
            if change.seq in self._known or change.seq in journal or change.shard not in self._owned:
                continue
            if key in refused_keys:
                continue  # what refused the one before may have room by now, and would let this one overtake it
            mark = self._unread.get(key)
            if mark and change.seq >= mark.seq:
                continue
            lane = self._lanes.get(key)
            held = row.held or wait_meanwhile.get(key, change.seq) < change.seq
            if held or (lane is not None and (lane.shut or lane.orphan or len(lane.queue) >= self._lane_capacity)):
                if due:
                    self._give_way(key, lane, change)
                    continue
                fits = self._remember(
                    change,
                    held=held or (lane is not None and (lane.shut or lane.orphan)),
                    force=resumed,  # its key's mark has just made room
                )
                if fits and row.held and key in done_meanwhile:
                    self._unhold(key)
            elif fits := self.room > 0:
                self._enqueue(key, lane, change)
                taken += 1
            if not fits:
                refused_keys.add(key)
                refused[change.shard] = min(change.seq, refused.get(change.shard, change.seq))
        return Admitted(taken, refused)

    def resumed(self, resume: Resume, rows: Sequence[Row], *, complete: bool) -> None:
        """The answer to a ``Resume``. ``complete``: there are no more visible changes of the key than these rows."""
        mark = self._unread.get(resume.key)
        if mark is None or mark.seq != resume.seq:
            # The shard left, or something earlier came to light while the read was under way.
            self._consider_resume(resume.key)
            return
        self._forget_unread(resume.key)
        refused = self._admit(rows, resumed=True).refused
        last = rows[-1].change if rows else None
        if refused:
            first = next(row.change for row in rows if row.change.seq == refused[resume.shard])
            self._remember(first, held=False, force=True)
        elif last and not complete and resume.key not in self._unread:
            self._note(resume.key, last.seq + 1, last.shard, held=False)
        self._consider_resume(resume.key)

    # --- through ---------------------------------------------------------------------------------------------------

    def start(self) -> Change | None:
        """The next change to run now, or None."""
        while self._ready:
            key = self._ready.popleft()
            lane = self._lanes.get(key)
            if lane is not None and self._startable(lane):
                return self._start_next(lane)
        return None

    def start_with(self, batch: list[Change], limit: int, belongs: Callable[[Change], bool]) -> None:
        """Start more changes that ``belong`` into a started batch, up to ``limit``: of its keys first, then others."""
        for key in dict.fromkeys(change.key for change in batch):
            self._start_run(self._lanes[key], batch, limit, belongs)
        for _ in range(len(self._ready)):
            if len(batch) >= limit:
                return
            key = self._ready.popleft()
            lane = self._lanes.get(key)
            if lane is None or not self._startable(lane):
                continue
            if belongs(lane.queue[0]):
                self._start_run(lane, batch, limit, belongs)
            else:
                self._ready.append(key)

    def finished(self, change: Change, outcome: Outcome) -> None:
        """The handler of a started change ended."""
        key = change.key
        lane = self._lanes[key]
        self._leave_running(lane, change)
        if lane.orphan:
            self._orphan_returned(key, lane)
            return
        finished = Finished(change, outcome)
        lane.settling += 1
        if isinstance(outcome, Committed):
            self._settling[change.seq] = finished
            self.settled([finished])
        else:
            self._finished.append(finished)
        if holds_its_key(outcome):
            lane.holding += 1
            self._drop_queue(key, lane, remember=True)
        elif lane.queue and not lane.running:
            self._ready.append(key)
        else:
            self._consider_resume(key)

    def interrupted(self, change: Change) -> None:
        """The handler of a started change was cut off. The table knows what came of it: its key is read anew."""
        key = change.key
        lane = self._lanes[key]
        self._leave_running(lane, change)
        if lane.orphan:
            self._orphan_returned(key, lane)
            return
        self._left_flight(change)
        self._drop_queue(key, lane, remember=False)
        if not change.requeued and change.shard in self._owned:
            self._note(key, change.seq, change.shard, held=False)
        if mark := self._unread.get(key):
            mark.held = lane.shut  # what held the key may be this change, and may be done: the table is asked
        self._drop_if_empty(key, lane)
        self._consider_resume(key)

    # --- out -------------------------------------------------------------------------------------------------------

    def take_finished(self, limit: int) -> list[Finished]:
        """What is to be settled next, in the order in which it finished."""
        batch, self._finished = self._finished[:limit], self._finished[limit:]
        self._settling.update((finished.change.seq, finished) for finished in batch)
        return batch

    def settled(self, batch: Iterable[Finished]) -> None:
        """These outcomes are committed."""
        for finished in batch:
            change = finished.change
            if self._settling.pop(change.seq, None) is None:
                continue  # the lanes were reset while the settle was under way
            if self._journal is not None:
                self._journal[change.seq] = finished
            self._left_flight(change)
            self._settled_in_lane(change, finished.outcome)

    def resumes(self, limit: int) -> list[Resume]:
        """Keys to read on for, each told once; answer each with ``resumed``."""
        keys = list(self._resumes)[:limit]
        for key in keys:
            del self._resumes[key]
        return [Resume(key, mark.shard, mark.seq) for key in keys if (mark := self._unread.get(key))]

    # --- inside ----------------------------------------------------------------------------------------------------

    def _startable(self, lane: _Lane) -> bool:
        if not lane.queue or lane.running or lane.shut:
            return False
        # A fenced one is made ready again when the last before it has settled.
        return not (lane.settling and self._fenced(lane.queue[0]))

    def _start_next(self, lane: _Lane) -> Change:
        change = lane.queue.popleft()
        lane.running.append(change)
        self._in_flight[change.shard] = self._in_flight.get(change.shard, 0) + 1
        return change

    def _start_run(self, lane: _Lane, batch: list[Change], limit: int, belongs: Callable[[Change], bool]) -> None:
        while lane.queue and len(batch) < limit and belongs(lane.queue[0]):
            batch.append(self._start_next(lane))
        # What is left behind them becomes ready when they have finished.

    def _leave_running(self, lane: _Lane, change: Change) -> None:
        if change not in lane.running:
            raise AssertionError(f"{change!r} finished but is not running")
        lane.running.remove(change)

    def _enqueue(self, key: Key, lane: _Lane | None, change: Change) -> None:
        if lane is None:
            lane = self._lanes[key] = _Lane()
        self._known[change.seq] = change
        if lane.queue and lane.queue[-1].seq > change.seq:
            # Only for a key coarser than the source row: its transactions may commit in another order.
            insort(lane.queue, change, key=lambda queued: queued.seq)
        else:
            lane.queue.append(change)
        if not lane.running and len(lane.queue) == 1:
            self._ready.append(key)

    def _settled_in_lane(self, change: Change, outcome: Outcome) -> None:
        key = change.key
        lane = self._lanes.get(key)
        if lane is not None:
            lane.settling -= 1
            lane.holding -= holds_its_key(outcome)
            if lane.queue and not lane.running and not lane.settling:
                self._ready.append(key)  # its head may have been fenced
            self._drop_if_empty(key, lane)
        if not holds_its_key(outcome):
            self._unhold(key)

    def _unhold(self, key: Key) -> None:
        if mark := self._unread.get(key):
            mark.held = False
            self._consider_resume(key)

    def _consider_resume(self, key: Key) -> None:
        mark, lane = self._unread.get(key), self._lanes.get(key)
        if mark and not mark.held and (lane is None or not (lane.queue or lane.shut or lane.orphan)):
            self._resumes[key] = None

    def _orphan_returned(self, key: Key, lane: _Lane) -> None:
        if lane.running:
            return
        lane.orphan = False
        self._unhold(key)
        self._drop_if_empty(key, lane)

    def _drop_queue(self, key: Key, lane: _Lane, *, remember: bool) -> None:
        """Let the queued changes go; with ``remember``, they are held behind the one that waits."""
        for change in lane.queue:
            del self._known[change.seq]
        if remember and lane.queue:
            self._note(key, lane.queue[0].seq, lane.queue[0].shard, held=True)
        if remember and (mark := self._unread.get(key)):
            mark.held = True
            self._resumes.pop(key, None)
        lane.queue.clear()
        self._drop_if_empty(key, lane)

    def _give_way(self, key: Key, lane: _Lane | None, earlier: Change) -> None:
        """An earlier change of the key was requeued and is not to run yet: what is queued behind it is let go."""
        later = [change for change in lane.queue if change.seq > earlier.seq] if lane else []
        for change in later:
            assert lane is not None
            lane.queue.remove(change)
            del self._known[change.seq]
        if later:
            self._note(key, later[0].seq, later[0].shard, held=True)
            self._resumes.pop(key, None)

    def _drop_if_empty(self, key: Key, lane: _Lane) -> None:
        if lane.empty:
            self._lanes.pop(key, None)

    def _left_flight(self, change: Change) -> None:
        self._known.pop(change.seq, None)
        left = self._in_flight[change.shard] - 1
        if left:
            self._in_flight[change.shard] = left
        else:
            del self._in_flight[change.shard]

    def _remember(self, change: Change, *, held: bool, force: bool = False) -> bool:
        """Note that the change was seen and not admitted. False: no room to remember it."""
        if change.key not in self._unread and len(self._unread) >= self._unread_max and not force:
            return False
        self._note(change.key, change.seq, change.shard, held=held)
        return True

    def _note(self, key: Key, seq: int, shard: int, *, held: bool) -> None:
        assert shard in self._owned, "a shard that comes back is read from its first change on, without old marks"
        mark = self._unread.get(key)
        if mark is None:
            self._unread[key] = _Unread(seq, shard, held)
        else:
            mark.seq = min(mark.seq, seq)
            mark.held = mark.held or held

    def _forget_unread(self, key: Key) -> None:
        del self._unread[key]
        self._resumes.pop(key, None)
