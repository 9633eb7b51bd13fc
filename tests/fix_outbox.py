"""A database with the outbox in it, copied from a template that was migrated once."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc import schema
from tests.fix_db import drop_database


@pytest.fixture(scope="session")
def migrated_template(admin_dsn: str) -> Iterator[str]:
    """The name of a database with the outbox installed in ``public``. Nobody may connect to it while it is copied."""
    name = f"template_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(make_conninfo(admin_dsn, dbname=name), autocommit=True) as connection:
            schema.install(connection, "public")
        yield name
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def outbox(admin_dsn: str, migrated_template: str) -> Iterator[str]:
    """The DSN of a database of the test's own, with the outbox installed in ``public``."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    copy = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(migrated_template))
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(copy)
        yield make_conninfo(admin_dsn, dbname=name)
        drop_database(admin, name)


@pytest.fixture
def outbox_db(outbox: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to ``outbox``."""
    with psycopg.connect(outbox, autocommit=True) as connection:
        yield connection
