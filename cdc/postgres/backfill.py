"""Backfill: the rows that a tracked table has already, as changes of the operation READ.

Theory
------
A page of rows, in the order of the primary key, is one transaction. It locks the rows as an UPDATE of them would, reads
them as they are then, draws their numbers, and notes how far it is. So:

- *Order.* Whoever writes a row holds its lock when the number of the change is drawn. The number of a READ is drawn
  under the same lock. So of a READ and a change of its row, the one with the higher number has the newer data.
- *Resumption.* Progress is committed with the page. After any crash the next page begins behind the last one: no row
  is left out, and none is written twice.
- *Rows that come and go.* A row that is deleted before its page gives nothing. One that was inserted after the start,
  or whose key moves, was captured then, so it need not be read; it may be, and carries the newer data.

It waits for no lock longer than ``lock_timeout``, which is shorter than the deadlock_timeout of any server that is not
tuned: so it gives up before the application's transaction would be ended for a deadlock.

The rows are read with the rights of whoever runs it, and converted by capture_rows() with those of the role that
captures. A condition is an expression of whoever started it; nobody else runs it unless they say the same one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from math import inf
from typing import Any
from uuid import UUID

import psycopg
from psycopg import errors
from psycopg.rows import dict_row

from cdc.core import failpoints
from cdc.core.backfill_pace import BackfillPace, Page, Wait
from cdc.core.errors import CdcError, NotFoundError, RefusedError, SchemaError, UsageError
from cdc.postgres import tracking
from cdc.postgres.actions import ActionLog, Actor
from cdc.postgres.admin import ROUND_LIMIT_S, bounded
from cdc.postgres.backfill_table import BackfillTable, key_is_another, the_arguments
from cdc.postgres.sql_files import blocks, load
from cdc.postgres.subscriptions import Subscription
from cdc.postgres.tracked_tables import SourceTable, Tracked

BACKLOG = 100
"""READs that may be unsettled, unless another number is asked for."""
UNFINISHED = ("running", "paused")
_DEEDS = {"running": "resume", "paused": "pause", "cancelled": "cancel"}
"""By the state that they lead to."""
_LOCK = 0x63646303
"""First key of the lock held by who works on a backfill; the second is a hash of the schema's name and its number."""
_LOOK_S = 0.2
"""While it waits, until it looks again whether somebody has paused it; each page looks as well."""
_DIGITS_MAX = 9
"""Of a backfill's number; what is longer is a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """One as the table has it. ``state``: running, paused, done or cancelled; ``at_work``: a session works on it now.

    ``estimate``: how many rows there were, by the planner, with a condition or without. Keys are texts, one for each of
    ``key_columns``: ``since_key`` the first that is read, ``after_key`` the last that was, ``until_key`` the last to be
    read. ``rate``: rows a second. ``started_by``: a role. ``subscription``: the only one that it is for.
    """

    id: int
    table_schema: str
    table_name: str
    table: str
    """Its name, as written in SQL."""
    condition: str | None
    key_columns: list[str]
    key_order: str
    since_key: list[str] | None
    after_key: list[str] | None
    until_key: list[str] | None
    estimate: int
    examined: int
    written: int
    rate: float | None
    backlog: int
    state: str
    started_by: str
    started_at: datetime
    changed_at: datetime
    subscription: int | None
    subscription_name: str | None
    at_work: bool

    @property
    def of(self) -> str:
        """What it reads and for whom, for a sentence."""
        return self.table if self.subscription is None else f"{self.table} for {self.subscription_name}"


@dataclass(frozen=True, slots=True)
class Progress:
    """``state``: of the backfill. ``waits``: the next page may not begin yet. ``unsettled``: of what it wrote."""

    examined: int
    written: int
    state: str = "running"
    waits: Wait | None = None
    unsettled: int = 0


@dataclass(frozen=True, slots=True)
class _Page:
    state: str
    examined: int = 0
    seqs: Sequence[int] = ()
    ids: Sequence[UUID] = ()


class Backfills:
    """The statements for the outbox in ``schema``, on an autocommit connection with the role's own search_path.

    What ``actor`` decides is recorded.
    """

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._schema = schema
        self._log = ActionLog(schema, actor)
        self._statements = load("backfill.sql", schema)
        own = blocks("backfill.sql")
        instead = {"is_written": own["is_written_for_one"], "is_open": own["is_open_for_one"]}
        self._for_one = load("backfill.sql", schema, instead=instead)

    def start(
        self,
        connection: psycopg.Connection,
        table: str,
        *,
        condition: str | None = None,
        since: Sequence[str] | None = None,
        rate: float | None = None,
        backlog: int = BACKLOG,
        subscription: Subscription | None = None,
    ) -> Backfill:
        """Note that the rows of a tracked table are to be read, from the key ``since`` on; ``work`` reads them.

        ``subscription``: nothing to any other one. Raises NotFoundError or RefusedError for a table that is not there,
        not tracked, without a primary key, not to be read by this role, or of which a backfill is not finished; for a
        subscription that does not take its type. UsageError for a condition or a key that is none.
        """
        source, triggers = tracking.find(connection, self._schema, table)
        the_arguments(source, triggers)
        if subscription is not None:
            _refuse_type(source, triggers[0], subscription)
        with _server_names(connection) as path, _explained():
            reading = BackfillTable(connection, self._schema, source, condition=condition, path=path)
            _refuse_other_key(reading, source, since)
            with bounded(connection, ROUND_LIMIT_S):
                reading.check(since)
                until = reading.last()
                estimate = reading.estimate(since, until) if until else 0
                given = {
                    "table_schema": source.namespace, "table_name": source.name, "condition": condition,
                    "key_columns": [column.name for column in reading.key], "key_order": reading.key_order,
                    "since_key": list(since) if since else None, "until_key": until, "estimate": estimate,
                    "rate": rate, "backlog": backlog,
                    "state": "running" if until else "done",
                    "subscription": subscription and subscription.number,
                    "subscription_name": subscription and subscription.name,
                }  # fmt: skip
                try:
                    with connection.transaction():
                        [(number,)] = connection.execute(self._statements["insert"], given).fetchall()
                        self._log.record(connection, "backfill start", {"backfill": number, "table": source.spelt})
                except errors.UniqueViolation:
                    [before] = self._rows(connection, "unfinished", given)
                    raise RefusedError(
                        f"backfill {before.id} of {before.of} is not finished: it is {before.state}",
                        hint=f"cdc backfill resume {before.id} goes on, cdc backfill cancel {before.id} ends it",
                    ) from None
        return self.named(connection, str(number))

    def named(self, connection: psycopg.Connection, reference: str) -> Backfill:
        """The backfill of this number, or the latest of this table, one that is not finished first.

        Raises NotFoundError, and RefusedError for a table that has several that are not finished.
        """
        if reference.isdecimal() and len(reference) <= _DIGITS_MAX:
            given: dict[str, Any] = {"id": int(reference)}
        else:
            source, _ = tracking.find(connection, self._schema, reference)
            given = {"table_schema": source.namespace, "table_name": source.name}
        found = self._rows(connection, "one" if "id" in given else "latest", given)
        if not found:
            raise NotFoundError(f"there is no backfill {reference}", hint="`cdc backfill status` lists them")
        if all(each.state in UNFINISHED for each in found) and len(found) > 1:
            those = ", ".join(f"{each.id} of {each.of}" for each in found)
            raise RefusedError(
                f"{reference} has several backfills that are not finished: {those}",
                hint="give the number of one",
            )
        return found[0]

    def newest(self, connection: psycopg.Connection) -> list[Backfill]:
        """The last hundred, newest first."""
        return self._rows(connection, "newest", {})

    def set_state(self, connection: psycopg.Connection, backfill: Backfill, to: str, states: Sequence[str]) -> None:
        """Raises RefusedError unless it is in one of these states. Whoever works on it ends after its page."""
        given = {"id": backfill.id, "to": to, "states": list(states)}
        with _server_names(connection), _explained(), bounded(connection):
            changed = connection.execute(self._statements["set_state"], given)
            target = {"backfill": backfill.id, "table": backfill.table}
            self._log.record(connection, f"backfill {_DEEDS[to]}", target, changed.rowcount)
        if not changed.rowcount:
            now = self.named(connection, str(backfill.id))
            raise RefusedError(f"backfill {backfill.id} of {backfill.table} is {now.state}; nothing was changed")

    def resume(
        self,
        connection: psycopg.Connection,
        backfill: Backfill,
        *,
        condition: str | None = None,
        rate: float | None = None,
        backlog: int | None = None,
    ) -> Backfill:
        """Let it run, and change its pace where that is not None.

        Raises RefusedError for one that ended, and for one that ``work`` would refuse with this condition.
        """
        with _server_names(connection):
            _refuse_condition(connection, backfill, condition)
        self.set_state(connection, backfill, "running", UNFINISHED)
        given = {"id": backfill.id, "rate": rate or backfill.rate, "backlog": backlog or backfill.backlog}
        with _server_names(connection):
            connection.execute(self._statements["set_pace"], given)
        return self.named(connection, str(backfill.id))

    def work(
        self, connection: psycopg.Connection, backfill: Backfill, *, condition: str | None = None
    ) -> Iterator[Progress]:
        """Read and write until it is done, paused or cancelled; yields after each page, and before it waits.

        The caller waits as long as ``waits`` says. ``condition``: repeats that of a backfill which another role
        started. Raises RefusedError while another session works on it, or where the table is not what it was.
        """
        lock = {"lock": _LOCK, "schema": self._schema, "id": backfill.id}
        with _server_names(connection) as path:
            [(taken,)] = connection.execute(self._statements["lock"], lock).fetchall()
            if not taken:
                raise RefusedError(
                    f"another session works on backfill {backfill.id} of {backfill.table}",
                    hint="if its host is gone, the server ends that session within a minute: see cdc backfill status",
                )
            try:
                with _explained():
                    _refuse_condition(connection, backfill, condition)
                    reading = self._reading(connection, backfill, path)
                    while True:
                        try:
                            yield from self._pages(connection, backfill, reading)
                        except (*_MISSING, errors.CannotCoerce):  # its columns may have changed
                            before, reading = reading, self._reading(connection, backfill, path)
                            if reading.columns == before.columns:
                                raise
                            backfill = self.named(connection, str(backfill.id))
                        else:
                            return
            finally:
                with suppress(psycopg.Error):  # the end of the session frees it as well
                    connection.execute(self._statements["unlock"], lock)

    def _reading(self, connection: psycopg.Connection, backfill: Backfill, path: str) -> BackfillTable:
        """Raises NotFoundError or RefusedError where the table is not what it was when the backfill was started."""
        source, triggers = tracking.find(connection, self._schema, backfill.table)
        the_arguments(source, triggers)
        reading = BackfillTable(connection, self._schema, source, condition=backfill.condition, path=path)
        _refuse_changed_key(reading, source, backfill)
        try:
            reading.check(None)
        except UsageError as wrong:
            raise RefusedError(
                f"backfill {backfill.id} cannot go on: {wrong}", hint=_begin_again(source, backfill)
            ) from None
        return reading

    def _pages(self, connection: psycopg.Connection, backfill: Backfill, reading: BackfillTable) -> Iterator[Progress]:
        pace = BackfillPace(rate=backfill.rate, backlog=backfill.backlog)
        unsettled: list[UUID] = []
        progress = Progress(backfill.examined, backfill.written)
        looked_at = -inf
        while progress.state == "running":
            if len(unsettled) > pace.wants_count:
                unsettled = self._ids(connection, backfill, "unsettled", {"ids": unsettled})
            turn = pace.next(len(unsettled), began := time.monotonic())
            if isinstance(turn, Wait):
                if began - looked_at >= _LOOK_S:
                    looked_at = began
                    row = connection.execute(self._statements["state"], {"id": backfill.id}).fetchone()
                    progress = replace(progress, state=row[0] if row else "cancelled")
                yield replace(progress, waits=turn, unsettled=len(unsettled))
                continue
            try:
                done = self._page(connection, backfill, reading, turn)
            except errors.LockNotAvailable:
                pace.locked(time.monotonic())
                continue
            pace.done(turn, done.seqs, began, looked_at := time.monotonic())
            unsettled += done.ids
            progress = Progress(progress.examined + done.examined, progress.written + len(done.ids), done.state)
            yield replace(progress, unsettled=len(unsettled))

    def _page(self, connection: psycopg.Connection, backfill: Backfill, reading: BackfillTable, size: Page) -> _Page:
        """Raises LockNotAvailable, and has done nothing then."""
        with connection.transaction():
            connection.execute(_SETTINGS)
            turn = connection.execute(self._statements["turn"], {"id": backfill.id}).fetchone()
            if turn is None or turn[0] != "running":
                return _Page(turn[0] if turn else "cancelled")
            since, after, until = backfill.since_key, turn[1], backfill.until_key
            edge = reading.edge(size, since, after, until) if until else None
            if edge is None:
                connection.execute(
                    self._statements["set_state"], {"id": backfill.id, "to": "done", "states": ["running"]}
                )
                return _Page("done")
            last, examined = edge
            self._refuse_dropped(connection, backfill)
            written = reading.write(backfill.id, since, after, last, backfill.subscription)
            failpoints.here("backfill.after_write")
            given = {"id": backfill.id, "after_key": last, "examined": examined}
            given |= {"seqs": written.seqs, "shards": written.shards}
            ids = self._ids(connection, backfill, "advance", given)
            if len(ids) != len(written.seqs):  # an earlier capture_rows() writes for all
                raise SchemaError("the outbox does not fit this version", hint="run: cdc db upgrade")
            failpoints.here("backfill.before_commit")
        failpoints.here("backfill.after_commit")
        return _Page("running", examined, written.seqs, ids)

    def _refuse_dropped(self, connection: psycopg.Connection, backfill: Backfill) -> None:
        if backfill.subscription is None:
            return
        asked = {"subscription": backfill.subscription}
        [(there,)] = connection.execute(self._statements["subscribed"], asked).fetchall()
        if not there:
            raise RefusedError(
                f"backfill {backfill.id} is for the subscription {backfill.subscription_name}, which was dropped",
                hint=f"cdc backfill cancel {backfill.id}; for another one of that name, begin again",
            )

    def _ids(
        self, connection: psycopg.Connection, backfill: Backfill, statement: str, given: dict[str, Any]
    ) -> list[UUID]:
        statements = self._statements if backfill.subscription is None else self._for_one
        parameters = {**given, "subscription": backfill.subscription}
        return [id_ for (id_,) in connection.execute(statements[statement], parameters).fetchall()]

    def _rows(self, connection: psycopg.Connection, statement: str, given: dict[str, Any]) -> list[Backfill]:
        asked = {**given, "lock": _LOCK, "schema": self._schema}
        with _server_names(connection), _explained(), connection.cursor(row_factory=dict_row) as cursor:
            return [Backfill(**row) for row in cursor.execute(self._statements[statement], asked).fetchall()]


_SETTINGS = """
SELECT set_config('statement_timeout', '120s', true), set_config('lock_timeout', '200ms', true),
  set_config('timezone', 'UTC', true), set_config('enable_seqscan', 'off', true),
  set_config('enable_sort', 'off', true), set_config('enable_bitmapscan', 'off', true)
