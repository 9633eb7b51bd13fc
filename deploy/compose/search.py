"""What a second service does with the same messages: it keeps an index. The service ``search`` runs this."""

import cdc

router = cdc.Router()
index: dict[str, str] = {}


@router.on("message", "INSERT")
async def add(change: cdc.Change) -> None:
    index[change.entity_id] = change.new["content"]
