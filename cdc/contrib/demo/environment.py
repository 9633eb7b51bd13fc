"""Where the demo runs: on a temporary server, or in schemas of its own on a named server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import CdcError, NotFoundError, RefusedError
from cdc.core.model import publication_name
from cdc.postgres import migrations
from cdc.postgres.connect import connect, describe
from cdc.replication import slots

SCHEMA = "cdc_demo"
SLOT = "cdc_demo"
TASKS = "cortex_projects"
"""The schema of the application's tasks; its name is the same everywhere."""
SESSION = {"search_path": SCHEMA}
"""For all connections that name the demo's tables: the statements are those of an application."""

_PUBLICATION = publication_name(SCHEMA)
_REMOVE_SCHEMA = f"DROP SCHEMA {SCHEMA} CASCADE"
_REMOVE_TASKS = f"DROP SCHEMA {TASKS} CASCADE"
_REMOVE_PUBLICATION = f"DROP PUBLICATION IF EXISTS {_PUBLICATION}"
_REMOVE_SLOT = f"SELECT pg_drop_replication_slot('{SLOT}')"
_APPLICATION = "cdc demo: set-up"
_ADD_RULE = """INSERT INTO "actionRules" (name, rule_type, config) VALUES ('check marks', 'simple_action', %s)"""

Say = Callable[[str], None]


@contextlib.contextmanager
def private(say: Say) -> Iterator[str]:
    """The DSN of a server that ends with the demo. Raises NotFoundError where no server programs are found."""
    server = TempServer()
    say(f"Starting a private server: {server.installation}. Nothing else on this machine is touched ...")
    with server:
        with connect(server.dsn(), application_name=_APPLICATION) as connection:
            _take(connection)
            _furnish(connection)
        yield server.dsn()


@contextlib.contextmanager
def guest(dsn: str, say: Say) -> Iterator[str]:
    """Yields the same DSN, of a server that is not ours. Nothing existing is changed, and what is made is removed.

    Raises RefusedError where an object already has a name that the demo needs.
    """
    with connect(dsn, application_name=_APPLICATION) as connection:
        if slots.snapshot(connection, SLOT):
            raise _taken("replication slot", SLOT, _REMOVE_SLOT)
        if connection.execute("SELECT FROM pg_catalog.pg_publication WHERE pubname = %s", [_PUBLICATION]).fetchall():
            raise _taken("publication", _PUBLICATION, f"{_REMOVE_SCHEMA}; {_REMOVE_PUBLICATION}")
        _take(connection)
        say(f"On your server, {describe(dsn)}:")
        say(f"makes the schemas {SCHEMA} and {TASKS}, with a publication and a slot of its own.")
        say("All are removed at the end ...")
    try:
        with connect(dsn, application_name=_APPLICATION) as connection:
            _furnish(connection)
        yield dsn
    finally:
        _leave(dsn, say)


def _take(connection: psycopg.Connection) -> None:
    """A separate step: only schemas that it has made itself may be dropped later."""
    try:
        with connection.transaction():
            _make(connection, SCHEMA, _taken("schema", SCHEMA, f"{_REMOVE_SCHEMA}; {_REMOVE_PUBLICATION}"))
            _make(connection, TASKS, _tasks_taken())
    except psycopg.errors.InsufficientPrivilege:
        user, dbname = connection.info.user, connection.info.dbname
        raise CdcError(
            f"the role {user} may not make a schema in the database {dbname}",
            hint=f"GRANT CREATE ON DATABASE {dbname} TO {user}, or name a role that may in --dsn",
        ) from None


def _make(connection: psycopg.Connection, name: str, taken: RefusedError) -> None:
    try:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    except psycopg.errors.DuplicateSchema:
        raise taken from None


def _tasks_taken() -> RefusedError:
    return RefusedError(
        f"there is a schema {TASKS} in this database already, and it may be your application's",
        hint="name another database in --dsn; if only a demo that was killed can have left it behind, this removes it:"
        f" {_REMOVE_TASKS}",
    )


def _taken(kind: str, name: str, remedy: str) -> RefusedError:
    return RefusedError(
        f"there is a {kind} {name} on this server already",
        hint=f"where another demo runs, wait for it; one that was killed left it behind, and this removes it: {remedy}",
    )


def _furnish(connection: psycopg.Connection) -> None:
    """Create the outbox, the application's tables, and a rule."""
    migrations.install(connection, SCHEMA, ["whatsapp"])
    connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(SCHEMA)))
    connection.execute(_ADD_RULE, [Jsonb({"trigger_emoji": "✅", "action_type": "create_task"})])


def _leave(dsn: str, say: Say) -> None:
    try:
        with connect(dsn, application_name="cdc demo: removal") as connection:
            _remove(connection)
    except BaseException:
        say("Not all could be removed. What is left, this removes:")
        for statement in (_REMOVE_SCHEMA, _REMOVE_TASKS, _REMOVE_PUBLICATION, _REMOVE_SLOT):
            say(f"  {statement};")
        raise
    say(f"Removed the schema {SCHEMA}, its publication and its slot, and the schema {TASKS}.")


def _remove(connection: psycopg.Connection) -> None:
    with contextlib.suppress(NotFoundError):  # a temporary slot has ended with its reader
        slots.drop(connection, SLOT, terminate=True)
    with contextlib.suppress(NotFoundError):  # the set-up ended before it
        migrations.uninstall(connection, SCHEMA, discard_unprocessed=True)
    connection.execute(_REMOVE_SCHEMA.encode())
    connection.execute(_REMOVE_TASKS.encode())
