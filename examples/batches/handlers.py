"""Many changes in one call: up to 200 orders are indexed by one statement, and a bad one does not stop the rest."""

import psycopg

import cdc

router = cdc.Router()

_INDEX = """
INSERT INTO public.order_search (order_id, words)
SELECT id, to_tsvector('simple', customer) FROM unnest(%s::bigint[], %s::text[]) AS indexed (id, customer)
ON CONFLICT (order_id) DO UPDATE SET words = excluded.words
"""


@router.on("order", "INSERT", "UPDATE", batch=200, linger=0.01)
async def index(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
    nameless = [change for change in changes if not change.new["customer"].strip()]
    # Of one order the last change counts: a statement may not touch a row twice.
    latest = {change.entity_id: change.new["customer"] for change in changes if change not in nameless}
    await connection.execute(_INDEX, [[*map(int, latest)], [*latest.values()]])
    if nameless:
        raise cdc.Failed({change: cdc.Reject("an order without a customer is not indexed") for change in nameless})
