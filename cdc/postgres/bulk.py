"""Decisions of an operator about many changes at once.

A filter is asked once. What matches is counted and stays on the server, so that what is decided about is what was
counted. Then each round is one short transaction, and what it has done stays done: a command that is interrupted is
given again.

All that is selected of one key is decided about in one round. A dead letter that is tried again runs before the later
changes of its key that have not run yet; of two in rounds of their own, a fresh change could run before the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any
from uuid import UUID

import psycopg

from cdc.core.model import ChangeState
from cdc.core.router import HandledChanges
from cdc.postgres.admin import Decision, OutboxAdmin, bounded
from cdc.postgres.sql_files import load

_SELECT_LIMIT_S = 600
"""For the one statement that selects; some 100,000 rows a second are examined."""
_ROUND = 1_000
_KEY_MAX = 100_000
"""Changes of one key that a round takes, if there are so many: some ten seconds."""
_CURSOR = b"cdc_selection"
_SELECTS = {ChangeState.DEAD: "select_dead", ChangeState.WAITING: "select_waiting"}

Moment = datetime | timedelta
"""With a zone; or how long ago, by the server's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which changes are meant; None is any.

    ``error``: what error_summary begins with, such as the name of a class. ``since`` and ``until`` compare
    ``changed_at``; the latter is excluded. ``handled``: those that one handler gets.
    """

    entity_type: str | None = None
    entity_id: str | None = None
    error: str | None = None
    since: Moment | None = None
    until: Moment | None = None
    handled: HandledChanges | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """``done`` of the ``looked_at`` changes; the others had another state by then, or another session held them."""

    looked_at: int
    done: int


class Bulk:
    """The statements for the outbox in ``schema``, on an autocommit connection."""

    def __init__(self, schema: str) -> None:
        self._statements = load("bulk.sql", schema)
        self._admin = OutboxAdmin(schema)

    @contextmanager
    def selected(self, connection: psycopg.Connection, state: ChangeState, wanted: Wanted) -> Iterator[Selection]:
        """The changes in this state, dead or waiting, that match. One at a time on a connection."""
        with bounded(connection, _SELECT_LIMIT_S):
            connection.execute(self._statements[_SELECTS[state]], _parameters(connection, wanted))
        count = connection.execute(b"MOVE FORWARD ALL IN " + _CURSOR).rowcount
        connection.execute(b"MOVE ABSOLUTE 0 IN " + _CURSOR)
        yield Selection(connection, self._admin, state, count)
        connection.execute(b"CLOSE " + _CURSOR)


class Selection:
    """``count`` changes in ``state``, each id with the hash of its key, as they were when they were selected."""

    def __init__(self, connection: psycopg.Connection, admin: OutboxAdmin, state: ChangeState, count: int) -> None:
        self._connection = connection
        self._admin = admin
        self._state = state
        self.count = count

    def decide(self, decision: Decision) -> Iterator[Round]:
        """Retry or discard them, in rounds; yields each after its commit."""
        for ids in self._whole_keys():
            yield Round(len(ids), self._admin.decide_free(self._connection, decision, self._state, ids))

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
        while rows := self._connection.execute(b"FETCH %d FROM %s" % (_ROUND, _CURSOR)).fetchall():
            yield from rows


def _parameters(connection: psycopg.Connection, wanted: Wanted) -> dict[str, Any]:
    handled = wanted.handled
    [(now,)] = connection.execute("SELECT now()").fetchall()
    return {
        "type": wanted.entity_type,
        "key": wanted.entity_id,
        "error": wanted.error,
        "since": _at(wanted.since, now),
        "until": _at(wanted.until, now),
        "types": [entity_type for entity_type, _ in handled.named] if handled else None,
        "operations": [operation for _, operation in handled.named] if handled else None,
        "named": list(handled.others_than) if handled else None,
        "others": list(handled.others) if handled else None,
    }


def _at(moment: Moment | None, now: datetime) -> datetime | None:
    return now - moment if isinstance(moment, timedelta) else moment
