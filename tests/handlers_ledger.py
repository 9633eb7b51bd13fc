"""Handlers that write down each of their calls, for tests that judge afterwards what became of every change.

A consumer's ledger is a file of its own, one JSON line for the start of a process, of a call, and for the end of a
call, each a single write to a file opened for appending: what is written survives ``kill -9``, and nothing but the disk
can make a call fail that was not meant to.

Which calls fail is decided by the change and its attempt, whoever makes them, alone or in a batch, and which fresh
changes are snoozed by the change. The token that a row carries decides more: one that begins with ``POISON`` ends the
process, one that begins with ``CALM`` never fails.
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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

import cdc

GROUPED = ("kept_transactional", "kept_transactional_sync")
"""Those of which several changes may share a transaction."""
TRANSACTIONAL = (*GROUPED, "kept_batch_transactional", "kept_latest_transactional", "kept_truncated")
"""Those whose handlers also leave an effect in the database, through the connection they are given."""
KINDS = ("kept_async", "kept_sync", "kept_batch", *GROUPED, "kept_batch_transactional")
"""Tracked tables, entity types and handlers in one: a new way to write handlers gets its table by its name here."""
LATEST = ("kept_latest", "kept_latest_transactional")
"""Those whose handlers get one call for what waits of a key."""
TRUNCATED = "kept_truncated"
"""The one whose table is truncated."""
ALL_KINDS = (*KINDS, *LATEST, TRUNCATED)
EFFECTS = """
CREATE TABLE effects (
  number bigint GENERATED ALWAYS AS IDENTITY, seq bigint NOT NULL, type text NOT NULL, key text NOT NULL,
  consumer name NOT NULL DEFAULT session_user
)
"""
ODD = "odd"
"""The type of changes that nothing can be done about but to make dead letters of them; the ledgers leave them out."""
FOLDER = "LEDGER_FOLDER"
"""The variable that names the folder of the ledgers."""
MAX_ATTEMPTS = 3
POISON, CALM = "poison", "calm"

_EFFECT = "INSERT INTO effects (seq, type, key) VALUES (%s, %s, %s)"

router = cdc.Router()
_numbers = itertools.count()


class MeantToFailError(Exception):
    """What a handler raises for a change that ``fails`` says should fail."""


def fails(change: cdc.Change) -> bool:
    """One attempt in twenty; and every attempt of one change in ninety-seven."""
    if _token(change).startswith(CALM):
        return False
    return change.seq % 97 == 0 or _dice(f"fails {change.seq} {change.attempt}") < 0.05


def _trouble(change: cdc.Change) -> MeantToFailError | cdc.Snooze | None:
    """What its handler raises for it. One fresh change in thirty is snoozed."""
    if not change.requeued and _dice(f"snoozes {change.seq}") < 1 / 30 and not _token(change).startswith(CALM):
        # Of the table that is truncated for longer than a TRUNCATE waits to look.
        return cdc.Snooze(2.0 if change.entity_type == TRUNCATED else 0.1)
    return MeantToFailError() if fails(change) else None


def takes_s(change: cdc.Change) -> float:
    """Mostly a few milliseconds; some calls are still on their way when something happens to their consumer."""
    share = _dice(f"takes {change.seq}")
    return share * 0.004 if share < 0.93 else (share - 0.93) * 4


def _token(change: cdc.Change) -> str:
    return str((change.new or change.old or {}).get("token"))


def _token_of(row: Mapping[str, object] | None) -> object:
    return None if row is None else row["token"]


def _dice(text: str) -> float:
    """Evenly from 0 to 1, the same in every process."""
    return zlib.crc32(text.encode()) / 2**32


@router.on("kept_async", max_attempts=MAX_ATTEMPTS)
async def keep_async(change: cdc.Change) -> None:
    with _call([change]):
        await _pass([change])
        _fail_if_meant(change)


@router.on("kept_sync", max_attempts=MAX_ATTEMPTS)
def keep_sync(change: cdc.Change) -> None:
    with _call([change]):
        threading.Event().wait(takes_s(change))
        _fail_if_meant(change)


@router.on("kept_transactional", max_attempts=MAX_ATTEMPTS)
async def keep_transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    with _call([change]):
        await connection.execute(_EFFECT, [change.seq, *change.key])
        await _pass([change])
        _fail_if_meant(change)


@router.on("kept_transactional_sync", max_attempts=MAX_ATTEMPTS)
def keep_transactional_sync(change: cdc.Change, connection: psycopg.Connection) -> None:
    with _call([change]):
        connection.execute(_EFFECT, [change.seq, *change.key])
        threading.Event().wait(takes_s(change))
        _fail_if_meant(change)


@router.on("kept_batch", batch=20, linger=0.01, max_attempts=MAX_ATTEMPTS)
async def keep_batch(changes: list[cdc.Change]) -> None:
    """Says which of them failed, as ``Failed``: the rest is done, later ones of their keys included."""
    with _call(changes):
        await _pass(changes)
        if failed := _troubles(changes):
            raise cdc.Failed(failed)


@router.on("kept_batch_transactional", batch=20, max_attempts=MAX_ATTEMPTS)
async def keep_batch_transactional(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
    """The same, unless a later change of their key is in the batch: its effect would come before theirs."""
    with _call(changes):
        failed = _troubles(changes)
        done = [change for change in changes if change not in failed]
        async with connection.cursor() as cursor:
            await cursor.executemany(_EFFECT, [[change.seq, *change.key] for change in done])
        await _pass(changes)
        of_their_keys = Counter(change.key for change in changes)
        if any(of_their_keys[change.key] > 1 for change in failed):
            raise MeantToFailError
        if failed:
            raise cdc.Failed(failed)


@router.on("kept_latest", latest=True, settle=0.05, at_most=0.5, max_attempts=MAX_ATTEMPTS)
async def keep_latest(change: cdc.Change) -> None:
    with _call([change]):
        await _pass([change])
        _fail_if_meant(change)


@router.on("kept_latest_transactional", latest=True, max_attempts=MAX_ATTEMPTS)
async def keep_latest_transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    with _call([change]):
        await connection.execute(_EFFECT, [change.seq, *change.key])
        await _pass([change])
        _fail_if_meant(change)


@router.on(TRUNCATED, max_attempts=MAX_ATTEMPTS)
async def keep_truncated(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    with _call([change]):
        await connection.execute(_EFFECT, [change.seq, *change.key])
        await _pass([change])
        _fail_if_meant(change)


@router.on(TRUNCATED, "TRUNCATE", max_attempts=MAX_ATTEMPTS)
async def keep_truncate(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    with _call([change]):
        await connection.execute(_EFFECT, [change.seq, *change.key])
        await _pass([change])
        _fail_if_meant(change)


@router.on(ODD, max_attempts=2)
async def refuse(change: cdc.Change) -> None:
    """Reads all there is to read, and fails with a text that no row can hold as it is."""
    repr((change.old, change.new, change.metadata))
    raise MeantToFailError("\0 \ud800 \u2717 " * 300_000)


async def _pass(changes: Sequence[cdc.Change]) -> None:
    """Lets the time pass that the slowest of them takes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(map(takes_s, changes))):
            await asyncio.Event().wait()


