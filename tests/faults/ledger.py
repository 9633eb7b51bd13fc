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
order: the first call of a change starts after every earlier change of its key was done, whoever called. That holds even
for a consumer that has lost its session, because it too goes through a key in order.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from tests.handlers_ledger import MAX_ATTEMPTS, TRANSACTIONAL, dies

NOTICE_S = 5.0
"""A consumer asks its session once a second; the rest is for a machine that is busy with three of them."""
_LOGGED_LATE_S = 0.25
"""A backend lets its locks go before it logs its end."""

Key = tuple[str, str]


class Write(NamedTuple):
    """What one statement did to one row. ``token``: what it wrote there, or, of a DELETE, what it deleted."""

    what: str
    token: str


class Captured(NamedTuple):
    """A row of entity_changes. ``before`` and ``after``: the tokens in old_data and new_data."""

    seq: int
    key: Key
    operation: str
    before: str | None
    after: str | None
    state: str
    settled_at: float | None

    @property
    def write(self) -> Write:
        if self.operation == "DELETE":
            return Write("DELETE", str(self.before))
        return Write("WRITE", str(self.after))


class Call(NamedTuple):
    """``end`` is when the process ended if the call did not; ``how``: returned, failed, cut off, killed."""

    consumer: str
    key: Key
    seq: int
    attempt: int
    start: float
    end: float
    how: str

    @property
    def final(self) -> bool:
        return self.how == "returned" or (self.how == "failed" and self.attempt >= MAX_ATTEMPTS)


class Effect(NamedTuple):
    """``number`` rises in the order in which the handlers wrote."""

    number: int
    seq: int
    key: Key


class Span(NamedTuple):
    start: float
    end: float


@dataclass
class Evidence:
    """All that is known at the end. ``sessions`` of None: whoever was alive held its session."""

    captured: list[Captured]
    calls: list[Call]
    committed: set[Write] = field(default_factory=set)
    unknown: set[Write] = field(default_factory=set)
    effects: list[Effect] = field(default_factory=list)
    sessions: dict[str, list[Span]] | None = None
    deaf: dict[str, list[Span]] = field(default_factory=dict)
    """When a consumer was stopped, or could not hear the server."""


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
    violations = [*_capture_faults(evidence), *_end_faults(evidence), *_effect_faults(evidence)]
    violations += [*_stray_calls(evidence), *sessions.late_starts()]
    for key, changes in rows.items():
        violations += _chain_faults(key, changes)
        violations += _order_faults(key, changes, by_key[key])
        violations += _overlap_faults(key, by_key[key], sessions)
        violations += _repeat_faults(key, changes, by_key[key], sessions)
    return Verdict(violations, _figures(evidence, sessions))


# --- rules ---------------------------------------------------------------------------------------------------------


def _capture_faults(evidence: Evidence) -> list[str]:
    """Each committed write is captured once, and nothing else is."""
    seen: set[Write] = set()
    faults = []
    for row in evidence.captured:
        if row.write in seen:
            faults.append(f"captured twice: {row.write}")
        seen.add(row.write)
    if not evidence.committed:  # published by the test itself
        return []
    faults += [f"lost in capture: {write}" for write in sorted(evidence.committed - seen)]
    faults += [f"captured and not committed: {write}" for write in sorted(seen - evidence.committed - evidence.unknown)]
    return faults


def _end_faults(evidence: Evidence) -> list[str]:
    """Each change is processed, or dead where it was meant to be, and a call of it ended that way."""
    ended = {call.seq: call.how for call in evidence.calls if call.final}
    faults = []
    for row in evidence.captured:
        should = ("dead", "failed") if dies(row.seq) else ("processed", "returned")
        if (row.state, ended.get(row.seq)) != should:
            faults.append(f"lost: {row.seq} of {row.key} is {row.state}, its last call {ended.get(row.seq)}")
    return faults


def _stray_calls(evidence: Evidence) -> list[str]:
    known = {row.seq for row in evidence.captured}
    return [f"called for a change that is not there: {call}" for call in evidence.calls if call.seq not in known]


def _effect_faults(evidence: Evidence) -> list[str]:
    """Exactly once, in order, and nothing of an attempt that failed."""
    counts = Counter(effect.seq for effect in evidence.effects)
    faults = []
    for row in evidence.captured:
        should = int(row.key[0] in TRANSACTIONAL and row.state == "processed")
        if counts[row.seq] != should:
            faults.append(f"{counts[row.seq]} effects instead of {should}: {row.seq} of {row.key}")
    last: dict[Key, int] = {}
    for effect in sorted(evidence.effects):
        if effect.seq < last.get(effect.key, 0):
            faults.append(f"effects out of order: {effect.seq} of {effect.key} after {last[effect.key]}")
        last[effect.key] = effect.seq
    return faults


def _chain_faults(key: Key, changes: Sequence[Captured]) -> list[str]:
    """In seq order each change of a row starts from what the one before it left: seq is the order of the commits."""
    return [
        f"captured out of order: {later.seq} of {key} follows {earlier.seq}"
        for earlier, later in pairwise(changes)
        if later.before != earlier.after
    ]


def _order_faults(key: Key, changes: Sequence[Captured], calls: Sequence[Call]) -> list[str]:
    first: dict[int, float] = {}
    done: dict[int, float] = {}
    for call in calls:
        first.setdefault(call.seq, call.start)
        if call.final:
            done[call.seq] = min(call.end, done.get(call.seq, inf))
    faults = []
    for earlier, later in pairwise(changes):
        if first.get(later.seq, inf) < done.get(earlier.seq, inf):
            faults.append(f"out of order: {later.seq} of {key} was called before {earlier.seq} was done")
    return faults


