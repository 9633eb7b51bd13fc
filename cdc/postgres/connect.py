"""Connections to PostgreSQL: this module alone reads a DSN, and explains why a server refused a connection.

A DSN is treated as a secret. libpq's and psycopg's parse errors quote pieces of the password (``missing "=" after
"cret"``), and an ``@`` or ``/`` that is not percent-encoded moves a part of it into host, port or dbname, which later
messages print. So no message quotes a DSN, and one whose password seems to have spilled over is refused before it is
used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from cdc.core.errors import CdcError, ConnectError, SchemaError, UsageError
from cdc.postgres import pinned
from cdc.postgres.link import GuardedConnection
from cdc.postgres.script import Script, run, run_async
from cdc.postgres.watched import WatchedConnection

Connection = psycopg.Connection
"""psycopg's class under our own name, for modules that pass connections on and do not import the driver."""

Dsn = str | Callable[[], str | None] | None
"""A DSN, or a function that returns the current one, as passwords are rotated. None: libpq's variables."""

CLIENT_TCP: Mapping[str, str] = {
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "2",
    "tcp_user_timeout": "8000",  # milliseconds; without it unacknowledged data overrides the keepalives
}
"""The client notices a dead link after 9 s, before the server (``SERVER_TCP``) releases the locks."""

SERVER_TCP: Mapping[str, str] = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""``session`` settings for a connection that holds advisory locks: the server ends it 11 s after its host vanished.

With the kernel's defaults that takes two hours. Without the fourth setting unsent NOTIFYs postpone it.
"""

_CONNECT_TIMEOUT_S = "10"
_SHOWN = {
    "service": "PGSERVICE",
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
}
_OF_SQLALCHEMY = {
    f"{name}+{driver}" for name in ("postgresql", "postgres") for driver in ("psycopg", "psycopg2", "asyncpg", "pg8000")
}
_OURS = ("entity_change", "cdc_subscription", "cdc_positions")
"""What the names of objects of the outbox begin with."""
_WRITE_IT = (
    "write it as postgresql://USER@HOST:PORT/DBNAME or as host=... port=... dbname=... user=...; "
    "percent-encode the password in a URL, or keep it in a password file (PGPASSFILE)"
)


def parse(dsn: str | None) -> dict[str, str]:
    """The parameters of a DSN, URL or ``key=value``. None or "" is {}: libpq's PG* variables and service files.

    Raises UsageError, which never quotes the DSN.
    """
    text = (dsn or "").strip()
    try:
        parameters = {name: str(value) for name, value in conninfo_to_dict(text).items() if value is not None}
    except (psycopg.Error, UnicodeError):
        scheme = text.partition("://")[0]
        if scheme in _OF_SQLALCHEMY:
            plain = f"write postgresql:// instead of {scheme}://, which is SQLAlchemy's way to name a driver"
            raise UsageError("the database DSN cannot be read", hint=plain) from None
        raise UsageError("the database DSN cannot be read", hint=_WRITE_IT) from None
    _refuse_a_spilled_password(parameters, is_url=text.startswith(("postgresql://", "postgres://")))
    return parameters


def _refuse_a_spilled_password(parameters: Mapping[str, str], *, is_url: bool) -> None:
    found = _shown(parameters)
    host = found["host"]
    # Outside a URL the parts cannot run into each other. A socket's name may begin with @, or be a path that has one.
    in_url = is_url and "host" in parameters
    host_spilled = "@" in host and (in_url or not host.startswith(("@", "/")))
    port_spilled = any(port and not port.isdecimal() for port in found["port"].split(","))
    # A whole DSN as dbname, such as PGDATABASE=postgresql://..., which libpq takes for a name.
    dbname_spilled = any(mark in found["dbname"] for mark in "@/=")
    for part, spilled, reason in (
        ("host", host_spilled, "contains @"),
        ("port", port_spilled, "is not a number"),
        ("dbname", dbname_spilled, "contains @, / or ="),
    ):
        if spilled:
            where = f"the {part} in the database DSN" if parameters.get(part) else _SHOWN[part]
            raise UsageError(f"{where} {reason}: a piece of the password?", hint=_WRITE_IT)


def describe(dsn: str | None) -> str:
    """Where a DSN leads, for messages: ``host=... port=... dbname=... user=...``. Never the password."""
    return _place(parse(dsn))


def _place(parameters: Mapping[str, Any]) -> str:
    return (
        " ".join(f"{name}={value}" for name, value in _shown(parameters).items() if value) or "libpq's default server"
    )


def _shown(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The parts that the DSN, or else libpq's variables, set; "" where neither does."""
    return {name: str(parameters.get(name) or os.environ.get(variable, "")) for name, variable in _SHOWN.items()}