def _fail_if_meant(change: cdc.Change) -> None:
    if trouble := _trouble(change):
        raise trouble


def _troubles(changes: Sequence[cdc.Change]) -> dict[cdc.Change, BaseException | str]:
    return {change: trouble for change in changes if (trouble := _trouble(change))}


@contextlib.contextmanager
def _call(changes: Sequence[cdc.Change]) -> Iterator[None]:
    call = next(_numbers)
    about = [[change.entity_type, change.entity_id, change.seq, change.attempt] for change in changes]
    entry: dict[str, object] = {"call": call, "changes": about, "start": time.time()}
    if changes[0].entity_type in LATEST:
        entry["stands_for"] = [changes[0].coalesced, _token_of(changes[0].old), _token_of(changes[0].new)]
    _write(entry)
    if any(_token(change).startswith(POISON) for change in changes):
        os._exit(1)
    hows = ["cut off"] * len(changes)
    try:
        yield
        hows = ["returned"] * len(changes)
    except cdc.Failed as failed:
        hows = [_how(failed.errors.get(change.seq)) for change in changes]
        raise
    except cdc.Snooze:
        hows = ["snoozed"]
        raise
    except MeantToFailError:
        # Of several nobody is told which one it was: they are called one by one.
        hows = ["failed"] if len(changes) == 1 else ["given back"] * len(changes)
        raise
    finally:
        _write({"call": call, "end": time.time(), "hows": hows})


def _how(error: BaseException | None) -> str:
    if error is None:
        return "returned"
    return "snoozed" if isinstance(error, cdc.Snooze) else "failed"


def _write(entry: dict[str, object]) -> None:
    _append(_file(), entry)


def _append(file: int, entry: dict[str, object]) -> None:
    os.write(file, f"{json.dumps(entry)}\n".encode())


@cache
def _file() -> int:
    """Named after the role the consumer works as: each process of a test has one of its own, or comes after another."""
    consumer = str(conninfo_to_dict(os.environ["CDC_DSN"])["user"])
    file = os.open(Path(os.environ[FOLDER], f"{consumer}.jsonl"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    _append(file, {"process": os.getpid()})
    return file
