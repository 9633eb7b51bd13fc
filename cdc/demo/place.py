"""Where the demo plays: a server of its own that is thrown away, or a schema of its own on a server that is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.resources import files

import psycopg
from psycopg import sql

from cdc import schema, slots
from cdc.connect import connect, describe
from cdc.errors import CdcError, NotFoundError, RefusedError
from cdc.model import publication_name
from cdc.throwaway import Server

SCHEMA = "cdc_demo"
SLOT = "cdc_demo"
SESSION = {"search_path": SCHEMA}
"""Of all connections that name the demo's tables: the statements are those of an application."""

_PUBLICATION = publication_name(SCHEMA)
_REMOVE_SCHEMA = f"DROP SCHEMA {SCHEMA} CASCADE"
_REMOVE_PUBLICATION = f"DROP PUBLICATION IF EXISTS {_PUBLICATION}"
_REMOVE_SLOT = f"SELECT pg_drop_replication_slot('{SLOT}')"
_APPLICATION = "cdc demo: set-up"

Say = Callable[[str], None]


@contextlib.contextmanager
def private(say: Say) -> Iterator[str]:
    """The DSN of a server that ends with the demo. Raises NotFoundError where there are no programs to run one."""
    server = Server()
    say(f"Starting a private server: {server.installation}. Nothing else on this machine is touched ...")
    with server:
        with connect(server.dsn(), application_name=_APPLICATION) as connection:
            _take(connection)
            _furnish(connection)
        yield server.dsn()


@contextlib.contextmanager
def guest(dsn: str, say: Say) -> Iterator[str]:
    """The same DSN, of a server that is not ours: nothing that is there is touched, and what is made is removed.

    Raises RefusedError where something has the name of what would be made.
    """
    with connect(dsn, application_name=_APPLICATION) as connection:
        if slots.snapshot(connection, SLOT):
            raise _taken("replication slot", SLOT, _REMOVE_SLOT)
        if connection.execute("SELECT FROM pg_catalog.pg_publication WHERE pubname = %s", [_PUBLICATION]).fetchone():
            raise _taken("publication", _PUBLICATION, f"{_REMOVE_SCHEMA}; {_REMOVE_PUBLICATION}")
        _take(connection)
        say(f"On your server, {describe(dsn)}:")
        say(f"makes the schema {SCHEMA}, with a publication and a slot of its own. All are removed at the end ...")
    try:
        with connect(dsn, application_name=_APPLICATION) as connection:
            _furnish(connection)
        yield dsn
    finally:
        _leave(dsn, say)


def _take(connection: psycopg.Connection) -> None:
    """Made by itself: what follows may drop this schema, because it is ours."""
    try:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMA)))
    except psycopg.errors.DuplicateSchema:
        raise _taken("schema", SCHEMA, f"{_REMOVE_SCHEMA}; {_REMOVE_PUBLICATION}") from None
    except psycopg.errors.InsufficientPrivilege:
        user, dbname = connection.info.user, connection.info.dbname
        raise CdcError(
            f"the role {user} may not make a schema in the database {dbname}",
            hint=f"GRANT CREATE ON DATABASE {dbname} TO {user}, or name a role that may in --dsn",
        ) from None


def _taken(kind: str, name: str, remedy: str) -> RefusedError:
    return RefusedError(
        f"there is a {kind} {name} on this server already",
        hint=f"where another demo runs, wait for it; one that was killed left it behind, and this removes it: {remedy}",
    )


def _furnish(connection: psycopg.Connection) -> None:
    """The outbox, the application's tables, the documented triggers."""
    schema.install(connection, SCHEMA)
    connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(SCHEMA)))
    connection.execute(files("cdc.demo").joinpath("tables.sql").read_bytes())


def _leave(dsn: str, say: Say) -> None:
    try:
        with connect(dsn, application_name="cdc demo: removal") as connection:
            _remove(connection)
    except BaseException:
        say("Not all could be removed. What is left, this removes:")
        for statement in (_REMOVE_SCHEMA, _REMOVE_PUBLICATION, _REMOVE_SLOT):
            say(f"  {statement};")
        raise
    say(f"Removed the schema {SCHEMA}, its publication and its slot.")


def _remove(connection: psycopg.Connection) -> None:
    with contextlib.suppress(NotFoundError):  # a temporary one has left with its reader
        slots.drop(connection, SLOT, terminate=True)
    with contextlib.suppress(NotFoundError):  # the set-up did not come that far
        schema.uninstall(connection, SCHEMA, discard_unprocessed=True)
    connection.execute(_REMOVE_SCHEMA.encode())
