"""A server, a stream and a consumer's decisions, without a server, a stream or a clock.

The pure core (``Intake`` and ``Lanes``) is the real one. Around it a seeded schedule picks one small step after the
other: transactions draw numbers, are flushed (the bell rings), become visible later or never; reads take their snapshot
at one step and are answered at another; settles are committed at one and reported at another; wake-ups are lost; the
session is lost; shards leave and come back. A run is a function of its seed.

What must hold is asserted where it could break: in ``Simulation._start``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from cdc.intake import Fetch, Intake, Snapshot, Sweep
from cdc.lanes import Finished, Lanes, Resume, Row
from cdc.model import Change, Committed, Dead, Operation, Outcome, Processed, Waiting, WakeUp, holds_its_key

_SHARDS = 3
_MAX_ATTEMPTS = 3
_FENCED_KEYS = "ab"
"""Their handlers are transactional."""
_PAUSING_KEYS = "bc"
"""Their dead letters pause them."""
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Record:
    """A row of the table."""

    seq: int
    key: str
    shard: int
    xid: int
    state: str = "fresh"
    due_at: float = 0.0
    failures: int = 0


@dataclass
class Server:
    """Rows, transactions and snapshots, as far as order depends on them."""

    rows: dict[int, Record] = field(default_factory=dict)
    open: dict[int, list[str]] = field(default_factory=dict)
    """Transaction id -> keys it has locked. Flushed ones stay in here until they are visible."""
    flushed: set[int] = field(default_factory=set)
    aborted: set[int] = field(default_factory=set)
    next_xid: int = 10
    completed: int = 9
    next_seq: int = 1

    def snapshot(self) -> Snapshot:
        """As PostgreSQL takes it: xmin is the oldest that runs, or one above the last that has completed."""
        return Snapshot(min([*self.open, self.completed + 1]), self.next_xid)

    def end(self, xid: int) -> None:
        del self.open[xid]
        self.completed = max(self.completed, xid)

    def begin(self) -> int:
        xid = self.next_xid
        self.next_xid += 1
        self.open[xid] = []
        return xid

    def write(self, xid: int, key: str) -> None:
        """Under the source row's lock: nobody else may have an open change of the key."""
        if any(key in keys for other, keys in self.open.items() if other != xid):
            return
        self.open[xid].append(key)
        shard = sum(key.encode()) % _SHARDS
        self.rows[self.next_seq] = Record(self.next_seq, key, shard, xid)
        self.next_seq += 1

    def visible(self) -> list[Record]:
        hidden = self.open.keys() | self.aborted
        return [row for row in self.rows.values() if row.xid not in hidden]

    def fresh(self) -> list[Record]:
        return [row for row in self.visible() if row.state == "fresh"]

    def row(self, record: Record) -> Row:
        held = any(
            other.state in ("waiting", "paused") and other.key == record.key and other.seq < record.seq
            for other in self.visible()
        )
        return Row(_change(record), held)


def _change(record: Record) -> Change:
    return Change(
        id=UUID(int=record.seq), seq=record.seq, shard=record.shard, entity_type="t", entity_id=record.key,
        table_schema="public", table="t", operation=Operation.INSERT, old=None, new=None, metadata=None,
        changed_at=_EPOCH, attempt=record.failures + 1, requeued=record.state == "waiting",
    )  # fmt: skip


