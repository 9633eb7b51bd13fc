"""What an operator reads from the outbox, and decides about waiting and dead changes.

A dead letter is not tried again until an operator decides it: ``retry`` makes it wait, due at once, and ``discard``
marks it processed. Both repeat their conditions in their own WHERE. Both lock the row first, without waiting: a locked
row is being worked on, and the command is refused.

Every read is bounded, however large the table is: it walks a partial index, and ends after a fixed number of rows. The
result says when it was cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import psycopg
from psycopg.rows import class_row, dict_row

from cdc.core.attempts import KEPT
from cdc.core.errors import NotFoundError, RefusedError, UsageError
from cdc.core.model import SHARDS, ChangeState
from cdc.core.sqlstate import About, about
from cdc.core.subscription import DEFAULT
from cdc.postgres.actions import ActionLog, Actor, named
from cdc.postgres.loaders import VerbatimJson
from cdc.postgres.sql_files import NONE_STANDS, load

STATES = {
    "fresh": "find_fresh",
    "blocked": "find_fresh",
    "waiting": "find_waiting",
    "dead": "find_dead",
    "processed": "find_processed",
}
"""States that ``find`` takes: those of a row, and ``blocked``: fresh, but an earlier change of its key blocks it."""

_PER_SHARD = 5_000
"""Fresh changes examined in each of the 64 shards."""
_SCAN = 100_000
"""Changes examined of each other state."""
_CHAIN_MAX = 100
"""Changes shown of a chain."""
_PACE_S = 60.0
_PACE_MAX = 10_000
"""Changes examined: where more were processed within the time, the last ones count."""
_STATEMENT_LIMIT_S = 30
ROUND_LIMIT_S = 120
"""For one round of a decision about many: some 10,000 changes a second."""
_DISCARD_BATCH = 1_000
_CHANNEL = "entity_change"
_MORE = ("more_fresh", "more_waiting", "more_dead")

Reference = UUID | int
"""A change by its id, or by its ``seq``."""
Decision = Literal["retry", "discard"]
"""About a waiting or a dead change."""


@dataclass(frozen=True, slots=True)
class ChangeSummary:
    """A change as the table has it, without its payload. Names are cut at 1,000 characters, the error at 10,000.

    ``state`` is that of the row. ``blocked_by``: the ``seq`` of the first change of the same key that blocks this one.
    ``pauses_key``: a dead letter that blocks the later changes of its key until it is retried or discarded.
    ``caused_by``: the id of the change whose handler made this one. ``depth``: how many causes lead to it.
    ``replay_of``: the id of the change that this one repeats. ``subscription``: the number of the only one that takes
    it; None: all do.
    """

    seq: int
    id: UUID
    state: ChangeState
    blocked_by: int | None
    pauses_key: bool
    entity_type: str
    entity_id: str
    shard: int
    table_schema: str | None
    table: str
    operation: str
    changed_at: datetime | None
    """None, as the other times, where Python does not have it: infinite, or of a year it does not count."""
    error_count: int
    last_error: str | None
    error_summary: str | None
    """The part of it that the page and `cdc status` show: 300 characters, which quote no row."""
    error_kind: str | None
    """A class, or a word of ours: ``timeout``, ``validation``, ``crash``."""
    next_attempt_at: datetime | None
    processed_at: datetime | None
    dead_at: datetime | None
    caused_by: UUID | None
    depth: int
    replay_of: UUID | None
    subscription: int | None

    @property
    def blocked(self) -> bool:
        return self.state == ChangeState.FRESH and self.blocked_by is not None

    @property
    def actionable(self) -> bool:
        """Waiting or dead: what ``retry`` and ``discard`` are for."""
        return self.state in (ChangeState.WAITING, ChangeState.DEAD)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A failed attempt at a change. ``text`` may quote the row, as ``last_error``; ``frames`` quote nothing.

    ``outcome``: retried; unavailable, which is not counted; dead; crashed with its consumer; refused by the database.
    ``started_at``: None: not known. ``consumer``: its process, as in cdc_shards. ``error``: the class.
    """

    attempt: int
    subscription: str
    consumer: UUID | None
    handler: str | None
    started_at: datetime | None
    ended_at: datetime
    outcome: str
    kind: str
    error: str
    text: str
    frames: list[str]


@dataclass(frozen=True, slots=True)
class CauseLink:
    """One change of a chain of causes. ``before`` of the last one says whether there is, or was, another."""

    seq: int
    id: UUID
    entity_type: str
    entity_id: str
    operation: str
    state: ChangeState
    changed_at: datetime | None
    caused_by: UUID | None
    replay_of: UUID | None

    @property
    def before(self) -> UUID | None:
        """The next change of the chain: the one that this one repeats, else the one whose handler made it."""
        return self.replay_of or self.caused_by


