"""Lets the server decode a message for a temporary slot: the only certain test of a plugin.

Nothing remains: the slot ends with the connection. The time is bounded: by a limit for each open write transaction that
it waits for, and by one for each statement.
"""

from __future__ import annotations

import psycopg
from psycopg import errors, sql

from cdc.core.errors import ProtocolError, RefusedError, StreamError
from cdc.core.model import PLUGINS, WakeUp, message_prefix, publication_name
from cdc.core.stream_reason import Reason
from cdc.diagnostics.facts import Decoding, Proof, Subject
from cdc.diagnostics.inspect_server import NAME, column
from cdc.postgres.connect import connect
from cdc.replication import pgoutput, slots, wal2json
from cdc.replication.refusals import ErrorContext, Phase, classify, in_recovery

_SLOT = "cdc_doctor"
_NAME_LENGTH = 63
_CREATE_LIMIT_S = 3.0
_STATEMENT_LIMIT = "15s"

_PUBLICATION = "SELECT puballtables FROM pg_catalog.pg_publication WHERE pubname = %s"
_MAY_PUBLISH = "SELECT has_database_privilege(current_database(), 'CREATE')"
_PUBLISHED = """
    SELECT format('%%I.%%I', schemaname, tablename) FROM pg_catalog.pg_publication_tables WHERE pubname = %s
     ORDER BY 1 LIMIT 5
"""
_MAY_SEND = """
    SELECT has_function_privilege(p.oid, 'EXECUTE') FROM pg_catalog.pg_proc p
     WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = 'pg_logical_emit_message'
       AND p.proargtypes[2] = 'pg_catalog.text'::regtype
"""


_SESSION = {
    "statement_timeout": _STATEMENT_LIMIT,
    "synchronous_commit": "local",  # an unflushed message is not decoded, and no standby matters here
}


def decoding(subject: Subject) -> Decoding:
    with connect(subject.stream_dsn, application_name=NAME, session=_SESSION) as connection:
        publication = publication_name(subject.schema)
        published, allowed = _published(connection, publication), _allowed(connection)
        return Decoding(
            role=connection.info.user,
            allowed=allowed,
            proofs=_proofs(connection, subject),
            publication=publication,
            published=published,
            may_publish=bool(column(connection, _MAY_PUBLISH)[0]),
        )


def _published(connection: psycopg.Connection, publication: str) -> tuple[str, ...] | None:
    found = connection.execute(_PUBLICATION, [publication]).fetchone()
    if found is None:
        return None
    return ("all tables",) if found[0] else column(connection, _PUBLISHED, [publication])


def _allowed(connection: psycopg.Connection) -> str | None:
    try:
        [setting] = column(connection, "SELECT current_setting('output_plugin_libraries', true)")
    except errors.InsufficientPrivilege:
        return ""
    return None if setting is None else str(setting)


def _proofs(connection: psycopg.Connection, subject: Subject) -> tuple[Proof, ...]:
    found = slots.snapshot(connection, subject.slot)
    if found is not None and found.ours and found.plugin:
        candidates: tuple[str, ...] = (found.plugin,)
    else:
        candidates = PLUGINS if subject.plugin == slots.AUTO else (subject.plugin,)
    proofs: list[Proof] = []
    if column(connection, "SELECT pg_catalog.pg_is_in_recovery()") == (True,):  # nothing is created on a standby
        names = ErrorContext(slot="", plugin=candidates[0], database="", role=connection.info.user)
        standby = in_recovery(names)
        return (Proof(candidates[0], standby.reason, str(standby), standby.hint),)
    for plugin in candidates:
        proofs.append(_prove(connection, subject.schema, plugin))
        if proofs[-1].reason not in (Reason.PLUGIN_MISSING, Reason.PLUGIN_REFUSED):
            break
    return tuple(proofs)


def _prove(connection: psycopg.Connection, schema: str, name: str) -> Proof:
    slot = f"{_SLOT}_{connection.info.backend_pid}_{name}"[:_NAME_LENGTH]
    names = ErrorContext(slot=slot, plugin=name, database=connection.info.dbname, role=connection.info.user)
    try:
        slots.create(connection, slot, plugin=name, schema=schema, temporary=True, limit_s=_CREATE_LIMIT_S)
        received = _receives(connection, slot, name, publication_name(schema))
    except StreamError as error:
        return Proof(name, error.reason, str(error), error.hint)
    except RefusedError as waits:
        return Proof(name, Reason.SLOT_MISSING.value, str(waits), waits.hint)
    except psycopg.Error as error:
        refused = classify(error.sqlstate, error.diag.source_function, Phase.START, names)
        return Proof(name, refused.reason, str(refused), refused.hint)
    except ProtocolError as garbled:
        return Proof(name, Reason.PROTOCOL.value, str(garbled))
    if received is None:
        return Proof(name, sent=False)
    return Proof(name) if received else Proof(name, Reason.PROTOCOL.value, f"{name} did not pass on a message")


def _receives(connection: psycopg.Connection, slot: str, name: str, publication: str) -> bool | None:
    """Write a message, as the capture function does, and read it as the stream does. None: this role may not write."""
    # A separate prefix: no consumer is woken.
    prefix = message_prefix(slot)
    known = (wal2json.plugin(prefix), pgoutput.plugin(prefix, publication))
    plugin = next(each for each in known if each.name == name)
    sent = _send(connection, prefix)
    options = [word for option in plugin.options for word in option]
    read = sql.SQL("SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, VARIADIC %s::text[])")
    notified = [plugin.decode(data) for (data,) in connection.execute(read, [slot, options])]
    return WakeUp(7, 3) in [each[0] for each in notified if each is not None] if sent else None


def _send(connection: psycopg.Connection, prefix: str) -> bool:
    if column(connection, _MAY_SEND) != (True,):  # checked before, since an error would drop the temporary slot
        return False
    connection.execute("SELECT pg_logical_emit_message(true, %s, '7,3')", [prefix])
    return True
