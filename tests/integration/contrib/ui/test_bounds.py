"""What a page asks of the server is bounded, however much there is: rows and statements are counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.bench.web_interface import PAGES
from tests.eventually import eventually
from tests.fix_tally import Tally
from tests.fix_ui import ask, serving

_ROWS = 40_000
"""Of a million. The overview looks at 10,000 of each kind and 200 of each of 64 shards, a search at 20,000 and 300."""
_STATEMENTS = 50
_READ = """
SELECT (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'entity_changes'),
       (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'entity_changes')
"""
_ASKING = """
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'cdc ui')
"""


Large = tuple[str, Tally, psycopg.Connection, dict[str, str]]


@pytest.fixture(scope="module")
def large(large_outbox: str) -> Iterator[Large]:
    """The address of an interface, what counts its statements, a session on the same database, and names of changes."""
    with psycopg.connect(large_outbox, autocommit=True) as other:  # it ends, so that what it reads is not counted later
        named = {
            name: str(other.execute(f"SELECT id FROM entity_changes WHERE {which} LIMIT 1".encode()).fetchall()[0][0])
            for name, which in (("dead", "NOT processed AND dead_at IS NOT NULL"), ("processed", "processed"))
        }
    tally = Tally(large_outbox)
    tally.start()
    with serving(tally.dsn) as address, psycopg.connect(large_outbox, autocommit=True) as db:
        yield address, tally, db, named
    tally.stop()


def _read(db: psycopg.Connection) -> tuple[int, int]:
    """Rows of whole tables, and entries of indexes. A session adds what it has read when it ends."""
    eventually(lambda: db.execute(_ASKING).fetchone() == (False,), what="the session of the page to end")
    [(whole, by_index)] = db.execute(_READ).fetchall()
    return whole, by_index


@pytest.mark.parametrize("page", [*PAGES, "activity"])
def test_a_page_reads_a_bounded_number_of_rows(large: Large, page: str) -> None:
    address, tally, db, named = large
    path = {**PAGES, "activity": "/api/activity"}[page].format(**named)
    if page == "of a subscription":  # there is none, and this outbox is only read
        path = "/changes?state=waiting&type=task&key=none"
    before, statements = _read(db), tally.passed.statements
    status, said, _ = ask(address, path)
    assert status == 200, said
    after = _read(db)
    assert after[0] == before[0], "no table is read whole"
    assert after[1] - before[1] <= _ROWS
    assert tally.passed.statements - statements <= _STATEMENTS
