"""A handler that forks, and a child that outlives its parent until it is told to end."""

from __future__ import annotations

import logging
import os
import signal

import cdc

router = cdc.Router()


@router.on("fork")
async def fork(change: cdc.Change) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            signal.pause()
    logging.getLogger("tests").warning("forked %d.", child)