def connect(
    dsn: Dsn,
    *,
    application_name: str,
    autocommit: bool = True,
    session: Mapping[str, str] | None = None,
    answer_limit_s: float | None = None,
    user_path: bool = False,
    **options: Any,
) -> Connection:
    """Connect, with a dead link noticed within seconds, and with the settings of ``pinned``, whatever the database's.

    ``session`` holds server settings for this session (``{"lock_timeout": "5s"}``); ``answer_limit_s`` is how long an
    answer may take before the connection is closed (``link``); ``options`` are arguments of psycopg.connect or
    parameters of libpq (``row_factory=...``, ``replication="database"``). ``user_path`` leaves the search_path as the
    role has it, for callers that look up a table by its name. Raises ConnectError with the server's words and a
    remedy, UsageError for a DSN that cannot be read.
    """
    arguments = _arguments(dsn, application_name, session, options, user_path=user_path)
    return run(_connect(GuardedConnection, arguments, autocommit=autocommit, answer_limit_s=answer_limit_s))


async def connect_async(
    dsn: Dsn,
    *,
    application_name: str,
    autocommit: bool = True,
    session: Mapping[str, str] | None = None,
    answer_limit_s: float | None = None,
    **options: Any,
) -> WatchedConnection:
    """``connect`` for an event loop."""
    arguments = _arguments(dsn, application_name, session, options)
    return await run_async(_connect(WatchedConnection, arguments, autocommit=autocommit, answer_limit_s=answer_limit_s))


def _connect(
    kind: type[GuardedConnection] | type[WatchedConnection],
    arguments: Mapping[str, Any],
    *,
    autocommit: bool,
    answer_limit_s: float | None,
) -> Script[Any]:
    try:
        connection = yield kind.connect("", autocommit=True, **arguments)
        connection.answer_limit_s = answer_limit_s
        try:
            cursor = yield connection.execute(_DID_IT_ARRIVE)
            _refuse_pooler((yield cursor.fetchone()))
            if newer := pinned.once_connected(connection.info.server_version):
                yield connection.execute(newer.encode())
            yield connection.set_autocommit(autocommit)
        except BaseException:
            yield connection.close()
            raise
    except (psycopg.Error, UnicodeError) as error:
        raise _explained(error, arguments) from None  # the driver's error carries a record that holds the password
    return connection


_DID_IT_ARRIVE = "SELECT pg_catalog.current_setting('row_security')"
_NO_POOLER = (
    "connect to the server itself: settings, locks and LISTEN belong to a session; transactional handlers may go "
    "through the pooler, by CDC_HANDLERS_DSN"
)


def _refuse_pooler(answer: tuple[str] | None) -> None:
    """A pooler may drop the settings asked for at the start, and may give each transaction another session."""
    if answer != (pinned.PINNED["row_security"],):
        raise ConnectError("a pooler in between drops the settings that this session needs", hint=_NO_POOLER)


def pool_arguments(dsn: Dsn, *, application_name: str, session: Mapping[str, str]) -> dict[str, Any]:
    """What a pool of our sessions passes to psycopg's connect for each connection."""
    return {"autocommit": True, **_arguments(dsn, application_name, session, {})}


def lent_arguments(dsn: Dsn, *, application_name: str, session: Mapping[str, str]) -> dict[str, Any]:
    """The same for connections lent to the application's code: its settings, and of ours only ``session``.

    An empty ``session`` allows a pooler that gives each transaction another session.
    """
    if not session:
        return {"autocommit": True, "prepare_threshold": None, **_link_arguments(dsn, application_name, {})}
    arguments = _link_arguments(dsn, application_name, {})
    arguments["options"] = pinned.options(_given(arguments), session)
    return {"autocommit": True, **arguments}


