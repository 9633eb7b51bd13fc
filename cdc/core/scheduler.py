"""Which change may run now. A state machine over keys: no clock, no I/O, no handler.

Theory
------
A ``KeyQueue`` holds the changes of one key that are in the window, in ``seq`` order:

    queued ──start──> running ──finished──> settling ──settled──> gone

* One change of a key runs at a time, or one batch of successive ones. Its successor may start when it has
  *finished*. Its mark need not be in the table by then: marks are written in the order in which changes finished, so
  after a crash a key resumes at its first unsettled change.
* A *fenced* change is one that its handler's own transaction marks. It starts only when all before it have settled:
  its mark does not queue behind theirs, and a crash in between would leave it marked and them to run again.
* A change that waits for its retry, or a dead letter that pauses its key, *blocks* its queue. The changes behind it
  leave the window, because the table holds the key back from then on.
* The window is bounded, and so is each queue: a key with a million changes cannot fill it. Each entity type has a limit
  in the window, and its handlers have a limit on what may run (``dynamic_limit``, ``ready_queues``). A change takes one
  place of the window, and one more for each ``place_bytes`` of its documents. It is admitted while a place is free.
* A change of a handler with ``latest`` is the last that its queue takes: its call stands for those behind it. If it is
  *put off*, it leaves the window, and its key is held until a time.

For what the window does not hold, each key has one number, its *watermark*: changes of the key from this ``seq`` on
were seen and not admitted. Only a ``KeyRead`` that starts there admits them. This rule keeps order whatever the reason
was: a waiting change, a full queue, or a pause of the key. A change for which neither this bounded memory nor the
window has room is *rejected*, and its type and shard are read again from there. So is one whose type a pause *holds*,
and one that is *barred*: a TRUNCATE of its type comes before it, or is this one. Nothing is remembered of these.
A read may be older than a settle that came after it began: ``admit`` corrects its rows by the ``ReadReconciler``.

A consumer that lost its session has lost its shards. ``lost`` keeps the handlers that still run, whose keys are shut
until they return, unsettled; and the outcomes not written yet, with their places and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from operator import attrgetter

from cdc.core.admission import Admission, Admitted, Row
from cdc.core.batch_start import BatchStart
from cdc.core.deferred_keys import DeferredKeys, KeyRead
from cdc.core.dynamic_limit import DynamicLimit, Room
from cdc.core.fast_change import fast_make
from cdc.core.key_queue import KeyQueue
from cdc.core.model import SEQ_MAX, Change, Committed, Key
from cdc.core.over_limit import OverLimit
from cdc.core.pauses import Held, Pauses
from cdc.core.read_reconciler import ReadReconciler, Settlement
from cdc.core.ready_queues import NOTHING, ReadyQueues, Requirements, Run
from cdc.core.shard_ownership import Acquired, ShardOwnership

_DEFERRED_KEYS_MAX = 10_000
_CHANGE, _SEQ = attrgetter("change"), attrgetter("seq")
_ADMITTED, _RUN = fast_make(Admitted), fast_make(Run)
_NO_KEYS: Set[Key] = frozenset()
_NONE_WAITS: Mapping[Key, int] = {}
_FACTOR = 4
"""A single type with a backlog holds at most four fifths of the window."""


class KeyScheduler:
    """``capacity``: places of the window, of ``place_bytes`` each. ``key_capacity``: queued changes of one key.

    ``ready_queues`` and ``needs``: what may run at the same time, and what is fenced. ``sole``: only one entity type.
    ``coalesces``: some handler has ``latest``.
    """

    def __init__(
        self,
        capacity: int,
        key_capacity: int = 64,
        deferred_max: int = _DEFERRED_KEYS_MAX,
        *,
        place_bytes: int = 16_384,
        ready_queues: ReadyQueues | None = None,
        needs: Callable[[Change], Requirements] = lambda change: Requirements(change.entity_type),
        sole: bool = True,
        coalesces: bool = False,
    ) -> None:
        self.capacity = capacity
        self.place_bytes = place_bytes
        """A change holds 1 + size // place_bytes places. Written out below: a call for it would be the commonest."""
        self.key_capacity = key_capacity
        self._needs = needs
        self.coalesces = coalesces
        self._queues: dict[Key, KeyQueue] = {}
        self._known: dict[int, KeyQueue] = {}
        """The queue of each change in the window, by the change's number."""
        self.window = DynamicLimit(capacity, _FACTOR, sole=sole)
        """It takes no more changes when 0 places, or fewer, are ``free``."""
        self.ready_queues = ready_queues or ReadyQueues()
        self.settling = 0
        """Number of changes that have finished and are not in the table yet."""
        self.deferred = DeferredKeys(deferred_max, sole=sole)
        self.ownership = ShardOwnership()
        self.ownership.subscribe(self)
        self.fenced: Callable[[], None] = lambda: None
        """Called when ``start`` meets a change that waits for those of its key before it to settle."""
        self.reading = ReadReconciler()
        """A context to hold from the beginning of a read of the table until its answer has been taken in."""
        self.held = Held()

    @property
    def worth(self) -> int:
        return max(1, self.capacity // 4)  # the room from which on reading a page is worth while

    def room_for(self, entity_type: str) -> Room:
        """How many more changes of this type the window takes."""
        over = self.held.over is not None and self.held.over.full(entity_type)
        free = 0 if over or self.held.pauses.holds(entity_type) else self.window.room(entity_type)
        return Room(free, max(1, min(self.worth, (self.window.held(entity_type) + free) // 2)))

    @property
    def types(self) -> Collection[str]:
        """The types that have changes in the window."""
        return self.window.users

    @property
    def running(self) -> int:
        return self.ownership.in_flight - self.settling

    @property
    def queued(self) -> int:
        return len(self._known) - self.ownership.in_flight

    def waiting_like(self, change: Change) -> int:
        """How many keys have a change to start of the same type and handler, startable now or not."""
        return self.ready_queues.waiting(self._needs(change))

    def requeued(self) -> list[int]:
        """The numbers of the requeued changes in the window that have not finished, and of those that are held."""
        return [c.seq for queue in self._queues.values() for c in queue.unfinished if c.requeued] + list(self.held.due)

    def knows(self, seq: int) -> bool:
        return seq in self._known

    def hold(self, pauses: Pauses) -> None:
        """Take in and start nothing of these any more; what runs goes on. The outbox is to be read again, then."""
        for key in self.held.become(pauses):
            self._unblock(key)
        for queue in [queue for queue in self._queues.values() if queue.queued and pauses.hold(queue.key)]:
            left = [change for change in queue.queued if not change.requeued]
            self._drop_queue(queue, remember=False)
            # Its mark, and a read that is under way, may bring later ones first.
            if left and (queue.key in self.deferred.watermarks or self.reading.under_way):
                self._defer(queue.key, left[0].seq, left[0].shard, last=left[-1].seq)

    def limit(self, over_limit: OverLimit | None) -> None:
        """Other limits are in force than before: what is ready is sorted again."""
        self.held.over = over_limit
        self.ready_queues.forget_ready()
        for queue in self._queues.values():
            if queue.queued and not queue.running and not queue.orphan:
                self._make_ready(queue)

    # --- shards ----------------------------------------------------------------------------------------------------

    def acquired(self, acquired: Acquired) -> None:
        self.reading.arrived(acquired.shards)

    def forget_deferred(self, shards: Iterable[int]) -> None:
        """These shards are about to be swept, which finds what the marks stand for. A mark may outlive its change."""
        self.deferred.forget([key for key in self.deferred.of_shards(set(shards)) if key not in self._queues])

    def revoked(self, shards: Collection[int]) -> None:
        """Drop the queued changes of these shards. Those that run go on, and settle."""
        for queue in list(self._queues.values()):
            if queue.queued and queue.queued[0].shard in shards:
                self._drop_queue(queue, remember=False)
        self.deferred.forget(list(self.deferred.of_shards(shards)))

    def lost(self) -> None:
        """Forget all but the running handlers. ``keep`` follows, with the outcomes that may still be written."""
        orphans = {key: queue for key, queue in self._queues.items() if queue.running}
        for queue in orphans.values():
            queue.queued.clear()
            queue.settling, queue.blocking = 0, ()
            queue.orphan = True
        self._queues = orphans
        for forgotten in (self._known, self.window, self.deferred):
            forgotten.clear()
        self.ready_queues.forget_ready()
        self.reading.close()
        self.settling = 0

    def keep(self, batch: Iterable[Settlement]) -> None:
        """These outcomes keep their places and keys after the session is lost, until they settle or are dropped."""
        for finished in batch:
            change = finished.change
            self.window.vacate(-(1 + change.size // self.place_bytes))
            self.ownership.started(change)
            queue = self._known[change.seq] = self._queues.setdefault(change.key, KeyQueue(change.key))
            self.settling += 1
            queue.settles(change.seq, blocks=finished.outcome.blocks_key)

    # --- in --------------------------------------------------------------------------------------------------------

    def admit(
        self, rows: Iterable[Row], *, due: bool = False, key_read: bool = False, throttled: Collection[str] = ()
    ) -> Admitted:
        """Take in the rows of a read, in its order. ``due``: waiting changes, which are found again without a mark.

        ``key_read``: all are of a key that is read on. Rows of ``throttled`` types are skipped.
        """
        if throttled:
            rows = (row for row in rows if row.change.entity_type not in throttled)
        taken = 0
        unblocked, waiting = self.reading.keys() if self.reading.eventful else (_NO_KEYS, _NONE_WAITS)
        rejected: dict[str, dict[int, int]] = {}
        rejected_keys, barred = set[Key](), False
        for row in rows:
            change, key = row.change, row.change.key
            if key in rejected_keys:
                continue  # the room that the change before lacked may be free by now: this one would overtake it
            match self._decide(row, key, waiting, key_read=key_read, due=due):
                case Admission.TAKE:
                    self._enqueue(key, change)
                    taken += 1
                case Admission.REMEMBERED if due and not row.blocked:
                    self._unblock(key)  # nothing before it waits: the mark may stand for this very change
                case Admission.RUNS_LATER:
                    barred |= row.barred
                    self._drop_later(key, change)
                case Admission.DEFER | Admission.DEFER_BLOCKED as decision:
                    self._defer(key, change.seq, change.shard, decision is Admission.DEFER_BLOCKED, change.seq)
                    if row.blocked and key in unblocked:
                        self._unblock(key)
                case Admission.PUT_OFF:
                    self._defer(key, change.seq, change.shard, last=change.seq)
                    if self.held.over is not None:
                        self.held.over.put_off(self._needs(change), key)
                case Admission.REJECT:
                    barred |= row.barred
                    rejected_keys.add(key)
                    of_type = rejected.setdefault(change.entity_type, {})
                    of_type[change.shard] = min(change.seq, of_type.get(change.shard, change.seq))
        return _ADMITTED((taken, rejected, barred))

    def _decide(self, row: Row, key: Key, waiting: Mapping[Key, int], *, key_read: bool, due: bool) -> Admission:
        """``waiting``: by key, the change that has begun to wait since the row was read."""
        change = row.change
        outdated = self.reading.eventful and self.reading.outdates(change)
        if outdated or change.seq in self._known or change.shard not in self.ownership.active:
            return Admission.NOTHING
        if self.held.pauses.all and (held := self.held.admission(change, due=due)):
            return held
        mark = self.deferred.watermarks.get(key)
        if mark and change.seq >= mark.seq:
            mark.last = max(mark.last, change.seq)
            return Admission.REMEMBERED
        blocked, closed = row.blocked or (key in waiting and waiting[key] < change.seq), False
        if (queue := self._queues.get(key)) is not None:
            blocked = blocked or queue.blocked or queue.orphan
            closed = self.coalesces and not due and self._takes_no_more(queue)
        if not (blocked or row.barred or closed) and (queue is None or len(queue.queued) < self.key_capacity):
            room = Admission.TAKE if self.window.admits(change.entity_type) else Admission.REJECT
            if self.held.over is None or queue is not None:
                return room
            return self.held.over.admission(self._needs(change), change, due=due) or room
        # The mark of a key that is read on has just made room.
        refused = row.barred or (not key_read and not self.deferred.has_room(key))
        deferred = Admission.REJECT if refused else Admission.DEFER_BLOCKED if blocked else Admission.DEFER
        return Admission.RUNS_LATER if due else deferred

    def admit_key_read(self, request: KeyRead, rows: Sequence[Row], *, complete: bool) -> Admitted:
        """The answer to a ``KeyRead``. ``complete``: these are all changes of the key. Returns what is barred."""
        mark = self.deferred.watermarks.get(request.key)
        if mark is None or mark.seq != request.seq:
            # The shard was revoked, or an earlier change became visible during the read.
            self._consider_key_read(request.key)
            return Admitted()
        self.deferred.forget([request.key])
        if (admitted := self.admit(rows, key_read=True)).barred:
            return admitted
        last = rows[-1].change if rows else None
        if rejected := admitted.rejected:
            self._defer(request.key, rejected[request.key[0]][request.shard], request.shard)
        elif not complete:
            self._defer(request.key, last.seq + 1 if last else request.seq, request.shard, last=mark.last)
        self._consider_key_read(request.key)
        return admitted._replace(rejected={})

    # --- through ---------------------------------------------------------------------------------------------------

    def start(self) -> Run:
        """Start the next change, or several with the same requirements. A run without changes: nothing is ready."""
        while turn := self.ready_queues.next():
            keys, needs = turn
            started: list[Change] = []
            for key in keys:
                queue = self._queues.get(key)
                if queue is None:
                    continue
                # The requirements differ if an earlier change of the key came in and was made ready instead.
                if queue.startable and queue.needs == needs:
                    started.append(self._start_next(queue))
                elif queue.settling and queue.after_settled:
                    self.fenced()
            if started:
                self.ready_queues.started(started, needs)
                if self.held.over is not None:
                    self.held.over.started(needs)
                return _RUN((needs.handler, started))
        return NOTHING

    def free_places(self, change: Change) -> None:
        """Free the places of a started change that waits for its own resource, or joins a batch."""
        self.ready_queues.ended([change])

    def start_with(self, batch: list[Change], limit: int, fits: Callable[[Change], bool]) -> None:
        """Start up to ``limit`` more changes of the same handler that fit into a started batch, of its keys first.

        A batch holds the places of its first change, whatever the types of the others.
        """
        handler = self._needs(batch[0]).handler

        def belongs(change: Change) -> bool:
            return self._needs(change).handler is handler and fits(change)

        if len(batch) > 1:
            self.free_places(batch[-1])
        starting = BatchStart(self.ready_queues, self._queues, self._start_next, self._make_ready)
        starting.fill(batch, limit, handler, belongs)

    def finished(self, batch: Sequence[Settlement]) -> list[Settlement]:
        """The handlers of these started changes ended. Those of one key stand in ``seq`` order.

        Returns what is to be written, in that order: neither what a handler has committed, nor the changes of orphans.
        """
        self.ready_queues.ended(map(_CHANGE, batch))
        to_settle: list[Settlement] = []
        committed: list[Settlement] = []
        places: dict[str, int] = {}
        for finished in batch:
            change, outcome = finished
            queue = self._known.get(change.seq) or self._queues[change.key]  # an orphan is not in the window
            queue.remove_running(change)
            if queue.orphan:
                self._orphan_returned(queue)
            else:
                places[change.entity_type] = places.get(change.entity_type, 0) + 1 + change.size // self.place_bytes
                queue.settles(change.seq, blocks=outcome.blocks_key)
                (committed if isinstance(outcome, Committed) else to_settle).append(finished)
                if outcome.blocks_key:
                    self._drop_queue(queue, remember=True)
                elif queue.queued and not queue.running:
                    self._make_ready(queue)
                elif self.deferred.watermarks:
                    self._consider_key_read(queue.key)
        for name, ended in places.items():
            self.window.end_use(name, ended)  # a type cannot speed up its marks
        self.settling += len(to_settle) + len(committed)
        if committed:
            self._leave_window(committed, in_table=True)
        return to_settle

    def interrupted(self, change: Change) -> None:
        """The handler of a started change was cut off. Only the table has its outcome, so its key is read again."""
        key = change.key
        queue = self._queues[key]
        queue.remove_running(change)
        self.ready_queues.ended([change])
        if queue.orphan:
            self._orphan_returned(queue)
            return
        self.ownership.ended((change,))
        self._forget(change)
        self.reading.cut_off(key)
        # A waiting change is found again when it is due. Those behind it, or before it and visible since, are not.
        left = sorted((each for each in (change, *queue.queued) if not each.requeued), key=_SEQ)
        self._drop_queue(queue, remember=False)
        if left and change.shard in self.ownership.active:
            self._defer(key, left[0].seq, change.shard, last=left[-1].seq)
        if mark := self.deferred.watermarks.get(key):
            mark.blocked = queue.blocked  # the change that blocked the key may be this one, and done: read the table
        self._drop_if_empty(queue)
        self._consider_key_read(key)

    def put_off(self, change: Change, until: float) -> bool:
        """This started, fresh change is to start again at that time. False: there is no room for a mark."""
        queue, owned = self._queues[change.key], change.shard in self.ownership.active
        if room := owned and not queue.orphan and self.deferred.has_room(queue.key):
            self.interrupted(change)
            self.deferred.hold(queue.key, until)
        return room

    def settled(self, batch: Sequence[Settlement]) -> None:
        """These are in the table. The outcome there may differ from that with which the change finished."""
        for queue in self._leave_window(batch, in_table=True):
            if queue.queued and not queue.running and not queue.settling and queue.after_settled:
                self._make_ready(queue)

    def dropped(self, batch: Sequence[Settlement]) -> None:
        """These outcomes, kept when the session was lost, are not written: other consumers own their shards."""
        self._leave_window(batch, in_table=False)

    def _leave_window(self, batch: Sequence[Settlement], *, in_table: bool) -> list[KeyQueue]:
        """Returns their queues, which know them no more."""
        if in_table and self.reading.under_way:
            self.reading.settled(batch)
        self.settling -= len(batch)
        self.window.vacate(sum([1 + change.size // self.place_bytes for change, _ in batch]))
        self.ownership.ended(map(_CHANGE, batch))
        queues = []
        for change, outcome in batch:
            queue = self._known.pop(change.seq)
            queue.settling -= 1
            if queue.blocking:
                queue.blocks_no_more(change.seq)
            self._drop_if_empty(queue)
            if in_table and self.deferred.watermarks and not outcome.blocks_key:
                self._unblock(queue.key)
            queues.append(queue)
        return queues

    def key_reads(self, limit: int) -> list[KeyRead]:
        """Reads of deferred keys, of one type that has room, each requested once; answer with ``admit_key_read``."""
        return self.deferred.take_reads(limit, lambda name: not self.held.holds(name) and self.window.room(name) > 0)

    def _make_ready(self, queue: KeyQueue) -> None:
        queue.needs = self._needs(queue.queued[0])
        self.ready_queues.put(queue.key, queue.needs)

    def _start_next(self, queue: KeyQueue) -> Change:
        change = queue.queued.popleft()
        queue.running.append(change)
        self.ownership.started(change)
        return change

    def _enqueue(self, key: Key, change: Change) -> None:
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = KeyQueue(key)
            queue.queued.append(change)
        else:
            queue.enqueue(change)
        self._known[change.seq] = queue
        self.window.acquire(change.entity_type, 1 + change.size // self.place_bytes)
        if not queue.running and queue.queued[0] is change:
            self._make_ready(queue)

    def _unblock(self, key: Key) -> None:
        if mark := self.deferred.watermarks.get(key):
            mark.blocked = False
            self._consider_key_read(key)

    def _consider_key_read(self, key: Key) -> None:
        mark, queue = self.deferred.watermarks.get(key), self._queues.get(key)
        closed = queue is not None and (queue.queued or queue.blocked or queue.orphan or self._takes_no_more(queue))
        if mark and not mark.blocked and not closed and key not in self.held.pauses.keys:
            self.deferred.request_read(key)

    def _takes_no_more(self, queue: KeyQueue) -> bool:
        """Whether the call of its last change stands for what comes after it, and has not settled; a mark does, too."""
        last = queue.last if self.coalesces else None
        needs = self._needs(last) if last else queue.needs if queue.settling else None
        return bool(needs and needs.handler and needs.handler.latest and self.deferred.has_room(queue.key))

    def _orphan_returned(self, queue: KeyQueue) -> None:
        if queue.running:
            return
        queue.orphan = False
        self._unblock(queue.key)
        self._drop_if_empty(queue)

    def _drop_queue(self, queue: KeyQueue, *, remember: bool) -> None:
        """Drop the queued changes; with ``remember``, they are deferred behind the one that waits."""
        key = queue.key
        for change in queue.queued:
            self._forget(change)
        if remember and queue.queued:
            self._defer(key, queue.queued[0].seq, queue.queued[0].shard, blocked=True)
        if remember and (mark := self.deferred.watermarks.get(key)):
            mark.blocked = True
            self.deferred.cancel_read(key)
        queue.queued.clear()
        self._drop_if_empty(queue)

    def _drop_later(self, key: Key, earlier: Change) -> None:
        """An earlier change of the key was requeued and cannot run yet: drop what is queued behind it."""
        if not (queue := self._queues.get(key)):
            return
        if later := [change for change in queue.queued if change.seq > earlier.seq]:
            for change in later:
                queue.queued.remove(change)
                self._forget(change)
            self._defer(key, later[0].seq, later[0].shard, blocked=True)
            self.deferred.cancel_read(key)
            self._drop_if_empty(queue)  # else its mark would outlive the earlier change, if another settles that

    def _drop_if_empty(self, queue: KeyQueue) -> None:
        if not (queue.queued or queue.running or queue.settling):
            self._queues.pop(queue.key, None)

    def _forget(self, change: Change) -> None:
        del self._known[change.seq]
        self.window.release(change.entity_type, 1 + change.size // self.place_bytes)

    def _defer(self, key: Key, seq: int, shard: int, blocked: bool = False, last: int = SEQ_MAX) -> None:
        assert shard in self.ownership.active, "a shard that comes back is read from the start, without old marks"
        self.deferred.defer(key, seq, shard, blocked=blocked, last=last)
