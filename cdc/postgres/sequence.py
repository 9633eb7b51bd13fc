"""The numbers of changes: one sequence gives their order, and replication and some copies do not carry it along."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from cdc.core.errors import CdcError, NotFoundError
from cdc.core.model import SHARDS

_LOCK_TIMEOUT = "5s"
_ROWS_EXAMINED = 10_000
"""Rows examined in each state but fresh, the latest by the state's index; of fresh ones the last of each shard.

Of those that somebody marked without a time the index knows no order: any of them.
"""

_NAME = """
SELECT s.oid, pg_catalog.format('%%I.%%I', n.nspname, s.relname) AS name,
  has_sequence_privilege(s.oid, 'SELECT') OR has_sequence_privilege(s.oid, 'USAGE') AS seen
FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'seq'
JOIN pg_catalog.pg_depend AS d ON d.refobjid = c.oid AND d.refobjsubid = a.attnum AND d.deptype = 'i'
  AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.classid = 'pg_catalog.pg_class'::regclass
JOIN pg_catalog.pg_class AS s ON s.oid = d.objid AND s.relkind = 'S'
WHERE n.nspname = %s AND c.relname = 'entity_changes'
"""
_LAST = "SELECT coalesce(pg_catalog.pg_sequence_last_value(%s::oid::regclass), 0)"
_HIGHEST = """
SELECT greatest(
  (SELECT pg_catalog.max(last.seq) FROM pg_catalog.generate_series(0, {shards} - 1) AS s (shard)
   CROSS JOIN LATERAL (SELECT seq FROM {changes} WHERE NOT processed AND next_attempt_at IS NULL AND dead_at IS NULL
     AND shard = s.shard::smallint ORDER BY seq DESC LIMIT 1) AS last),
  (SELECT pg_catalog.max(seq) FROM (SELECT seq FROM {changes}
     WHERE NOT processed AND next_attempt_at <= 'infinity' AND dead_at IS NULL
     ORDER BY dead_at DESC, next_attempt_at DESC LIMIT {rows}) AS waiting),
  (SELECT pg_catalog.max(seq) FROM (SELECT seq FROM {changes} WHERE NOT processed AND dead_at IS NOT NULL
     ORDER BY dead_at DESC LIMIT {rows}) AS dead),
  (SELECT pg_catalog.max(seq) FROM (SELECT seq FROM {changes} WHERE processed AND processed_at IS NOT NULL
     ORDER BY processed_at DESC LIMIT {rows}) AS processed),
  (SELECT pg_catalog.max(seq) FROM (SELECT seq FROM {changes} WHERE processed AND processed_at IS NULL
     LIMIT {rows}) AS untimed),
  0)
"""


@dataclass(frozen=True, slots=True)
class Numbers:
    """``last``: the number drawn last, None where the role may not see it. ``highest``: of the rows examined."""

    sequence: str
    last: int | None
    highest: int

    @property
    def behind(self) -> bool:
        """New changes would get numbers that exist already, or lower ones."""
        return self.last is not None and self.last < self.highest


def look(connection: psycopg.Connection, schema: str) -> Numbers:
    """Takes some index look-ups and no lock. Raises NotFoundError where the table or its sequence is missing."""
    row = connection.execute(_NAME.encode(), [schema]).fetchone()
    if row is None:
        raise NotFoundError(f"entity_changes in schema {schema} has no sequence", hint="run `cdc db upgrade`")
    oid, name, seen = row
    if not seen:
        return Numbers(name, None, 0)
    [(last,)] = connection.execute(_LAST, [oid]).fetchall()
    return Numbers(name, last, _highest(connection, schema))


def _highest(connection: psycopg.Connection, schema: str) -> int:
    names = {
        "changes": sql.Identifier(schema, "entity_changes"),
        "shards": sql.Literal(SHARDS),
        "rows": sql.Literal(_ROWS_EXAMINED),
    }
    [(highest,)] = connection.execute(sql.SQL(_HIGHEST).format(**names)).fetchall()
    return int(highest)


def catch_up(connection: psycopg.Connection, schema: str) -> Numbers | None:
    """Set the sequence behind the highest number; returns what it was before, None where it was right.

    Reads the whole table once, and then holds SHARE ROW EXCLUSIVE on it for a moment: writers of tracked tables wait,
    so no number is drawn meanwhile. Raises CdcError where that lock is not granted within 5 s.
    """
    before = look(connection, schema)
    if not before.behind:
        return None
    changes = sql.Identifier(schema, "entity_changes")
    [(highest,)] = connection.execute(sql.SQL("SELECT max(seq) FROM {}").format(changes)).fetchall()
    try:
        with connection.transaction():
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
            connection.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(changes))
            now = look(connection, schema)
            connection.execute(
                "SELECT pg_catalog.setval(%s::regclass, greatest(%s::bigint, %s::bigint, %s::bigint))",
                [before.sequence, highest, now.highest, now.last or 1],
            )
    except (errors.LockNotAvailable, errors.DeadlockDetected) as busy:
        raise CdcError(
            f"entity_changes stayed locked for {_LOCK_TIMEOUT}, and its sequence is still behind",
            hint="run this again when the long transactions on tracked tables have ended",
        ) from busy
    return before
