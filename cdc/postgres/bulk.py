"""Decisions of an operator about many changes at once.

A filter is asked once. What matches is counted and stays on the server, so that what is decided about is what was
counted. Then each round is one short transaction, and what it has done stays done: a command that is interrupted is
given again.

All that is selected of one key is decided about in one round. A dead letter that is tried again runs before the later
changes of its key that have not run yet; of two in rounds of their own, a fresh change could run before the second.

A replay writes processed changes once more, as new ones that name the old. Their numbers are drawn in the order of the
old ones, so they run in it, behind whatever of their key is there already. No row says how far a replay got: it is
resumed by leaving out what has a replay made since it began. One for a subscription is of what that one has done, and
seen by that one only: to the default one it is processed from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any
from uuid import UUID

import psycopg

from cdc.core.errors import RefusedError, UsageError
from cdc.core.model import ChangeState, message_prefix
from cdc.core.router import HandledChanges
from cdc.postgres.actions import named
from cdc.postgres.admin import ROUND_LIMIT_S, Decision, OutboxAdmin, Reference, bounded, wake
from cdc.postgres.sql_files import load

_SELECT_LIMIT_S = 600
"""Some 100,000 rows a second are examined."""
_ROUND = 1_000
_REPLAYED_BYTES = 16 << 20
"""Of stored documents that a round writes; the first change always fits."""
_REPLAY_LOCK = 0x63646302
"""First key of the lock held by who replays; the second is a hash of the schema's name."""
_KEY_MAX = 100_000
"""Changes of one key that a round takes, if there are so many: some ten seconds."""
_CURSOR = b"cdc_selection"
_SELECTS = {ChangeState.DEAD: "select_dead", ChangeState.WAITING: "select_waiting"}

Moment = datetime | timedelta
"""With a zone; or how long ago, by the server's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which changes are meant; None is any.

    ``error``: error_kind, such as the name of a class, or whole words that error_summary begins with. ``text``: what
    the key or the error has in it, in any case of letters. ``since`` and ``until`` compare ``changed_at``; the latter
    is excluded. ``handled``: those that one handler gets; ``handler`` is its name.
    """

    entity_type: str | None = None
    entity_id: str | None = None
    error: str | None = None
    text: str | None = None
    since: Moment | None = None
    until: Moment | None = None
    handled: HandledChanges | None = None
    handler: str | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """``done`` of the ``looked_at`` changes; the others had another state by then, or another session held them."""

    looked_at: int
    done: int


