"""Handlers that look at what they get, as most do."""

from __future__ import annotations

import cdc

router = cdc.Router()


@router.on("nothing")
async def read(change: cdc.Change) -> None:
    assert change.new["content"]
