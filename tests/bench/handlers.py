"""The handlers that are measured. ``cdc run --handlers tests.bench.handlers:noop``

What they keep of each call goes to the file BENCH_CALLS when the process ends: a few bytes a call, so that keeping it
costs a fraction of a microsecond.
"""

from __future__ import annotations

import atexit
import os
import time
from array import array
from pathlib import Path

import cdc

nothing = cdc.Router()
noop = cdc.Router()
noop_sync = cdc.Router()
stamp = cdc.Router()

_calls = array("q")


@nothing.on("*")
async def do_nothing(change: cdc.Change) -> None:
    """Keeps nothing at all: for measuring memory."""


@noop.on("*")
async def note_number(change: cdc.Change) -> None:
    """The order of the calls can be checked afterwards."""
    _calls.append(change.seq)


@noop_sync.on("*")
def note_number_in_thread(change: cdc.Change) -> None:
    _calls.append(change.seq)


@stamp.on("*")
async def note_time(change: cdc.Change) -> None:
    """The row's number and the moment at which its handler began, on the clock that the writer reads too."""
    _calls.extend((int(change.entity_id), time.monotonic_ns()))


def _keep() -> None:
    if path := os.environ.get("BENCH_CALLS"):
        Path(path).write_bytes(_calls.tobytes())


atexit.register(_keep)
