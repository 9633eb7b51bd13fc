"""What a real server, or the lack of one, answers to those who connect."""

import asyncio
import socket
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.core.errors import CdcError, ConnectError, SchemaError, UsageError
from cdc.postgres.connect import SERVER_TCP, connect, connect_async, explain

PASSWORD = "hunter-2-secret"


def _connect(dsn: str) -> None:
    connect(dsn, application_name="test").close()


def _connect_async(dsn: str) -> None:
    async def attempt() -> None:
        await (await connect_async(dsn, application_name="test")).close()

    asyncio.run(attempt())


@pytest.fixture(params=[_connect, _connect_async], ids=["sync", "async"])
def attempt(request: pytest.FixtureRequest) -> Callable[[str], None]:
    connects: Callable[[str], None] = request.param
    return connects


@pytest.fixture
def role(db: psycopg.Connection) -> Iterator[str]:
    """A role that may log in, with nothing else; no other test's."""
    name = f"role_{uuid.uuid4().hex[:12]}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), PASSWORD))
    yield name
    db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def _refusal(attempt: Callable[[str], None], dsn: str) -> ConnectError:
    with pytest.raises(ConnectError) as refused:
        attempt(make_conninfo(dsn, password=PASSWORD))
    said = f"{refused.value} {refused.value.hint}"
    assert PASSWORD not in said
    assert "\n" not in said
    assert refused.value.hint
    assert refused.value.__cause__ is None
    assert refused.value.exit_code == 3
    return refused.value


def test_a_missing_database_is_named_with_the_remedy(attempt: Callable[[str], None], database: str) -> None:
    refused = _refusal(attempt, make_conninfo(database, dbname="nosuch"))
    assert 'database "nosuch" does not exist' in str(refused)
    assert "createdb" in refused.hint


def test_a_missing_role_is_named_with_the_remedy(attempt: Callable[[str], None], database: str) -> None:
    refused = _refusal(attempt, make_conninfo(database, user="nosuch"))
    assert 'role "nosuch" does not exist' in str(refused)
    assert "create the role" in refused.hint


def test_for_a_role_that_may_not_connect_or_log_in_the_grant_is_named(
    attempt: Callable[[str], None], database: str, db: psycopg.Connection, role: str
) -> None:
    db.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM public").format(sql.Identifier(db.info.dbname)))
    assert "GRANT CONNECT" in _refusal(attempt, make_conninfo(database, user=role)).hint
    db.execute(sql.SQL("ALTER ROLE {} NOLOGIN").format(sql.Identifier(role)))
    assert "LOGIN" in _refusal(attempt, make_conninfo(database, user=role)).hint


def test_for_a_role_without_replication_the_alter_role_is_named(database: str, role: str) -> None:
    with pytest.raises(ConnectError) as refused:
        connect(make_conninfo(database, user=role), application_name="test", replication="database")
    assert "REPLICATION" in refused.value.hint


def test_where_no_server_listens_the_place_is_named(attempt: Callable[[str], None]) -> None:
    with socket.socket() as unused:  # bound, and not listening: nobody else can take the port meanwhile
        unused.bind(("127.0.0.1", 0))
        refused = _refusal(attempt, f"host=127.0.0.1 port={unused.getsockname()[1]} dbname=app user=me")
    assert "host=127.0.0.1" in str(refused)
    assert "start the server" in refused.hint
    refused = _refusal(attempt, "host=/nonexistent dbname=app user=me")
    assert str(refused) == "cannot connect to host=/nonexistent dbname=app user=me: No such file or directory"
    assert "socket" in refused.hint


def test_a_server_that_does_not_answer_ends_in_a_timeout(attempt: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"host=127.0.0.1 port={silent.getsockname()[1]} dbname=app user=me connect_timeout=2"
        refused = _refusal(attempt, dsn)
    assert "connect_timeout" in refused.hint


def test_a_host_name_that_cannot_be_resolved_is_refused(attempt: Callable[[str], None]) -> None:
    assert "host" in _refusal(attempt, "host=nosuch.invalid dbname=app user=me").hint
    _refusal(attempt, "host=a..b dbname=app user=me")


def test_a_parameter_that_has_no_valid_value_is_a_usage_error(attempt: Callable[[str], None]) -> None:
    with pytest.raises(UsageError):
        attempt("host=/nonexistent connect_timeout=soon")


def test_settings_of_the_session_reach_the_server_whatever_they_contain(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c idle_in_transaction_session_timeout=7s -c lock_timeout=1s")
    session = {"lock_timeout": "5s", "search_path": '"a b", "c\\d"', **SERVER_TCP}
    with connect(database, application_name="two words", session=session) as connection:
        row = connection.execute(
            "SELECT current_setting('lock_timeout'), current_setting('search_path'),"
            " current_setting('application_name'), current_setting('idle_in_transaction_session_timeout')"
        ).fetchone()
    assert row == ("5s", '"a b", "c\\d"', "two words", "7s")


async def test_an_asynchronous_connection_gets_the_same_settings(database: str) -> None:
    async with await connect_async(database, application_name="test", session={"lock_timeout": "5s"}) as connection:
        cursor = await connection.execute("SELECT current_setting('lock_timeout')")
        assert await cursor.fetchone() == ("5s",)
        assert connection.autocommit


def test_a_dead_link_is_watched_for_unless_the_dsn_says_how(database: str) -> None:
    with connect(make_conninfo(database, keepalives_idle=60), application_name="test") as connection:
        parameters = connection.info.get_parameters()
    assert parameters["keepalives_idle"] == "60"
    assert parameters["tcp_user_timeout"] == "8000"
    assert parameters["connect_timeout"] == "10"


def test_text_is_text_in_a_database_without_an_encoding(db: psycopg.Connection, database: str) -> None:
    name = f"{db.info.dbname}_ascii"
    db.execute(
        sql.SQL("CREATE DATABASE {} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0").format(sql.Identifier(name))
    )
    try:
        with connect(make_conninfo(database, dbname=name), application_name="test") as connection:
            row = connection.execute("SELECT 'é'::text").fetchone()
        assert row == ("é",)
    finally:
        db.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


@pytest.mark.parametrize(
    ("statement", "kind", "hint"),
    [
        ("SELECT * FROM entity_changes", SchemaError, "cdc db install"),
        ("SELECT * FROM nosuch.entity_changes", SchemaError, "cdc db install"),
        ("SELECT * FROM other_table", CdcError, ""),
        ("SELECT pg_terminate_backend(pg_backend_pid())", ConnectError, "server's log"),
        ("SET statement_timeout = 1; SELECT pg_sleep(10)", CdcError, "try again"),
        ("SELECT pg_read_file('/etc/hostname')", CdcError, "GRANT"),
        ("SELECT 'secret-row'::int", CdcError, ""),
        ("CREATE TEMP TABLE t (a text PRIMARY KEY); INSERT INTO t VALUES ('secret-row'), ('secret-row')", CdcError, ""),
    ],
)
def test_an_error_of_the_server_becomes_a_sentence_without_a_row_in_it(
    database: str, role: str, statement: str, kind: type[CdcError], hint: str
) -> None:
    with (
        connect(make_conninfo(database, user=role), application_name="test") as connection,
        pytest.raises(psycopg.Error) as raised,
    ):
        connection.execute(statement)  # type: ignore[arg-type, unused-ignore]  # a table of fixed statements
    explained = explain(raised.value)
    assert type(explained) is kind
    assert explained is not None
    assert hint in explained.hint
    assert bool(explained.hint) == bool(hint)
    assert "secret-row" not in f"{explained} {explained.hint}"
    assert "\n" not in str(explained)
