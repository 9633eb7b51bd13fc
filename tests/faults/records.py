"""What the judge reads: the handlers' ledgers, the outbox, the effects, and the server's own log."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.faults.ledger import Call, Captured, Effect, Span
from tests.handlers_ledger import TRANSACTIONAL, TRUNCATED
from tests.subscriptions import states_of


def read_calls(folder: Path, ended_at: dict[str, float]) -> list[Call]:
    """The ledgers in ``folder``. ``ended_at``: when each consumer's process had ended.

    One that came after another in the same ledger has begun when the other had ended: whatever was on its way then, was
    killed at the latest moment that the ledger knows of.
    """
    numbers = count()
    return [call for path in sorted(folder.glob("*.jsonl")) for call in _read_ledger(path, ended_at, numbers)]


def _read_ledger(path: Path, ended_at: dict[str, float], numbers: Iterator[int]) -> Iterator[Call]:
    open_: dict[int, dict[str, Any]] = {}
    latest, process = 0.0, None
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("process", process) != process:
            process = entry["process"]
            yield from _killed(path.stem, open_, latest, numbers)
            open_ = {}
        elif "start" in entry:
            open_[entry["call"]] = entry
        elif "end" in entry:
            yield from _calls(path.stem, open_.pop(entry["call"]), entry["end"], entry["hows"], numbers)
        latest = max(latest, entry.get("start", 0.0), entry.get("end", 0.0))
    yield from _killed(path.stem, open_, ended_at.get(path.stem, inf), numbers)


def _killed(consumer: str, open_: dict[int, dict[str, Any]], at: float, numbers: Iterator[int]) -> Iterator[Call]:
    for entry in open_.values():
        yield from _calls(consumer, entry, max(entry["start"], at), ["killed"] * len(entry["changes"]), numbers)


def _calls(
    consumer: str, entry: dict[str, Any], end: float, hows: Sequence[str], numbers: Iterator[int]
) -> Iterator[Call]:
    batch = next(numbers) if len(hows) > 1 else None
    stands_for = entry.get("stands_for", ())
    for (type_, key, seq, attempt), how in zip(entry["changes"], hows, strict=True):
        yield Call(consumer, (type_, key), seq, attempt, entry["start"], end, how, batch, *stands_for)


def read_captured(connection: psycopg.Connection, types: Iterable[str], number: int | None = None) -> list[Captured]:
    """As the default subscription has them; those that are for all, or for this one."""
    rows = connection.execute(
        "SELECT seq, coalesce(entity_type, table_name), entity_id, operation, old_data ->> 'token',"
        " new_data ->> 'token', CASE WHEN processed THEN 'processed' WHEN dead_at IS NOT NULL THEN 'dead'"
        " WHEN next_attempt_at IS NOT NULL THEN 'waiting' ELSE 'fresh' END,"
        " extract(epoch FROM coalesce(processed_at, dead_at))::float8,"
        " substring(last_error FROM '^coalesced into seq ([0-9]+)$')::bigint,"
        " (SELECT old.seq FROM entity_changes AS old WHERE old.id = c.replay_of),"
        " CASE WHEN operation = 'READ' THEN (metadata ->> 'backfill')::int END"
        " FROM entity_changes AS c WHERE coalesce(entity_type, table_name) = ANY (%s)"
        " AND (subscription IS NULL OR subscription = %s)",
        [list(types), number],
    ).fetchall()
    return [Captured(seq, (type_, key), *rest) for seq, type_, key, *rest in rows]


def read_captured_by(
    connection: psycopg.Connection,
    types: Iterable[str],
    number: int,
    seen: Mapping[int, float],
    *,
    calls: Sequence[Call],
    effects: Iterable[Effect],
) -> list[Captured]:
    """As a subscription has them, or its calls where it was dropped. ``seen``: when each was first seen settled."""
    states = {"done": "processed", **{state: state for state in ("dead", "waiting", "fresh")}}
    has = {seq: states[state] for seq, state in states_of(connection, number).items()}
    done: dict[int, float] = {}
    for call in sorted(calls, key=lambda call: call.end):
        if call.final:
            done.setdefault(call.seq, call.end)
    ended = {call.seq: call.end for call in calls} | done
    rows = [
        row._replace(
            state=has.get(row.seq) or ("processed" if row.seq in done else "fresh"),
            settled_at=seen.get(row.seq),
            into=None,
            done_at=ended.get(row.seq),
        )
        for row in read_captured(connection, types, number)
    ]
    into = coalesced_into(rows, calls, {effect.seq for effect in effects})
    return [row._replace(into=into.get(row.seq)) for row in rows]


def coalesced_into(rows: Iterable[Captured], calls: Iterable[Call], effects: Set[int]) -> dict[int, int]:
    """Into which change others were coalesced: no row of a subscription says so, but its calls do.

    A call for several has one effect, that of the last of them; or the last of them is dead. One in a transaction that
    returned and has no effect was not committed: its changes are called again.
    """
    by_key: dict[Any, list[Captured]] = defaultdict(list)
    for row in sorted(rows):
        by_key[row.key].append(row)
    found: dict[int, int] = {}
    returned = set[int]()
    for call in calls:
        of_key = by_key[call.key]
        place = next((place for place, row in enumerate(of_key) if row.seq == call.seq), None)
        if place is None or call.stood_for == 1:
            continue
        others = [row.seq for row in of_key[max(0, place + 1 - call.stood_for) : place] if row.state == "processed"]
        if call.how == "returned" and (call.seq in effects or call.key[0] not in TRANSACTIONAL):
            returned.update(others)
        if call.seq in effects or (of_key[place].state == "dead" and call.final):
            found.update(dict.fromkeys(others, call.seq))
    dead = {row.seq for row in rows if row.state == "dead"}
    return {seq: last for seq, last in found.items() if seq not in effects and not (last in dead and seq in returned)}


def read_effects(connection: psycopg.Connection, consumers: Iterable[str] | None = None) -> list[Effect]:
    """Those of these consumers, or all."""
    statement = "SELECT number, seq, type, key, xmin::text FROM effects WHERE %s OR consumer = ANY (%s::text[])"
    rows = connection.execute(statement, [consumers is None, list(consumers or ())]).fetchall()
    return [Effect(number, seq, (type_, key), transaction) for number, seq, type_, key, transaction in rows]


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


TRUNCATES = sql.SQL(
    "CREATE TRIGGER truncated AFTER TRUNCATE ON {table}"
    " FOR EACH STATEMENT EXECUTE FUNCTION capture_truncate({type}, 'event')"
).format(table=sql.Identifier(TRUNCATED), type=sql.Literal(TRUNCATED))
