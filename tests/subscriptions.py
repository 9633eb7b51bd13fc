"""Subscriptions as tests make them, and what each has done with the changes, as the database has it."""

from __future__ import annotations

from typing import Any

import psycopg

from cdc.postgres.subscriptions import Subscriptions

_STATES = """
SELECT n.seq, CASE
  WHEN s.dead_at IS NOT NULL THEN 'dead' WHEN s.next_attempt_at IS NOT NULL THEN 'waiting'
  WHEN s.seq IS NOT NULL OR n.seq <= p.seq THEN 'done' ELSE 'fresh' END
FROM entity_changes AS n
JOIN cdc_positions AS p ON p.subscription = %(number)s AND p.shard = n.shard
LEFT JOIN cdc_subscription_changes AS s
  ON s.subscription = %(number)s AND s.shard = n.shard AND s.seq = n.seq
WHERE n.subscription IS NULL OR n.subscription = %(number)s
ORDER BY n.seq
"""


def subscribe(db: psycopg.Connection, name: str = "search", **options: Any) -> int:
    """Its number. It begins at the first change, unless ``start`` says otherwise."""
    made, _ = Subscriptions("public").create(db, name, **{"start": "beginning", **options})
    return made.number


def states_of(db: psycopg.Connection, number: int) -> dict[int, str]:
    """By seq; without what is for another one."""
    return dict(db.execute(_STATES, {"number": number}).fetchall())


def is_done(db: psycopg.Connection, number: int) -> bool:
    """Nothing is fresh in it or waits."""
    return not {"fresh", "waiting"} & set(states_of(db, number).values())


def kept(db: psycopg.Connection, number: int) -> int:
    """How many rows it keeps beside the changes."""
    [(count,)] = db.execute(
        "SELECT count(*) FROM cdc_subscription_changes WHERE subscription = %s", [number]
    ).fetchall()
    return int(count)
