"""Every statement of the consumer on ``entity_changes``. Takes the connection, never opens one."""

from __future__ import annotations

import itertools
import shlex
import time
from collections import Counter
from collections.abc import Awaitable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from operator import attrgetter, itemgetter
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import errors, sql

from cdc.core import failpoints
from cdc.core.admission import Row
from cdc.core.attempts import KEPT
from cdc.core.deferred_keys import KeyRead
from cdc.core.errors import SchemaError
from cdc.core.model import SHARDS, Change, Key, Suspicion, WakeUp
from cdc.core.page_size import BYTES
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.shard_cursor import Scanned
from cdc.core.subscription import DEFAULT
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.postgres import grants
from cdc.postgres.coalesced import CoalescedChanges
from cdc.postgres.kept_floors import KeptFloors
from cdc.postgres.outcomes import Divided, divide, settle_values
from cdc.postgres.pages import (
    COUNT_BOUND,
    DuePage,
    Figures,
    KeyPage,
    Marked,
    OutboxPage,
    Place,
    Settled,
    change_row,
    cut_short,
    page_of,
)  # fmt: skip
from cdc.postgres.sql_files import NONE_STANDS, load
from cdc.postgres.unreadable import RefusedReadError, RefusedRows, may_be_refused
from cdc.postgres.watched import WatchedConnection, rows_of

INDEXED = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
"""``session`` settings for connections that run these statements: every one of them must use an index.

By default the planner plans each call again, with statistics that are wrong as soon as they are taken: it scans a
queue that was analysed while empty. Measured: 0.15 ms a fetch with these, 0.75 ms without, after 2,000 rows."""
READ_LIMITS = {"statement_timeout": "60s", "lock_timeout": "20s"}
READ_SESSION = {**INDEXED, **READ_LIMITS}
"""The same for who reads changes. The lock timeout is the shorter one, so that waiting for a lock is not taken for a
read that takes too long."""
READ_LIMIT_S = 65.0
"""For an answer to such a session; longer than its statement_timeout."""

CRASHED = "the consumer's process ended while this change's handler ran"
"""The last_error and error_summary of a change that was running when its consumer died."""

_ID, _SEQ, _SHARD, _REQUEUED = map(attrgetter, ("id.hex", "seq", "shard", "requeued"))
_FIRST, _DEPTH = itemgetter(0), attrgetter("change.depth")
_SCAN_MAX = 20_000
"""Rows that a sweep of some types examines: some 20 ms. Other reads wait no longer than that."""
_ROWS_EXAMINED_PER_SHARD = 500
"""Fresh changes examined in search of one that nothing blocks."""
_ROWS_EXAMINED_OF_ALL_TYPES = 200
"""The same for a consumer of some types, whose changes may lie behind any number of others: some 10 us each."""
_OUTSIDE_MAX = 100
FIRST_TYPE, _LAST_TYPE = -(1 << 63), (1 << 63) - 1
"""Waiting types are visited in the order of their hashes."""
TYPES_MAX = 1_000
"""Types that one read of due changes visits: some 20 ms, however many there are."""
_RIGHTS = {
    "state": list(grants.STATE), "shard_rights": list(grants.SHARD_RIGHTS), "floor_rights": list(grants.FLOOR_RIGHTS),
    "barrier_rights": list(grants.BARRIER_RIGHTS), "attempt_rights": list(grants.ATTEMPT_RIGHTS),
}  # fmt: skip
_NO_CHAIN = "what led to it cannot be read"
_CHAIN_MAX = 100  # changes that it names: more do not fit into last_error