def _arguments(
    dsn: Dsn,
    application_name: str,
    session: Mapping[str, str] | None,
    options: Mapping[str, Any],
    *,
    user_path: bool = False,
) -> dict[str, Any]:
    arguments = _link_arguments(dsn, application_name, options)
    arguments["options"] = pinned.startup(_given(arguments), session or {}, user_path=user_path)
    return arguments


def _given(arguments: Mapping[str, Any]) -> str:
    """The options of the DSN, else PGOPTIONS: what we pass replaces PGOPTIONS, and so is joined with it."""
    return str(arguments.get("options", os.environ.get("PGOPTIONS", "")))


def _link_arguments(dsn: Dsn, application_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    dsn = dsn() if callable(dsn) else dsn
    arguments: dict[str, Any] = {**CLIENT_TCP, **parse(dsn), **options, "application_name": application_name}
    # Without it psycopg returns texts of an SQL_ASCII database as bytes.
    arguments["client_encoding"] = "utf8"
    if "PGCONNECT_TIMEOUT" not in os.environ:
        arguments.setdefault("connect_timeout", _CONNECT_TIMEOUT_S)
    return arguments


def _explained(error: Exception, arguments: Mapping[str, Any]) -> CdcError:
    if isinstance(error, psycopg.ProgrammingError):
        return UsageError("a parameter in the database DSN has a value that is not valid", hint=_WRITE_IT)
    words = _words(str(error))
    hint = _remedy(error, words)
    if not any(_shown(arguments).values()) and not (arguments.get("service") or os.environ.get("PGSERVICE")):
        hint = f"no database is named: give CDC_DSN, --dsn or libpq's variables (PGHOST, PGDATABASE); or {hint}"
    return ConnectError(f"cannot connect to {_place(arguments)}: {words}", hint=hint)


def _words(text: str) -> str:
    """The server's or libpq's own sentence, without the address around it; for several hosts, all sentences."""
    if text.startswith("Multiple connection attempts"):
        return " ".join(text.split())
    last = text.rpartition(" failed: ")[2].strip().partition("\n")[0].removeprefix("connection is bad: ")
    return " ".join(last.split())


_TIMEOUT = "check host and port, and that no firewall drops the connection; connect_timeout in the DSN sets the limit"
_NO_PASSWORD = "the server asks for a password: give it in a password file (PGPASSFILE) or in the DSN"  # noqa: S105 - a sentence
_BAD_PASSWORD = "check user and password; the server's log names the line of pg_hba.conf it used"  # noqa: S105 - a sentence
_NO_REPLICATION = "ALTER ROLE ... REPLICATION (rds_replication on RDS and Aurora)"
_GENERAL = "check host, port, dbname and user; the server's own log says more"

# A refused connection carries no SQLSTATE: libpq has only the text, in the server's language. These words choose the
# remedy that is shown and nothing else; for a server that speaks another language the general one is shown.
_REMEDIES = (
    (
        "no encryption",
        "sslmode=verify-full in the DSN, if the server takes encrypted connections only; or see pg_hba.conf",
    ),
    ("unsupported startup parameter", _NO_POOLER),
    ("no pg_hba.conf entry", "add a line for this database, user and address to pg_hba.conf, then reload"),
    ("not currently accepting connections", "ALTER DATABASE ... ALLOW_CONNECTIONS true, or correct dbname in the DSN"),
    ("is not permitted to log in", "ALTER ROLE ... LOGIN, or use another user"),
    ("FATAL: database", "create the database (createdb NAME), or correct dbname in the DSN"),
    ("FATAL: role", "create the role, or correct user in the DSN"),
    ("permission denied for database", "GRANT CONNECT ON DATABASE ... TO the role"),
    ("must be superuser or replication role", _NO_REPLICATION),
    ("permission denied to start WAL sender", _NO_REPLICATION),  # the wording from PostgreSQL 16 on
    ("max_wal_senders", "raise max_wal_senders and restart the server, or end an idle walsender"),
    ("too many", "raise max_connections or the role's CONNECTION LIMIT, or run fewer consumers"),
    ("remaining connection slots", "raise max_connections and restart the server, or run fewer consumers"),
    ("starting up", "wait until the server has started"),
    ("shutting down", "wait until the server is back"),
    ("Connection refused", "start the server, or correct host and port; it must listen on that address"),
    ("No such file", "start the server, or correct host: the folder of its Unix socket, or a host name for TCP"),
    ("resolve host", "correct host in the DSN, or the name service of this machine"),
    ("hot standby", "no server of that kind answered: see target_session_attrs and the hosts in the DSN"),
    ("read-only", "no server of that kind answered: see target_session_attrs and the hosts in the DSN"),
    (
        "does not match host name",
        "connect by a name that is in the server's certificate, or have one made for this name",
    ),
    ("root certificate file", "name the authority that signed the server's certificate: sslrootcert=FILE in the DSN"),
    ("private key file", "sslkey in the DSN names the key of sslcert; chmod 600 it, as this user or root owns it"),
    ("client certificate", "name one that the server's ssl_ca_file vouches for: sslcert and sslkey in the DSN"),
    ("alert unknown ca", "name one that the server's ssl_ca_file vouches for: sslcert and sslkey in the DSN"),
    ("channel binding", "channel_binding=require takes TLS, and a password that the server keeps as scram-sha-256"),
    ("SSL", "check sslmode and sslrootcert in the DSN, and ssl on the server"),
)


def _remedy(error: Exception, words: str) -> str:
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return _TIMEOUT
    link = error.pgconn if isinstance(error, psycopg.Error) else None
    if link is not None and link.needs_password:
        return _NO_PASSWORD
    named = next((remedy for said, remedy in _REMEDIES if said in words), None)
    if named is None and link is not None and link.used_password:
        return _BAD_PASSWORD
    return named or _GENERAL


def explain(error: Exception) -> CdcError | None:
    """What an unexpected error of the driver means to an operator; None for any other error.

    Only the server's primary message is kept: DETAIL and CONTEXT quote rows, and so do the messages of class 22.
    """
    if not isinstance(error, psycopg.Error):
        return None
    code, said = error.sqlstate, error.diag.message_primary
    if code is None or said is None:
        if isinstance(error, psycopg.OperationalError):
            return ConnectError(
                "the connection to the database was lost", hint="look at the server's log; then try again"
            )
        return CdcError(f"the database driver gave up: {type(error).__name__}")
    if code.startswith("22"):
        return CdcError(f"the database refused a value: {type(error).__name__} (SQLSTATE {code})")
    kind, hint = _meaning(code, said)
    return kind(f"the database refused: {said} (SQLSTATE {code})", hint=hint)


def _meaning(code: str, said: str) -> tuple[type[CdcError], str]:
    if code == "42501":
        return CdcError, (
            "connect as the owner of the object, or GRANT this role what it lacks; where row-level security is meant, "
            "switch it off for the outbox, or ALTER ROLE ... BYPASSRLS"
        )
    if code in _MISSING and (code == "3F000" or any(name in said for name in _OURS)):
        return SchemaError, "run cdc db install, or cdc db upgrade, with the --schema the consumer uses"
    if code == "25006":
        return ConnectError, STANDBY
    if code.startswith("08") or code in {"57P01", "57P02", "57P03"}:
        return ConnectError, "look at the server's log; then try again"
    if code in {"55P03", "57014", "40P01", "40001"}:
        return CdcError, "another session blocked it (see pg_stat_activity); try again"
    return CdcError, ""


STANDBY = "the server is a standby, or has become one: list all hosts in the DSN, with target_session_attrs=read-write"
"""What a refusal to write means in a session of ours, whose transactions are read-write by default."""

_MISSING = {"3F000", "42P01", "42703", "42883"}  # schema, table, column, function


def driver_versions() -> tuple[str, str]:
    """The versions of psycopg and of libpq, such as ("3.3.9", "18.6")."""
    libpq = psycopg.pq.version()
    return psycopg.__version__, f"{libpq // 10000}.{libpq % 10000}"
