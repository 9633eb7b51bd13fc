"""Every statement of the consumer on ``entity_changes``. Takes the connection, never opens one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import errors, sql

from cdc import probe
from cdc.errors import SchemaError
from cdc.intake import Position, Snapshot
from cdc.lanes import Finished, Resume, Row
from cdc.model import Change, Committed, Dead, Discarded, Operation, Outcome, Processed, Skipped, Waiting, WakeUp
from cdc.outbox.statements import load

INDEXED = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
"""``session`` settings for connections that run these statements: each of them goes through an index, always.

Left to itself the planner plans each call anew, by statistics that are wrong as soon as they are taken: of a queue that
was analysed while empty it expects nothing and scans it. Measured: 0.15 ms a fetch, and 0.75 ms after 2,000 rows.
"""

_OPERATIONS = {operation.value: operation for operation in Operation}
_COUNT_BOUND = 10_001


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a read, in seq order within a shard, and the snapshot that showed them."""

    rows: list[Row]
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Settled:
    """``missed`` of the batch had been settled by somebody else. ``at`` is the database's clock."""

    missed: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts end at 10,001, which means "more"."""

    fresh: int
    waiting: int
    dead: int
    oldest_ready_age_s: float
    table_bytes: int
    dead_tuples: int


class Store:
    """The statements for the outbox in ``schema``."""

    def __init__(self, schema: str) -> None:
        self._statements = load("queries.sql", schema)
        self._table = sql.Identifier(schema, "entity_changes").as_string(None)
        self._option = "" if schema == "public" else f" --schema {shlex.quote(schema)}"

    async def check(self, reader: psycopg.AsyncConnection) -> None:
        """Raises SchemaError where the table is missing, is an older one, or may not be read and settled."""
        try:
            await reader.execute(self._statements["check"])
            denied = [name for (name,) in await self._rows(reader, "missing_rights", {})]
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
                hint=f"grant it USAGE on the schema, and: GRANT SELECT, UPDATE ON {self._table} TO ...",
            ) from None
        if denied:
            raise SchemaError(
                f"the role may not settle changes: no UPDATE on {', '.join(denied)} of {self._table}",
                hint=f"GRANT UPDATE ({', '.join(denied)}) ON {self._table} TO ...",
            )

    async def fetch(self, reader: psycopg.AsyncConnection, wakeups: Sequence[WakeUp]) -> Page:
        parameters = {"seqs": [w.seq for w in wakeups], "shards": [w.shard for w in wakeups]}
        return _page(await self._rows(reader, "fetch", parameters))

    async def sweep(self, reader: psycopg.AsyncConnection, positions: Mapping[int, Position], per_shard: int) -> Page:
        parameters = {
            "shards": list(positions),
            "floors": [position.floor for position in positions.values()],
            "cursors": [position.cursor for position in positions.values()],
            "since": [_xid(position.since) for position in positions.values()],
            "per_shard": per_shard,
        }
        return _page(await self._rows(reader, "sweep", parameters))

    async def resume(
        self, reader: psycopg.AsyncConnection, resumes: Sequence[Resume], per_key: int
    ) -> dict[Resume, list[Row]]:
        """The next ``per_key`` changes of each key."""
        parameters = {
            "shards": [resume.shard for resume in resumes],
            "types": [resume.key[0] for resume in resumes],
            "ids": [resume.key[1] for resume in resumes],
            "seqs": [resume.seq for resume in resumes],
            "per_key": per_key,
        }
        by_key = {resume.key: resume for resume in resumes}
        found: dict[Resume, list[Row]] = {resume: [] for resume in resumes}
        for record in await self._rows(reader, "resume", parameters):
            row = _row(record)
            found[by_key[row.change.key]].append(row)
        return found

    async def due(
        self, reader: psycopg.AsyncConnection, shards: Iterable[int], limit: int
    ) -> tuple[list[Row], float | None]:
        """Waiting changes that are due, and the seconds until the next one will be."""
        owned = list(shards)
        found = await self._rows(reader, "due", {"shards": owned, "limit": limit})
        rows = [_row(record, requeued=True) for record in found]
        [(next_due_s,)] = await self._rows(reader, "next_due", {"shards": owned})
        return rows, next_due_s

    async def settle(self, session: psycopg.AsyncConnection, batch: Sequence[Finished]) -> Settled:
        """Record outcomes, all or none, on the session that holds the shard locks."""
        plain = [f.change for f in batch if _is_plain(f)]
        others = [f for f in batch if not _is_plain(f)]
        probe.here("settle.before_commit")
        if plain and others:
            # One transaction: a retried change and its successor may both be in this batch, and a crash between two
            # commits would leave the successor marked and its predecessor to run again.
            async with session.transaction():
                counts = [await self._settle_plain(session, plain), await self._settle_others(session, others)]
        elif plain:
            counts = [await self._settle_plain(session, plain)]
        else:
            counts = [await self._settle_others(session, others)]
        probe.here("settle.after_commit")
        return Settled(len(batch) - sum(count for count, _ in counts), counts[-1][1])

    def take(self, changes: Sequence[Change]) -> tuple[bytes, dict[str, Any]]:
        """The statement by which a transactional handler's connection, of either kind, takes them: a row each."""
        return self._statements["take"], {
            "ids": [change.id for change in changes],
            "requeued": [change.requeued for change in changes],
            "failures": [change.attempt - 1 for change in changes],
        }

    def mark(self, changes: Sequence[Change], xid: str) -> tuple[bytes, dict[str, Any]]:
        """The statement that marks what ``take`` took, if the transaction is still the one with that id."""
        return self._statements["mark"], {"ids": [change.id for change in changes], "xid": xid}

    def figures(self, connection: psycopg.Connection) -> Figures:
        """For the collector; bounded however large the table is."""
        row = connection.execute(self._statements["figures"], {"bound": _COUNT_BOUND}).fetchone()
        assert row is not None
        return Figures(*row)

    async def _settle_plain(self, session: psycopg.AsyncConnection, changes: list[Change]) -> tuple[int, datetime]:
        parameters = {"seqs": [change.seq for change in changes], "shards": [change.shard for change in changes]}
        [(count, at)] = await self._rows(session, "settle_processed", parameters)
        return count, at

    async def _settle_others(self, session: psycopg.AsyncConnection, batch: list[Finished]) -> tuple[int, datetime]:
        columns = zip(*(_settle_values(finished.outcome) for finished in batch), strict=True)
        parameters: dict[str, Any] = {"ids": [finished.change.id for finished in batch]}
        names = ("processed", "dead", "pauses", "failed", "delays", "errors")
        parameters |= zip(names, map(list, columns), strict=True)
        [(count, at)] = await self._rows(session, "settle_others", parameters)
        return count, at

    async def _rows(self, connection: psycopg.AsyncConnection, name: str, parameters: dict[str, Any]) -> list[Any]:
        async with connection.cursor(binary=True) as cursor:
            await cursor.execute(self._statements[name], parameters)
            return await cursor.fetchall()


