"""Handlers that fail, each in its way, for a consumer that runs as a process."""

from __future__ import annotations

import json
import logging

import cdc

router = cdc.Router()
log = logging.getLogger("shop.orders")


def read(change: cdc.Change) -> object:
    """Fails inside the standard library."""
    return json.loads(change.new["text"])


@router.on("order", max_attempts=2)
async def order(change: cdc.Change) -> None:
    """Says what it is at, and fails in a function of its own."""
    log.info("reading", extra={"order_id": change.entity_id, "lines": [1, 2]})
    read(change)


@router.on("later", max_attempts=1)
def later(change: cdc.Change) -> None:
    """Asks for another try, in a thread."""
    raise cdc.Retry(after=0)
