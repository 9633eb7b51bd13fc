"""The handlers whose consumer runs under valgrind, and the switch that counts only in the middle of their drain.

For ``tests.bench.instructions``. It is loaded by name beside ``cdc``, which may be of another tree: it imports nothing
of ours but the public names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psycopg

import cdc

noop = cdc.Router()
noop_sync = cdc.Router()
batches = cdc.Router()
inserts = cdc.Router()
inserts_sync = cdc.Router()

TYPE = "task"
INSERT_EFFECT = "INSERT INTO bench_effects (seq, entity_id) VALUES (%s, %s)"

_FIRST, _LAST = (int(number) for number in os.environ["COUNTED"].split(":"))
_calls = 0


def _called(changes: int = 1) -> None:
    global _calls
    before, _calls = _calls, _calls + changes
    if before < _FIRST <= _calls:
        _as_if_fast()
        _switch("on")
    elif before < _LAST <= _calls:
        _switch("off")


def _switch(to: str) -> None:
    """Blocks meanwhile, as the count is of all threads."""
    told = ["callgrind_control", "-i", to, str(os.getpid())]
    subprocess.run(told, check=True, stdout=subprocess.DEVNULL)


def _as_if_fast() -> None:
    """Calls take fifty times as long under valgrind, and so their groups would be smaller."""
    for name in ("cdc.core.transaction_batching", "cdc.grouping"):  # by version
        if module := sys.modules.get(name):
            vars(module)["_LASTS_S"] = 100.0


@noop.on(TYPE)
async def nothing(_change: cdc.Change) -> None:
    _called()


@noop_sync.on(TYPE)
def nothing_in_a_thread(_change: cdc.Change) -> None:
    _called()


@batches.on(TYPE, batch=200)
async def nothing_for_many(changes: Sequence[cdc.Change]) -> None:
    _called(len(changes))


@inserts.on(TYPE)
async def insert_effect(change: cdc.Change, connection: psycopg.AsyncConnection[Any]) -> None:
    await connection.execute(INSERT_EFFECT, [change.seq, change.entity_id])
    _called()


@inserts_sync.on(TYPE)
def insert_effect_in_a_thread(change: cdc.Change, connection: psycopg.Connection[Any]) -> None:
    connection.execute(INSERT_EFFECT, [change.seq, change.entity_id])
    _called()
