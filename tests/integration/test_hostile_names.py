"""Every command beside names that a terminal would obey: of tables, columns, types, keys, roles, sessions, handlers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import click
import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc as root_command

HOSTILE = "n\x1b]0;owned\x07\x9b2J\u202eeman\u2028\x85\nError: forged"
SQL_NAME = HOSTILE[:20]
"""Names of objects have 63 bytes at most."""

ELSEWHERE = {
    "db print": "of the operator's words, for psql",
    "demo": "it shows the rows it has written itself",
    "healthcheck": "tests/unit/test_healthcheck.py",
    "run": "what it says is logged: tests/unit/test_logs.py",
    "smoke": "it writes a row of its own into tables of its own",
    "whatsapp serve": "as run",
}
"""Commands that are not called here, and why."""


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CDC_") and not name.startswith("CDC_TEST_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def role(db: psycopg.Connection) -> Iterator[str]:
    name = f"r{os.getpid()}{HOSTILE[:20]}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    yield name
    db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


@pytest.fixture
def hostile(database: str, db: psycopg.Connection, role: str) -> Iterator[str]:
    """The DSN of an outbox with such names in it, and somebody else's session of such a name."""
    run(database, "db", "install")
    table, column = sql.Identifier(SQL_NAME), sql.Identifier(f"c{SQL_NAME}")
    db.execute(sql.SQL("CREATE TABLE {} (id text PRIMARY KEY, {} text)").format(table, column))
    run(database, "track", sql.Identifier(SQL_NAME).as_string(), "--type", HOSTILE, "--exclude", f"c{SQL_NAME}")
    db.execute(sql.SQL("INSERT INTO {} VALUES (%s)").format(table), [HOSTILE])
    for key in ("waits", "dead", "dead again", "fresh"):
        db.execute("SELECT publish_change(%s, %s)", [HOSTILE, f"{HOSTILE} {key}"])
    db.execute("UPDATE entity_changes SET last_error = %s, error_count = 3, next_attempt_at = now() + interval '1 h'"
               " WHERE entity_id LIKE '%%waits'", [HOSTILE])  # fmt: skip
    db.execute("UPDATE entity_changes SET last_error = %s, error_count = 3, dead_at = now()"
               " WHERE entity_id LIKE '%%dead%%'", [HOSTILE])  # fmt: skip
    db.execute("SELECT pg_create_logical_replication_slot('other', 'test_decoding')")
    # By hand, with an option that names no column, so that doctor has something to say about the table.
    db.execute(sql.SQL("CREATE TABLE {} (id int)").format(sql.Identifier(f"b{SQL_NAME}")))
    by_hand = "CREATE TRIGGER {} AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION capture_entity_change({})"
    options = sql.Literal(json.dumps({"key": [f"c{SQL_NAME}"]}))
    db.execute(sql.SQL(by_hand).format(sql.Identifier(f"t{SQL_NAME}"), sql.Identifier(f"b{SQL_NAME}"), options))
    db.execute(sql.SQL("GRANT SELECT ON entity_changes TO {}").format(sql.Identifier(role)))
    with psycopg.connect(make_conninfo(database, application_name=f"cdc: {SQL_NAME}"), autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock_shared(%s, 64)", [_lock_class()])
        other.execute("BEGIN; SELECT txid_current()")
        yield database


def _lock_class() -> int:
    from cdc.outbox.shards import lock_class

    return lock_class("public")


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(root_command, [*arguments, "--dsn", dsn], terminal_width=200)


def every_command(group: click.Group = root_command, before: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from every_command(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def test_no_command_prints_what_a_terminal_obeys(hostile: str, role: str, tmp_path: Path) -> None:
    table = sql.Identifier(SQL_NAME).as_string()
    module = tmp_path / "hostile_handlers.py"
    module.write_text(f"import cdc\nrouter = cdc.Router()\n@router.on({HOSTILE!r}, name={HOSTILE!r})\ndef f(c): ...\n")
    toml = tmp_path / "hostile.toml"
    toml.write_text(f"schema = {json.dumps(SQL_NAME)}\n", "utf-8")
    called = [
        ("status",), ("tracked",), ("slot", "list"), ("slot", "status", "other"), ("slot", "status", HOSTILE),
        ("outbox", "stats"), ("outbox", "list"), ("outbox", "list", "--state", "fresh"),
        ("outbox", "list", "--type", HOSTILE), ("outbox", "show", "1", "--show-payload"), ("outbox", "show", HOSTILE),
        ("outbox", "retry", "3"), ("outbox", "discard", "2"), ("outbox", "retry", "1"),
        ("outbox", "retry", "--all", "--type", HOSTILE), ("outbox", "prune", "--older-than", HOSTILE),
        ("outbox", "discard", "--type", HOSTILE, "--before", HOSTILE, "--yes"),
        ("outbox", "prune", "--older-than", "1d"), ("doctor", "--handlers", HOSTILE), ("doctor",), ("doctor", "--fix"),
        ("config", "show", "--config", str(toml)), ("config", "show", "--config", str(tmp_path / HOSTILE)),
        ("config", "schema", HOSTILE), ("track", table), ("track", HOSTILE), ("track", table, "--key", HOSTILE),
        ("db", "grant", "--readonly", role), ("db", "grant", "--consumer", HOSTILE),
        ("db", "install", "--with", HOSTILE),
        ("db", "install"), ("db", "verify"), ("db", "verify", "--schema", SQL_NAME), ("db", "upgrade"),
        ("db", "retire-processor"), ("slot", "create", HOSTILE), ("slot", "create", "other"),
        ("slot", "recreate", HOSTILE, "--yes"),
        ("slot", "advance", "other"), ("slot", "drop", "other", "--yes"), ("untrack", table), ("untrack", HOSTILE),
        ("db", "uninstall", "--yes"), ("db", "uninstall", "--yes", "--discard-unprocessed"), (HOSTILE,),
    ]  # fmt: skip
    for arguments in called:
        for as_json in ([], ["--json"]):
            output = run(hostile, *arguments, *as_json).output
            assert not [character for character in output if not character.isprintable() and character != "\n"], (
                arguments
            )
            assert "\nError: forged" not in output, arguments
    names = {" ".join(arguments[:2]) for arguments in called} | {arguments[0] for arguments in called}
    assert set(every_command()) - names == set(ELSEWHERE)


def test_the_script_of_doctor_stays_a_script(hostile: str) -> None:
    """A name that cannot be shown is for the reader to write: what is run is what is seen."""
    for line in run(hostile, "doctor", "--fix").stdout.splitlines():
        assert line.isprintable()
        assert not line.startswith("Error")