class Simulation:
    """``run()`` plays the schedule of ``seed``, then lets everything settle; raises where order or rows are lost."""

    def __init__(self, seed: int, *, steps: int = 400) -> None:
        self.dice = random.Random(seed)
        self.steps = steps
        self.server = Server()
        self.lanes = Lanes(
            self.dice.choice([4, 12, 40]), self.dice.choice([1, 2, 8]), self.dice.choice([1, 3, 100]),
            fenced=lambda change: change.entity_id in _FENCED_KEYS,
        )  # fmt: skip
        self.intake = Intake(sweep_interval_s=5.0, queue_capacity=self.dice.choice([2, 10, 1000]))
        self.now = 0.0
        self.bells: list[WakeUp] = []
        self.running: list[Change] = []
        self.batches = self.dice.random() < 0.5
        self.unsettled: dict[int, Outcome] = {}
        self.reading: Callable[[], None] | None = None
        self.settling: list[Finished] | None = None
        self.handled: dict[int, int] = defaultdict(int)
        self.lossy = self.dice.random() < 0.5
        self.streaming = False
        self.relayed = self.dice.random() < 0.3
        self.calm = False
        self._own(range(_SHARDS))
        self._switch_stream()

    def run(self) -> None:
        actions = [
            (6, self._write), (3, self._flush), (3, self._end), (5, self._ring), (8, self._read), (8, self._start),
            (6, self._finish), (6, self._settle), (2, self._tick), (0.3 if self.lossy else 0, self._lose_bells),
            (0.2 if self.lossy else 0, self._lose_session), (0.2, self._give_shard),
            (0.3 if self.relayed else 0, self._switch_stream), (1, self._commit), (0.3, self._interrupt),
        ]  # fmt: skip
        weights, calls = zip(*actions, strict=True)
        for _ in range(self.steps):
            self.dice.choices(calls, weights)[0]()
        self._let_settle()

    def _let_settle(self) -> None:
        """The writers stop, every transaction ends, nothing fails any more: all must be settled."""
        self.calm = True
        for xid in list(self.server.open):
            self.server.flushed.add(xid)
            self.server.end(xid)
        for round_ in range(4_000):
            if round_ % 100 == 0:
                self._decide_about_the_dead()
            for call in (self._ring, self._read, self._read, self._start, self._finish, self._settle, self._settle):
                call()
            self.now += 0.05
            left = [row for row in self.server.visible() if row.state not in ("processed", "dead")]
            if not left and self.lanes.idle and not self.settling:
                return
        raise AssertionError(f"never settled: {left[:5]}, room {self.lanes.room}, {self.intake.catching_up=}")

    def _decide_about_the_dead(self) -> None:
        """An operator requeues what pauses its key, and rings."""
        if self.reading:
            return
        for record in self.server.rows.values():
            if record.state == "paused":
                record.state, record.due_at, record.failures = "waiting", self.now, 0
        self.lanes.forget_unread(self.intake.restart())

    # --- writers ---------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        candidates = [xid for xid in self.server.open if xid not in self.server.flushed]
        xid = self.dice.choice(candidates) if candidates and self.dice.random() < 0.5 else self.server.begin()
        for _ in range(self.dice.choice([1, 1, 1, 5])):
            self.server.write(xid, self.dice.choice("abcdef"))

    def _flush(self) -> None:
        """The commit record is on disk: the bell rings, though nobody sees the rows yet."""
        if candidates := [xid for xid in self.server.open if xid not in self.server.flushed]:
            xid = self.dice.choice(candidates)
            if self.dice.random() < 0.1:
                self.server.aborted.add(xid)
                self.server.end(xid)
                return
            self.server.flushed.add(xid)
            self.bells += [WakeUp(row.seq, row.shard) for row in self.server.rows.values() if row.xid == xid]

    def _end(self) -> None:
        if candidates := [xid for xid in self.server.open if xid in self.server.flushed]:
            self.server.end(self.dice.choice(candidates))

    # --- the stream ------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        count = self.dice.randint(1, 6)
        rung = self.bells[:count]
        if not self.streaming:
            rung = [bell for bell in rung if self.dice.random() < 0.7]
        self.intake.rung(rung)
        del self.bells[:count]

    def _switch_stream(self) -> None:
        """Another consumer streams instead, and relays what it does not lose; or we do again."""
        self.streaming = not self.streaming
        self.bells.clear()
        self.intake.streaming(connected=self.streaming)

    def _lose_bells(self) -> None:
        """A reconnect: what was sent meanwhile is gone, and the consumer is told when the new stream begins."""
        if self.streaming:
            self.bells.clear()
            self.intake.streaming(connected=True)

    # --- the consumer ----------------------------------------------------------------------------------------------

    def _own(self, shards: range | list[int]) -> None:
        self.lanes.own(shards)
        self.intake.own(shards)

    def _lose_session(self) -> None:
        if self.reading or self.settling:
            return
        self.lanes.reset()
        self.intake.disown(range(_SHARDS))
        for change in self.running:
            self.lanes.interrupted(change)
        self.running.clear()
        self.unsettled.clear()
        self._own(range(_SHARDS))

    def _give_shard(self) -> None:
        """Away, and back when it is quiet: another consumer in between would find the same rows."""
        if self.reading:
            return
        shard = self.dice.randrange(_SHARDS)
        self.lanes.release([shard])
        self.intake.disown([shard])

    def _tick(self) -> None:
        self.now += self.dice.choice([0.001, 0.01, 0.1, 1.0])
        if back := sorted(self.lanes.released()):
            self._own(back)

    def _read(self) -> None:
        """Takes a snapshot at one step, and at a later one its answer comes in."""
        if self.calm and (back := sorted(self.lanes.released())):
            self._own(back)
        if self.reading:
            self.reading()
            self.reading = None
            self._context.__exit__(None, None, None)
            return
        if self.lanes.room <= 0:
            return
        self._context = self.lanes.reading()
        self._context.__enter__()
        self.reading = self._request()
        if self.reading is None:
            self._context.__exit__(None, None, None)

    def _request(self) -> Callable[[], None] | None:
        room = self.lanes.room
        if resumes := self.lanes.resumes(2):
            return self._answer_resumes(resumes, max(1, room // 2))
        if self.dice.random() < 0.2:
            return self._answer_due()
        if self.intake.full_pass_due(self.now):
            self.lanes.forget_unread(self.intake.restart())
        match self.intake.next(self.now, room, 1 if room < 8 else 4):
            case Fetch() as fetch:
                return self._answer_fetch(fetch)
            case Sweep() as sweep:
                return self._answer_sweep(sweep)
        return None

    def _answer_fetch(self, fetch: Fetch) -> Callable[[], None]:
        wanted = {wakeup.seq for wakeup in fetch.wakeups}
        rows = sorted((self.server.row(r) for r in self.server.fresh() if r.seq in wanted), key=_seq)
        snapshot = self.server.snapshot()

        def answer() -> None:
            admitted = self.lanes.admit(rows)
            self.intake.fetched(fetch, {row.change.seq for row in rows}, snapshot, self.now)
            self.intake.refused(admitted.refused, self.now)

        return answer

    def _answer_sweep(self, sweep: Sweep) -> Callable[[], None]:
        rows: list[Row] = []
        for shard, position in sweep.positions.items():
            found = [
                record
                for record in self.server.fresh()
                if record.shard == shard
                and record.seq > position.floor
                and (record.seq > position.cursor or record.xid >= position.since)
            ]
            rows += [self.server.row(record) for record in sorted(found, key=lambda r: r.seq)[: sweep.per_shard]]
        snapshot = self.server.snapshot()

        def answer() -> None:
            admitted = self.lanes.admit(rows)
            seen = [WakeUp(row.change.seq, row.change.shard) for row in rows]
            self.intake.swept(sweep, seen, admitted.refused, snapshot, self.now)

        return answer

    def _answer_resumes(self, resumes: list[Resume], per_key: int) -> Callable[[], None]:
        answers = []
        for resume in resumes:
            found = sorted((r for r in self.server.fresh() if ("t", r.key) == resume.key and r.seq >= resume.seq),
                           key=lambda r: r.seq)[:per_key]  # fmt: skip
            answers.append((resume, [self.server.row(record) for record in found]))

        def answer() -> None:
            for resume, rows in answers:
                self.lanes.resumed(resume, rows, complete=len(rows) < per_key)

        return answer

    def _answer_due(self) -> Callable[[], None]:
        due = [r for r in self.server.visible() if r.state == "waiting" and (r.due_at <= self.now or self.calm)]
        rows = [self.server.row(record) for record in sorted(due, key=lambda r: r.due_at)]
        return lambda: self.lanes.admit(rows, due=True) and None

    def _start(self) -> None:
        change = self.lanes.start()
        if change is None:
            return
        batch = [change]
        if self.batches:
            fenced = change.entity_id in _FENCED_KEYS
            self.lanes.start_with(batch, 3, lambda other: (other.entity_id in _FENCED_KEYS) == fenced)
        assert [c.seq for c in batch if c.key == change.key] == sorted(c.seq for c in batch if c.key == change.key)
        for started in batch:
            assert started.key not in {running.key for running in self.running}, f"{started.key} runs twice"
        for started in batch:
            self._begin(started, {other.seq for other in batch})

    def _begin(self, change: Change, batch: set[int]) -> None:
        record = self.server.rows[change.seq]
        assert record.state in ("fresh", "waiting"), f"{change!r} was settled and starts again"
        assert change.seq not in self.unsettled, f"{change!r} has finished and starts again"
        for earlier in self.server.rows.values():
            if earlier.seq in batch or earlier.xid in self.server.aborted:
                continue
            if earlier.key == record.key and earlier.seq < record.seq:
                outcome = self.unsettled.get(earlier.seq)
                marked = earlier.state in ("processed", "dead")
                assert marked or (outcome is not None and not holds_its_key(outcome)), f"{change!r} overtakes {earlier}"
                assert marked or record.key not in _FENCED_KEYS, f"{change!r} would be marked before {earlier}"
        self.running.append(change)
        self.handled[change.seq] += 1

    def _finish(self) -> None:
        if not self.running:
            return
        change = self._leaves()
        outcome: Outcome = Processed()
        if self.server.rows[change.seq].state == "processed":
            outcome = Committed(_EPOCH)
        elif not self.calm and self.dice.random() < 0.25:
            failed = change.attempt >= _MAX_ATTEMPTS
            outcome = Dead("no", pauses=change.entity_id in _PAUSING_KEYS) if failed else Waiting(0.1, "no")
        elif change.entity_id in _FENCED_KEYS:
            self.server.rows[change.seq].state = "processed"
            outcome = Committed(_EPOCH)
        self.lanes.finished(change, outcome)
        if not isinstance(outcome, Committed):
            self.unsettled[change.seq] = outcome

    def _leaves(self) -> Change:
        """One that runs; of a key's batch the first, as a batch reports its outcomes in order."""
        key = self.dice.choice(self.running).key
        change = min((change for change in self.running if change.key == key), key=lambda change: change.seq)
        self.running.remove(change)
        return change

    def _commit(self) -> None:
        """A transactional handler commits, and for a while nobody here knows."""
        if fenced := [change for change in self.running if change.entity_id in _FENCED_KEYS]:
            self.server.rows[self.dice.choice(fenced).seq].state = "processed"

    def _interrupt(self) -> None:
        """A handler is cut off, its commit's fate unknown: the table is asked."""
        if self.running and not self.reading:
            key = self.dice.choice(self.running).key
            for change in [change for change in self.running if change.key == key]:
                self.running.remove(change)
                self.lanes.interrupted(change)

    def _settle(self) -> None:
        """Committed at one step, reported at the next."""
        if self.settling:
            self.lanes.settled(self.settling)
            for finished in self.settling:
                self.unsettled.pop(finished.change.seq, None)
            self.settling = None
            return
        self.settling = self.lanes.take_finished(self.dice.choice([1, 3, 100]))
        for change, outcome in self.settling:
            record = self.server.rows[change.seq]
            assert record.state in ("fresh", "waiting")
            match outcome:
                case Processed():
                    record.state = "processed"
                case Dead(pauses=pauses):
                    record.state = "paused" if pauses else "dead"
                case Waiting(delay_s):
                    record.state, record.due_at, record.failures = "waiting", self.now + delay_s, record.failures + 1


def _seq(row: Row) -> int:
    return row.change.seq
