"""What each page of ``cdc ui`` takes: 200 consumers, 20 subscriptions, and a large history with all that goes wrong.

A page is asked for over HTTP, from the request to its last byte: a connection to the database, the rights of the role,
the statements, and the template. Figures are the median of some requests; the second is the slowest request of all.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import SHARDS
from cdc.postgres.shard_locks import lock_class
from cdc.postgres.subscriptions import Subscriptions
from tests.bench.database import fresh_outbox, preload_history, preload_unprocessed, rest
from tests.bench.report import Figure
from tests.bench.size import Size
from tests.fix_ui import serving

PAGES = {
    "overview": "/", "dead": "/changes", "waiting": "/changes?state=waiting", "fresh": "/changes?state=fresh",
    "processed": "/changes?state=processed", "by type": "/changes?state=processed&type=message",
    "by key": "/changes?state=processed&key=4711", "by text that is not there": "/changes?state=processed&text=none",
    "by time": "/changes?state=processed&since=20d&until=19d", "of a subscription": "/changes?subscription=s1",
    "a dead change": "/changes/{dead}?payload=1", "a processed change": "/changes/{processed}?payload=1",
    "pauses": "/pauses", "limits": "/limits", "backfills": "/backfills", "subscriptions": "/subscriptions",
    "slot": "/slot", "log": "/actions", "style": "/style.css",
}  # fmt: skip
_CONSUMERS, _SUBSCRIPTIONS, _HANDLERS = 200, 20, 20
_DAYS = 30.0
_CALLS = 7

# A failed attempt of each dead change and each waiting one, and more of them that were processed since.
_ATTEMPTS = """
INSERT INTO change_attempts (seq, subscription, attempt, handler, started_at, ended_at, outcome, error_kind,
                             error_class, error_text, frames)
SELECT n.seq, 'default', a, 'handler' || n.seq %% 20, n.changed_at, now() - n.number * interval '1 ms', 'retried',
       'SMTPError', 'smtplib.SMTPError', repeat('550 no ', 50), ARRAY['f.py:1', 'g.py:2']
FROM (SELECT seq, changed_at, row_number() OVER () AS number FROM entity_changes
      WHERE NOT processed AND (dead_at IS NOT NULL OR next_attempt_at IS NOT NULL)) AS n
CROSS JOIN generate_series(1, 3) AS a
"""
_ACTIONS = """
INSERT INTO cdc_actions (command, person, via, action, target, because, count)
SELECT gen_random_uuid(), 'anna', 'ui', 'retry', jsonb_build_object('type', 'task'), 'it is mended', n
FROM generate_series(1, 20000) AS n
"""
_CONTROLS = """
INSERT INTO cdc_controls (entity_type, entity_id, because, set_by)
SELECT 'task', 'paused ' || n, 'it is looked into', 'anna' FROM generate_series(1, 200) AS n
UNION ALL
INSERT INTO cdc_controls (handler, because, set_by, rate)
SELECT 'handler' || n, 'what the provider allows', 'anna', '14/s' FROM generate_series(1, 20) AS n
"""
_LEASES = """
INSERT INTO cdc_limit_leases (subscription, handler, key, leases, idle_at)
SELECT 'default', 'handler' || n, key::text,
       (SELECT jsonb_object_agg('consumer ' || c, jsonb_build_array(1, 1, 5, extract(epoch FROM later.at), 1, 14, 50))
        FROM generate_series(1, %(consumers)s) AS c), later.at
FROM generate_series(1, %(handlers)s) AS n CROSS JOIN generate_series(1, 10) AS key
CROSS JOIN (SELECT now() + interval '1 day' AS at) AS later
"""
# More in a minute than the overview looks at.
_OF_LATE = """
UPDATE entity_changes SET processed_at = now()
WHERE id = ANY (ARRAY(SELECT id FROM entity_changes WHERE processed AND processed_at IS NOT NULL
                      ORDER BY processed_at DESC LIMIT 20000))
"""
_BACKFILLS = """
INSERT INTO cdc_backfills (table_schema, table_name, key_columns, key_order, estimate, examined, backlog, state)
SELECT 'public', 'table' || n, '{id}', '', 1000, n, 100, 'done' FROM generate_series(1, 1000) AS n
"""


def measure(server: TempServer, size: Size) -> list[Figure]:
    server.configure(max_connections="300")
    server.restart()
    with fresh_outbox(server) as connection:
        fill(connection, size.history)
        with consuming(connection.info.dsn):
            return pages(connection)


def fill(connection: psycopg.Connection, rows: int) -> None:
    """So many processed changes, some ten thousand that are not, and whatever else a page shows."""
    preload_history(connection, rows=rows, days=_DAYS)
    # As it is where nothing was fresh for an hour, when the server looked at the table.
    rest(connection)
    preload_unprocessed(connection, 1, wait="1 day", key="stuck")
    preload_unprocessed(connection, 100_000, key="stuck")
    preload_unprocessed(connection, 30_000)
    preload_unprocessed(connection, 20_000, wait="1 day")
    preload_unprocessed(connection, 30_000, dead=True)
    for number in range(_SUBSCRIPTIONS):
        Subscriptions("public").create(connection, f"s{number}", start="now" if number else "beginning")
    connection.execute(_ATTEMPTS, [])
    connection.execute(_ACTIONS)
    for statement in _CONTROLS.split("UNION ALL"):
        connection.execute(statement.encode())
    connection.execute(_LEASES, {"consumers": _CONSUMERS, "handlers": _HANDLERS})
    connection.execute(_BACKFILLS)


@contextmanager
def consuming(dsn: str) -> Iterator[None]:
    """Sessions that hold what consumers hold."""
    class_ = lock_class("public")
    with ExitStack() as stack:
        for number in range(_CONSUMERS):
            session = stack.enter_context(psycopg.connect(dsn, autocommit=True))
            session.execute("SELECT pg_advisory_lock_shared(%s, %s)", [class_, SHARDS])
            if number < SHARDS:
                session.execute("SELECT pg_advisory_lock(%s, %s)", [class_, number])
        yield


def pages(connection: psycopg.Connection) -> list[Figure]:
    named = {
        "dead": _one(connection, "NOT processed AND dead_at IS NOT NULL"), "processed": _one(connection, "processed")
    }  # fmt: skip
    figures, slowest = list[Figure](), 0.0
    connection.execute(_OF_LATE)
    with serving(connection.info.dsn) as address:
        for name, path in PAGES.items():
            times = _times(address + path.format(**named))
            slowest = max(slowest, *times)
            figures.append(Figure(name, _median(times), "ms"))
    return [*figures, Figure("slowest request", slowest, "ms")]


def _one(connection: psycopg.Connection, condition: str) -> str:
    [(name,)] = connection.execute(f"SELECT id::text FROM entity_changes WHERE {condition} LIMIT 1".encode()).fetchall()
    return str(name)


def _times(url: str) -> list[float]:
    """Milliseconds. The first request of each page fills the server's cache, and does not count."""
    found = list[float]()
    for _ in range(_CALLS + 1):
        began = time.perf_counter()
        with urllib.request.urlopen(url, timeout=60) as answer:
            answer.read()
        found.append((time.perf_counter() - began) * 1e3)
    return found[1:]


def _median(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]
