"""Handlers for the page: what works, what waits, what dies."""

from __future__ import annotations

import cdc

router = cdc.Router()


@router.on("good")
async def good(change: cdc.Change) -> None:
    pass


@router.on("dying", max_attempts=1)
async def dies(change: cdc.Change) -> None:
    raise ValueError(change.new["secret"])


@router.on("failing", max_attempts=5)
async def fails(change: cdc.Change) -> None:
    raise KeyError(change.new["secret"])
