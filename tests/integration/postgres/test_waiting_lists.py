"""Lists of what waits read as much as they show, not all that waits: rows and entries are counted, not timed."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdc.core.model import ChangeState
from cdc.diagnostics import inspect_outbox
from cdc.postgres import sequence
from cdc.postgres.admin import Filter, OutboxAdmin
from cdc.postgres.bulk import Wanted
from cdc.postgres.search import Search
from tests.bench.database import preload_unprocessed

_WAITING = 20_000
_SHOWN = 100
_BESIDE = 500
"""Of other states, and what is shown by its id."""
_READ = """
SELECT sum(pg_stat_get_xact_tuples_returned(oid))::bigint FROM pg_class
WHERE oid = 'entity_changes'::regclass
  OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'entity_changes'::regclass)
"""
_LISTS: dict[str, tuple[Callable[[psycopg.Connection], object], int]] = {
    "cdc outbox list": (lambda db: OutboxAdmin("public").find(db, "waiting", Filter(), _SHOWN), _SHOWN),
    "figures by type": (lambda db: OutboxAdmin("public").stats(db, scan=_SHOWN), _SHOWN),
    "a page of a search": (
        lambda db: Search("public").page(db, ChangeState.WAITING, Wanted(), _SHOWN, scan=_SHOWN),
        _SHOWN,
    ),
    "the highest number": (lambda db: sequence.look(db, "public"), 10_000),
    "shards of others": (lambda db: inspect_outbox.astray(db, "public"), 1_000),
}
"""And how many of those that wait each looks at."""


@pytest.fixture
def waiting(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """An outbox in which many wait, each for another time, and the server has its statistics."""
    preload_unprocessed(outbox_db, _WAITING, wait="1 hour")
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now() + seq * interval '1 ms'")
    outbox_db.execute("VACUUM ANALYZE entity_changes")
    return outbox_db


@pytest.mark.parametrize("name", list(_LISTS))
def test_what_lists_waiting_changes_reads_as_many_as_it_shows(waiting: psycopg.Connection, name: str) -> None:
    ask, looked_at = _LISTS[name]
    with waiting.transaction():
        before = _read(waiting)
        ask(waiting)
        read = _read(waiting) - before
    assert looked_at <= read <= looked_at + _BESIDE


def _read(connection: psycopg.Connection) -> int:
    """By this session, since the server has last been told."""
    [(count,)] = connection.execute(_READ).fetchall()
    return int(count)
