"""Handlers for consumers that run as processes. Each call leaves a row in ``calls``, committed on its own."""

from __future__ import annotations

import asyncio
import os
import threading

import psycopg

import cdc

router = cdc.Router()
_links: dict[str, psycopg.AsyncConnection] = {}
_lock = asyncio.Lock()


async def _link() -> psycopg.AsyncConnection:
    """A connection of the handler's own; made again when the server has been away."""
    async with _lock:
        link = _links.get("only")
        if link is None or link.closed or link.broken:
            link = _links["only"] = await psycopg.AsyncConnection.connect(os.environ["CDC_DSN"], autocommit=True)
        return link


@router.on("counted")
async def count(change: cdc.Change) -> None:
    """Records the call, then takes as long as the row says; all that time it may also block the event loop."""
    link = await _link()
    await link.execute(
        "INSERT INTO calls (seq, key, attempt, pid) VALUES (%s, %s, %s, %s)",
        [change.seq, change.entity_id, change.attempt, os.getpid()],
    )
    threading.Event().wait(change.new.get("blocks_s") or 0)
    await asyncio.sleep(change.new.get("takes_s") or 0)
    await link.execute("UPDATE calls SET ended = clock_timestamp() WHERE seq = %s AND ended IS NULL", [change.seq])


@router.on("counted", "TRUNCATE")
async def truncated(change: cdc.Change) -> None:
    """Records the call."""
    link = await _link()
    await link.execute(
        "INSERT INTO calls (seq, key, attempt, pid) VALUES (%s, %s, %s, %s)",
        [change.seq, change.entity_id, change.attempt, os.getpid()],
    )


@router.on("nothing")
async def nothing(change: cdc.Change) -> None:
    """As cheap as a handler can be."""