class Store:
    """The statements for the outbox in ``schema``, limited to the types in ``scope``.

    A change deeper than ``max_chain_depth`` is read with its chain. A read returns at most ``page_bytes`` of texts
    and one change. Changes are read on sessions where ``read_changes`` was called. ``observes``: nothing is started, so
    no read looks at the barriers, and no right on them is needed.
    """

    session: Mapping[str, str] = INDEXED
    """Of connections that run these statements."""

    def __init__(
        self, schema: str, max_chain_depth: int = 16, scope: TypeFilter = EVERYTHING, *, page_bytes: int = BYTES,
        observes: bool = False,
    ) -> None:  # fmt: skip
        self._statements = load("outbox.sql", schema, instead={"barred": "false", **NONE_STANDS} if observes else None)
        self.process = uuid4()
        """Identifies this process as the one that started a change, or owns a shard."""
        self._always: dict[str, Any] = {
            "process": self.process, "page_bytes": page_bytes, "skipped": "{}", "subscription_name": DEFAULT,
            "attempts_kept": KEPT,
        }  # fmt: skip
        self.refused = RefusedRows(schema, given=self._always)
        self.coalesced = CoalescedChanges(load("coalesced.sql", schema), self._always)
        self._max_chain_depth = max_chain_depth
        self.scope = scope
        self._everything = scope.everything
        self._table = sql.Identifier(schema, "entity_changes").as_string(None)
        self._floors = KeptFloors(schema)
        self._option = "" if schema == "public" else f" --schema {shlex.quote(schema)}"

    async def check(self, reader: psycopg.AsyncConnection, *, settles: bool = True) -> None:
        """Raises SchemaError where the table is missing or of an older version, or this role lacks rights.

        ``settles``: also checks the rights to settle.
        """
        await self._refuse_filtered(reader)
        try:
            await reader.execute(self._statements["check"], {})
        except (errors.UndefinedTable, errors.InvalidSchemaName):
            raise SchemaError(f"there is no table {self._table}", hint=f"run: cdc db install{self._option}") from None
        except errors.UndefinedColumn as missing:
            raise SchemaError(
                f"{self._table} does not fit this version: {missing.diag.message_primary}",
                hint=f"run: cdc db upgrade{self._option}",
            ) from None
        except errors.InsufficientPrivilege as refused:
            raise SchemaError(
                f"the role may not read {self._table}: {refused.diag.message_primary}",
                hint=f"run: cdc db grant{self._option} --consumer ROLE",
            ) from None
        if not settles:
            return
        try:
            denied = await self._rows(reader, "missing_rights", _RIGHTS)
        except (errors.UndefinedTable, errors.UndefinedFunction) as missing:
            raise SchemaError(
                f"the outbox does not fit this version: {missing.diag.message_primary}",
                hint=f"run: cdc db upgrade{self._option}",
            ) from None
        if denied:
            lacking = [f"{rights} ON {table}" for rights, table in denied]
            raise SchemaError(
                f"the role may not settle changes: it has no {', no '.join(lacking)}",
                hint=f"run: cdc db grant{self._option} --consumer ROLE",
            )
        self._floors.begin()

    async def _refuse_filtered(self, reader: psycopg.AsyncConnection) -> None:
        """Filtered rows would look like an outbox without work."""
        if filtered := [name for (name,) in await self._rows(reader, "filtered", {})]:
            raise SchemaError(
                f"row-level security hides rows of {' and '.join(filtered)} from the role",
                hint="ALTER TABLE ... DISABLE ROW LEVEL SECURITY (who has no rights reads nothing either), "
                "or ALTER ROLE ... BYPASSRLS",
            )

    def skip(self, seqs: Iterable[int]) -> None:
        """Leave these changes out of every read from now on. They replace those of the call before."""
        self._always["skipped"] = as_array(seqs)

    async def fetch(self, reader: psycopg.AsyncConnection, wakeups: Collection[WakeUp]) -> OutboxPage:
        if len(wakeups) > 1:
            wakeups = sorted(wakeups)
        parameters = self._numbers(wakeups)
        if self._everything:
            name = "fetch" if len(wakeups) > 1 else "fetch_one"
            try:  # not by ``_rows``: each layer is a step of its own
                records = await self._answer(reader, name, parameters)
            except psycopg.Error as error:
                if may_be_refused(name, error):
                    raise RefusedReadError(name, parameters, error) from error
                raise
            page = page_of(records)
            return await self._page(reader, records) if self._any_deep(page.rows) else page
        types, include = self.scope
        records = await self._rows(reader, "fetch_some", {**parameters, "types": list(types), "among": include})
        ours = [record for record in records if record[3] is not None]
        others = frozenset(record[2] for record in records if record[2] is not None and record[3] is None)
        page = await self._page(reader, ours or [(*records[0][:2], None, None)], first_column=3)
        return page._replace(others=others)

    async def sweep(self, reader: psycopg.AsyncConnection, sweep: Sweep) -> OutboxPage:
        positions = sweep.positions.values()
        parameters: dict[str, Any] = {
            "shards": as_array(sweep.positions), "per_shard": sweep.per_shard,
            "floors": as_array(position.floor for position in positions),
            "cursors": as_array(position.cursor for position in positions),
            "since": as_array(_xid(position.since) for position in positions),
        }  # fmt: skip
        if not sweep.scope.everything:
            return await self._sweep_some(reader, sweep, parameters)
        page = await self._page(reader, await self._rows(reader, "sweep", parameters))
        if not page.cut:
            return page
        counts = Counter(row.change.shard for row in page.rows)
        last = {row.change.shard: row.change.seq for row in page.rows}
        ends = {shard: Scanned(seq, counts[shard] >= sweep.per_shard) for shard, seq in last.items()}
        return page._replace(scanned=ends | cut_short(page))

    async def _sweep_some(
        self, reader: psycopg.AsyncConnection, sweep: Sweep, parameters: dict[str, Any]
    ) -> OutboxPage:
        """A sweep of one type, or of all but some."""
        scan = max(sweep.per_shard, _SCAN_MAX // len(sweep.positions))
        parameters |= {"types": list(sweep.scope.types), "among": sweep.scope.include, "scan": scan}
        records = await self._rows(reader, "sweep_some", parameters)
        found = [record for record in records if record[2] is None]
        page = await self._page(reader, found or [(*records[0][:4], None)], first_column=4)
        # Of each shard the last row: that of a full page, or the one without a change.
        last = {record[5]: record for record in records if record[5] is not None}
        scanned = {
            shard: Scanned(seq, more=True) if reached is None else Scanned(reached, walked >= scan)
            for shard, (_, _, reached, walked, seq, *_) in last.items()
        }
        return page._replace(scanned=scanned | cut_short(page))

    async def read_keys(
        self, reader: psycopg.AsyncConnection, key_reads: Sequence[KeyRead], per_key: int
    ) -> dict[KeyRead, KeyPage]:
        """The next ``per_key`` changes of each key."""
        parameters = {
            "shards": [each.shard for each in key_reads], "types": [each.key[0] for each in key_reads],
            "ids": [each.key[1] for each in key_reads], "seqs": [each.seq for each in key_reads], "per_key": per_key,
        }  # fmt: skip
        records = await self._rows(reader, "read_keys", parameters)
        fitting = [record for record in records if record[3] is not None]
        cut = {record[0] for record in records if record[3] is None}
        found: dict[int, list[Row]] = {place: [] for place in range(1, len(key_reads) + 1)}
        rows = [change_row(record[1:]) for record in fitting]
        if self._any_deep(rows):
            rows = await self._with_chains(reader, rows)
        for record, row in zip(fitting, rows, strict=True):
            found[record[0]].append(row)
        return {key_reads[place - 1]: KeyPage(rows, place in cut) for place, rows in found.items()}

    async def due(
        self,
        reader: psycopg.AsyncConnection,
        shards: Iterable[int],
        limit: int,
        without: Iterable[str] = (),
        *,
        start: int = FIRST_TYPE,
        in_window: Iterable[int] = (),
    ) -> DuePage:
        """Due changes that wait for a retry, each type in turn, except the types in ``without``.

        ``start`` is where the previous call ended, if it did not visit all types. Changes ``in_window`` are not read,
        but they count for ``limit``.
        """
        types, include = self.scope.without(without)
        parameters = {"shards": list(shards), "types": list(types), "among": include, "from": start,
                      "types_max": TYPES_MAX}  # fmt: skip
        # In this order: a change that becomes due between the two is in both. In the other order it is in neither.
        [(next_due_s, last)] = await self._rows(reader, "next_due", parameters)
        found = await self._rows(reader, "due", {**parameters, "limit": limit, "skipped": as_array(in_window)})
        fitting = [record for record in found if record[2] is not None]
        rows = [change_row(record, requeued=True) for record in fitting]
        if self._any_deep(rows):
            rows = await self._with_chains(reader, rows)
        more = len(found) == limit or any(record[0] is not None and record[2] is None for record in found)
        return DuePage(rows, next_due_s, None if last is None or last == _LAST_TYPE else last + 1, more)

    async def settle(
        self,
        session: psycopg.AsyncConnection,
        batch: Sequence[Settlement],
        *,
        maybe_written: Container[int] = (),
        around_locks: bool = False,
    ) -> Settled:
        """Record outcomes, all or none, on the session that holds the shard locks.

        ``maybe_written``: the seqs of changes that may be recorded already. ``around_locks``: leave out the keys of
        which another session holds a change.
        """
        failpoints.here("settle.before_commit")
        self._floors.settled()
        locked: list[Settlement] = []
        if around_locks:
            async with session.transaction():
                keys = await self._locked(session, batch)
                locked = [finished for finished in batch if finished.change.key in keys]
                batch = [finished for finished in batch if finished.change.key not in keys]
                counts = await self._settle(session, divide(batch), maybe_written)
        else:
            divided = divide(batch)
            if divided.others or divided.groups:
                counts = await self._settle(session, divided, maybe_written)
            else:
                counts = await self._settle_plain(session, divided.plain)
        failpoints.here("settle.after_commit")
        return Settled(len(batch) - sum(map(_FIRST, counts)), counts[-1][1], locked)

    async def _settle(
        self,
        session: psycopg.AsyncConnection,
        divided: Divided,
        maybe_written: Container[int],
    ) -> list[tuple[int, datetime]]:
        """Returns how many were recorded, and when, by statement; without what was coalesced into one of them."""
        plain, others, groups = divided
        if groups or (plain and others):
            # One transaction: a retried change and its successor may both be in this batch. A crash between two
            # commits would leave the successor marked, and its predecessor would run again.
            async with session.transaction():
                if groups:
                    await self.coalesced.settle(session, groups)
                counts = await self._settle_plain(session, plain) if plain else []
                failpoints.here("settle.between_marks")
                if others:
                    counts += await self._settle_others(session, others, maybe_written)
                return counts
        if others:
            return await self._settle_others(session, others, maybe_written)
        return await self._settle_plain(session, plain)

    def _settle_plain(self, session: psycopg.AsyncConnection, plain: Sequence[Change]) -> Awaitable[list[Any]]:
        return self._answer(session, "settle_processed", self._numbers(plain))

    async def _locked(self, session: psycopg.AsyncConnection, batch: Sequence[Settlement]) -> set[Key]:
        """The keys of changes that another session has locked; the others are locked until the transaction ends."""
        keys = {finished.change.id: finished.change.key for finished in batch}
        found = await self._rows(session, "lock", {"ids": list(keys)})
        left = list(keys.keys() - {id_ for (id_,) in found})
        there = await self._rows(session, "there", {"ids": left}) if left else []
        locked = {keys[id_] for (id_,) in there}
        if groups := divide(batch).groups:
            locked |= await self.coalesced.locked(session, groups)
        return locked

    async def marked_since(self, reader: psycopg.AsyncConnection, after: Place | None, limit: int) -> Marked:
        """Changes marked processed after that place. With None: no changes, only the clock."""
        types, include = self.scope
        at, row = after or (None, None)
        parameters = {"after": at, "place": row, "limit": limit, "types": list(types), "among": include}
        records = await self._rows(reader, "marked_since", parameters)
        now: datetime = records[0][0]
        found = [record for record in records if record[1] is not None]
        # Rows of other types have no number either.
        read = list(itertools.takewhile(lambda record: record[3] is None or record[5] is not None, found))
        marks = [(change_row(record[3:]).change, record[1]) for record in read if record[3] is not None]
        more = len(found) == limit or len(read) < len(found)
        return Marked(now, marks, Place(read[-1][1], read[-1][2]) if more and read else None)

    def take(self, changes: Sequence[Change], cause: Change) -> tuple[bytes, dict[str, Any]]:
        """The statement that locks these on a transactional handler's connection, of either kind: a row each.

        What the transaction writes from then on is caused by ``cause``.
        """
        return self._statements["take"], {
            "ids": as_array(map(_ID, changes)), "cause": cause.cause,
            "requeued": as_array(map(_REQUEUED, changes)),
            "failures": as_array(change.attempt - 1 for change in changes),
        }  # fmt: skip

    def cause(self, change: Change) -> tuple[bytes, dict[str, Any]]:
        """What the transaction writes from now on is caused by this change."""
        return self._statements["cause"], {"cause": change.cause}

    def mark(self, changes: Sequence[Change], xid: str) -> tuple[bytes, dict[str, Any]]:
        """The statement that marks what ``take`` locked, if the transaction still has this id."""
        self._floors.settled()
        return self._statements["mark"], {"ids": as_array(map(_ID, changes)), "xid": xid}

    async def start(
        self, session: psycopg.AsyncConnection, changes: Sequence[Change], handlers: Sequence[str | None]
    ) -> set[UUID]:
        """Record that this process starts these. A suspect's earlier start is counted as a failed attempt.

        Returns the ids of the changes recorded: without those that another session has locked or settled.
        """
        parameters = {
            "ids": [change.id for change in changes], "failures": [change.attempt - 1 for change in changes],
            "errors": [CRASHED if change.crashed else None for change in changes], "handlers": list(handlers),
        }  # fmt: skip
        return {id_ for (id_,) in await self._rows(session, "start", parameters)}

    async def unstart(self, session: psycopg.AsyncConnection, changes: Sequence[Change]) -> None:
        """Take back the record of a start: these calls were cancelled."""
        ids = [change.id for change in changes]
        await session.execute(self._statements["unstart"], {"ids": ids, "process": self.process})

    async def suspects(self, session: psycopg.AsyncConnection, change: Change) -> Suspicion:
        """Whether another process recorded that it started the change, and no outcome followed."""
        found = await self._rows(session, "suspect", {"id": change.id, "crashed": CRASHED})
        if not found:
            return Suspicion.NONE
        return Suspicion.AGAIN if found[0][0] else Suspicion.ONCE

    def doubt(self) -> None:
        """What was read before is no answer now."""

    def may_advance(self, now: float) -> bool:
        return self._floors.may_move(now)

    async def advance(self, session: psycopg.AsyncConnection, shards: Collection[int]) -> None:
        """Move the floors of these shards, on the session that owns them."""
        await self._floors.move(session, shards)

    def figures(self, connection: psycopg.Connection) -> Figures:
        """For the stats poller; bounded however large the table is."""
        parameters: dict[str, Any] = {"bound": COUNT_BOUND, "per_shard": _ROWS_EXAMINED_PER_SHARD, "shards": SHARDS}
        statement = "figures"
        if not self._everything:
            types, include = self.scope
            statement = "figures_some"
            parameters |= {
                "types": list(types), "among": include, "scan": _ROWS_EXAMINED_OF_ALL_TYPES,
                "from": FIRST_TYPE, "types_max": TYPES_MAX,
            }  # fmt: skip
        row = connection.execute(self._statements[statement], parameters).fetchone()
        assert row is not None
        return Figures(*row)

    def outside(self, connection: psycopg.Connection) -> dict[str, int]:
        """The types of fresh changes outside the scope, each with a lower bound of their number."""
        parameters = {"types": list(self.scope.types), "among": self.scope.include, "shards": SHARDS,
                      "scan": _ROWS_EXAMINED_OF_ALL_TYPES, "bound": _OUTSIDE_MAX}  # fmt: skip
        return dict(connection.execute(self._statements["outside"], parameters).fetchall())

    async def _settle_others(
        self, session: psycopg.AsyncConnection, batch: Sequence[Settlement], maybe_written: Container[int]
    ) -> list[tuple[int, datetime]]:
        encoding = session.info.parameter_status("server_encoding") or ""
        values = {**settle_values(batch, encoding, maybe_written, time.monotonic())}
        return await self._rows(session, "settle_others", values)

    async def _page(self, reader: psycopg.AsyncConnection, records: list[Any], first_column: int = 2) -> OutboxPage:
        page = page_of(records, first_column)
        return page._replace(rows=await self._with_chains(reader, page.rows)) if self._any_deep(page.rows) else page

    def _any_deep(self, rows: Sequence[Row]) -> bool:
        return max(map(_DEPTH, rows), default=0) > self._max_chain_depth

    async def _with_chains(self, reader: psycopg.AsyncConnection, rows: list[Row]) -> list[Row]:
        """The same rows; those that are too deep get the chain of their causes."""
        deep = [row.change.id for row in rows if row.change.depth > self._max_chain_depth]
        bound = min(2 * self._max_chain_depth, _CHAIN_MAX)
        try:
            chains = dict(await self._rows(reader, "chains", {"ids": deep, "bound": bound}))
        except RefusedReadError:
            chains = dict.fromkeys(deep, _NO_CHAIN)
        return [row._replace(change=replace(row.change, chain=chains.get(row.change.id))) for row in rows]

    async def _rows(self, connection: psycopg.AsyncConnection, name: str, parameters: dict[str, Any]) -> list[Any]:
        """The rows of the statement. Raises RefusedReadError where it reads changes and one of them is refused."""
        parameters = {**self._always, **parameters}
        try:
            return await self._answer(connection, name, parameters)
        except psycopg.Error as error:
            if may_be_refused(name, error):
                raise RefusedReadError(name, parameters, error) from error
            raise

    def _numbers(self, these: Collection[Change | WakeUp]) -> dict[str, Any]:
        """The parameters of a statement that names fresh changes by their numbers."""
        if len(these) == 1:  # most come alone
            [one] = these
            return {**self._always, "seqs": f"{{{one.seq}}}", "shards": f"{{{one.shard}}}"}
        return {
            **self._always,
            "seqs": f"{{{','.join(map(str, map(_SEQ, these)))}}}",
            "shards": f"{{{','.join(map(str, map(_SHARD, these)))}}}",
        }

    def _answer(
        self, connection: psycopg.AsyncConnection, name: str, parameters: dict[str, Any]
    ) -> Awaitable[list[Any]]:
        statement = self._statements[name]
        if isinstance(connection, WatchedConnection):  # as in rows_of, whose call each change would pay for
            return connection.rows(statement, parameters)
        return rows_of(connection, statement, parameters)


def as_array(values: Iterable[int | str]) -> str:
    """As PostgreSQL writes an array. The driver examines each element: a tenth of a small fetch's cost."""
    return f"{{{','.join(map(str, values))}}}"


def _xid(wide: int) -> int:
    """A 64-bit transaction id as the 32-bit one that rows carry. 3 is the first that is not special."""
    return max(wide & 0xFFFFFFFF, 3)
