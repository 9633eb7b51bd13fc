"""Reads the subscriptions: how far they are, who consumes them, and whether what they name exists."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from psycopg import sql

from cdc.core.model import SHARDS
from cdc.diagnostics.facts import IndexFacts, SubscriptionFacts, SubscriptionsFacts
from cdc.diagnostics.inspect_server import column
from cdc.postgres import capture_catalog
from cdc.postgres.sql_files import table
from cdc.postgres.subscriptions import INDEXES, Subscriptions, index_is_valid, index_statement

_EXAMINED = 10_000
# Of the types those that changes have: among the first fresh ones of each shard, and the latest that are processed.
_SEEN = """
SELECT DISTINCT t.type FROM pg_catalog.unnest(%(types)s::text[]) AS t (type) WHERE t.type = ANY (ARRAY(
  SELECT coalesce(f.entity_type, f.table_name) FROM pg_catalog.generate_series(0, {shards} - 1) AS s (shard)
  CROSS JOIN LATERAL (
    SELECT n.entity_type, n.table_name FROM {changes} AS n
    WHERE n.shard = s.shard::smallint AND NOT n.processed AND n.next_attempt_at IS NULL AND n.dead_at IS NULL
    ORDER BY n.seq LIMIT 100
  ) AS f
  UNION ALL
  (SELECT coalesce(n.entity_type, n.table_name) FROM {changes} AS n
   WHERE n.processed AND n.processed_at < 'infinity' ORDER BY n.processed_at DESC LIMIT {bound})
))
"""


def subscriptions(connection: psycopg.Connection, name: str) -> SubscriptionsFacts:
    found = Subscriptions(name).progress(connection)
    named = {each for one in found for each in one.subscription.types or ()}
    known = _known(connection, name, sorted(named)) if named else set()
    return SubscriptionsFacts(
        indexes=tuple(
            IndexFacts(
                name=sql.Identifier(name, index).as_string(),
                valid=index_is_valid(connection, name, index),
                creation=f"{index_statement(name, index).as_string()};",
            )
            for index in INDEXES
        ),
        each=tuple(
            SubscriptionFacts(
                name=each.subscription.name,
                consumers=each.consumers,
                paused=each.paused is not None,
                behind=each.behind,
                held_back=each.held_back,
                oldest_age_s=each.oldest_age_s,
                unknown_types=tuple(one for one in each.subscription.types or () if one not in known),
            )
            for each in found
        ),
    )


def _known(connection: psycopg.Connection, name: str, types: Sequence[str]) -> set[str]:
    function = capture_catalog.capture_function(connection, name)
    captured = {
        each.entity_type
        for each in capture_catalog.triggers(connection, function, name)
        if each.entity_type is not None
    }
    names = {"changes": table(name, "entity_changes"), "shards": sql.Literal(SHARDS), "bound": sql.Literal(_EXAMINED)}
    statement = sql.SQL(_SEEN).format(**names).as_string()
    return captured | set(column(connection, statement, {"types": list(types)}))