class Bulk:
    """The statements for the outbox in ``schema``, on an autocommit connection; of the subscription of ``admin``.

    ``select_limit_s``: for the one statement that selects.
    """

    def __init__(self, schema: str, admin: OutboxAdmin | None = None, *, select_limit_s: int = _SELECT_LIMIT_S) -> None:
        self._select_limit_s = select_limit_s
        self._admin = admin or OutboxAdmin(schema)
        self._statements = {**load("bulk.sql", schema), **self._admin.selections}
        self._schema = schema
        self._prefix = message_prefix(schema)

    @contextmanager
    def selected(self, connection: psycopg.Connection, state: ChangeState, wanted: Wanted) -> Iterator[Selection]:
        """The changes in this state, dead or waiting, that match. One at a time on a connection."""
        [(now,)] = connection.execute("SELECT now()").fetchall()
        parameters = {**self._admin.given, **parameters_of(wanted, now)}
        with _cursor(connection, self._statements[_SELECTS[state]], parameters, self._select_limit_s) as count:
            yield Selection(connection, self._admin, state, count, target=_target(wanted, now))

    @contextmanager
    def replayable(
        self,
        connection: psycopg.Connection,
        wanted: Wanted,
        *,
        latest_per_key: bool = False,
        unless_since: Moment | None = None,
        only_count: bool = False,
    ) -> Iterator[Replay]:
        """The processed changes that match and are no replays themselves; of each key the last only, if asked.

        ``unless_since``: without those that have a replay made since then. One at a time, also by others: raises
        RefusedError while another replay runs, unless this is ``only_count``; UsageError where an error is asked for
        that a subscription does not keep.
        """
        if wanted.error is not None and self._admin.subscription is not None:
            raise UsageError("--error finds nothing here: a subscription keeps no errors of what it has processed")
        with nullcontext() if only_count else self._alone(connection):
            [(now,)] = connection.execute("SELECT now()").fetchall()
            parameters = {**self._admin.given, **parameters_of(wanted, now), "unless_since": _at(unless_since, now)}
            statement = self._statements["select_latest" if latest_per_key else "select_processed"]
            with _cursor(connection, statement, parameters, self._select_limit_s) as count:
                yield Replay(
                    self, connection, count, since=parameters["since"], until=parameters["until"] or now,
                    unless_since=parameters["unless_since"] or now,
                    target={**_target(wanted, now), "latest_per_key": latest_per_key or None},
                )  # fmt: skip

    def replay_named(self, connection: psycopg.Connection, references: Sequence[Reference]) -> Iterator[Round]:
        """Replay these. Raises NotFoundError, and RefusedError for a change that is not processed, before any is."""
        entries = sorted(self._admin.named(connection, references), key=attrgetter("seq"))
        for entry in entries:
            if self._admin.subscription is None and entry.subscription is not None:
                raise RefusedError(
                    f"cannot replay the change {entry.seq} for all: it is for subscription {entry.subscription} only",
                    hint="cdc outbox replay ID --subscription NAME; cdc subscription list --json has the numbers",
                )
            if entry.state is not ChangeState.PROCESSED:
                raise RefusedError(
                    f"cannot replay the change {entry.seq}: it is {entry.state}",
                    hint="a fresh one runs in its turn; cdc outbox retry is for one that waits or is dead",
                )
        with self._alone(connection):
            yield from self.replay(connection, [entry.id for entry in entries], named([each.seq for each in entries]))

    def replay(
        self, connection: psycopg.Connection, ids: Sequence[UUID], target: Mapping[str, Any] | None = None
    ) -> Iterator[Round]:
        """Write these once more, in this order, where they are processed; yields each round after its commit.

        ``target``: what found them, for the record.
        """
        while ids:
            parameters = {**self._admin.given, "ids": list(ids), "bytes": _REPLAYED_BYTES, "prefix": self._prefix}
            with bounded(connection, ROUND_LIMIT_S):
                # Before any number: readers conclude from transaction ids whether a lower seq may still appear.
                connection.execute("SELECT pg_current_xact_id()")
                row = connection.execute(self._statements["replay"], parameters).fetchone()
                assert row is not None
                written, looked_at = row
                self._admin.record(connection, "replay", target or {}, written)
            wake(connection)
            yield Round(looked_at, written)
            ids = ids[looked_at:]

    @contextmanager
    def _alone(self, connection: psycopg.Connection) -> Iterator[None]:
        """The order of two replays of one key would be nobody's."""
        lock = [_REPLAY_LOCK, self._schema]
        [(taken,)] = connection.execute("SELECT pg_try_advisory_lock(%s, hashtext(%s))", lock).fetchall()
        if not taken:
            raise RefusedError("another replay runs on this outbox", hint="wait until it has ended")
        try:
            yield
        finally:
            with suppress(psycopg.OperationalError):  # the connection is gone, and the lock with it
                connection.execute("SELECT pg_advisory_unlock(%s, hashtext(%s))", lock)


