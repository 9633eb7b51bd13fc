"""Handlers for the latest change of a key, of every kind, and what they have seen; and changes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

import cdc
from cdc.engine.dispatcher import OtherTasks

KINDS = ("async", "sync", "transactional", "transactional sync")
_UPDATE = """
SELECT publish_change('product', %(key)s, 'UPDATE', jsonb_build_object('n', n), jsonb_build_object('n', n - 1))
FROM generate_series(%(first)s::int, %(last)s::int) AS n ORDER BY n
"""


def declare(router: cdc.Router, kind: str, handle: Callable[[cdc.Change], None], **options: Any) -> None:
    async def in_loop(change: cdc.Change) -> None:
        await OtherTasks()
        handle(change)

    def sync(change: cdc.Change) -> None:
        handle(change)

    async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO effect VALUES (%s)", [change.seq])
        handle(change)

    def transactional_sync(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("INSERT INTO effect VALUES (%s)", [change.seq])
        handle(change)

    functions: tuple[Callable[..., Any], ...] = (in_loop, sync, transactional, transactional_sync)
    function = dict(zip(KINDS, functions, strict=True))[kind]
    router.on("product", latest=True, name="index", **options)(function)


def got(change: cdc.Change) -> tuple[Any, ...]:
    return change.operation, change.old and change.old["n"], change.new and change.new["n"], change.coalesced


def update(db: psycopg.Connection, first: int, last: int, key: str = "1") -> list[int]:
    return [seq for (seq,) in db.execute(_UPDATE, {"key": key, "first": first, "last": last})]
