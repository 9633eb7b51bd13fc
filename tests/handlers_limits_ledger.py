"""Limited handlers that write down when each call begins and ends, by a clock that all processes share.

A line is a single write to a file opened for appending, so it survives ``kill -9``. The time of day of such a process
is nonsense and jumps at each look: nothing of a limit may go by it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from pathlib import Path

import cdc

RATE = 20
AT_ONCE = 3
_FILE = "LIMITS_LEDGER"

router = cdc.Router()
_real_time = time.time
_dice = random.Random(os.getpid())
_numbers = itertools.count()


def _jumping_time() -> float:
    return _real_time() + _dice.uniform(-86_400, 86_400)


if _FILE in os.environ:
    time.time = _jumping_time


def _write(what: str, change: cdc.Change, number: int) -> None:
    line = (
        f"{time.monotonic()} {os.getpid()}.{number} {what} {change.entity_type} {change.new['tenant']} {change.seq}\n"
    )
    with Path(os.environ[_FILE]).open("a", encoding="utf-8") as ledger:
        ledger.write(line)


@router.on("mail", name="send", limit=cdc.Limit(rate=f"{RATE}/s", by="new.tenant"))
async def send(change: cdc.Change) -> None:
    _write("call", change, next(_numbers))


@router.on("export", name="export", limit=cdc.Limit(at_once=AT_ONCE))
async def export(change: cdc.Change) -> None:
    number = next(_numbers)
    _write("begin", change, number)
    try:
        await asyncio.to_thread(threading.Event().wait, 0.05)
    finally:
        _write("end", change, number)