@dataclass(frozen=True, slots=True)
class TypeStats:
    """Counts of one entity type; ``fresh`` includes ``blocked``. Ages in seconds; None: no such change."""

    entity_type: str
    fresh: int
    blocked: int
    waiting: int
    dead: int
    blocked_keys: int
    oldest_ready_age_s: float | None
    oldest_blocked_age_s: float | None


@dataclass(frozen=True, slots=True)
class Stats:
    """``more_*``: more changes exist than were examined, so the state's counts (fresh: also blocked) are too low."""

    types: list[TypeStats]
    more_fresh: bool = False
    more_waiting: bool = False
    more_dead: bool = False


@dataclass(frozen=True, slots=True)
class Throughput:
    """``per_s``: changes processed a second. Latencies: from the change to its mark; None where none was processed."""

    per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None


@dataclass(frozen=True, slots=True)
class Filter:
    """What to search for; None is any. ``since_s``: changed within the last so many seconds."""

    entity_type: str | None = None
    entity_id: str | None = None
    since_s: float | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """``more``: more changes match than were asked for. ``cut``: the search ended before it had examined all."""

    entries: list[ChangeSummary]
    more: bool
    cut: bool


def parse_reference(text: str) -> Reference:
    """A ``seq`` or an id. Raises UsageError."""
    try:
        # isdecimal() is true of other scripts' digits, too; int() reads those as well.
        return int(text) if text.isdecimal() and len(text) < 19 else UUID(text)
    except ValueError:
        raise UsageError(
            f"{text!r} names no change", hint="give its seq or its id, as cdc outbox list shows them"
        ) from None


