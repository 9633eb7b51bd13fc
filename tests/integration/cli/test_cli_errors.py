"""What an operator sees of a database that is not as it should be: a sentence, a remedy, an exit code, no secret."""

import sys
import types
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo

import cdc.cli
from cdc.app.config import Settings
from cdc.cli.options import database_options, open_database

PASSWORD = "hunter-2-secret"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Result]:
    """Runs a statement by ``cdc ask``, a command as any other, over a DSN with a password in it."""

    @click.command()
    @click.argument("statement")
    @database_options
    def ask(statement: str, settings: Settings) -> None:
        with open_database(settings) as connection:
            row = connection.execute(statement.encode()).fetchone()
        click.echo(row)

    module = types.ModuleType("ask_commands")
    module.ask = ask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ask_commands", module)
    monkeypatch.setitem(cdc.cli.COMMANDS, "ask", ("ask_commands", "Ask."))

    def call(dsn: str, statement: str = "SELECT 1") -> Result:
        result = CliRunner().invoke(cdc.cli.cdc, ["ask", statement, "--dsn", make_conninfo(dsn, password=PASSWORD)])
        assert PASSWORD not in result.output
        assert "Traceback" not in result.output
        return result

    return call


def test_a_command_gets_a_connection(ask: Callable[..., Result], database: str) -> None:
    result = ask(database)
    assert (result.exit_code, result.stdout) == (0, "(1,)\n")


def test_a_database_that_cannot_be_reached_ends_with_3(ask: Callable[..., Result], database: str) -> None:
    for dsn in (make_conninfo(database, dbname="nosuch"), "host=/nonexistent", make_conninfo(database, user="nosuch")):
        result = ask(dsn)
        assert result.exit_code == 3
        assert result.stdout == ""
        sentence, remedy = result.stderr.splitlines()
        assert sentence.startswith("Error: cannot connect to host=")
        assert remedy.startswith("  ")


def test_a_dsn_that_cannot_be_read_ends_with_2(database: str) -> None:
    for dsn in (f"host=db password=x {PASSWORD}", f"postgresql://u:1/{PASSWORD}@db/app"):
        result = CliRunner().invoke(cdc.cli.cdc, ["config", "show", "--dsn", dsn])
        assert result.exit_code == 2
        assert PASSWORD not in result.output


def test_a_missing_table_names_the_command_that_makes_it(ask: Callable[..., Result], database: str) -> None:
    result = ask(database, "SELECT * FROM public.entity_changes")
    assert result.exit_code == 1
    assert "cdc db install" in result.stderr


def test_a_statement_that_the_server_refuses_shows_no_row(ask: Callable[..., Result], database: str) -> None:
    result = ask(database, "SELECT 'secret-row'::int")
    assert result.exit_code == 1
    assert result.stderr == "Error: the database refused a value: InvalidTextRepresentation (SQLSTATE 22P02)\n"