def _is_plain(finished: Finished) -> bool:
    """A fresh change that is done: what the statement ``settle_processed`` is for."""
    return not finished.change.requeued and isinstance(finished.outcome, Processed | Skipped)


def _settle_values(outcome: Outcome) -> tuple[bool, bool, bool, bool, float | None, str | None]:
    """(processed, dead, pauses, failed, delay_s, error) of the statement ``settle_others``."""
    match outcome:
        case Processed() | Skipped():
            return True, False, False, False, None, None
        case Discarded(reason):
            return True, False, False, False, None, f"discarded: {reason}"
        case Waiting(delay_s, error):
            return False, False, False, True, delay_s, error
        case Dead(error, pauses):
            return False, True, pauses, True, None, error
        case Committed():
            raise AssertionError("marked by its own transaction, so there is nothing to settle")


def _page(records: list[Any]) -> Page:
    xmin, next_xid = records[0][:2]
    # The snapshot comes with every row, and alone, with nulls, when there is none.
    rows = [] if records[0][2] is None else [_row(record[2:]) for record in records]
    return Page(rows, Snapshot(xmin, next_xid))


def _row(record: Sequence[Any], *, requeued: bool = False) -> Row:
    (seq, shard, id_, entity_type, entity_id, table_schema, table, operation, old, new, metadata, changed_at, failures,
     held) = record  # fmt: skip
    change = Change(
        id=id_,
        seq=seq,
        shard=shard,
        entity_type=entity_type,
        entity_id=entity_id,
        table_schema=table_schema,
        table=table,
        operation=_OPERATIONS[operation],
        old=old,
        new=new,
        metadata=metadata,
        changed_at=changed_at,
        attempt=failures + 1,
        requeued=requeued,
    )
    return Row(change, held)


def _xid(wide: int) -> str:
    """A 64-bit transaction id as the 32-bit one that rows carry. 3 is the first that is not special."""
    return str(max(wide & 0xFFFFFFFF, 3))
