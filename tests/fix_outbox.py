"""A database with the outbox in it, copied from a template that was migrated once."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.postgres import migrations
from tests.bench.database import preload_history, preload_unprocessed
from tests.fix_db import create_database, drop_database


@pytest.fixture(scope="session")
def migrated_template(admin_dsn: str, creation: sql.Composable) -> Iterator[str]:
    """The name of a database with the outbox installed in ``public``. Nobody may connect to it while it is copied."""
    name = f"template_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        create_database(admin, name, creation)
        with psycopg.connect(make_conninfo(admin_dsn, dbname=name), autocommit=True) as connection:
            migrations.install(connection, "public")
        yield name
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def copied_outbox(admin_dsn: str, template: str) -> Iterator[str]:
    """The DSN of a copy of the template, which is dropped in the end."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        create_database(admin, name, sql.SQL("TEMPLATE {}").format(sql.Identifier(template)))
        yield make_conninfo(admin_dsn, dbname=name)
        drop_database(admin, name)


@pytest.fixture
def outbox(admin_dsn: str, migrated_template: str) -> Iterator[str]:
    """The DSN of a database of the test's own, with the outbox installed in ``public``."""
    with copied_outbox(admin_dsn, migrated_template) as dsn:
        yield dsn


@pytest.fixture
def outbox_db(outbox: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to ``outbox``."""
    with psycopg.connect(outbox, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def large_outbox(admin_dsn: str, migrated_template: str) -> Iterator[str]:
    """The DSN of an outbox with a million processed changes of 30 days, for tests that only read.

    Nothing was fresh, waiting or dead when it was analysed. Now there are 3,000 fresh, 2,000 waiting, 1,000 dead ones,
    and 5,000 that are held back behind one that waits.
    """
    with copied_outbox(admin_dsn, migrated_template) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("ALTER TABLE entity_changes SET (autovacuum_enabled = off)")
            preload_history(connection, rows=1_000_000, days=30, payload=False)
            connection.execute("VACUUM ANALYZE entity_changes")
            preload_unprocessed(connection, 1, wait="1 hour", key="stuck")
            preload_unprocessed(connection, 5_000, key="stuck")
            preload_unprocessed(connection, 3_000)
            preload_unprocessed(connection, 2_000, wait="1 hour")
            preload_unprocessed(connection, 1_000, dead=True)
        yield dsn


def fill(db: psycopg.Connection, count: int, *, state: str = "processed", days: float = 10) -> None:
    """So many changes that are so many days old in everything."""
    columns = {
        "fresh": "false, NULL, NULL, NULL",
        "waiting": "false, NULL, {ago}, NULL",
        "dead": "false, NULL, NULL, {ago}",
        "paused": "false, NULL, 'infinity'::timestamptz, {ago}",
        "processed": "true, {ago}, NULL, NULL",
    }[state]
    statement = sql.SQL(
        "INSERT INTO entity_changes (table_name, operation, entity_id, changed_at, processed, processed_at,"
        " next_attempt_at, dead_at) SELECT 'x', 'INSERT', n::text, {ago}, "
        + columns
        + " FROM generate_series(1, {n}) AS n"
    )
    ago = sql.SQL("now() - {} * interval '1 day'").format(sql.Literal(days))
    db.execute(statement.format(ago=ago, n=sql.Literal(count)))


def count(db: psycopg.Connection) -> int:
    [(left,)] = db.execute("SELECT count(*) FROM entity_changes").fetchall()
    return int(left)