def _overlap_faults(key: Key, calls: Sequence[Call], sessions: _Sessions) -> list[str]:
    running: list[Call] = []
    faults = []
    for call in calls:
        running = [other for other in running if other.end > call.start]
        for other in running:
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
        self._deaf = evidence.deaf
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
            late_s = call.start - span.end - self._deaf_s(call.consumer, span.end, call.start)
            self.latest_start_s = max(self.latest_start_s, late_s)
            if late_s > NOTICE_S:
                faults.append(f"called {late_s:.1f} s after the session had ended: {call}")
        return faults

    def _last_begun(self, consumer: str, at: float) -> Span | None:
        spans = (self._spans or {}).get(consumer, [])
        place = bisect_right(spans, at, key=lambda span: span.start)
        return spans[place - 1] if place else None

    def _deaf_s(self, consumer: str, start: float, end: float) -> float:
        return sum(max(0.0, min(end, span.end) - max(start, span.start)) for span in self._deaf.get(consumer, []))


def _figures(evidence: Evidence, sessions: _Sessions) -> dict[str, float]:
    hows = [call.how for call in evidence.calls]
    return {
        "committed": len(evidence.committed),
        "unknown": len(evidence.unknown),
        "captured": len(evidence.captured),
        "dead": sum(row.state == "dead" for row in evidence.captured),
        "effects": len(evidence.effects),
        "calls": len(evidence.calls),
        "failed": hows.count("failed"),
        "cut off": hows.count("cut off"),
        "killed": hows.count("killed"),
        "repeated": len(hows) - len({(call.seq, call.attempt) for call in evidence.calls}),
        "latest start without a session, s": round(sessions.latest_start_s, 2),
    }


# --- reading the records -------------------------------------------------------------------------------------------


def read_calls(folder: Path, ended_at: dict[str, float]) -> list[Call]:
    """The ledgers in ``folder``. ``ended_at``: when each consumer's process had ended."""
    calls = []
    for path in sorted(folder.glob("*.jsonl")):
        open_: dict[int, dict[str, Any]] = {}
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if "start" in entry:
                open_[entry["call"]] = entry
            else:
                calls.append(_call(path.stem, open_.pop(entry["call"]), entry["end"], entry["how"]))
        for started in open_.values():
            end = max(started["start"], ended_at.get(path.stem, inf))
            calls.append(_call(path.stem, started, end, "killed"))
    return calls


def _call(consumer: str, entry: dict[str, Any], end: float, how: str) -> Call:
    return Call(consumer, (entry["type"], entry["key"]), entry["seq"], entry["attempt"], entry["start"], end, how)


def read_captured(connection: psycopg.Connection, types: Iterable[str]) -> list[Captured]:
    rows = connection.execute(
        "SELECT seq, coalesce(entity_type, table_name), entity_id, operation, old_data ->> 'token',"
        " new_data ->> 'token', CASE WHEN processed THEN 'processed' WHEN dead_at IS NOT NULL THEN 'dead'"
        " WHEN next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END,"
        " extract(epoch FROM coalesce(processed_at, dead_at))::float8"
        " FROM entity_changes WHERE coalesce(entity_type, table_name) = ANY (%s)",
        [list(types)],
    ).fetchall()
    return [Captured(seq, (type_, key), *rest) for seq, type_, key, *rest in rows]


def read_effects(connection: psycopg.Connection) -> list[Effect]:
    rows = connection.execute("SELECT number, seq, type, key FROM effects").fetchall()
    return [Effect(number, seq, (type_, key)) for number, seq, type_, key in rows]


_BEGAN = re.compile(r"^(\d+\.\d+) (\d+) LOG: .*connection authorized: user=(\S+) .*application_name=cdc: shards")
_ENDED = re.compile(r"^(\d+\.\d+) (\d+) LOG: .*disconnection: session time")


def read_sessions(log: str, crashed_at: Sequence[float]) -> dict[str, list[Span]]:
    """Of each role the sessions that own shards, from the server's log with ``log_line_prefix='%n %p '``.

    ``crashed_at``: when the server was ended without a chance to log anything.
    """
    spans: dict[str, list[Span]] = defaultdict(list)
    open_: dict[str, tuple[str, float]] = {}
    for line in log.splitlines():
        if began := _BEGAN.match(line):
            at, backend, role = began.groups()
            if backend in open_:
                spans[open_[backend][0]].append(_crashed(open_.pop(backend)[1], crashed_at))
            open_[backend] = (role, float(at))
        elif (ended := _ENDED.match(line)) and ended[2] in open_:
            role, start = open_.pop(ended[2])
            spans[role].append(Span(start, float(ended[1])))
    for role, start in open_.values():
        spans[role].append(_crashed(start, crashed_at))
    return {role: sorted(of_role) for role, of_role in spans.items()}


def _crashed(start: float, crashed_at: Sequence[float]) -> Span:
    return Span(start, min((at for at in crashed_at if at > start), default=inf))


def tracked_table(name: str) -> sql.Composed:
    """A table whose rows are captured for the handler of its name."""
    return sql.SQL(
        "CREATE TABLE {table} (id int PRIMARY KEY, token text NOT NULL);"
        " CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON {table}"
        " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    ).format(table=sql.Identifier(name))
