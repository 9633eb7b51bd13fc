"""Transform, then send: what an order costs, and nothing of its customer, goes to a broker."""

import os

import cdc
from cdc import sinks

router = cdc.Router()
totals = sinks.nats(os.environ.get("BROKER_URL", "nats://127.0.0.1:4222/cdc.{type}"))


@router.on("order", "INSERT", "UPDATE", batch=500, linger=0.01)
async def forward(changes: list[cdc.Change]) -> None:
    await totals.send_batch(changes, total)


def total(change: cdc.Change) -> sinks.Payload | None:
    if change.old and change.old["total"] == change.new["total"]:
        return None  # nothing is sent, and the change is done
    return sinks.Payload({"order": change.entity_id, "total": change.new["total"]})
