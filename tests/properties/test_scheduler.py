"""The lanes against a table: whatever happens in whatever order, a change starts when its key has come to it.

The model is the table alone, a list of rows with their states. Reads take what the table shows at one step and give it
to the lanes at a later one; settles are written at one and reported at another. What a consumer does with its cursor is
done here as plainly as possible: one number for each shard, sent back where a row was refused. What is released may be
handled elsewhere before it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cdc.core.admission import Row
from cdc.core.deferred_keys import KeyRead
from cdc.core.model import Change, Committed, Dead, Outcome, Processed, Waiting
from cdc.core.pauses import Pause, Pauses
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import Requirements
from cdc.core.shard_ownership import Acquired
from tests.changes import EPOCH, change
from tests.properties.machine import MACHINE
from tests.settling import SettlingScheduler

_SHARDS = range(2)
_KEYS = "abc"
_PAUSING = "b"
_BACKLOG = 12


def _after_settled(one: Change) -> bool:
    """All of one key's handlers are transactional, and every other one of another key's."""
    return one.entity_id == "a" or (one.entity_id == "c" and one.seq % 2 == 0)


@dataclass(slots=True)
class _Record:
    seq: int
    key: str
    state: str = "fresh"
    failures: int = 0
    requeued_late: bool = False

    @property
    def shard(self) -> int:
        return ord(self.key) % len(_SHARDS)

    @property
    def settled(self) -> bool:
        return self.state in ("processed", "dead")

    def change(self) -> Change:
        return change(self.seq, self.key, shard=self.shard, attempt=self.failures + 1, requeued=self.state == "waiting")


class SchedulerAndTable(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table: list[_Record] = []
        self.running: list[Change] = []
        self.orphans: list[Change] = []
        self.unsettled: dict[int, Outcome] = {}
        """Finished, and not in the table yet."""
        self.writing: list[Settlement] = []
        self.written = False
        self.answer: Callable[[], None] | None = None
        self.read = ExitStack()
        self.cursors: dict[int, int] = {}
        """Of the shards we own: all fresh rows up to here have been read."""
        self.away: set[int] = set()
        self.anew = False
        """What is paused has changed since the last pass from the beginning."""

    @initialize(
        capacity=st.sampled_from([2, 6, 30]),
        queue=st.sampled_from([1, 2, 5]),
        deferred=st.sampled_from([1, 2, 50]),
        run=st.sampled_from([1, 3]),
    )
    def begin(self, capacity: int, queue: int, deferred: int, run: int) -> None:
        self.arrived: set[int] = set()
        """Shards that have come, or come back, since the read began."""
        self.scheduler = SettlingScheduler(
            capacity,
            queue,
            deferred,
            needs=lambda one: Requirements(
                "t", after_settled=_after_settled(one), run=1 if _after_settled(one) else run
            ),
        )
        self.deferred_max = deferred
        self._own(_SHARDS)

    @rule(data=st.data(), steps=st.integers(1, 20))
    def work(self, data: st.DataObject, steps: int) -> None:
        """What goes on all the time. One rule, because only all of it together brings anything about."""
        for _ in range(steps):
            self._one_of(data, {
                self.write: sum(not record.settled for record in self.table) < _BACKLOG,
                self.sweep: not self.answer,
                self.look_for_due: not self.answer and any(record.state == "waiting" for record in self.table),
                self.read_on: not self.answer and len(self.scheduler.deferred),
                self.end_read: self.answer,
                self.start: self.scheduler.ready_queues.ready,
                self.finish: self.running,
                self.settle: self.unsettled and not self.writing,
                self.write_or_report: self.writing,
            })  # fmt: skip

    @rule(data=st.data())
    def trouble(self, data: st.DataObject) -> None:
        """What goes on now and then."""
        self._one_of(data, {
            self.requeue: any(record.state in ("dead", "paused") for record in self.table),
            self.pause_or_resume: True,
            self.pass_from_the_beginning: not self.answer and any(self.cursors.values()),
            self.commit: any(_after_settled(one) for one in self.running),
            self.interrupt: self.running,
            self.orphan_returns: self.orphans,
            self.release: len(self.cursors) == len(_SHARDS),
            self.ask_what_is_released: len(self.cursors) + len(self.away) < len(_SHARDS),
            self.handle_elsewhere: self.away,
            self.come_back: self.away,
            self.lose_the_session: len(self.running) + len(self.unsettled) > 1,
        })  # fmt: skip

    @staticmethod
    def _one_of(data: st.DataObject, steps: dict[Callable[[st.DataObject], None], object]) -> None:
        if possible := [step for step, can in steps.items() if can]:
            data.draw(st.sampled_from(possible), label="step")(data)

    # --- the table -------------------------------------------------------------------------------------------------

    def write(self, data: st.DataObject) -> None:
        for key in data.draw(st.lists(st.sampled_from(_KEYS), min_size=1, max_size=3)):
            self.table.append(_Record(len(self.table) + 1, key))

    def requeue(self, data: st.DataObject) -> None:
        """An operator gives a dead letter another try."""
        record = data.draw(st.sampled_from([r for r in self.table if r.state in ("dead", "paused")]))
        record.requeued_late = record.requeued_late or record.state == "dead"
        record.state, record.failures = "waiting", 0

    def handle_elsewhere(self, data: st.DataObject) -> None:
        """Another consumer has what was released, and handles the first change of each key."""
        failed = data.draw(st.booleans())
        for key in _KEYS:
            record = next((r for r in self.table if r.key == key and r.shard in self.away and not r.settled), None)
            if record and record.state != "paused":
                record.state = "waiting" if failed else "processed"
                record.failures += failed

    def _row(self, record: _Record) -> Row:
        waits = ("waiting", "paused")
        earlier = self.table[: record.seq - 1]
        return Row(record.change(), any(other.key == record.key and other.state in waits for other in earlier))

    def _fresh(self, wanted: Callable[[_Record], bool], limit: int) -> list[Row]:
        return [self._row(record) for record in self.table if record.state == "fresh" and wanted(record)][:limit]

    # --- reads -----------------------------------------------------------------------------------------------------

    def sweep(self, data: st.DataObject) -> None:
        """The next page of each shard or, as often as one likes, the first one."""
        self._sweep(data.draw(st.integers(1, 8)), late=data.draw(st.booleans()), anew=data.draw(st.booleans()))

    def _sweep(self, limit: int, *, late: bool, anew: bool) -> None:
        if self.anew:
            self.pass_from_the_beginning(None)
        begun = dict(self.cursors)
        pages = {
            shard: self._fresh(lambda r, shard=shard, at=at: r.shard == shard and r.seq > at, limit)  # type: ignore[misc]
            for shard, at in ((shard, 0 if anew else at) for shard, at in begun.items())
        }

        def answer() -> None:
            refused = self.scheduler.admit([row for rows in pages.values() for row in rows]).rejected.get("t", {})
            for shard, rows in pages.items():
                if self.cursors.get(shard) == begun[shard] and shard not in self.arrived:
                    reached = max(begun[shard], rows[-1].change.seq if rows else 0)
                    self.cursors[shard] = min(reached, refused.get(shard, reached + 1) - 1)

        self._begin_read(answer, late)

    def look_for_due(self, data: st.DataObject) -> None:
        self._look_for_due(data.draw(st.integers(1, 8)), late=data.draw(st.booleans()))

    def _look_for_due(self, limit: int, *, late: bool) -> None:
        rows = [self._row(record) for record in self.table if record.state == "waiting"][:limit]

        def answer() -> None:
            self.scheduler.admit(rows, due=True)

        self._begin_read(answer, late)

    def read_on(self, data: st.DataObject) -> None:
        self._read_on(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), late=data.draw(st.booleans()))

    def _read_on(self, limit: int, per_key: int, *, late: bool) -> None:
        found = [(resume, self._after(resume, per_key)) for resume in self.scheduler.key_reads(limit)]

        def answer() -> None:
            for resume, rows in found:
                self.scheduler.admit_key_read(resume, rows, complete=len(rows) < per_key)

        self._begin_read(answer, late)

    def _after(self, resume: KeyRead, limit: int) -> list[Row]:
        return self._fresh(lambda record: record.key == resume.key[1] and record.seq >= resume.seq, limit)

    def _begin_read(self, answer: Callable[[], None], late: bool) -> None:
        self.read.enter_context(self.scheduler.reading)
        self.answer, self.arrived = answer, set()
        if not late:
            self.end_read()

    def end_read(self, _: st.DataObject | None = None) -> None:
        assert self.answer
        self.answer()
        self.answer = None
        self.read.close()

    def pause_or_resume(self, data: st.DataObject) -> None:
        """Some of the keys, all, or nothing. A read may be under way; the next sweep begins anew."""
        keys = data.draw(st.sets(st.sampled_from((*_KEYS, None)), max_size=2))
        self._hold(*(Pause(n, entity_type="t", entity_id=key) for n, key in enumerate(sorted(keys, key=str))))

    def _hold(self, *pauses: Pause) -> None:
        self.scheduler.hold(Pauses(pauses))
        self.anew = True

    def pass_from_the_beginning(self, _: st.DataObject | None) -> None:
        self.anew = False
        self.scheduler.forget_deferred(self.cursors)
        self.cursors = dict.fromkeys(self.cursors, 0)

    # --- handlers --------------------------------------------------------------------------------------------------

    def start(self, data: st.DataObject) -> None:
        self._start(data.draw(st.integers(1, 4)))

    def _start(self, batch: int) -> None:
        started = list(self.scheduler.start().changes)
        if not started:
            return
        if len(started) == 1:
            self.scheduler.start_with(started, batch, lambda other: _after_settled(other) == _after_settled(started[0]))
            assert len(started) <= batch
        for one in started:
            assert not self.scheduler.held.pauses.hold(one.key), f"{one!r} is paused"
            assert one.key not in {other.key for other in (*self.running, *self.orphans)}, f"{one.key} runs twice"
            self._may_start(one, {other.seq for other in started})
        assert self._in_order(started)
        self.running += started

    def _may_start(self, one: Change, beside: set[int]) -> None:
        record = self.table[one.seq - 1]
        assert record.shard in self.cursors, f"{one!r} was released"
        # One whose commit nobody has heard of may start again: it finds its row processed.
        assert _after_settled(one) or record.state in ("fresh", "waiting"), f"{one!r} is {record.state}"
        assert one.seq not in self.unsettled, f"{one!r} has finished and starts again"
        assert record.requeued_late or one.attempt == record.failures + 1, f"{one!r} was read before it failed"
        for earlier in self.table[: one.seq - 1]:
            if earlier.key == record.key and not (earlier.settled or earlier.requeued_late or earlier.seq in beside):
                outcome = self.unsettled.get(earlier.seq)
                assert outcome is not None, f"{one!r} overtakes {earlier}"
                assert not outcome.blocks_key, f"{one!r} overtakes {earlier}"
                assert not _after_settled(one), f"{one!r} does not wait for {earlier} to be settled"

    @staticmethod
    def _in_order(changes: Iterable[Change]) -> bool:
        """Each key's changes follow each other by number."""
        last: dict[str, int] = {}
        for one in changes:
            if one.seq < last.get(one.entity_id, 0):
                return False
            last[one.entity_id] = one.seq
        return True

    def finish(self, data: st.DataObject) -> None:
        count = min(data.draw(st.integers(1, 3)), len(self.running))
        ended = [self._ends(data, self._leaves(data, self.running)) for _ in range(count)]
        self.scheduler.finished(ended)
        self.unsettled |= {one.seq: outcome for one, outcome in ended if not isinstance(outcome, Committed)}

    def _ends(self, data: st.DataObject, one: Change) -> Settlement:
        dead = Dead("no", one.entity_id in _PAUSING)
        outcomes: list[Outcome] = [Processed(), Processed(), Waiting(1.0, "no"), dead]
        outcome = data.draw(st.sampled_from(outcomes))
        if self.table[one.seq - 1].state == "processed":
            outcome = Committed(EPOCH)
        elif isinstance(outcome, Processed) and _after_settled(one):
            self.table[one.seq - 1].state = "processed"
            outcome = Committed(EPOCH)
        return Settlement(one, outcome)

    def commit(self, data: st.DataObject) -> None:
        """A handler's own transaction marks its change; that it did is learnt later, or not at all."""
        one = data.draw(st.sampled_from([one for one in self.running if _after_settled(one)]))
        if all(other.key != one.key or other.seq >= one.seq for other in self.running):
            self.table[one.seq - 1].state = "processed"

    def interrupt(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.running)).key
        for one in [one for one in self.running if one.key == key]:
            self.running.remove(one)
            self.scheduler.interrupted(one)

    def orphan_returns(self, data: st.DataObject) -> None:
        one = self._leaves(data, self.orphans)
        if data.draw(st.booleans()):
            self.scheduler.interrupted(one)
        else:
            self.scheduler.finished([Settlement(one, Processed())])

    @staticmethod
    def _leaves(data: st.DataObject, running: list[Change]) -> Change:
        """One that runs; of a key's batch the first, as a batch reports its outcomes in order."""
        key = data.draw(st.sampled_from(running)).key
        one = min((one for one in running if one.key == key), key=lambda one: one.seq)
        running.remove(one)
        return one

    # --- settle ----------------------------------------------------------------------------------------------------

    def settle(self, data: st.DataObject) -> None:
        self._settle(data.draw(st.integers(1, 5)), late=data.draw(st.booleans()))

    def _settle(self, limit: int, *, late: bool) -> None:
        self.writing, self.written = self.scheduler.take_finished(limit), False
        while self.writing and not late:
            self.write_or_report()

    def write_or_report(self, _: st.DataObject | None = None) -> None:
        if not self.written:
            self._write()
            return
        for one, _outcome in self.writing:
            del self.unsettled[one.seq]
        self.scheduler.settled(self.writing)
        self.writing = []

    def _write(self) -> None:
        self.written = True
        for one, outcome in self.writing:
            record = self.table[one.seq - 1]
            assert record.state == ("waiting" if one.requeued else "fresh")
            match outcome:
                case Processed():
                    for earlier in self.table[: one.seq - 1]:
                        ahead = earlier.key != record.key or earlier.settled or earlier.requeued_late
                        failed = earlier.seq in self.unsettled or earlier.state in ("waiting", "paused")
                        assert ahead or failed, f"{one!r} is marked before {earlier}"
                    record.state = "processed"
                case Dead(pauses=pauses):
                    record.state = "paused" if pauses else "dead"
                case Waiting():
                    record.state = "waiting"
                    record.failures += 1

    # --- shards and sessions ---------------------------------------------------------------------------------------

    def release(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(_SHARDS))
        self.cursors.pop(shard, None)
        self.scheduler.ownership.revoke([shard])

    def ask_what_is_released(self, _: st.DataObject | None = None) -> None:
        in_flight = {one.shard for one in self.running} | {self.table[seq - 1].shard for seq in self.unsettled}
        released = self.scheduler.ownership.idle()
        self.scheduler.ownership.released(released)
        assert not released & in_flight
        assert not released & self.cursors.keys()
        self.away |= released

    def come_back(self, _: st.DataObject | None = None) -> None:
        self._own(self.away)
        self.away = set()

    def _own(self, shards: Collection[int]) -> None:
        self.scheduler.ownership.acquire(Acquired(shards))
        self.arrived.update(shards)
        self.cursors.update(dict.fromkeys(shards, 0))

    def lose_the_session(self, data: st.DataObject) -> None:
        """What was being written may have been; whoever can be cut off is."""
        cut_off = data.draw(st.booleans())
        if self.writing and not self.written and cut_off:
            self._write()
        self.writing, self.answer = [], None
        self.read.close()
        self.unsettled.clear()
        self.scheduler.ownership.lose()
        self.orphans += self.running
        self.running = []
        for one in [one for one in self.orphans if cut_off]:
            self.orphans.remove(one)
            self.scheduler.interrupted(one)
        self.cursors, self.away = {}, set()
        self._own(_SHARDS)

    # --- always, and in the end ------------------------------------------------------------------------------------

    @invariant()
    def the_figures_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        assert scheduler.running == len(self.running)
        assert scheduler.settling == len(self.unsettled)
        assert scheduler.queued >= 0
        in_window = scheduler.running + scheduler.settling + scheduler.queued
        assert scheduler.window.free == scheduler.capacity - in_window >= 0
        assert bool(scheduler.ownership.in_flight) == bool(self.running or self.unsettled)
        assert len(scheduler.deferred) <= len(_KEYS)
        assert all(scheduler.knows(seq) for seq in (*self.unsettled, *(one.seq for one in self.running)))

    def teardown(self) -> None:
        """Nothing fails, and nobody pauses or passes from the beginning any more: still everything is settled."""
        self._hold()
        self.come_back()
        for orphan in self.orphans:
            self.scheduler.finished([Settlement(orphan, Processed())])
        self.orphans = []
        for _ in range(20 + 20 * len(self.table)):
            for record in self.table:
                if record.state == "paused":
                    record.state, record.failures = "waiting", 0
            if all(record.settled for record in self.table) and not self.scheduler.ownership.in_flight:
                return
            self._turn()
        raise AssertionError(f"never settled: {[record for record in self.table if not record.settled]}")

    def _turn(self) -> None:
        if self.answer:
            self.end_read()
        self._sweep(8, late=False, anew=False)
        self._look_for_due(99, late=False)
        self._read_on(3, 4, late=False)
        self._start(1)
        if self.running:
            one = self.running.pop(0)
            committed = self.table[one.seq - 1].state == "processed"
            if committed or _after_settled(one):
                self.table[one.seq - 1].state = "processed"
                self.scheduler.finished([Settlement(one, Committed(EPOCH))])
            else:
                self.scheduler.finished([Settlement(one, Processed())])
                self.unsettled[one.seq] = Processed()
        self.ask_what_is_released()
        if self.away:
            self.come_back()
        while self.writing:
            self.write_or_report()
        self._settle(99, late=False)


SchedulerAndTable.TestCase.settings = MACHINE
TestSchedulerAndTable = SchedulerAndTable.TestCase
