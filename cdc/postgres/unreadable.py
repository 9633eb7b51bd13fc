"""Reads that fail because of one row: finding that row, and making it a dead letter without reading it.

The server converts each value when it sends it, and refuses the whole statement where one does not fit: a byte that is
not UTF-8 in a database without an encoding, a document whose text is longer than 1 GB, a damaged value. A value that
takes longer than the session's ``statement_timeout`` is refused as well, but only at a repeated try. A statement that
an operator cancelled ends with the same SQLSTATE, but before the timeout. An operation that this version does not
know is refused by the driver (``loaders``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg import errors

from cdc.core.page_size import PageSize
from cdc.core.sqlstate import About, about
from cdc.postgres.sql_files import load

_READS = {
    "fetch", "fetch_one", "fetch_some", "sweep", "sweep_some", "read_keys", "due", "marked_since", "chains", "ask",
}  # fmt: skip
_WORDS_MAX = 500
_TRIES = 2
_TIMEOUT = "SELECT setting::float8 / 1000 FROM pg_catalog.pg_settings WHERE name = 'statement_timeout'"
"""Returns seconds."""
NUMBERS = {
    "texts": "n.seq, n.id, n.entity_type, n.table_name, n.old_data, n.new_data, n.metadata",
    "no_texts": "NULL, NULL, NULL, NULL, NULL, NULL, NULL",
    "fits": "true AS fits",
    "columns": """
    coalesce(pg_column_size(c.old_data), 0) + coalesce(pg_column_size(c.new_data), 0)
      + coalesce(pg_column_size(c.metadata), 0), c.seq, c.id
    """,
}
"""What is read of changes whose values may not be converted. The size is that of the stored form, free of cost."""


_SUMMARY = "the database refuses to hand it over"
_SUMMARY_OF_DRIVER = "this version cannot read it"

Kind = tuple[str, str]
"""Entity type and operation."""


class RefusedReadError(psycopg.DataError):
    """``error`` is the server's, about a row that the statement ``name`` would have returned."""

    def __init__(self, name: str, parameters: Mapping[str, Any], error: psycopg.Error) -> None:
        super().__init__(_words(error))
        self.name = name
        self.parameters = parameters
        self.error = error

    @property
    def took_too_long(self) -> bool:
        return isinstance(self.error, errors.QueryCanceled)


class Refused(NamedTuple):
    """A change that is refused also when it is read alone.

    ``summary``: by whom. ``words``: the server's or the driver's, in ASCII. ``kind``: its type and operation;
    None where the type is refused, too.
    """

    seq: int
    id: UUID
    summary: str
    words: str
    kind: Kind | None


def may_be_refused(name: str, error: psycopg.Error) -> bool:
    """Whether the statement ``name`` reads changes, and the error may be about one of them."""
    return name in _READS and _may_be_about_a_row(error)


