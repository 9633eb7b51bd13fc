"""The handlers that are measured. ``cdc run --handlers tests.bench.handlers:noop``

What they keep of each call goes to the file BENCH_CALLS when the process ends: a few bytes a call, so that keeping it
costs a fraction of a microsecond. ``tests.bench.instructions`` loads this file beside the ``cdc`` of another tree: it
imports nothing of ours but the public names.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

import psycopg

import cdc

nothing = cdc.Router()
noop = cdc.Router()
lone = cdc.Router()
noop_sync = cdc.Router()
batches = cdc.Router()
inserts = cdc.Router()
inserts_sync = cdc.Router()
awaits_10ms = cdc.Router()
awaits_20ms = cdc.Router()
stamp = cdc.Router()
began = cdc.Router()

TYPE = "task"
"""Of the changes that are drained. A handler for any type would leave a third of the places to other types."""
EFFECTS = "CREATE TABLE bench_effects (seq bigint PRIMARY KEY, entity_id text NOT NULL)"
INSERT_EFFECT = "INSERT INTO bench_effects (seq, entity_id) VALUES (%s, %s)"


class _Counted(array):
    """Under valgrind: what runs from one call to another, by their numbers ``FIRST:LAST``, is counted."""

    first, last = (int(number) for number in os.environ.get("BENCH_COUNTED", "0:0").split(":"))

    def append(self, number: int) -> None:
        self.extend([number])

    def extend(self, numbers: Iterable[int]) -> None:
        before = len(self)
        super().extend(numbers)
        if before < self.first <= len(self):
            _as_if_fast()
            _count("on")
        elif before < self.last <= len(self):
            _count("off")


def _count(to: str) -> None:
    """Blocks meanwhile, as the count is of all threads."""
    command = ["callgrind_control", "-i", to, str(os.getpid())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _as_if_fast() -> None:
    """Calls take fifty times as long under valgrind, and so their groups would be smaller."""
    for name in ("cdc.core.transaction_batching", "cdc.grouping"):  # by version
        if module := sys.modules.get(name):
            vars(module)["_LASTS_S"] = 100.0


_calls = _Counted("q") if "BENCH_COUNTED" in os.environ else array("q")


@nothing.on("*")
async def do_nothing(change: cdc.Change) -> None:
    """Keeps nothing at all: for measuring memory."""


@noop.on(TYPE)
async def note_number(change: cdc.Change) -> None:
    """The order of the calls can be checked afterwards."""
    _calls.append(change.seq)


@lone.on("*")
async def note_lone(change: cdc.Change) -> None:
    _calls.append(change.seq)


@noop_sync.on(TYPE)
def note_number_in_thread(change: cdc.Change) -> None:
    _calls.append(change.seq)


@batches.on(TYPE, batch=200)
async def note_numbers(changes: list[cdc.Change]) -> None:
    _calls.extend(change.seq for change in changes)


@inserts.on(TYPE)
async def insert_effect(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    _calls.append(change.seq)
    await connection.execute(INSERT_EFFECT, [change.seq, change.entity_id])


@inserts_sync.on(TYPE)
def insert_effect_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
    _calls.append(change.seq)
    connection.execute(INSERT_EFFECT, [change.seq, change.entity_id])


@awaits_10ms.on(TYPE)
async def await_10ms(change: cdc.Change) -> None:
    _calls.append(change.seq)
    await asyncio.sleep(0.010)


@awaits_20ms.on(TYPE)
async def await_20ms(change: cdc.Change) -> None:
    _calls.append(change.seq)
    await asyncio.sleep(0.020)


@stamp.on("*", "READ")
async def read_row(change: cdc.Change) -> None:
    """A row of a backfill, of which no moment is kept."""


@stamp.on("*")
async def note_time(change: cdc.Change) -> None:
    """The row's number and the moment at which its handler began, on the clock that the writer reads too."""
    _calls.extend((int(change.entity_id), time.monotonic_ns()))


@began.on("*")
async def note_first(change: cdc.Change) -> None:
    """When the first was called, in unix nanoseconds."""
    if not _calls:
        _calls.append(time.time_ns())


def _keep() -> None:
    if path := os.environ.get("BENCH_CALLS"):
        Path(path).write_bytes(_calls.tobytes())


atexit.register(_keep)
