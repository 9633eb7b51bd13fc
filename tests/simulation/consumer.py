"""A consumer without sockets and clock: the real ``ReadPlanner``, ``KeyScheduler`` and ``balance``.

Around them is a step for each thing that takes time. The order of what happens within a step is that of
``cdc.engine.consumer`` and ``cdc.engine.dispatcher``.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from cdc.core.admission import Row
from cdc.core.deferred_keys import KeyRead
from cdc.core.kept_floor import KeptFloor
from cdc.core.latest import Latest, latest
from cdc.core.model import Change, Coalesced, Committed, Dead, Operation, Outcome, Processed, Snoozed, Waiting, WakeUp
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import ReadyQueues, Requirements
from cdc.core.rebalance import balance
from cdc.core.router import Handler
from cdc.core.scheduler import KeyScheduler
from cdc.core.settle_queue import SettleQueue
from cdc.core.shard_cursor import Scanned
from cdc.core.shard_ownership import Acquired
from tests.simulation.promises import Promises
from tests.simulation.server import EPOCH, SHARDS, Asked, Server, Session, SessionLostError, seqs_of

_MAX_ATTEMPTS = 3
_MISFITS = 0.1
_SNOOZES = 0.3
"""Of those that fail so many are dead at the first attempt."""
_BATCH = 3
_READ_TAKES = (0,) * 9 + (20,)
"""So many times its answer is not there yet: in a while like that, a shard may leave and come back."""
_MARKS_ENOUGH = 100
"""With fewer a call for the latest may leave its key open: what it stands for is read, and asked about once more."""
_LARGE = 0.2
"""Of the pages so many end before all that is there: their rows are large."""
_SWEEP_INTERVAL_S, _POLL_INTERVAL_S = 5.0, 1.0


class Kind(NamedTuple):
    """A handler. ``in_thread``: it cannot be cut off. ``pauses``: a dead letter of its keeps its key back. ``latest``:
    it is called once for what waits of a key.
    """

    transactional: bool
    in_thread: bool
    pauses: bool
    latest: bool = False


_HANDLERS = {
    kind: Handler(
        str(kind), print, is_async=not kind.in_thread, transactional=kind.transactional, pauses=kind.pauses,
        latest=kind.latest,
    )
    for kind in map(Kind._make, product((False, True), repeat=4))
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """``full_passes``: without them nothing is ever swept a second time from zero, except what was lost or refused."""

    kinds: dict[str, tuple[Kind, Kind]]
    """Key -> the handlers of its changes with even and odd numbers."""
    capacity: int
    key_capacity: int
    deferred_max: int
    queue_capacity: int
    sole: bool
    """No type leaves room for others."""
    concurrency: int
    threads: int
    batches: bool
    full_passes: bool
    settle_s: float
    """Of those with ``latest``."""
    coalesced_max: int

    def kind(self, key: str, seq: int) -> Kind:
        return self.kinds[key][seq % 2]


@dataclass(eq=False)
class Call:
    """A handler that runs."""

    process: object
    session: Session
    kind: Kind
    changes: list[Change]
    lingering: bool = False
    taken: bool = False
    asked: Asked | None = None
    """What its call stands for, as the table has shown it; the answer comes in at the next step."""
    latest: Latest | None = None
    outcomes: dict[Change, Outcome] | None = field(default=None)
    """As its transaction has committed them, or None."""

    @property
    def seqs(self) -> list[int]:
        """What it stands for."""
        return [*(change.seq for change in self.changes), *(self.asked.later if self.latest and self.asked else ())]


class Consumer:
    """One process, from its start until it is killed."""

    def __init__(self, settings: Settings, server: Server, promises: Promises, dice: random.Random) -> None:
        self._settings = settings
        self.reader = self._server = server
        self._promises = promises
        self._dice = dice
        self.scheduler = KeyScheduler(
            settings.capacity, settings.key_capacity, settings.deferred_max,
            ready_queues=ReadyQueues(settings.concurrency, {"threads": settings.threads}, sole=settings.sole),
            needs=self._needs, sole=settings.sole, coalesces=True,
        )  # fmt: skip
        self.planner = ReadPlanner(
            sweep_interval_s=_POLL_INTERVAL_S, queue_capacity=settings.queue_capacity, room_for=self.scheduler.room_for
        )
        self.session: Session | None = None
        self.ownership = self.scheduler.ownership
        self.ownership.subscribe(self.planner)
        self.calls: list[Call] = []
        self.streaming = False
        """As far as this process knows."""
        self.wakeups: deque[list[WakeUp] | None] = deque()
        self._to_settle = SettleQueue()
        self._unsettled: dict[int, Outcome] = {}
        self._stood_for = set[int]()
        """What calls of this session for the latest stood for that have ended, while no read was under way."""
        self._looked: tuple[int, int] | None = None
        self._answer: Callable[[], None] | None = None
        self._reading = ExitStack()
        self._slow = 0
        self._floor, self._drew = KeptFloor(), False
        self._next_due_at = 0.0
        self._restart_due = False

    @property
    def at_rest(self) -> bool:
        return not self.scheduler.ownership.in_flight and not self.calls and self._answer is None

    # --- the session -----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        if self.session is None:
            self.session = self._server.connect()

    def notice(self) -> None:
        """A statement on the session finds out whether it is still there."""
        if self.session and not self.session.alive:
            self._end_connection()

    def _end_connection(self) -> None:
        assert self.session
        self._server.end_session(self.session)
        self.session = self._looked = self._answer = None
        self._floor, self._drew = KeptFloor(), False
        self._reading.close()
        self._unsettled.clear()
        self._stood_for.clear()
        self._to_settle = SettleQueue()
        self.ownership.lose()
        self._next_due_at = 0.0
        for call in list(self.calls):
            if call.kind.in_thread and not (call.kind.latest and call.latest is None):  # else it is not called yet
                self._promises.happened["a handler went on without its session"] += 1
            else:
                self.interrupt(call)

    def killed(self) -> None:
        """The process is gone, its handlers' transactions with it; its session is when the server says so."""
        for call in list(self.calls):
            self._leaves(call)

    def balance(self) -> None:
        """Look at one step, and act on those figures at a later one."""
        if self.session is None:
            return
        try:
            if self._looked is None:
                self._looked = self._server.look(self.session)
            else:
                figures, self._looked = self._looked, None
                self._move(self.session, *figures)
        except SessionLostError:
            self._end_connection()

    def _move(self, session: Session, members: int, free: int) -> None:
        move = balance(members, self.ownership.owned, free, shards=SHARDS)
        if move.acquire and (taken := self._server.acquire_shards(session, move.acquire, self._dice)):
            floors = {shard: self._server.floors[shard] for shard in taken}
            self._promises.happened["a shard was read from a kept floor on"] += sum(map(bool, floors.values()))
            self.ownership.acquire(Acquired(taken, floors=floors))
            self._next_due_at = 0.0
        self.ownership.revoke(move.release)
        if idle := self.ownership.idle():
            self._server.release_shards(session, idle)
            self._promises.happened["a shard was given away"] += len(idle)
            self.ownership.released(idle)

    def keep_floors(self) -> int:
        """Look up the number drawn last at one step, and move the floors at a later one. Returns how many moved."""
        if self.session is None or self._server.positions:
            return 0
        if not self._drew:
            self._floor.drew(self._server.last_drawn)
            self._drew = True
            return 0
        self._drew = False
        try:
            return self._server.move_floors(self.session, self._floor)
        except SessionLostError:
            self._end_connection()
            return 0

    # --- wake-ups --------------------------------------------------------------------------------------------------

    def notified(self, wakeups: Iterable[WakeUp], *, relayed: bool = False) -> list[WakeUp]:
        """Returns what is for the others."""
        notified = list(wakeups)
        self.planner.notified([wakeup for wakeup in notified if wakeup.shard in self.ownership.owned], relayed=relayed)
        return [wakeup for wakeup in notified if wakeup.shard not in self.ownership.owned]

    def hear(self) -> None:
        """A NOTIFY has come in: wake-ups, or the word that the table was changed without any."""
        if not self.wakeups:
            return
        wakeups = self.wakeups.popleft()
        if wakeups is not None:
            self.notified(wakeups, relayed=True)
        else:
            self._restart_due = self._settings.full_passes
            self._next_due_at = 0.0

    def stream_began(self) -> None:
        self.streaming = True
        self.planner.interval(_SWEEP_INTERVAL_S, self._server.now)
        self.planner.streaming(connected=True)

    def stream_ended(self) -> None:
        self.streaming = False
        self.planner.interval(_POLL_INTERVAL_S, self._server.now)
        self.planner.streaming(connected=False)

    # --- reads -----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Takes a snapshot at one step, and at a later one its answer comes in."""
        if self._answer and self._slow:
            self._slow -= 1
        elif self._answer:
            answer, self._answer = self._answer, None
            answer()
            self._reading.close()
        elif self.session and self.scheduler.window.free > 0:
            self._reading.enter_context(self.scheduler.reading)
            self._answer = self._request(self.scheduler.window.free)
            self._slow = self._dice.choice(_READ_TAKES)
            if self._answer is None:
                self._reading.close()

    def _request(self, room: int) -> Callable[[], None] | None:
        now = self._server.now
        if self.scheduler.deferred.held_until <= now:
            self.scheduler.deferred.read_held(now)
        if key_reads := self.scheduler.key_reads(min(2, room)):
            return self._resume(key_reads, max(1, room // len(key_reads)))
        enough = 1 if self.planner.throttled else self.scheduler.worth
        if self.ownership.active and now >= self._next_due_at and room >= enough:
            return self._due()
        if self._restart_due or (self._settings.full_passes and self.planner.full_pass_due(now)):
            self._restart_due = False
            self.scheduler.forget_deferred(self.planner.restart())
        match self.planner.next(now, room, enough):
            case Fetch() as fetch:
                return self._fetch(fetch)
            case Sweep() as sweep:
                return self._sweep(sweep)
        return None

    def _page(self, rows: list[Row]) -> tuple[list[Row], list[WakeUp]]:
        """Those that fit, and the numbers of the others."""
        fit = self._dice.randint(1, len(rows)) if rows and self._dice.random() < _LARGE else len(rows)
        self._promises.happened["a change did not fit into a page"] += len(rows) - fit
        self._promises.happened["a TRUNCATE kept a change from starting"] += sum(row.barred for row in rows[:fit])
        return rows[:fit], [WakeUp(row.change.seq, row.change.shard) for row in rows[fit:]]

    def _fetch(self, fetch: Fetch) -> Callable[[], None]:
        (rows, cut), snapshot = self._page(self._server.fetch(fetch.wakeups)), self._server.snapshot()
        self._promises.happened["a change was fetched by its number"] += len(rows)

        def answer() -> None:
            for row in rows:
                self.planner.skipped(row.change.entity_type, row.change.shard)
            admitted = self.scheduler.admit(rows, throttled=self.planner.throttled)
            self.planner.fetched(fetch, {row.change.seq for row in rows}, snapshot, self._server.now, cut)
            self.planner.throttle(admitted.rejected, self._server.now)

        return answer

    def _sweep(self, sweep: Sweep) -> Callable[[], None]:
        (rows, scanned), snapshot = self._server.sweep(sweep), self._server.snapshot()
        rows, cut = self._page(rows)
        for shard in {shard for _, shard in cut}:
            scanned[shard] = Scanned(max((r.change.seq for r in rows if r.change.shard == shard), default=0), more=True)
        if sweep.only is not None:
            self._promises.happened["a type was read apart"] += len(rows)

        def answer() -> None:
            admitted = self.scheduler.admit(rows)
            seen = [WakeUp(row.change.seq, row.change.shard) for row in rows]
            self.planner.swept(sweep, seen, admitted.rejected, snapshot, self._server.now, scanned=scanned)

        return answer

    def _resume(self, key_reads: list[KeyRead], per_key: int) -> Callable[[], None]:
        by_key = [(resume, self._server.resume(resume, per_key)) for resume in key_reads]
        cut = {number for number, _ in self._page([row for _, rows in by_key for row in rows])[1]}
        found = [(resume, [row for row in rows if row.change.seq not in cut], rows) for resume, rows in by_key]
        self._promises.happened["a key was read on"] += len(found)

        def answer() -> None:
            for resume, rows, there in found:
                admitted = self.scheduler.admit_key_read(resume, rows, complete=len(rows) == len(there) < per_key)
                self.planner.throttle(admitted.rejected, self._server.now)

        return answer

    def _due(self) -> Callable[[], None]:
        without = [name for name in self.scheduler.types if self.scheduler.room_for(name).free == 0]
        due, next_due_s = self._server.due(self.ownership.active, self._settings.capacity, without)
        in_window = set(self.scheduler.requeued())
        rows, cut = self._page([row for row in due if row.change.seq not in in_window])

        def answer() -> None:
            admitted = self.scheduler.admit(rows, due=True)
            pause_s = _SWEEP_INTERVAL_S if next_due_s is None else next_due_s
            pause_s = 0.0 if cut else pause_s
            if admitted.rejected or without:
                pause_s = _POLL_INTERVAL_S
            self._next_due_at = self._server.now + min(pause_s, _SWEEP_INTERVAL_S)

        return answer

    # --- handlers --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        run = self.scheduler.start().changes
        assert not run or self.session, "handed out without a session"
        for change in run:
            self._start(change)

    def _start(self, change: Change) -> None:
        kind = self._kind(change)
        mine = (call for call in self.calls if call.lingering and call.kind == kind and call.session is self.session)
        call = next(mine, None)
        if call is None:
            lingers = self._settings.batches and self._dice.random() < 0.3
            call = Call(self, self.session, kind, [], lingers)
            self.calls.append(call)
            self._promises.calls.append(call)
        before = len(call.changes)
        call.changes.append(change)
        if kind.latest:
            call.lingering = False
            return  # it is called when it is known what for
        if self._settings.batches:
            self.scheduler.start_with(call.changes, _BATCH, lambda _other: True)
        if len(call.changes) >= _BATCH:
            call.lingering = False
        self._promises.starts(call, call.changes[before:], self._unsettled)

    def _needs(self, change: Change) -> Requirements:
        kind = self._kind(change)
        single = not (kind.in_thread or kind.transactional or kind.latest or self._settings.batches)
        return Requirements(
            change.entity_type, _HANDLERS[kind], ("threads",) if kind.in_thread else (),
            after_settled=kind.transactional or kind.latest, run=_BATCH if single else 1,
            read=change.operation == Operation.READ,
        )  # fmt: skip

    def _kind(self, change: Change) -> Kind:
        return self._settings.kind(change.entity_id, change.seq)

    def advance(self, failure: float) -> None:
        """One handler goes a step further; each of its changes fails with this probability."""
        if not self.calls:
            return
        call = self._dice.choice(self.calls)
        if call.lingering:
            call.lingering = False
        elif call.kind.latest and call.latest is None:
            self._ask(call)
        elif not call.kind.transactional:
            self._report(call, self._run(call, failure))
        elif not call.taken:
            call.taken = self._server.take(call.changes, call)
            if not call.taken:
                self._promises.happened["a row was somebody else's"] += 1
                self.interrupt(call)
        elif call.outcomes is None:
            self._commit(call, self._run(call, failure))
        else:
            self._report(call, call.outcomes)

    def _ask(self, call: Call) -> None:
        """What the call stands for: the table shows it at one step, and the handler is called at another."""
        [change] = call.changes
        if call.asked is None:
            kind, settle_s = call.kind, 0.0 if change.requeued else self._settings.settle_s
            call.asked = self._server.ask(
                change,
                self._settings.coalesced_max,
                settle_s,
                lambda seq: self._settings.kind(change.entity_id, seq) == kind,
            )
            return
        later, wait_s, gone, before = call.asked
        if before is not None:
            self._promises.happened["a call waited for what had become visible late"] += 1
            if change.shard in self.ownership.active:
                self.scheduler.deferred.defer(change.key, before, change.shard, blocked=False, last=before)
            self.interrupt(call)
        elif gone:
            self._promises.happened["a change had been coalesced"] += 1
            known = change.seq in self._stood_for and call.session is self.session
            assert not known or self._settings.deferred_max < _MARKS_ENOUGH, f"{change!r} is asked about in vain"
            self.interrupt(call)
        elif wait_s and self.scheduler.put_off(change, self._server.now + wait_s):
            self._promises.happened["a change was put off"] += 1
            self._leaves(call)
        else:
            last = self._server.rows[later[-1]].change() if later else change
            numbers = "{" + ",".join(map(str, later)) + "}"
            call.latest = latest(change, last, numbers) if later else Latest(change)
            if later:
                self.scheduler.deferred.handled(change.key, change.seq, last.seq)
            self._promises.starts(call, call.changes, self._unsettled)
            self._promises.coalesces(call, later)

    def cut_off(self) -> None:
        """One handler's connection is lost, and with it the answer to its COMMIT, if there was one."""
        if self.calls:
            self.interrupt(self._dice.choice(self.calls))

    def interrupt(self, call: Call) -> None:
        self._promises.happened["a commit's answer was lost"] += call.outcomes is not None
        self._leaves(call)
        for change in call.changes:
            self.scheduler.interrupted(change)

    def _run(self, call: Call, failure: float) -> dict[Change, Outcome]:
        """A key ends where one of its changes failed, unless what was raised is about all of them."""
        about_all = self._dice.random() < failure / 2
        outcomes: dict[Change, Outcome] = {}
        failed: set[str] = set()
        for change in call.changes:
            if about_all or (change.entity_id not in failed and self._dice.random() < failure):
                failed.add(change.entity_id)
                last = change.attempt >= _MAX_ATTEMPTS or self._dice.random() < _MISFITS
                outcomes[change] = Dead("no", call.kind.pauses) if last else self._later()
                if not outcomes[change].blocks_key:
                    failed.discard(change.entity_id)
            elif change.entity_id not in failed:
                outcomes[change] = Committed(EPOCH) if call.kind.transactional else Processed()
                self._promises.returned.update(call.seqs if call.latest else [change.seq])
        if call.latest:
            outcomes = {change: call.latest.outcome(outcome) for change, outcome in outcomes.items()}
        self._promises.given_up.update(
            *(
                call.seqs
                for outcome in outcomes.values()
                if isinstance(outcome, Coalesced) and isinstance(outcome.outcome, Dead)
            )
        )
        return outcomes

    def _later(self) -> Waiting:
        snoozes = self._dice.random() < _SNOOZES
        self._promises.happened["a change was snoozed"] += snoozes
        return (Snoozed if snoozes else Waiting)(self._dice.choice([0, 1.0]), "no")

    def _commit(self, call: Call, outcomes: dict[Change, Outcome]) -> None:
        done = [change.seq for change, outcome in outcomes.items() if isinstance(outcome, Committed)]
        if call.latest and done:
            done = call.seqs
        self._promises.committed(done)
        self._server.commit(done)
        self._server.unlock(call)
        call.outcomes = outcomes

    def _report(self, call: Call, outcomes: dict[Change, Outcome]) -> None:
        self._leaves(call)
        self._to_settle.add(*self.scheduler.finished([Settlement(*each) for each in outcomes.items()]))
        for change, outcome in outcomes.items():
            if call.session is self.session and not isinstance(outcome, Committed):
                self._unsettled.update(dict.fromkeys(seqs_of(Settlement(change, outcome)), outcome))
        done = any(isinstance(outcome, Coalesced | Committed) for outcome in outcomes.values())
        if call.latest and done and call.session is self.session and self._answer is None:
            self._stood_for.update(call.seqs[1:])
        for change in call.changes:
            if change not in outcomes:
                self.scheduler.interrupted(change)

    def _leaves(self, call: Call) -> None:
        self._server.unlock(call)
        self.calls.remove(call)
        self._promises.calls.remove(call)

    # --- settle ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Sent at one step; when the server has executed it, its answer comes in at another."""
        session = self.session
        if session is None or session.statement:
            return
        try:
            if session.answer is not None:
                batch, session.answer = session.answer, None
                for finished in batch:
                    for seq in seqs_of(finished):
                        self._unsettled.pop(seq, None)
                    if self._answer is not None:
                        self._stood_for.difference_update(seqs_of(finished))
                    if finished.change.requeued:
                        self._next_due_at = 0.0
                    if isinstance(finished.outcome, Waiting):
                        self._next_due_at = min(self._next_due_at, self._server.now + finished.outcome.delay_s)
                self.scheduler.settled(self._to_settle.written(batch))
            elif batch := self._to_settle.take(self._dice.choice([1, 3, 100])):
                self._server.settle(session, batch)
        except SessionLostError:
            self._end_connection()