class OutboxAdmin:
    """The statements for the outbox in ``schema``, on an autocommit connection: of its default subscription.

    What ``actor`` decides is recorded. ``given``: parameters of each statement. ``selections``: statements of ``bulk``
    that are others here.
    ``subscription``: its number, and its name; None for the default one.
    """

    given: Mapping[str, Any] = {"subscription_name": DEFAULT}
    selections: Mapping[str, bytes] = {}
    subscription: int | None = None
    subscription_name: str | None = None
    _by_number: Sequence[str] = ("number_unprocessed", "number_processed")

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._statements = load("admin.sql", schema)
        self.log = ActionLog(schema, actor)
        self._without_barriers = load("admin.sql", schema, instead=NONE_STANDS)

    # --- reading ---------------------------------------------------------------------------------------------------

    def stats(
        self,
        connection: psycopg.Connection,
        *,
        per_shard: int | None = None,
        scan: int | None = None,
        limit_s: int = _STATEMENT_LIMIT_S,
    ) -> Stats:
        """By entity type, of unprocessed changes: up to ``per_shard`` fresh ones, ``scan`` of each other state."""
        parameters = {**self.given, "shards": SHARDS, "per_shard": per_shard or _PER_SHARD, "bound": scan or _SCAN}
        with bounded(connection, limit_s), connection.cursor(row_factory=dict_row) as cursor:
            sees = cursor.execute(self._statements["sees_barriers"]).fetchone()
            statements = self._statements if sees and all(sees.values()) else self._without_barriers
            rows = cursor.execute(statements["stats"], parameters).fetchall()
        # Every row has the same values.
        more = {name: rows[0][name] for name in _MORE} if rows else {}
        types = [TypeStats(**{name: value for name, value in row.items() if name not in _MORE}) for row in rows]
        return Stats(types, **more)

    def find(self, connection: psycopg.Connection, state: str, wanted: Filter, limit: int) -> SearchResult:
        """Up to ``limit`` changes in one of STATES.

        Order: fresh and blocked ones oldest first, waiting ones by when they are due, dead and processed ones newest
        first.
        """
        filtered = wanted != Filter() or state == "blocked"
        parameters = {
            **self.given,
            "type": wanted.entity_type,
            "key": wanted.entity_id,
            "age_s": wanted.since_s,
            "blocked": state == "blocked",
            "shards": SHARDS,
            "per_shard": _PER_SHARD if filtered else limit + 1,
            "scan": _SCAN if filtered else limit + 1,
            "limit": limit + 1,
        }
        with bounded(connection):
            row = connection.execute(self._statements[STATES[state]], parameters).fetchone()
            assert row is not None
            cut, ids = row
            entries = self.summaries(connection, ids[:limit])
        return SearchResult(entries, more=len(ids) > limit, cut=cut and filtered)

    def pace(self, connection: psycopg.Connection) -> Throughput:
        """What was processed in the last minute, by all consumers."""
        with bounded(connection), connection.cursor(row_factory=class_row(Throughput)) as cursor:
            pace = cursor.execute(self._statements["pace"], {"seconds": _PACE_S, "bound": _PACE_MAX}).fetchone()
        assert pace is not None
        return pace

    def show(self, connection: psycopg.Connection, reference: Reference) -> ChangeSummary:
        """Raises NotFoundError."""
        with bounded(connection):
            return self._named(connection, [reference])[0]

    def named(self, connection: psycopg.Connection, references: Sequence[Reference]) -> list[ChangeSummary]:
        """In the order of their names, each once. Raises NotFoundError."""
        with bounded(connection):
            return self._named(connection, references)

    def chain(self, connection: psycopg.Connection, entry: ChangeSummary) -> list[CauseLink]:
        """The change, what it repeats or what caused it, the same of that, and so on, at most 100 changes."""
        with bounded(connection), connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(self._statements["chain"], {"id": entry.id, "bound": _CHAIN_MAX}).fetchall()
        return [CauseLink(**{**row, "state": ChangeState(row["state"])}) for row in rows]

    def attempts(self, connection: psycopg.Connection, entry: ChangeSummary) -> list[Attempt]:
        """Those that failed, the oldest first: of many the last ones."""
        parameters = {**self.given, "seq": entry.seq, "limit": KEPT}
        with bounded(connection), connection.cursor(row_factory=class_row(Attempt)) as cursor:
            return cursor.execute(self._statements["attempts_of"], parameters).fetchall()[::-1]

    def payload(self, connection: psycopg.Connection, entry: ChangeSummary) -> dict[str, Any]:
        """``old``, ``new`` and ``metadata``: the application's data. Raises RefusedError where the server refuses.

        Each is Json, with the digits that are stored, or its text where Python cannot read it.
        """
        try:
            with bounded(connection), connection.cursor(row_factory=dict_row) as cursor:
                cursor.adapters.register_loader("jsonb", VerbatimJson)
                found = cursor.execute(self._statements["payload"], {"id": entry.id}).fetchone()
        except psycopg.Error as error:
            if about(error.sqlstate) is not About.ROW:
                raise
            raise RefusedError(
                f"the database refuses to hand over the payload of change {entry.seq}: SQLSTATE {error.sqlstate}",
                hint="without --show-payload all else is shown",
            ) from error
        if found is None:
            raise _missing([entry.seq])
        return found

    # --- deciding --------------------------------------------------------------------------------------------------

    def retry(self, connection: psycopg.Connection, references: Sequence[Reference]) -> list[ChangeSummary]:
        """Make these due now, all or none, and wake the consumers; a dead letter gets all its attempts again.

        Raises NotFoundError; RefusedError for a change that is neither waiting nor dead, or is being worked on.
        """
        return self._decide(connection, "retry", references)

    def discard(self, connection: psycopg.Connection, references: Sequence[Reference]) -> list[ChangeSummary]:
        """Mark these processed, all or none, and wake the consumers: later changes of their keys go on.

        Raises as ``retry`` does.
        """
        return self._decide(connection, "discard", references)

    def decide_free(
        self,
        connection: psycopg.Connection,
        decision: Decision,
        state: ChangeState,
        ids: Sequence[UUID],
        *,
        target: Mapping[str, Any] | None = None,
    ) -> int:
        """Retry or discard those of ``ids`` that are in ``state`` and free, and wake the consumers; returns how many.

        The others stay as they are. ``target``: what found them, for the record.
        """
        with bounded(connection, ROUND_LIMIT_S):
            given = {**self.given, "ids": list(ids), "state": state}
            free = [id_ for (id_,) in connection.execute(self._statements["take"], given)]
            count = connection.execute(self._statements[decision], {**self.given, "ids": free}).rowcount
            self.record(connection, decision, {"state": str(state), **(target or {})}, count)
        if count:
            wake(connection)
        return count

    def discard_before(self, connection: psycopg.Connection, entity_type: str, before: str) -> Iterator[int]:
        """Mark processed the fresh changes of a type made before a moment, which PostgreSQL parses.

        Works in batches, each committed; yields the number marked by each. Raises UsageError for an invalid moment.
        """
        try:
            [moment] = connection.execute("SELECT %s::timestamptz", [before]).fetchone() or [None]
        except psycopg.DataError:
            raise UsageError(f"{before!r} is no moment", hint="write it as 2026-01-31T18:00:00Z, or: now") from None
        for shard in range(SHARDS):
            parameters = {"type": entity_type, "before": moment, "shard": shard, "after": 0, "limit": _DISCARD_BATCH}
            more = True
            while more:
                with bounded(connection):
                    row = connection.execute(self._statements["discard_before"], parameters).fetchone()
                    assert row is not None
                    marked, looked_at, parameters["after"] = row
                    target = {"type": entity_type, "changed_before": str(moment)}
                    self.record(connection, "discard", target, marked)
                yield marked
                more = looked_at == _DISCARD_BATCH

    def _decide(
        self, connection: psycopg.Connection, decision: Decision, references: Sequence[Reference]
    ) -> list[ChangeSummary]:
        with bounded(connection):
            ids = [entry.id for entry in self._named(connection, references)]
            given = {**self.given, "ids": ids, "state": None}
            taken = {id_ for (id_,) in connection.execute(self._statements["take"], given)}
            # Read again: their states cannot change while the rows are locked.
            entries = self.summaries(connection, ids)
            for entry in entries:
                _refuse_unless_free(entry, taken=entry.id in taken, to=decision)
            count = connection.execute(self._statements[decision], given).rowcount
            if count != len(ids):
                raise _missing(references)
            decided = self.summaries(connection, ids)
            self.record(connection, decision, named([entry.seq for entry in decided]), count)
        wake(connection)
        return decided

    # --- inside a transaction --------------------------------------------------------------------------------------

    def record(self, connection: psycopg.Connection, action: str, target: Mapping[str, Any], count: int) -> None:
        """See ``ActionLog``."""
        self.log.record(connection, action, {**target, "subscription": self.subscription_name}, count)

    def summaries(self, connection: psycopg.Connection, ids: Sequence[UUID]) -> list[ChangeSummary]:
        """Those that are there, in the order of their ids."""
        with connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(self._statements["look"], {**self.given, "ids": list(ids)}).fetchall()
        return [ChangeSummary(**{**row, "state": ChangeState(row["state"])}) for row in rows]

    def _named(self, connection: psycopg.Connection, references: Sequence[Reference]) -> list[ChangeSummary]:
        by_seq = self._numbered(connection, [name for name in references if isinstance(name, int)])
        ids = [by_seq.get(name) if isinstance(name, int) else name for name in references]
        entries = self.summaries(connection, list(dict.fromkeys(id_ for id_ in ids if id_)))
        there = {entry.id for entry in entries}
        if missing := [name for name, id_ in zip(references, ids, strict=True) if id_ not in there]:
            raise _missing(missing)
        return entries

    def _numbered(self, connection: psycopg.Connection, seqs: list[int]) -> dict[int, UUID]:
        """The ids of these numbers, those that are found."""
        found: dict[int, UUID] = {}
        for statement in self._by_number:
            if left := [seq for seq in seqs if seq not in found]:
                parameters = {**self.given, "seqs": left, "shards": SHARDS, "scan": _SCAN}
                found.update(connection.execute(self._statements[statement], parameters).fetchall())
        return found


