"""Backlogs of large rows, and what they take of memory: a container has 256 MB where nobody has said otherwise."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.eventually import eventually
from tests.fix_consumer import Process, states
from tests.fix_memory import megabytes

_LIMIT_MB = 230
# Of random letters, so that the server does not store a tenth of it.
_BODY = """
SELECT string_agg(md5(random()::text || n), '') FROM generate_series(1, %s / 32) AS n
"""


def _backlog(db: psycopg.Connection, rows: int, size: int, entity_type: str = "nothing", keys: int = 1_000) -> None:
    [(body,)] = db.execute(_BODY, [size]).fetchall()
    db.execute(
        "SELECT publish_change(%s, (n %% %s)::text, 'INSERT', jsonb_build_object('content', %s::text, 'n', n))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, keys, body, rows],
    )


@pytest.mark.parametrize(
    ("rows", "size"), [(4_000, 65_536), (300, 1 << 20), (6, 8 << 20), (60, 5 << 20), (12, 20 << 20)]
)
def test_a_backlog_of_large_rows_goes_through_with_the_memory_of_the_shipped_limit(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, processes: list[Process], *, rows: int, size: int
) -> None:
    _backlog(outbox_db, rows, size)
    process = Process(outbox, tmp_path / "log", handlers="tests.handlers_large:router", options=("--no-stream",))
    processes.append(process)
    eventually(lambda: states(outbox_db) == {"processed": rows}, within_s=200, what="the backlog is gone")
    assert megabytes(process.process.pid) < _LIMIT_MB
