"""Handlers that write down each of their calls, for tests that judge afterwards what became of every change.

A consumer's ledger is a file of its own, one JSON line for the start of a call and one for its end, each a single
write to a file opened for appending: what is written survives ``kill -9``, and nothing but the disk can make a call
fail that was not meant to.

Which calls fail is decided by the change alone, so that the judge knows which changes have to end as dead letters.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

import cdc

TRANSACTIONAL = ("kept_transactional", "kept_transactional_sync")
"""Those whose handlers also leave an effect in the database, through the connection they are given."""
KINDS = ("kept_async", "kept_sync", *TRANSACTIONAL)
"""Tracked tables, entity types and handlers in one: a new way to write handlers gets its table by its name here."""
EFFECTS = """
CREATE TABLE effects (
  number bigint GENERATED ALWAYS AS IDENTITY, seq bigint NOT NULL, type text NOT NULL, key text NOT NULL
)
"""
FOLDER = "LEDGER_FOLDER"
"""The variable that names the folder of the ledgers."""
MAX_ATTEMPTS = 3

_EFFECT = "INSERT INTO effects (seq, type, key) VALUES (%s, %s, %s)"

router = cdc.Router()
_numbers = itertools.count()


class MeantToFailError(Exception):
    """What a handler raises for a change that ``fails`` says should fail."""


def fails(seq: int, attempt: int) -> bool:
    """One attempt in twenty; and every attempt of one change in ninety-seven."""
    return seq % 97 == 0 or _dice(f"fails {seq} {attempt}") < 0.05


def dies(seq: int) -> bool:
    """Whether the change ends as a dead letter."""
    return all(fails(seq, attempt) for attempt in range(1, MAX_ATTEMPTS + 1))


def takes_s(seq: int) -> float:
    """Mostly a few milliseconds; some calls are still on their way when something happens to their consumer."""
    share = _dice(f"takes {seq}")
    return share * 0.004 if share < 0.9 else (share - 0.9) * 3


def _dice(text: str) -> float:
    """Evenly from 0 to 1, the same in every process."""
    return zlib.crc32(text.encode()) / 2**32


@router.on("kept_async", max_attempts=MAX_ATTEMPTS)
async def keep_async(change: cdc.Change) -> None:
    with _call(change):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(takes_s(change.seq)):
                await asyncio.Event().wait()
        _fail_if_meant(change)


@router.on("kept_sync", max_attempts=MAX_ATTEMPTS)
def keep_sync(change: cdc.Change) -> None:
    with _call(change):
        threading.Event().wait(takes_s(change.seq))
        _fail_if_meant(change)


@router.on("kept_transactional", max_attempts=MAX_ATTEMPTS)
async def keep_transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    with _call(change):
        await connection.execute(_EFFECT, [change.seq, *change.key])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(takes_s(change.seq)):
                await asyncio.Event().wait()
        _fail_if_meant(change)


@router.on("kept_transactional_sync", max_attempts=MAX_ATTEMPTS)
def keep_transactional_sync(change: cdc.Change, connection: psycopg.Connection) -> None:
    with _call(change):
        connection.execute(_EFFECT, [change.seq, *change.key])
        threading.Event().wait(takes_s(change.seq))
        _fail_if_meant(change)


def _fail_if_meant(change: cdc.Change) -> None:
    if fails(change.seq, change.attempt):
        raise MeantToFailError


@contextlib.contextmanager
def _call(change: cdc.Change) -> Iterator[None]:
    call = next(_numbers)
    _write({"call": call, "type": change.entity_type, "key": change.entity_id, "seq": change.seq,
            "attempt": change.attempt, "start": time.time()})  # fmt: skip
    how = "cut off"
    try:
        yield
        how = "returned"
    except MeantToFailError:
        how = "failed"
        raise
    finally:
        _write({"call": call, "end": time.time(), "how": how})


def _write(entry: dict[str, object]) -> None:
    os.write(_file(), f"{json.dumps(entry)}\n".encode())


@cache
def _file() -> int:
    """Named after the role the consumer works as: each process of a test has one of its own."""
    consumer = str(conninfo_to_dict(os.environ["CDC_DSN"])["user"])
    return os.open(Path(os.environ[FOLDER], f"{consumer}.jsonl"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
