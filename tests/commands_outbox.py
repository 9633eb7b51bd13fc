"""The commands of `cdc outbox`, and changes in the states that they are about."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.types.json import Jsonb

from cdc.cli import cdc as root_command
from tests.commands import answer


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(root_command, ["outbox", *arguments, "--dsn", dsn])


def data(dsn: str, *arguments: str) -> dict[str, Any]:
    return answer(run(dsn, *arguments, "--json"))


def numbers(dsn: str, *arguments: str) -> list[int]:
    return [change["seq"] for change in data(dsn, "list", *arguments)["changes"]]


def publish(db: psycopg.Connection, entity_type: str = "x", entity_id: str = "k", schema_name: str = "public") -> int:
    function = sql.Identifier(schema_name, "publish_change")
    call = sql.SQL("SELECT {}(%s, %s, 'INSERT', %s)").format(function)
    content = Jsonb({"secret": "row content"})
    [(seq,)] = db.execute(call, [entity_type, entity_id, content]).fetchall()
    return int(seq)


def wait(db: psycopg.Connection, *seqs: int) -> None:
    """As a failed attempt leaves them, until in an hour."""
    db.execute(
        "UPDATE entity_changes SET next_attempt_at = now() + interval '1 hour', error_count = 1,"
        " last_error = 'Failed: x' WHERE seq = ANY(%s)",
        [list(seqs)],
    )


def die(db: psycopg.Connection, *seqs: int, pausing: bool = False) -> None:
    """As the last failed attempt leaves them."""
    db.execute(
        "UPDATE entity_changes SET next_attempt_at = %s, dead_at = clock_timestamp(), error_count = 3,"
        " last_error = 'Failed: x' WHERE seq = ANY(%s)",
        ["infinity" if pausing else None, list(seqs)],
    )


def process(db: psycopg.Connection, *seqs: int) -> None:
    db.execute(
        "UPDATE entity_changes SET processed = true, processed_at = clock_timestamp() WHERE seq = ANY(%s)", [list(seqs)]
    )


def leave(db: psycopg.Connection, *seqs: int) -> None:
    """As they were captured."""


BRING: dict[str, Callable[..., None]] = {
    "fresh": leave, "blocked": leave, "waiting": wait, "dead": die, "paused": partial(die, pausing=True),
    "processed": process,
}  # fmt: skip
"""Into a state."""


def row(db: psycopg.Connection, seq: int) -> dict[str, Any]:
    with db.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute(
            "SELECT id, processed, processed_at, error_count, last_error, error_summary, dead_at,"
            " nullif(next_attempt_at, 'infinity') AS next_attempt_at, next_attempt_at <= now() AS due"
            " FROM entity_changes WHERE seq = %s",
            [seq],
        ).fetchone()
    assert found is not None
    return found
