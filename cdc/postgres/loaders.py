"""How documents and texts of the outbox are loaded: lazily for a consumer, tolerant of any content for an operator."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import psycopg
from psycopg.abc import AdaptContext
from psycopg.adapt import Buffer, Loader
from psycopg.pq import Format
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.string import ByteaBinaryLoader

from cdc.core.fast_change import Json
from cdc.core.model import Operation

_NO_ENCODING = "SQL_ASCII"


class _Operations(dict[Buffer, Operation]):
    def __missing__(self, data: Buffer) -> Operation:
        # Without quoting it: it may be anything, of any length.
        raise psycopg.DataError("its operation is none that this version knows")


_OPERATIONS = _Operations({operation.value.encode(): operation for operation in Operation})


class _KnownOperation(Loader):
    format = Format.BINARY
    load = _OPERATIONS.__getitem__  # type: ignore[assignment]  # a function of ours would be called for each row


def read_changes(connection: psycopg.AsyncConnection[Any]) -> None:
    """From now on this connection loads documents and operations of changes, in the types that outbox.sql gives them.

    Documents are raw values: most handlers need one of the three that a change may have, and some need none. A read
    that finds an operation it does not know raises DataError.
    """
    connection.adapters.register_loader("varchar", ByteaBinaryLoader)
    connection.adapters.register_loader("bpchar", _KnownOperation)


def read_anything(connection: psycopg.Connection[Any]) -> None:
    """From now on a text may hold any bytes, shown as escapes where they are not UTF-8, and a document any content.

    A time that Python does not have, infinite or of a year it does not count, is None.

    Only a database without an encoding holds such texts; the server is set to convert nothing there.
    """
    connection.adapters.register_loader("jsonb", _AnyJson)
    connection.adapters.register_loader("timestamptz", _AnyTime)
    if connection.info.parameter_status("server_encoding") == _NO_ENCODING:
        connection.execute("SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false)")
        connection.adapters.register_loader("text", _AnyText)


class _AnyTime(Loader):
    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        self._usual = TimestamptzLoader(oid, context)

    def load(self, data: Buffer) -> datetime | None:
        try:
            return self._usual.load(data)
        except psycopg.DataError:
            return None


class _AnyText(Loader):
    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", "backslashreplace")


def _json_text(data: Buffer) -> str:
    # As backslashreplace would, with the backslash escaped as JSON has it.
    return re.sub(
        "[\udc80-\udcff]",
        lambda found: f"\\\\x{ord(found[0]) - 0xDC00:02x}",
        bytes(data).decode("utf-8", "surrogateescape"),
    )


class _AnyJson(Loader):
    """A document, or its text where Python cannot read it: numbers of thousands of digits, thousands of levels."""

    def load(self, data: Buffer) -> Any:
        return _read(_json_text(data), as_it_is=False)


class VerbatimJson(Loader):
    """The same for display: what Python can read is Json, with the digits that the database has."""

    def load(self, data: Buffer) -> Json | str:
        shown: Json | str = _read(_json_text(data), as_it_is=True)
        return shown


def _read(text: str, *, as_it_is: bool) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return Json(text.encode()) if as_it_is else value
