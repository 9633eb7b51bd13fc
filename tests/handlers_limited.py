"""Limited handlers of a consumer that runs as a process: a line of a file for each call, by a clock that all share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cdc

router = cdc.Router()


@router.on("mail", limit=cdc.Limit(rate="20/s"))
async def send(change: cdc.Change) -> None:
    line = f"{time.monotonic()} {os.getpid()}\n"
    with Path(os.environ["LIMITED_CALLS"]).open("a", encoding="utf-8") as calls:
        calls.write(line)
