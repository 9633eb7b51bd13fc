"""The judge: from what was written, captured, called and settled, was anything lost, doubled or out of order?

Pure: it reads records that were made independently of each other and finds where they disagree.

    committed   what the writers know to be committed; ``unknown`` is what was on its way when the answer was lost
    captured    the rows of entity_changes at the end
    calls       what the handlers wrote down, across all consumers, by the wall clock of one machine
    effects     what transactional handlers did through the connection they were given
    sessions    from the server's own log: when which consumer held the session that owns shards

What is allowed, and nothing else: **a call may overlap another consumer's call of the same key, or repeat a settled
change, only if one of the two was started by a consumer without its session, or by one that lost it before the other
began.** A handler on its way in a process whose session has just ended cannot be recalled: not by the server, and in a
thread or in a stopped process not by the consumer either. How long a consumer goes on starting calls without a session
is bounded too (``NOTICE_S``, time in which it was stopped or cut off from the server not counted).

Effects allow no exception: one for each processed change of a transactional handler and no other, in order. Nor does
order: the first call of a change starts after every earlier change of its key was done, whoever called, or is one call
with it, a batch, which names them in order. That holds even for a consumer that has lost its session, because it too
goes through a key in order.

A call for the latest is one call for all the changes of its key that it stood for, as a batch is, and is given the row
before the first of them and that after the last. A TRUNCATE starts when all of its type before it is settled, and
nothing after it starts before it is settled itself. A READ says what the change of its row before it has left, once in
a backfill. A replay names each change once, in their order.

A replay locks no row, so it has no order with what is written in the same moment, from when its round begins until that
has been committed; nor has what was written in that moment with other replays. With all else of its key it is in order,
by effects as by calls: it comes behind what is there when its round begins, and what is written after its round comes
behind it.

A change is dead because its last attempt failed, or because it counts that its process died in it. An attempt may
count without a call that shows it only if a process was killed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple

from tests.handlers_ledger import GROUPED, LATEST, MAX_ATTEMPTS, TRANSACTIONAL

NOTICE_S = 5.0
"""A consumer asks its session once a second; the rest is for a machine that is busy with three of them."""
_LOGGED_LATE_S = 0.25
"""A backend lets its locks go before it logs its end."""

Key = tuple[str, str]


class Write(NamedTuple):
    """What one statement did to one row. ``token``: what it wrote there, or, of a DELETE, what it deleted.

    Of a TRUNCATE it is the number of the change. A token with an ``@`` is of an event that was due at that time.
    """

    what: str
    token: str


class Captured(NamedTuple):
    """A row of entity_changes. ``before`` and ``after``: the tokens in old_data and new_data.

    ``into``: the change whose call stood for this one. ``replays``: the change that this one replays; ``backfill``: of
    a READ. A mark of a subscription has no time: there ``settled_at`` is when it was seen, which is later, and
    ``done_at`` that of the call, which is earlier.
    """

    seq: int
    key: Key
    operation: str
    before: str | None
    after: str | None
    state: str
    settled_at: float | None
    into: int | None = None
    replays: int | None = None
    backfill: int | None = None
    done_at: float | None = None

    @property
    def is_written(self) -> bool:
        """By an application, not by an operator."""
        return self.operation != "READ" and self.replays is None

    @property
    def write(self) -> Write:
        if self.operation == "TRUNCATE":
            return Write("TRUNCATE", str(self.seq))
        if self.operation == "DELETE":
            return Write("DELETE", str(self.before))
        return Write("WRITE", str(self.after))


class Call(NamedTuple):
    """Of one change; a batch is several with one number ``batch``.

    ``end`` is when the process ended if the call did not. ``how``: returned; failed; cut off; killed, with its process;
    given back, because another one of its batch failed; snoozed, which is no attempt.

    ``stood_for`` so many changes of the key, the last of them ``seq``, with the tokens in ``old`` and ``new``.
    """

    consumer: str
    key: Key
    seq: int
    attempt: int
    start: float
    end: float
    how: str
    batch: int | None = None
    stood_for: int = 1
    old: str | None = None
    new: str | None = None

    @property
    def final(self) -> bool:
        return self.how == "returned" or (self.how == "failed" and self.attempt >= MAX_ATTEMPTS)

    @property
    def spent(self) -> bool:
        """Whether it may count as an attempt: cut off by its time limit, a call shows no more than that."""
        return self.how in ("failed", "killed", "cut off")

    def together_with(self, other: Call) -> bool:
        return self.batch is not None and self.batch == other.batch


class Effect(NamedTuple):
    """``number`` rises in the order in which the handlers wrote; ``transaction`` is the same for what shared one."""

    number: int
    seq: int
    key: Key
    transaction: str


class Span(NamedTuple):
    start: float
    end: float


class ReplayRound(NamedTuple):
    """A transaction that wrote replays: those with numbers above ``before``, up to ``after``.

    These were the newest numbers before it began, and when it had been committed; None: whether it was, is not known.
    ``there``: the changes that were visible and not settled when it began.
    """

    before: int
    after: int | None
    there: frozenset[int]


@dataclass
class Evidence:
    """All that is known at the end. ``sessions`` of None: whoever was alive held its session."""

    captured: list[Captured]
    calls: list[Call]
    committed: set[Write] = field(default_factory=set)
    unknown: set[Write] = field(default_factory=set)
    effects: list[Effect] = field(default_factory=list)
    sessions: dict[str, list[Span]] | None = None
    paused: dict[str, list[Span]] = field(default_factory=dict)
    """When a consumer was stopped, or could not hear the server."""
    kills: int = 0
    """Consumers that ended without a word."""
    replays_from: list[int] = field(default_factory=list)
    """The newest number at the beginning of each replay; no change is replayed by two of them."""
    replay_rounds: list[ReplayRound] = field(default_factory=list)
    """In their order."""


@dataclass
class Verdict:
    violations: list[str]
    figures: dict[str, float]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value:g}" for name, value in self.figures.items())
        faults = [f"  {fault}" for fault in self.violations[:20]]
        return "\n".join([f"{len(self.violations)} violations; {told}", *faults])


def judge(evidence: Evidence) -> Verdict:
    by_key: dict[Key, list[Call]] = defaultdict(list)
    for call in sorted(evidence.calls, key=lambda call: call.start):
        by_key[call.key].append(call)
    rows: dict[Key, list[Captured]] = defaultdict(list)
    for row in sorted(evidence.captured):
        rows[row.key].append(row)
    sessions = _Sessions(evidence)
    violations = [*_capture_faults(evidence), *_effect_faults(evidence), *_replay_faults(evidence)]
    violations += [*_stray_calls(evidence), *_truncate_faults(evidence), *sessions.late_starts()]
    truncates = _truncates(evidence)
    written = {effect.seq for effect in evidence.effects}
    for key, changes in rows.items():
        violations += _chain_faults(key, changes, truncates[key[0]])
        violations += _read_faults(key, changes)
        violations += _latest_faults(key, changes, by_key[key])
        calls = list(_as_batches(changes, by_key[key]))
        violations += _due_faults(changes, calls)
        violations += _end_faults(changes, calls, written, evidence.kills)
        for replays in (False, True):
            violations += _order_faults(key, [row for row in changes if (row.replays is not None) is replays], calls)
        violations += _replay_order_faults(key, changes, calls, evidence)
        violations += _batch_faults(key, calls)
        violations += _overlap_faults(key, calls, sessions)
        violations += _repeat_faults(key, changes, calls, sessions)
    return Verdict(violations, _figures(evidence, sessions))


def _as_batches(changes: Sequence[Captured], calls: Sequence[Call]) -> Iterator[Call]:
    """A call that stood for several changes is a batch of them."""
    places = {row.seq: place for place, row in enumerate(changes)}
    for number, call in enumerate(calls, 1):
        if call.stood_for == 1 or (place := places.get(call.seq)) is None:
            yield call
        else:
            for row in changes[max(0, place + 1 - call.stood_for) : place + 1]:
                yield call._replace(seq=row.seq, batch=-number, stood_for=1)


def _truncates(evidence: Evidence) -> dict[str, list[int]]:
    """Their numbers, by type."""
    found: dict[str, list[int]] = defaultdict(list)
    for row in sorted(evidence.captured):
        if row.operation == "TRUNCATE":
            found[row.key[0]].append(row.seq)
    return found


# --- rules ---------------------------------------------------------------------------------------------------------


def _capture_faults(evidence: Evidence) -> list[str]:
    """Each committed write is captured once, and nothing else is."""
    seen: set[Write] = set()
    faults = []
    for row in evidence.captured:
        if not row.is_written:
            continue
        if row.write in seen:
            faults.append(f"captured twice: {row.write}")
        seen.add(row.write)
    if not evidence.committed:  # published by the test itself
        return []
    faults += [f"lost in capture: {write}" for write in sorted(evidence.committed - seen)]
    faults += [f"captured and not committed: {write}" for write in sorted(seen - evidence.committed - evidence.unknown)]
    return faults


def _end_faults(
    changes: Sequence[Captured], calls: Sequence[Call], written: Container[int], kills: int
) -> Iterator[str]:
    """Each change is processed, and a call of it returned; or dead, and all its attempts are accounted for.

    What was coalesced has the end of the change it was coalesced into, a later one of its key. The attempts of all are
    those of the first. A call in a transaction may have returned, and its transaction may have failed: of what is not
    ``written`` it counts as an attempt.
    """
    returned = {call.seq for call in calls if call.how == "returned"}
    spent: dict[int, set[int]] = defaultdict(set)
    for call in calls:
        undone = call.how == "returned" and call.key[0] in TRANSACTIONAL and call.seq not in written
        if call.spent or undone:
            spent[call.seq].add(call.attempt)
    ends = {row.seq: row for row in changes if row.into is None}
    shown: dict[int, int] = defaultdict(int)
    for row in changes:
        last = row.into or row.seq
        shown[last] = max(shown[last], len(spent[row.seq]))
    for row in changes:
        end = ends.get(row.into or row.seq)
        if end is None or end.seq < row.seq or (row.into and row.state != "processed"):
            yield f"lost: {row.seq} of {row.key} is {row.state}, coalesced into {row.into}, which cannot stand for it"
            continue
        lives = end.state == "processed" and row.seq in returned
        if not lives and not (end.state == "dead" and shown[end.seq] + min(kills, 1) >= MAX_ATTEMPTS):
            seen = next((call for call in reversed(calls) if call.seq == row.seq), None)
            yield f"lost: {row.seq} of {row.key} is {row.state} after {shown[end.seq]} attempts, the last: {seen}"


def _latest_faults(key: Key, changes: Sequence[Captured], calls: Sequence[Call]) -> Iterator[str]:
    """A call that stood for several changes had the row before the first of them, and that after the last."""
    places = {row.seq: place for place, row in enumerate(changes)}
    for call in calls:
        if key[0] not in LATEST or (place := places.get(call.seq)) is None:
            continue
        first = place + 1 - call.stood_for
        if first < 0 or (call.old, call.new) != (changes[first].before, changes[place].after):
            yield f"not what it stood for: {call}, the last of {changes[max(0, first) : place + 1][:5]}"


def _due_faults(changes: Sequence[Captured], calls: Sequence[Call]) -> Iterator[str]:
    due = {row.seq: float(row.after.partition("@")[2]) for row in changes if row.after and "@" in row.after}
    for call in calls:
        if call.start < due.get(call.seq, 0.0):
            yield f"called before it was due, at {due[call.seq]}: {call}"


def _read_faults(key: Key, changes: Sequence[Captured]) -> list[str]:
    """A backfill reads a row once."""
    reads = Counter(row.backfill for row in changes if row.operation == "READ" and row.replays is None)
    return [f"read {count} times by backfill {number}: {key}" for number, count in reads.items() if count > 1]


def _replay_faults(evidence: Evidence) -> Iterator[str]:
    """Each replayed change is named once and repeated as it was; those of a replay come in their order."""
    captured = {row.seq: row for row in evidence.captured}
    named = set[int]()
    last: dict[tuple[Key, int], int] = {}
    for row in sorted(evidence.captured):
        if row.replays is None:
            continue
        old = captured.get(row.replays)
        if old is None or old[1:5] != row[1:5] or old.replays is not None:
            yield f"replays something else: {row} names {old}"
        if row.replays in named:
            yield f"replayed twice: {row.replays} by {row.seq} of {row.key}"
        named.add(row.replays)
        replay = row.key, bisect_right(evidence.replays_from, row.seq)
        if row.replays < last.get(replay, 0):
            yield f"replayed out of order: {row.replays} of {row.key} after {last[replay]}"
        last[replay] = row.replays


def _truncate_faults(evidence: Evidence) -> Iterator[str]:
    """All of its type that comes before it is settled when it starts, and it when anything after it starts.

    Effects say the same by another clock, that of the database.
    """
    first: dict[int, float] = {}
    for call in evidence.calls:
        first[call.seq] = min(call.start, first.get(call.seq, inf))
    numbers = {effect.seq: effect.number for effect in evidence.effects}
    for type_, seqs in _truncates(evidence).items():
        rows = [row for row in evidence.captured if row.key[0] == type_]
        for truncate in (row for row in rows if row.seq in seqs):
            starts, ends = first.get(truncate.seq, inf), truncate.done_at or truncate.settled_at or inf
            number = numbers.get(truncate.seq)
            for row in rows:
                before = row.seq < truncate.seq
                if before and (row.done_at or row.settled_at or inf) > starts:
                    yield f"truncated too early: {truncate.seq} of {type_}, before {row.seq} was settled"
                if row.seq > truncate.seq and first.get(row.seq, inf) < ends:
                    yield f"truncated too late: {truncate.seq} of {type_}, after {row.seq} was called"
                if row is not truncate and number and row.seq in numbers and before != (numbers[row.seq] < number):
                    yield f"truncated out of order: the effects of {truncate.seq} of {type_} and of {row.seq}"


def _stray_calls(evidence: Evidence) -> list[str]:
    known = {row.seq for row in evidence.captured}
    return [f"called for a change that is not there: {call}" for call in evidence.calls if call.seq not in known]


def _effect_faults(evidence: Evidence) -> list[str]:
    """Exactly once, in order, and nothing of an attempt that failed."""
    counts = Counter(effect.seq for effect in evidence.effects)
    faults = []
    for row in evidence.captured:
        should = int(row.key[0] in TRANSACTIONAL and row.state == "processed" and row.into is None)
        if counts[row.seq] != should:
            faults.append(f"{counts[row.seq]} effects instead of {should}: {row.seq} of {row.key}")
    replays = {row.seq for row in evidence.captured if row.replays is not None}
    last: dict[tuple[Key, bool], int] = {}
    for effect in sorted(evidence.effects):
        ordered = effect.key, effect.seq in replays
        if effect.seq < last.get(ordered, 0):
            faults.append(f"effects out of order: {effect.seq} of {effect.key} after {last[ordered]}")
        last[ordered] = effect.seq
    return faults


def _chain_faults(key: Key, changes: Sequence[Captured], truncates: Sequence[int]) -> Iterator[str]:
    """In seq order each change of a row starts from what the one before it left: seq is the order of the commits.

    A READ says just that. A TRUNCATE leaves nothing, and a replay neither starts from anything nor leaves it.
    """
    for earlier, later in pairwise(row for row in changes if row.replays is None):
        emptied = bisect_right(truncates, earlier.seq) < bisect_right(truncates, later.seq - 1)
        left = None if emptied else earlier.after
        if (later.after if later.operation == "READ" else later.before) != left:
            yield f"captured out of order: {later.seq} of {key} follows {earlier.seq}"


def _order_faults(key: Key, changes: Sequence[Captured], calls: Sequence[Call]) -> Iterator[str]:
    first: dict[int, Call] = {}
    batches: dict[int, set[int | None]] = defaultdict(set)
    for made in calls:
        first.setdefault(made.seq, made)
        batches[made.seq].add(made.batch)
    done = _done(changes, calls)
    # At each place: when all before it were done, and which of them was the last.
    done_before = list(accumulate(((done.get(row.seq, inf), row.seq) for row in changes), max, initial=(0.0, 0)))
    late: set[int] = set()
    for place, change in enumerate(changes):
        if (call := first.get(change.seq)) is None:
            continue
        alone_from = place
        while call.batch is not None and alone_from and call.batch in batches[changes[alone_from - 1].seq]:
            alone_from -= 1
        done_at, latest = done_before[alone_from]
        if call.start < done_at and latest not in late:
            late.add(latest)  # it is as late for all that follow
            yield f"out of order: {change.seq} of {key} was called before {latest} was done"


def _replay_order_faults(
    key: Key, changes: Sequence[Captured], calls: Sequence[Call], evidence: Evidence
) -> Iterator[str]:
    """Each replay comes behind what was there, and what was written later behind it, but for what is of its moment."""
    first: dict[int, float] = {}
    batches: dict[int, set[int | None]] = defaultdict(set)
    for call in calls:
        first.setdefault(call.seq, call.start)
        batches[call.seq].add(call.batch)
    done = _done(changes, calls)
    numbers = {effect.seq: effect.number for effect in evidence.effects if effect.key == key}
    for earlier, later in _ordered_pairs(changes, evidence.replay_rounds):
        called = first.get(later, inf) < done.get(earlier, inf)
        if called and not (batches[earlier] & batches[later]) - {None}:
            yield f"out of order: {later} of {key} was called before {earlier} was done, and one of them is a replay"
        if numbers.get(earlier, 0) > numbers.get(later, inf):
            yield f"effects out of order: {later} of {key} before {earlier}, and one of them is a replay"


def _ordered_pairs(changes: Sequence[Captured], rounds: Sequence[ReplayRound]) -> Iterator[tuple[int, int]]:
    """The numbers of two changes of a key, one of them a replay, of which the second has to come behind the first."""
    begun = [each.before for each in rounds]
    of_round: dict[int, list[int]] = defaultdict(list)
    beside: dict[int, list[int]] = defaultdict(list)
    for row in changes:
        place = bisect_left(begun, row.seq) - 1
        if place >= 0 and (rounds[place].after is None or row.seq <= rounds[place].after):
            (beside if row.replays is None else of_round)[place].append(row.seq)
    of_a_moment = {seq for place in of_round for seq in beside[place]}
    for place, replays in of_round.items():
        _, after, there = rounds[place]
        for replay in replays:
            yield from ((row.seq, replay) for row in changes if row.seq in there and row.seq not in of_a_moment)
            if after is not None and not beside[place]:
                yield from ((replay, row.seq) for row in changes if row.seq > after)


def _done(changes: Sequence[Captured], calls: Sequence[Call]) -> dict[int, float]:
    """When each change was first done. Where no call says what a dead one died of, it was not before its last call."""
    done: dict[int, float] = {}
    spent = {call.seq: call.end for call in calls if call.spent}
    for call in calls:
        if call.final:
            done[call.seq] = min(call.end, done.get(call.seq, inf))
    ends = {row.seq: row.state for row in changes}
    coalesced = [row for row in changes if row.into and ends.get(row.into) == "dead"]
    dead = {row.seq: spent[row.seq] for row in changes if row.state == "dead" and row.seq in spent}
    # Its process may have died before the call for all of them had begun.
    return dict.fromkeys((row.seq for row in coalesced), 0.0) | dead | done


def _batch_faults(key: Key, calls: Sequence[Call]) -> list[str]:
    return [
        f"out of order within a batch: {later} of {key} after {earlier.seq}"
        for earlier, later in pairwise(calls)
        if later.together_with(earlier) and later.seq <= earlier.seq
    ]


def _overlap_faults(key: Key, calls: Sequence[Call], sessions: _Sessions) -> list[str]:
    running: list[Call] = []
    faults = []
    for call in calls:
        running = [other for other in running if other.end > call.start]
        for other in running:
            if call.together_with(other):
                continue
            if other.consumer == call.consumer:
                faults.append(f"twice at a time in one consumer: {other} and {call}")
            elif sessions.holds(call.consumer, call.start) and sessions.keeps(other.consumer, other.start, call.start):
                faults.append(f"twice at a time: {key}: {other} and {call}")
        running.append(call)
    return faults


def _repeat_faults(key: Key, changes: Sequence[Captured], calls: Sequence[Call], sessions: _Sessions) -> list[str]:
    settled = {row.seq: row.settled_at for row in changes if row.settled_at is not None}
    return [
        f"called after it was settled: {call} of {key}"
        for call in calls
        if call.start > settled.get(call.seq, inf) and sessions.holds(call.consumer, call.start)
    ]


class _Sessions:
    def __init__(self, evidence: Evidence) -> None:
        self._spans = evidence.sessions
        self._paused = evidence.paused
        self._calls = evidence.calls
        self.latest_start_s = 0.0

    def holds(self, consumer: str, at: float) -> bool:
        return self.keeps(consumer, at, at)

    def keeps(self, consumer: str, start: float, end: float) -> bool:
        """Whether one session of the consumer lasted from start to end."""
        if self._spans is None:
            return True
        span = self._last_begun(consumer, start)
        return span is not None and span.end - _LOGGED_LATE_S > end

    def late_starts(self) -> list[str]:
        """Calls started so long after the session had ended that the consumer must have known."""
        faults = []
        for call in self._calls if self._spans is not None else []:
            span = self._last_begun(call.consumer, call.start)
            if span is None:
                faults.append(f"called before there was a session: {call}")
                continue
            late_s = call.start - span.end - self._paused_s(call.consumer, span.end, call.start)
            self.latest_start_s = max(self.latest_start_s, late_s)
            if late_s > NOTICE_S:
                faults.append(f"called {late_s:.1f} s after the session had ended: {call}")
        return faults

    def _last_begun(self, consumer: str, at: float) -> Span | None:
        spans = (self._spans or {}).get(consumer, [])
        place = bisect_right(spans, at, key=lambda span: span.start)
        return spans[place - 1] if place else None

    def _paused_s(self, consumer: str, start: float, end: float) -> float:
        return sum(max(0.0, min(end, span.end) - max(start, span.start)) for span in self._paused.get(consumer, []))


def _figures(evidence: Evidence, sessions: _Sessions) -> dict[str, float]:
    hows = [call.how for call in evidence.calls]
    attempts = [call for call in evidence.calls if call.how != "snoozed"]
    return {
        "committed": len(evidence.committed),
        "unknown": len(evidence.unknown),
        "captured": len(evidence.captured),
        "dead": sum(row.state == "dead" for row in evidence.captured),
        "effects": len(evidence.effects),
        "that shared a transaction": _shared(evidence.effects),
        "calls": len(evidence.calls),
        "coalesced": sum(row.into is not None for row in evidence.captured),
        "truncates": sum(map(len, _truncates(evidence).values())),
        "read": sum(row.operation == "READ" for row in evidence.captured),
        "replayed": sum(row.replays is not None for row in evidence.captured),
        "in batches": sum(size for size in _batch_sizes(evidence.calls) if size > 1),
        "failed": hows.count("failed"),
        "snoozed": hows.count("snoozed"),
        "cut off": hows.count("cut off"),
        "killed": hows.count("killed"),
        "returned again": _returned_again(evidence.calls),
        "repeated": len(attempts) - len({(call.seq, call.attempt) for call in attempts}),
        "latest start without a session, s": round(sessions.latest_start_s, 2),
    }


def _returned_again(calls: Iterable[Call]) -> int:
    """Calls that repeat one which had returned. What shared a transaction repeats because another one failed in it."""
    counts = Counter(call.seq for call in calls if call.how == "returned" and call.key[0] not in TRANSACTIONAL)
    return sum(count - 1 for count in counts.values())


def _batch_sizes(calls: Iterable[Call]) -> Iterable[int]:
    return Counter(call.batch for call in calls if call.batch is not None).values()


def _shared(effects: Sequence[Effect]) -> int:
    """Of handlers that take one change at a time."""
    alone = [effect for effect in effects if effect.key[0] in GROUPED]
    return sum(size for size in Counter(effect.transaction for effect in alone).values() if size > 1)
