"""A plain handler of either kind: async, in the event loop; and not async, in a thread, where it may block."""

import logging

import cdc

log = logging.getLogger(__name__)
router = cdc.Router()


@router.on("order", "INSERT")
async def welcome(change: cdc.Change) -> None:
    log.info("new order %s of %s", change.entity_id, change.new["customer"])


@router.on("order", "UPDATE", changed={"total"}, timeout=10)
def tell_price(change: cdc.Change) -> None:
    log.info("order %s now costs %s", change.entity_id, change.new["total"])
