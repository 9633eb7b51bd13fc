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
* The window is bounded, and so is each queue: a key with a million changes cannot fill it. Nor can an entity type: it
  has a limit in it, and its handlers one of what may run (``dynamic_limit``, ``ready_queues``). The window has places;
  a change takes one, and one more for each ``place_bytes`` of its documents, and is let in while one is free.

What the window does not hold is remembered by one number a key, ``deferred``: from this ``seq`` on, changes of the key
exist that were seen and not admitted. Nothing of the key at or above that number is admitted except by a *resume*: a
read of this key that starts there. That one rule keeps order whatever was dropped, and why: behind a waiting change
(``held``, until that one has settled), or because the lane was full. The memory for these is bounded, too; a change
that finds no room there, or in the window, is *refused*, and its type and shard are read on from there.

A read may come back older than what has settled meanwhile: ``admit`` corrects its rows by a ``reconciler``.

A consumer that lost its session has lost its shards: ``reset`` forgets all but the handlers that still run, whose keys
stay shut until they return, unsettled, and the outcomes not written yet (``marks``), which keep places and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from math import inf
from typing import NamedTuple

from cdc.core.deferred_keys import DeferredKeys, KeyRead
from cdc.core.dynamic_limit import DynamicLimit, Room
from cdc.core.key_queue import KeyQueue
from cdc.core.model import Change, Committed, Key
from cdc.core.read_reconciler import ReadReconciler, Settlement
from cdc.core.ready_queues import NOTHING, ReadyQueues, Requirements, Run
from cdc.core.settle_queue import SettleQueue
from cdc.core.shard_ownership import ShardOwnership

_UNREAD_KEYS_MAX = 10_000
_FACTOR = 4
"""One type that has more to do than there is room for holds four fifths of the window."""


class Row(NamedTuple):
    """A change as read. ``held``: an earlier change of its key waits for a retry."""

    change: Change
    held: bool = False


class Admitted(NamedTuple):
    """How many changes were taken; by entity type and shard the lowest number neither taken nor remembered."""

    taken: int
    refused: dict[str, dict[int, int]]


