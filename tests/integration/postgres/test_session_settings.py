"""The settings of a session of ours against those of real servers."""

from __future__ import annotations

import json

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from cdc.cli import cdc as command
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import SchemaError
from cdc.postgres import migrations, pinned
from cdc.postgres.connect import connect, connect_async
from tests import servers

_SETTABLE = "SELECT name FROM pg_catalog.pg_settings WHERE context = 'user'"


@pytest.mark.parametrize("major", servers.MAJORS)
def test_each_setting_that_a_session_may_have_is_pinned_or_has_a_reason_not_to_be(major: int) -> None:
    known = {*pinned.LIMITS, *pinned.PINNED, *pinned.NEWER, *" ".join(pinned.HARMLESS.values()).split()}
    with (
        TempServer(durable=False, binaries=servers.required(major)) as server,
        psycopg.connect(server.dsn()) as connection,
    ):
        connection.execute("LOAD 'plpgsql'")
        found = {name for (name,) in connection.execute(_SETTABLE)}
        assert found - known == set()
        assert {*pinned.LIMITS, *pinned.PINNED} <= found, "naming what a server does not know ends the connection"


def test_no_setting_is_pinned_and_harmless_at_once() -> None:
    names = [*pinned.LIMITS, *pinned.PINNED, *pinned.NEWER, *" ".join(pinned.HARMLESS.values()).split()]
    assert len(names) == len(set(names))


_ODD = {
    "search_path": "public, pg_catalog", "row_security": "on", "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on", "default_transaction_deferrable": "on", "DateStyle": "SQL, DMY",
    "IntervalStyle": "iso_8601", "extra_float_digits": "-15", "bytea_output": "escape", "array_nulls": "off",
    "standard_conforming_strings": "off", "backslash_quote": "off", "transform_null_equals": "on",
    "quote_all_identifiers": "on", "plpgsql.extra_errors": "all", "exit_on_error": "on",
    "client_min_messages": "debug5",
    "statement_timeout": "1ms", "enable_indexscan": "off", "jit": "on", "lock_timeout": "1ms",
}  # fmt: skip


async def test_whatever_the_database_says_a_session_has_what_is_pinned(database: str, db: psycopg.Connection) -> None:
    for name, value in _ODD.items():
        db.execute(sql.SQL("ALTER DATABASE {} SET {} = {}").format(
            sql.Identifier(db.info.dbname), sql.SQL(name), sql.Literal(value)))  # fmt: skip
    asked = "SELECT name, pg_catalog.current_setting(name) FROM pg_catalog.unnest(%s::text[]) AS name"
    wanted = {**pinned.LIMITS, **pinned.PINNED}
    with connect(database, application_name="test") as connection:
        assert dict(connection.execute(asked, [list(wanted)]).fetchall()) == wanted
    async with await connect_async(database, application_name="test") as connection:
        assert dict(await (await connection.execute(asked, [list(wanted)])).fetchall()) == wanted


def test_options_of_ones_own_go_before_limits_and_after_nothing_that_is_pinned(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=7s -c search_path=public -c timezone=Asia/Tokyo")
    asked = "SELECT current_setting('statement_timeout'), current_setting('search_path'), current_setting('timezone')"
    with connect(database, application_name="test") as connection:
        assert connection.execute(asked).fetchone() == ("7s", "pg_catalog", "Asia/Tokyo")
    with connect(database, application_name="test", user_path=True) as connection:
        assert connection.execute(asked).fetchone() == ("7s", "public", "Asia/Tokyo")


def test_a_database_that_is_read_only_by_default_takes_an_installation_and_doctor_warns(
    database: str, db: psycopg.Connection
) -> None:
    db.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(
        sql.Identifier(db.info.dbname)))  # fmt: skip
    installed = CliRunner().invoke(command, ["db", "install"], env={"CDC_DSN": database})
    assert installed.exit_code == 0, installed.output
    found = CliRunner().invoke(command, ["doctor", "--json", "--no-stream"], env={"CDC_DSN": database})
    [recovery] = [each for each in json.loads(found.stdout)["findings"] if "recovery" in each.values()]
    assert "read only by default" in recovery["detail"]
    # A session of somebody else's is told why, and not sent to look for a primary.
    with (
        psycopg.connect(database, autocommit=True) as theirs,
        pytest.raises(SchemaError, match="read only by default"),
    ):
        migrations.install(theirs, "other")