class RefusedRows:
    """The statements that find and mark refused rows, for the outbox in ``schema``."""

    def __init__(
        self,
        schema: str,
        *,
        numbers: Mapping[str, bytes] | None = None,
        mark: bytes | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """``numbers``, reads of NUMBERS alone, and ``mark``, with parameters besides: those of a subscription."""
        self._numbers = numbers or load("outbox.sql", schema, instead=NUMBERS)
        # With the documents, also of a change that a TRUNCATE keeps from starting.
        self._statements = load("unreadable.sql", schema, instead={"barred": "false"})
        self._mark, self._given = mark or self._statements["mark"], given or {}

    async def find(self, reader: psycopg.AsyncConnection, read: RefusedReadError) -> list[Refused]:
        """Changes of the read that are refused alone. Raises an error that is not about a row."""
        cursor = await reader.execute(_TIMEOUT)
        [(timeout_s,)] = await cursor.fetchall()
        cursor = await reader.execute(self._numbers[read.name], read.parameters, binary=True)
        records = [record[-3:] for record in await cursor.fetchall() if record[-1] is not None]
        found = {id_: seq for _, seq, id_ in sorted(records, key=lambda record: record[0])}
        alone = await self._halve(reader, list(found), {**read.parameters, "timeout_s": timeout_s}, fails=True)
        return [
            Refused(found[id_], id_, _summary(error), _words(error), await self._kind(reader, id_))
            for id_, error in alone.items()
        ]

    async def mark(
        self, session: psycopg.AsyncConnection, refused: Sequence[Refused], pauses: Callable[[Kind | None], bool]
    ) -> set[UUID]:
        """Make them dead letters, on the session that holds their shards. Returns the ids of those marked."""
        parameters = {
            **self._given,
            "ids": [each.id for each in refused],
            "errors": [f"{each.summary}: {each.words}" for each in refused],
            "summaries": [each.summary for each in refused],
            "pauses": [pauses(each.kind) for each in refused],
        }
        return {id_ for (id_,) in await (await session.execute(self._mark, parameters)).fetchall()}

    async def _halve(
        self, reader: psycopg.AsyncConnection, ids: Sequence[UUID], parameters: Mapping[str, Any], *, fails: bool
    ) -> dict[UUID, psycopg.Error]:
        """``ids``: the largest last. ``fails``: a read of these seems to fail; only for a single one this must be sure.

        A failed read of a document of hundreds of MB takes half a minute: this order causes only one.
        """
        if not ids:
            return {}
        if len(ids) == 1 or not fails:
            error = await self._refusal(reader, ids, parameters)
            if error is None:
                return {}
            if len(ids) == 1:
                return {ids[0]: error}
        half = len(ids) // 2
        first = await self._halve(reader, ids[:half], parameters, fails=False)
        return first | await self._halve(reader, ids[half:], parameters, fails=not first)

    async def _refusal(
        self, reader: psycopg.AsyncConnection, ids: Sequence[UUID], parameters: Mapping[str, Any]
    ) -> psycopg.Error | None:
        """The error, if any of these is refused, read page by page."""
        paging, left, tries = PageSize(), list(ids), _TRIES if len(ids) == 1 else 1
        while left:
            started = time.monotonic()
            try:
                page = left[: paging.rows]
                cursor = await reader.execute(self._statements["read"], {**parameters, "ids": page}, binary=True)
                records = await cursor.fetchall()
            except psycopg.Error as error:
                took_too_long = isinstance(error, errors.QueryCanceled)
                cancelled = took_too_long and time.monotonic() - started < parameters["timeout_s"]
                if cancelled or not _may_be_about_a_row(error):
                    raise
                tries -= took_too_long
                if not took_too_long or not tries:
                    return error
            else:
                read = [record for record in records if record[2] is not None]
                paging.read([sum(len(text or b"") for text in record[8:11]) for record in read])
                # Rows that are gone are not asked for again.
                left = page[len(read) : len(records)] + left[len(page) :]
        return None

    async def _kind(self, reader: psycopg.AsyncConnection, id_: UUID) -> Kind | None:
        try:
            record = await (await reader.execute(self._statements["kind"], {"id": id_})).fetchone()
        except psycopg.Error as error:
            if not _may_be_about_a_row(error):
                raise
            return None
        return record and (record[0], record[1])


def _may_be_about_a_row(error: psycopg.Error) -> bool:
    """A DataError without an SQLSTATE is the driver's: a value that Python does not have."""
    return isinstance(error, psycopg.DataError | errors.QueryCanceled) or about(error.sqlstate) is About.ROW


def _summary(error: psycopg.Error) -> str:
    return _SUMMARY if error.sqlstate else _SUMMARY_OF_DRIVER


def _words(error: psycopg.Error) -> str:
    words = f"{error.diag.message_primary or error} [{error.sqlstate or type(error).__name__}]"
    return words.replace("\0", "").encode("ascii", "backslashreplace").decode()[:_WORDS_MAX]
