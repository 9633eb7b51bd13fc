"""A handler for whatever comes: it looks at all there is to a change."""

from __future__ import annotations

import cdc

router = cdc.Router()


@router.on("*")
async def look(change: cdc.Change) -> None:
    repr((change.key, change.operation, change.old, change.new, change.metadata))