"""
"""The key's index gives the rows in order, whatever the statistics say. Times without a zone are UTC in a condition."""


_MISSING = (errors.UndefinedTable, errors.UndefinedFunction, errors.UndefinedColumn)


@contextmanager
def _server_names(connection: psycopg.Connection) -> Iterator[str]:
    """Names are the server's own meanwhile, whatever the user's search_path has, which is given."""
    [(path,)] = connection.execute("SELECT pg_catalog.current_setting('search_path')").fetchall()
    switch = "SELECT pg_catalog.set_config('search_path', %s, false)"
    connection.execute(switch, ["pg_catalog"])
    try:
        yield path
    finally:
        with suppress(psycopg.Error):
            connection.execute(switch, [path])


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of the server, without what they quote: that may be a row."""
    try:
        yield
    except _MISSING as missing:
        raise SchemaError(
            f"the outbox does not fit this version: {missing.diag.message_primary}", hint="run: cdc db upgrade"
        ) from None
    except errors.AmbiguousFunction:
        raise RefusedError(
            "the values of the primary key cannot be compared: somebody has given their type an implicit cast",
            hint="DROP CAST, or create it again AS ASSIGNMENT",
        ) from None
    except errors.InsufficientPrivilege as denied:
        raise RefusedError(
            f"the role may not do this: {denied.diag.message_primary}",
            hint="what an operator needs for a backfill is in docs/operations/roles.md",
        ) from None
    except (errors.DataError, errors.ProgramLimitExceeded, errors.RaiseException) as failed:
        raise CdcError(
            f"the server cannot read a row: {failed.sqlstate}",
            hint="where --where computes: write it so that no row fails; a row of hundreds of MB: leave it out",
        ) from None


def _refuse_other_key(reading: BackfillTable, source: SourceTable, since: Sequence[str] | None) -> None:
    if since is not None and len(since) != len(reading.key):
        raise UsageError(
            f"--since is a value of the primary key of {source.spelt}, which has {len(reading.key)} columns",
            hint=f"--since {','.join(column.name for column in reading.key)}",
        )


def _refuse_type(source: SourceTable, tracked: Tracked, subscription: Subscription) -> None:
    types = subscription.types
    if types is not None and tracked.effective_type not in types:
        raise RefusedError(
            f"the subscription {subscription.name} does not take the type {tracked.effective_type} of {source.spelt}",
            hint=f"it takes {subscription.taking}",
        )


def _refuse_changed_key(reading: BackfillTable, source: SourceTable, backfill: Backfill) -> None:
    if reading.key_order != backfill.key_order:
        raise key_is_another(source, hint=_begin_again(source, backfill))


def _begin_again(source: SourceTable, backfill: Backfill) -> str:
    option = f" --subscription {backfill.subscription_name}" if backfill.subscription else ""
    return f"begin again: cdc backfill cancel {backfill.id}; cdc backfill {source.spelt}{option}"


def _refuse_condition(connection: psycopg.Connection, backfill: Backfill, condition: str | None) -> None:
    """Somebody else's SQL would run with this role's rights."""
    [(role,)] = connection.execute("SELECT current_user::text").fetchall()
    if (
        backfill.condition is None
        or condition == backfill.condition
        or (condition is None and role == backfill.started_by)
    ):
        return
    raise RefusedError(
        f"backfill {backfill.id} of {backfill.table} has a condition of {backfill.started_by}, which would run with the"
        f" rights of {role}",
        hint="read it (cdc backfill status), and if it is harmless give it again: --where",
    )
