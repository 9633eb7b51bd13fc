"""Exactly once: the invoice and the mark of its change commit together, or not at all."""

import psycopg

import cdc

router = cdc.Router()


@router.on("order", "INSERT")
async def invoice(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    # No ON CONFLICT: the row cannot be there from an attempt that was cut off.
    await connection.execute(
        "INSERT INTO public.invoices (order_id, total) VALUES (%s, %s)", [change.entity_id, change.new["total"]]
    )
