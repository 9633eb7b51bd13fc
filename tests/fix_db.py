"""A private server for the run, and a database of its own for each test.

The server: CDC_TEST_DSN (a superuser on a throw-away server), else the machine's own binaries. Without either the
tests that need one are skipped with the reason; CDC_REQUIRE_PG=1 makes that a failure.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import NotFoundError
from tests.eventually import eventually

_server_line = "none started"


def pytest_report_header() -> str:
    return f"psycopg {psycopg.__version__} ({psycopg.pq.__impl__}), libpq {psycopg.pq.version()}"


@contextlib.contextmanager
def new_server(*, tcp: bool = False) -> Iterator[TempServer]:
    """A throw-away server, fsync off. Skips the test where there is none to be had."""
    try:
        running = TempServer(durable=False, tcp=tcp)
    except NotFoundError as missing:
        if os.environ.get("CDC_REQUIRE_PG"):
            raise
        pytest.skip(str(missing))
    with running:
        yield running


@pytest.fixture(scope="session")
def server() -> Iterator[TempServer]:
    """A running throw-away server with wal2json: for tests that neither stop nor crash it."""
    with new_server() as running:
        yield running


@pytest.fixture(scope="session")
def admin_dsn(request: pytest.FixtureRequest) -> str:
    """A superuser's connection to the server's maintenance database."""
    named = os.environ.get("CDC_TEST_DSN")
    return named or str(request.getfixturevalue("server").dsn())


@pytest.fixture(scope="session")
def creation(request: pytest.FixtureRequest) -> sql.Composable:
    """What follows CREATE DATABASE and its name: nothing, or how it gets the encoding that --encoding names."""
    encoding = request.config.getoption("--encoding")
    options = sql.SQL("TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'")
    return options.format(sql.Literal(encoding)) if encoding else sql.SQL("")


@pytest.fixture
def database(admin_dsn: str, creation: sql.Composable) -> Iterator[str]:
    """The DSN of an empty database; at the end nobody may be left in it, and no slot."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        create_database(admin, name, creation)
        yield make_conninfo(admin_dsn, dbname=name)
        drop_database(admin, name)


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to the test's own database."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def create_database(admin: psycopg.Connection, name: str, options: sql.Composable) -> None:
    """Where there is a choice its pages are not copied into the log as well, which takes twice as long."""
    strategy = sql.SQL("STRATEGY file_copy" if admin.info.server_version >= 150000 else "")
    admin.execute(sql.SQL("CREATE DATABASE {} {} {}").format(sql.Identifier(name), options, strategy))


def drop_database(admin: psycopg.Connection, name: str) -> None:
    """An active slot would keep the database alive, and its walsender takes a moment to end; an idle one goes along."""
    end_readers = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = %s AND active"
    eventually(lambda: not admin.execute(end_readers, [name]).fetchall(), what="nobody reads a slot of the database")
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