class Selection:
    """``count`` changes in ``state``, each id with the hash of its key, as they were when they were selected."""

    def __init__(
        self,
        connection: psycopg.Connection,
        admin: OutboxAdmin,
        state: ChangeState,
        count: int,
        *,
        target: Mapping[str, Any],
    ) -> None:
        self._connection = connection
        self._admin = admin
        self._state = state
        self._target = target
        self.count = count

    def decide(self, decision: Decision) -> Iterator[Round]:
        """Retry or discard them, in rounds; yields each after its commit."""
        for ids in self._whole_keys():
            done = self._admin.decide_free(self._connection, decision, self._state, ids, target=self._target)
            yield Round(len(ids), done)

    def _whole_keys(self) -> Iterator[list[UUID]]:
        """The ids, some at a time, those of one key together."""
        pending: list[UUID] = []
        for _, changes in groupby(self._rows(), key=itemgetter(1)):
            of_key: list[UUID] = []
            for id_, _ in changes:
                of_key.append(id_)
                if len(of_key) == _KEY_MAX:
                    yield of_key
                    of_key = []
            pending += of_key
            if len(pending) >= _ROUND:
                yield pending
                pending = []
        if pending:
            yield pending

    def _rows(self) -> Iterator[tuple[UUID, int]]:
        while rows := _fetch(self._connection):
            yield from rows


class Replay:
    """``count`` processed changes, as they were when they were selected.

    Given again with these moments, the command goes on where it was interrupted.
    """

    def __init__(
        self,
        bulk: Bulk,
        connection: psycopg.Connection,
        count: int,
        *,
        since: datetime | None,
        until: datetime,
        unless_since: datetime,
        target: Mapping[str, Any],
    ) -> None:
        self._bulk = bulk
        self._connection = connection
        self._target = target
        self.count = count
        self.since = since
        self.until = until
        self.unless_since = unless_since

    def rounds(self) -> Iterator[Round]:
        """Write them once more; yields each round after its commit, and after the consumers are woken."""
        while rows := _fetch(self._connection):
            yield from self._bulk.replay(self._connection, [id_ for id_, _ in rows], self._target)


@contextmanager
def _cursor(
    connection: psycopg.Connection, statement: bytes, parameters: dict[str, Any], limit_s: int
) -> Iterator[int]:
    """How many rows the statement selects, which stay on the server meanwhile."""
    with bounded(connection, limit_s):
        # By old statistics a loop within a loop looks cheap.
        connection.execute("SELECT set_config('enable_nestloop', 'off', true)")
        connection.execute(statement, parameters)
    try:
        count = connection.execute(b"MOVE FORWARD ALL IN " + _CURSOR).rowcount
        connection.execute(b"MOVE ABSOLUTE 0 IN " + _CURSOR)
        yield count
    finally:
        with suppress(psycopg.OperationalError):  # the connection is gone, and the cursor with it
            connection.execute(b"CLOSE " + _CURSOR)


def _fetch(connection: psycopg.Connection) -> list[tuple[UUID, int]]:
    return connection.execute(b"FETCH %d FROM %s" % (_ROUND, _CURSOR)).fetchall()


def parameters_of(wanted: Wanted, now: datetime) -> dict[str, Any]:
    """What the expression ``matches`` of bulk.sql is given. ``now``: by the server's clock."""
    handled = wanted.handled
    return {
        "type": wanted.entity_type,
        "key": wanted.entity_id,
        "error": wanted.error,
        "text": wanted.text,
        "since": _at(wanted.since, now),
        "until": _at(wanted.until, now),
        "types": [entity_type for entity_type, _ in handled.named] if handled else None,
        "operations": [operation for _, operation in handled.named] if handled else None,
        "named": list(handled.others_than) if handled else None,
        "others": list(handled.others) if handled else None,
    }


def _target(wanted: Wanted, now: datetime) -> dict[str, Any]:
    """The filters as the log has them."""
    since, until = _at(wanted.since, now), _at(wanted.until, now)
    return {
        "type": wanted.entity_type, "key": wanted.entity_id, "handler": wanted.handler,
        "error": wanted.error, "text": wanted.text,
        "since": since and since.isoformat(), "until": until and until.isoformat(),
    }  # fmt: skip


def _at(moment: Moment | None, now: datetime) -> datetime | None:
    return now - moment if isinstance(moment, timedelta) else moment