@contextmanager
def bounded(connection: psycopg.Connection, statement_limit_s: int = _STATEMENT_LIMIT_S) -> Iterator[None]:
    """One transaction whose statements have time limits.

    They must use an index: the statistics of a queue are wrong as soon as they are taken.
    """
    with connection.transaction():
        connection.execute(
            "SELECT set_config('statement_timeout', %s, true), set_config('lock_timeout', '5s', true),"
            " set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true)",
            [f"{statement_limit_s}s"],
        )
        yield


def wake(connection: psycopg.Connection) -> None:
    """Wake the consumers, in a transaction after the commit: NOTIFY takes a lock of the whole cluster."""
    connection.execute("SELECT pg_notify(%s, '')", [_CHANNEL])


def _refuse_unless_free(entry: ChangeSummary, *, taken: bool, to: str) -> None:
    if not entry.actionable:
        why = {
            ChangeState.FRESH: "it is fresh, and runs in its turn",
            ChangeState.PROCESSED: "it is processed already",
        }[entry.state]
        hint = f"the change {entry.blocked_by} holds it back: decide about that one" if entry.blocked else ""
        raise RefusedError(f"cannot {to} the change {entry.seq}: {why}", hint=hint)
    if not taken:
        raise RefusedError(
            f"cannot {to} the change {entry.seq}: another session is at work on it", hint="try again in a moment"
        )


def _missing(references: Iterable[Reference]) -> NotFoundError:
    names = [str(name) for name in references]
    several = len(names) > 1
    hint = (
        f"by their seq, processed changes are found among the last {_SCAN:,} only: give the id"
        if all(name.isdecimal() for name in names)
        else "cdc outbox list shows those that wait or are dead"
    )
    return NotFoundError(f"there {'are no changes' if several else 'is no change'} {', '.join(names)}", hint=hint)
