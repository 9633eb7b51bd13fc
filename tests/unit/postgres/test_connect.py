import os

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.errors import ConnectError, SchemaError, UsageError
from cdc.postgres.connect import CLIENT_TCP, SERVER_TCP, connect, describe, driver_versions, explain, parse


@pytest.fixture(autouse=True)
def _no_libpq_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("dsn", "parameters"),
    [
        (None, {}),
        ("", {}),
        ("service=app", {"service": "app"}),
        ("host=db dbname=app password='se cret'", {"host": "db", "dbname": "app", "password": "se cret"}),
        ("postgresql://u:p%40w%2F@db:5433/app", {
            "user": "u", "password": "p@w/", "host": "db", "port": "5433", "dbname": "app"}),
        ("postgres://h1:1,h2:2/app", {"host": "h1,h2", "port": "1,2", "dbname": "app"}),
        ("postgresql://[::1]/app\n", {"host": "::1", "dbname": "app"}),
        ("host=/run/user@1000/pg", {"host": "/run/user@1000/pg"}),
        ("host=@abstract", {"host": "@abstract"}),
    ],
)  # fmt: skip
def test_a_dsn_is_read_as_libpq_reads_it(dsn: str | None, parameters: dict[str, str]) -> None:
    assert parse(dsn) == parameters


@pytest.mark.parametrize(
    ("dsn", "part"),
    [
        ("postgresql://u:hun/ter@db/app", "port"),
        ("postgresql://u:1/hunter@db/app", "dbname"),
        ("postgresql://u:hun@ter@db/app", "host"),
        ("postgresql://u:hunter@@db/app", "host"),
        ("host=db dbname=postgresql://u:hunter@db/app", "dbname"),
        ("host=hun@ter", "host"),
        ("port=hunter", "port"),
    ],
)
def test_a_dsn_whose_password_spilled_into_another_part_is_refused_and_not_quoted(dsn: str, part: str) -> None:
    with pytest.raises(UsageError, match=f"the {part} in the database DSN") as refused:
        parse(dsn)
    assert "hun" not in f"{refused.value} {refused.value.hint}"
    assert "percent-encode" in refused.value.hint
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("dsn", ["host=db password=hun ter", "postgresql://u:hun%zz@db", "host=db hun=ter", "hun\0ter"])
def test_a_dsn_that_cannot_be_read_is_not_quoted(dsn: str) -> None:
    with pytest.raises(UsageError, match=r"^the database DSN cannot be read$") as refused:
        parse(dsn)
    assert "hun" not in refused.value.hint
    # A log that prints the whole chain must not find the driver's error in it either.
    assert refused.value.__suppress_context__


@given(st.text(alphabet=st.sampled_from("aZ9@/:%[]# ?.,'\\="), max_size=12))
def test_no_password_written_into_a_url_ever_shows(password: str) -> None:
    try:
        shown = describe(f"postgresql://user:{password}@host/db")
    except UsageError:
        return
    assert shown == "host=host dbname=db user=user"


@pytest.mark.parametrize(
    ("dsn", "variables", "told"),
    [
        (None, {}, True),
        ("", {}, True),
        ("host=db", {}, False),
        ("service=app", {}, False),
        (None, {"PGHOST": "db"}, False),
    ],
)
def test_without_a_database_the_error_says_how_to_name_one(
    dsn: str | None, variables: dict[str, str], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("connection failed: No such file or directory")

    monkeypatch.setattr("cdc.postgres.connect.GuardedConnection.connect", refuse)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectError) as refused:
        connect(dsn, application_name="test")
    assert ("CDC_DSN" in refused.value.hint) == told


def test_a_place_is_described_with_the_libpq_variables_that_fill_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe(None) == "libpq's default server"
    monkeypatch.setenv("PGHOST", "db.example")
    monkeypatch.setenv("PGDATABASE", "ignored")
    monkeypatch.setenv("PGPASSWORD", "hunter")
    assert describe("dbname=app password=hunter sslpassword=hunter") == "host=db.example dbname=app"


def test_the_client_notices_a_dead_link_before_the_server_gives_its_locks_away() -> None:
    client, server = (
        {name.removeprefix("tcp_keep").removeprefix("keep"): int(value) for name, value in side.items()}
        for side in (CLIENT_TCP, SERVER_TCP)
    )

    def silence_s(side: dict[str, int]) -> int:
        return side["alives_idle"] + side["alives_interval"] * side["alives_count"]

    assert silence_s(client) < silence_s(server)
    assert client["tcp_user_timeout"] < server["tcp_user_timeout"]


def _driver_error(code: str) -> psycopg.Error:
    return psycopg.errors.lookup(code)("a row with hunter in it")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (psycopg.OperationalError("server closed hunter"), ConnectError, "the connection to the database was lost"),
        (psycopg.InterfaceError("hunter"), None, "the database driver gave up: InterfaceError"),
    ],
)
def test_a_driver_error_without_a_code_becomes_a_sentence(
    error: Exception, kind: type[Exception] | None, sentence: str
) -> None:
    explained = explain(error)
    assert str(explained) == sentence
    assert kind is None or isinstance(explained, kind)


def test_another_error_is_not_explained() -> None:
    assert explain(KeyError("x")) is None
    assert not isinstance(explain(_driver_error("42P01")), SchemaError)  # no words of the server: not our table


def test_the_versions_of_driver_and_library_are_dotted() -> None:
    assert all(version[0].isdigit() and "." in version for version in driver_versions())