class KeyScheduler:
    """``capacity``: places of the window, of ``place_bytes`` each. ``lane_capacity``: queued changes of one key.

    ``ready_queues`` and ``needs``: what may run beside what, and is fenced. ``sole``: there is one entity type only.
    """

    def __init__(
        self,
        capacity: int,
        lane_capacity: int = 64,
        unread_max: int = _UNREAD_KEYS_MAX,
        *,
        place_bytes: int = 16_384,
        ready_queues: ReadyQueues | None = None,
        needs: Callable[[Change], Requirements] = lambda change: Requirements(change.entity_type),
        sole: bool = True,
    ) -> None:
        self.capacity = capacity
        self.place_bytes = place_bytes
        self._places: Callable[[Change], int] = lambda change: 1 + change.size // place_bytes
        self.lane_capacity = lane_capacity
        self._needs = needs
        self._scheduler: dict[Key, KeyQueue] = {}
        self._known: dict[int, KeyQueue] = {}
        """Of each change in the window, by its number."""
        self._window = DynamicLimit(capacity, _FACTOR, sole=sole)
        self._ready_queues = ready_queues or ReadyQueues()
        self.marks = SettleQueue()
        """What has finished and is not in the table yet."""
        self._deferred = DeferredKeys(unread_max, sole=sole)
        self._in_flight = ShardOwnership()
        self._reconciler = ReadReconciler()

    @property
    def room(self) -> int:
        """How many more changes the window takes; none, too, where it is below 0."""
        return self._window.free

    @property
    def worth(self) -> int:
        """Room for so many is worth reading a page: a quarter of the window."""
        return max(1, self.capacity // 4)

    def room_for(self, entity_type: str) -> Room:
        """How many more of this type."""
        free = self._window.room(entity_type)
        return Room(free, max(1, min(self.worth, (self._window.held(entity_type) + free) // 2)))

    @property
    def types(self) -> Collection[str]:
        """The types that have changes in the window."""
        return self._window.users

    @property
    def running(self) -> int:
        return len(self._in_flight) - len(self.marks)

    @property
    def settling(self) -> int:
        return len(self.marks)

    @property
    def queued(self) -> int:
        return len(self._known) - len(self._in_flight)

    @property
    def ready(self) -> int:
        """How many runs could start now: changes, where no more than one of them starts at a time."""
        return self._ready_queues.ready

    def waiting_like(self, change: Change) -> int:
        """How many keys have a change to start of the same type and handler, whether they could now or not."""
        return self._ready_queues.waiting(self._needs(change))

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits to be settled."""
        return not self._in_flight

    def requeued(self) -> list[int]:
        """The numbers of the changes in the window that were waited for, and have not finished."""
        return [change.seq for lane in self._scheduler.values() for change in lane.here if change.requeued]

    @property
    def unread_keys(self) -> int:
        return len(self._deferred)

    def knows(self, seq: int) -> bool:
        return seq in self._known

    # --- shards ----------------------------------------------------------------------------------------------------

    def own(self, shards: Collection[int], kept: Collection[int] = ()) -> None:
        """``kept``: those of them that were ours before the session was lost, and nobody else's since."""
        self._reconciler.arrived(self._in_flight.own(shards))
        self.marks.unpark(kept)
        self.disown(shards)

    def disown(self, shards: Iterable[int]) -> None:
        """Somebody else has, or had, these: what finished of them before the session was lost is not ours to mark."""
        for change, outcome in self.marks.drop(shards):
            self._in_flight.left(change)
            self._window.vacate(self._places(change))
            lane = self._known.pop(change.seq)
            lane.settling -= 1
            lane.holding -= outcome.holds_key
            self._drop_if_empty(lane)

    def forget_unread(self, shards: Iterable[int]) -> None:
        """These shards are about to be swept from their first change on, which finds what the marks stand for.

        Needed because a mark may outlive its change: somebody may have deleted the row, or requeued the one before.
        """
        self._deferred.forget([key for key in self._deferred.of_shards(set(shards)) if key not in self._scheduler])

    def release(self, shards: Iterable[int]) -> None:
        """Take nothing more from these shards and let go what is queued. ``released`` tells when they are quiet."""
        leaving = self._in_flight.release(shards)
        for lane in list(self._scheduler.values()):
            if lane.queue and lane.queue[0].shard in leaving:
                self._drop_queue(lane, remember=False)
        self._deferred.forget(list(self._deferred.of_shards(leaving)))

    def released(self) -> set[int]:
        """The shards asked back that have nothing in flight any more; each is told once."""
        return self._in_flight.released()

    def reset(self, *, keep: bool = False) -> list[Change]:
        """The session is lost: forget all but the running handlers, and return the changes these work on.

        ``keep``: also the outcomes that are not written; ``own`` and ``disown`` tell what becomes of them.
        """
        orphans = {key: lane for key, lane in self._scheduler.items() if lane.running}
        for lane in orphans.values():
            lane.queue.clear()
            lane.settling = lane.holding = 0
            lane.orphan = True
        self._scheduler = orphans
        for forgotten in (self._known, self._window, self._deferred, self._in_flight):
            forgotten.clear()
        self._ready_queues.forget_ready()
        self._reconciler.close()
        orphaned = [change for lane in orphans.values() for change in lane.running]
        for change, outcome in self.marks.park() if keep else self.marks.clear():
            self._window.vacate(-self._places(change))
            self._in_flight.started(change)
            lane = self._known[change.seq] = self._scheduler.setdefault(change.key, KeyQueue(change.key))
            lane.settling += 1
            lane.holding += outcome.holds_key
        return orphaned

    # --- in --------------------------------------------------------------------------------------------------------

    def reading(self) -> AbstractContextManager[object]:
        """Around a read of the table and the ``admit`` of its answer. One read at a time."""
        return self._reconciler

    def admit(self, rows: Iterable[Row], *, due: bool = False, apart: Collection[str] = ()) -> Admitted:
        """Take in what a read found, in its order. ``due``: waiting changes, which need no mark to be found again.

        Types that are read ``apart`` are passed over.
        """
        if apart:
            rows = (row for row in rows if row.change.entity_type not in apart)
        return self._admit(rows, resumed=False, due=due)

    def _admit(self, rows: Iterable[Row], *, resumed: bool, due: bool = False) -> Admitted:
        taken = 0
        done_meanwhile, wait_meanwhile = self._reconciler.done(), self._reconciler.waits()
        refused: dict[str, dict[int, int]] = {}
        refused_keys: set[Key] = set()
        owned = self._in_flight.owned
        for row in rows:
            change, key = row.change, row.change.key
            if change.seq in self._known or change.shard not in owned or self._reconciler.outdates(change):
                continue
            if key in refused_keys:
                continue  # what refused the one before may have room by now, and would let this one overtake it
            mark = self._deferred.get(key)
            if mark and change.seq >= mark.seq:
                if due and not row.held:
                    self._unhold(key)  # nothing before it waits: what the mark stands for may be this very change
                continue
            lane = self._scheduler.get(key)
            held = row.held or wait_meanwhile.get(key, change.seq) < change.seq
            if held or (lane is not None and (lane.shut or lane.orphan or len(lane.queue) >= self.lane_capacity)):
                if due:
                    self._give_way(key, lane, change)
                    continue
                fits = resumed or self._deferred.has_room(key)  # the mark of a resumed one has just made room
                if fits:
                    held = held or (lane is not None and (lane.shut or lane.orphan))
                    self._note(key, change.seq, change.shard, held=held)
                if fits and row.held and key in done_meanwhile:
                    self._unhold(key)
            elif fits := self._window.admits(change.entity_type):
                self._enqueue(key, lane, change)
                taken += 1
            if not fits:
                refused_keys.add(key)
                of_type = refused.setdefault(change.entity_type, {})
                of_type[change.shard] = min(change.seq, of_type.get(change.shard, change.seq))
        return Admitted(taken, refused)

    def resumed(self, resume: KeyRead, rows: Sequence[Row], *, complete: bool) -> None:
        """The answer to a ``KeyRead``. ``complete``: there are no more visible changes of the key than these rows."""
        mark = self._deferred.get(resume.key)
        if mark is None or mark.seq != resume.seq:
            # The shard left, or something earlier came to light while the read was under way.
            self._consider_resume(resume.key)
            return
        self._deferred.forget([resume.key])
        refused = self._admit(rows, resumed=True).refused
        last = rows[-1].change if rows else None
        if refused:
            self._note(resume.key, refused[resume.key[0]][resume.shard], resume.shard, held=False)
        elif not complete and not self._deferred.get(resume.key):
            self._note(resume.key, last.seq + 1 if last else resume.seq, resume.shard, held=False)
        self._consider_resume(resume.key)

    # --- through ---------------------------------------------------------------------------------------------------

    def start(self) -> Run:
        """What is to run now: the next change, or several that need the same. Without changes: nothing is ready."""
        while turn := self._ready_queues.next():
            keys, needs = turn
            started: list[Change] = []
            for key in keys:
                lane = self._scheduler.get(key)
                # Of other needs, if an earlier change of the key came in and has been made ready instead.
                if lane is not None and self._startable(lane) and lane.needs == needs:
                    started.append(self._start_next(lane))
            if started:
                self._ready_queues.started(started, needs)
                return Run(needs.handler, started)
        return NOTHING

    def set_aside(self, change: Change) -> None:
        """A started change waits for something of its own, or joins a batch: others may run in its place."""
        self._ready_queues.ended([change])

    def start_with(self, batch: list[Change], limit: int, fits: Callable[[Change], bool]) -> None:
        """Start more changes of its handler that fit into a started batch, up to ``limit``: of its keys first.

        A batch holds the places of its first change, whatever the types of the others.
        """
        handler = self._needs(batch[0]).handler

        def belongs(change: Change) -> bool:
            return self._needs(change).handler is handler and fits(change)

        if len(batch) > 1:
            self.set_aside(batch[-1])
        for key in dict.fromkeys(change.key for change in batch):
            self._start_run(self._scheduler[key], batch, limit, belongs)
        if len(batch) >= limit:
            return
        with closing(self._ready_queues.of_handler(handler)) as keys:
            for key in keys:
                lane = self._scheduler.get(key)
                if lane is None or not self._startable(lane):
                    continue
                if belongs(lane.queue[0]):
                    self._start_run(lane, batch, limit, belongs)
                else:
                    self._make_ready(lane)
                if len(batch) >= limit:
                    return

    def finished(self, batch: Sequence[Settlement]) -> None:
        """The handlers of these started changes ended; those of a key stand in ``seq`` order."""
        self._ready_queues.ended(finished.change for finished in batch)
        for finished in batch:
            change = finished.change
            lane = self._known.get(change.seq) or self._scheduler[change.key]  # an orphan is not in the window
            lane.leave_running(change)
            if lane.orphan:
                self._orphan_returned(lane)
            else:
                self._window.leave(change.entity_type, self._places(change))  # its type can do no more for its mark
                lane.settling += 1
                self._finished_in_lane(lane, finished)

    def _finished_in_lane(self, lane: KeyQueue, finished: Settlement) -> None:
        if isinstance(finished.outcome, Committed):
            self._reconciler.settled((finished,))
            self._window.vacate(self._places(finished.change))
            self._gone(finished, finished)
        else:
            self.marks.add(finished)
        if finished.outcome.holds_key:
            lane.holding += 1
            self._drop_queue(lane, remember=True)
        elif lane.queue and not lane.running:
            self._make_ready(lane)
        else:
            self._consider_resume(lane.key)

    def interrupted(self, change: Change) -> None:
        """The handler of a started change was cut off. The table knows what came of it: its key is read anew."""
        key = change.key
        lane = self._scheduler[key]
        lane.leave_running(change)
        self._ready_queues.ended([change])
        if lane.orphan:
            self._orphan_returned(lane)
            return
        self._forget(change)
        self._in_flight.left(change)
        self._reconciler.cut_off(key)
        # A waiting change is found again when it is due; those behind it are not, and may be held back no more.
        first = next((c for c in (change, *lane.queue) if not c.requeued), None)
        self._drop_queue(lane, remember=False)
        if first and change.shard in self._in_flight.owned:
            self._note(key, first.seq, first.shard, held=False)
        if mark := self._deferred.get(key):
            mark.held = lane.shut  # what held the key may be this change, and may be done: the table is asked
        self._drop_if_empty(lane)
        self._consider_resume(key)

    def take_finished(self, limit: int, now: float = inf) -> list[Settlement]:
        """What is to be settled next, in the order in which it finished."""
        return self.marks.take(limit, now)

    def settled(self, batch: Iterable[Settlement]) -> None:
        """These outcomes are committed; a mark that the table refused may have become another one."""
        # Those that are not there: the lanes were reset while the settle was under way.
        done = [(first, finished) for finished in batch if (first := self.marks.written(finished))]
        self._reconciler.settled([finished for _, finished in done])
        self._window.vacate(sum([self._places(finished.change) for _, finished in done]))
        for first, finished in done:
            self._gone(first, finished)

    def _gone(self, first: Settlement, finished: Settlement) -> None:
        """As it finished, and as it is in the table."""
        self._in_flight.left(finished.change)
        lane = self._known.pop(finished.change.seq)
        lane.settling -= 1
        lane.holding -= first.outcome.holds_key
        if lane.queue and not lane.running and not lane.settling and lane.fenced:
            self._make_ready(lane)
        self._drop_if_empty(lane)
        if not finished.outcome.holds_key:
            self._unhold(lane.key)

    def resumes(self, limit: int) -> list[KeyRead]:
        """Keys to read on for, of one type that has room, each told once; answer each with ``resumed``."""
        return self._deferred.resumes(limit, self._window.admits)

    def _make_ready(self, lane: KeyQueue) -> None:
        lane.needs = self._needs(lane.queue[0])
        self._ready_queues.put(lane.key, lane.needs)

    def _startable(self, lane: KeyQueue) -> bool:
        if not lane.queue or lane.running or lane.shut:
            return False
        return not (lane.settling and lane.fenced)  # it is made ready again when the last before it has settled

    def _start_next(self, lane: KeyQueue) -> Change:
        change = lane.queue.popleft()
        lane.running.append(change)
        self._in_flight.started(change)
        return change

    def _start_run(self, lane: KeyQueue, batch: list[Change], limit: int, belongs: Callable[[Change], bool]) -> None:
        while lane.queue and len(batch) < limit and belongs(lane.queue[0]):
            if lane.running and lane.queue[0].seq < lane.running[-1].seq:
                return  # an operator has requeued it meanwhile: it runs by itself
            batch.append(self._start_next(lane))
        # What is left behind them becomes ready when they have finished.

    def _enqueue(self, key: Key, lane: KeyQueue | None, change: Change) -> None:
        if lane is None:
            lane = self._scheduler[key] = KeyQueue(key)
        self._known[change.seq] = lane
        self._window.take(change.entity_type, self._places(change))
        lane.enqueue(change)
        if not lane.running and lane.queue[0] is change:
            self._make_ready(lane)

    def _unhold(self, key: Key) -> None:
        if mark := self._deferred.get(key):
            mark.held = False
            self._consider_resume(key)

    def _consider_resume(self, key: Key) -> None:
        mark, lane = self._deferred.get(key), self._scheduler.get(key)
        if mark and not mark.held and (lane is None or not (lane.queue or lane.shut or lane.orphan)):
            self._deferred.resume(key)

    def _orphan_returned(self, lane: KeyQueue) -> None:
        if lane.running:
            return
        lane.orphan = False
        self._unhold(lane.key)
        self._drop_if_empty(lane)

    def _drop_queue(self, lane: KeyQueue, *, remember: bool) -> None:
        """Let the queued changes go; with ``remember``, they are held behind the one that waits."""
        key = lane.key
        for change in lane.queue:
            self._forget(change)
        if remember and lane.queue:
            self._note(key, lane.queue[0].seq, lane.queue[0].shard, held=True)
        if remember and (mark := self._deferred.get(key)):
            mark.held = True
            self._deferred.do_not_resume(key)
        lane.queue.clear()
        self._drop_if_empty(lane)

    def _give_way(self, key: Key, lane: KeyQueue | None, earlier: Change) -> None:
        """An earlier change of the key was requeued and is not to run yet: what is queued behind it is let go."""
        later = [change for change in lane.queue if change.seq > earlier.seq] if lane else []
        for change in later:
            assert lane is not None
            lane.queue.remove(change)
            self._forget(change)
        if later:
            self._note(key, later[0].seq, later[0].shard, held=True)
            self._deferred.do_not_resume(key)

    def _drop_if_empty(self, lane: KeyQueue) -> None:
        if lane.empty:
            self._scheduler.pop(lane.key, None)

    def _forget(self, change: Change) -> None:
        del self._known[change.seq]
        self._window.give(change.entity_type, self._places(change))

    def _note(self, key: Key, seq: int, shard: int, *, held: bool) -> None:
        owned = self._in_flight.owned
        assert shard in owned, "a shard that comes back is read from its first change on, without old marks"
        self._deferred.note(key, seq, shard, held=held)
