"""The commands of `cdc subscription`, and what a subscription has done, as the database has it."""

from __future__ import annotations

from typing import Any

import psycopg
from click.testing import CliRunner, Result

from cdc.cli import cdc as root_command
from tests.commands import answer


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(root_command, ["subscription", *arguments, "--dsn", dsn])


def data(dsn: str, *arguments: str) -> dict[str, Any]:
    return answer(run(dsn, *arguments, "--json"))


def create(dsn: str, name: str = "search", *arguments: str) -> int:
    """Its number."""
    return int(data(dsn, "create", name, *arguments)["subscription"]["number"])


def progress(dsn: str, name: str = "search") -> dict[str, Any]:
    found: dict[str, Any] = data(dsn, "show", name)["subscription"]
    return found


def taken(db: psycopg.Connection, number: int, schema: str = "public") -> list[int]:
    """The numbers that are fresh for it, by the definition: above the position of their shard, and without a row."""
    rows = db.execute(
        f"""
        SELECT n.seq FROM {schema}.entity_changes AS n
        JOIN {schema}.cdc_positions AS p ON p.shard = n.shard
        JOIN {schema}.cdc_subscriptions AS s ON s.subscription = p.subscription
        WHERE p.subscription = %s AND n.seq > p.seq AND (n.subscription IS NULL OR n.subscription = p.subscription)
          AND (s.types IS NULL OR coalesce(n.entity_type, n.table_name) = ANY (s.types))
          AND NOT EXISTS (SELECT FROM {schema}.cdc_subscription_changes AS e
                          WHERE e.subscription = p.subscription AND e.shard = n.shard AND e.seq = n.seq)
        ORDER BY 1
        """.encode(),
        [number],
    )
    return [seq for (seq,) in rows]


def finish(db: psycopg.Connection, number: int) -> None:
    """It has done all that there is."""
    db.execute("DELETE FROM cdc_subscription_changes WHERE subscription = %s", [number])
    db.execute(
        "UPDATE cdc_positions SET seq = (SELECT coalesce(max(seq), 0) FROM entity_changes) WHERE subscription = %s",
        [number],
    )


def fail(db: psycopg.Connection, number: int, *seqs: int, dead: bool = False, pauses: bool = False) -> None:
    """As a failed attempt leaves a change in it: waiting for an hour, or dead."""
    db.execute(
        """
        INSERT INTO cdc_subscription_changes
          (seq, subscription, shard, next_attempt_at, dead_at, type_hash, key_hash, tried)
        SELECT n.seq, %(number)s, n.shard,
          CASE WHEN %(pauses)s THEN 'infinity' WHEN NOT %(dead)s THEN now() + interval '1 hour' END,
          CASE WHEN %(dead)s THEN clock_timestamp() END, hashtextextended(coalesce(n.entity_type, n.table_name), 0),
          hashtextextended(n.entity_id, hashtextextended(coalesce(n.entity_type, n.table_name), 0)),
          jsonb_build_object('count', 3, 'error', 'Failed: x', 'summary', 'Failed')
        FROM entity_changes AS n WHERE n.seq = ANY (%(seqs)s)
        """,
        {"number": number, "seqs": list(seqs), "dead": dead or pauses, "pauses": pauses},
    )
