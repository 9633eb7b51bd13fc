"""Handlers of every kind that a router takes, which all do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg

import cdc
from cdc.engine.dispatcher import OtherTasks

KINDS = ("waits", "at once", "sync", "transactional", "transactional sync", "batch", "transactional batch")


def handler(
    kind: str, handle: Callable[[Sequence[cdc.Change]], None], effect: str = "SELECT %s::bigint"
) -> Callable[..., Any]:
    """One of that kind. Before it calls ``handle`` with its change or changes, a transactional one executes ``effect``
    for each, with its number.
    """

    async def waits(change: cdc.Change) -> None:
        await OtherTasks()
        handle([change])

    async def at_once(change: cdc.Change) -> None:
        handle([change])

    def sync(change: cdc.Change) -> None:
        handle([change])

    async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute(effect.encode(), [change.seq])
        handle([change])

    def transactional_sync(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute(effect.encode(), [change.seq])
        handle([change])

    async def batch(changes: list[cdc.Change]) -> None:
        handle(changes)

    async def transactional_batch(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        for change in changes:
            await connection.execute(effect.encode(), [change.seq])
        handle(changes)

    functions: tuple[Callable[..., Any], ...] = (
        waits, at_once, sync, transactional, transactional_sync, batch, transactional_batch,
    )  # fmt: skip
    return dict(zip(KINDS, functions, strict=True))[kind]
