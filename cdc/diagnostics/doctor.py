"""Every precondition of the consumer, inspected and checked.

    inspect_*                       read the server: each read bounded, a failed one reported             (edges)
    facts                           what was read, as values
    check_*                         the checks: facts in, one finding out                                  (pure)

Nothing is changed: what is created for a test (a temporary slot, temporary tables) is gone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import psycopg

from cdc.core.errors import CdcError
from cdc.diagnostics import (
    check_outbox,
    check_replication,
    check_server,
    check_subscriptions,
    check_tables,
    inspect_operators,
    inspect_outbox,
    inspect_server,
    inspect_subscriptions,
)
from cdc.diagnostics.facts import Installed, OpenTransactions, ServerFacts, SessionFacts, SlotFacts, Subject
from cdc.diagnostics.findings import Absent, Finding, Severity, Unknown, run_checks
from cdc.diagnostics.inspect_plugin import decoding
from cdc.postgres.connect import SERVER_TCP, connect
from cdc.replication import slots
from cdc.replication.slot_health import SlotReport

T = TypeVar("T")
_SESSION = {**SERVER_TCP, "statement_timeout": "10s", "lock_timeout": "3s"}
_NO_CONNECTION = Unknown("there is no connection to the database")
_NO_OUTBOX = Absent("there is no outbox: see schema")
_NO_HANDLERS = Absent("no handlers are named here (--handlers, CDC_HANDLERS or --config)")
_NO_STREAM = Absent("the stream is switched off (CDC_STREAM)")


def examine(subject: Subject) -> list[Finding]:
    """One finding of each check. Never raises for a fault it finds; takes about a minute at most without any answer."""
    try:
        with connect(subject.dsn, application_name=inspect_server.NAME, session=_SESSION) as connection:
            return list(_examine(subject, connection))
    except CdcError as error:
        # No connection: report it, the checks that need none, and that the others need one.
        refused = Finding(Severity.FAIL, str(error), error.hint, check="connect")
        return [refused, *(each for each in _examine(subject, None) if each.check != "connect")]


def _examine(subject: Subject, connection: psycopg.Connection | None) -> Iterator[Finding]:
    def seen(look_at: Callable[[psycopg.Connection], T]) -> T | Unknown:
        return _NO_CONNECTION if connection is None else inspect_server.known(lambda: look_at(connection))

    session = seen(lambda link: inspect_server.session(link, subject))
    machine = seen(inspect_server.server)
    yield from run_checks(session, check_server.of_session(subject.handler_timeout_s))
    yield from run_checks(machine, check_server.SERVER)
    yield from run_checks(seen(lambda link: _transactions(link, subject, session)), check_server.TRANSACTIONS)
    yield from _slot_facts(subject, seen(lambda link: slots.snapshot(link, subject.slot)), machine)
    there = seen(lambda link: inspect_outbox.installed(link, subject.schema))
    yield from run_checks(there, check_outbox.of_installed(subject.slot))
    yield from _outbox(subject, connection, missing=isinstance(there, Installed) and not there.exists)
    yield from run_checks(subject, check_outbox.LOCAL)


def _outbox(subject: Subject, connection: psycopg.Connection | None, *, missing: bool) -> Iterator[Finding]:
    def seen(look_at: Callable[[psycopg.Connection, str], T]) -> T | Unknown | Absent:
        if connection is None:
            return _NO_CONNECTION
        return _NO_OUTBOX if missing else inspect_server.known(lambda: look_at(connection, subject.schema))

    yield from run_checks(seen(inspect_outbox.capture), check_outbox.CAPTURE)
    yield from run_checks(seen(inspect_outbox.captured), check_tables.of_captured(subject))
    yield from run_checks(seen(lambda link, _: inspect_outbox.rights(link, subject)), check_outbox.RIGHTS)
    yield from run_checks(seen(inspect_operators.operators), check_outbox.OPERATORS)
    yield from run_checks(seen(inspect_outbox.row_security), check_outbox.ROW_SECURITY)
    yield from run_checks(seen(inspect_outbox.readers), check_outbox.READERS)
    yield from run_checks(seen(inspect_outbox.creators), check_outbox.CREATORS)
    yield from run_checks(seen(lambda link, _: inspect_outbox.senders(link)), check_outbox.SENDERS)
    yield from run_checks(seen(inspect_outbox.numbering), check_outbox.NUMBERING)
    yield from run_checks(seen(inspect_outbox.astray), check_outbox.ASTRAY)
    yield from run_checks(seen(inspect_outbox.shard_holders), check_outbox.SHARDS_HELD)
    yield from run_checks(seen(inspect_outbox.table), check_outbox.TABLE)
    yield from run_checks(seen(inspect_outbox.backlog), check_outbox.BACKLOG)
    yield from run_checks(seen(inspect_subscriptions.subscriptions), check_subscriptions.SUBSCRIPTIONS)
    scope = subject.scope
    waits = _NO_HANDLERS if scope is None else seen(lambda link, name: inspect_outbox.unhandled(link, name, scope))
    yield from run_checks(waits, check_outbox.UNHANDLED)


def _transactions(
    connection: psycopg.Connection, subject: Subject, session: SessionFacts | Unknown
) -> OpenTransactions:
    sees_all = not isinstance(session, Unknown) and session.sees_all_sessions
    return inspect_server.transactions(connection, limit_s=subject.old_transaction_s, sees_all=sees_all)


def _slot_facts(
    subject: Subject, slot: SlotReport | Unknown | None, machine: ServerFacts | Unknown
) -> Iterable[Finding]:
    there = None if isinstance(slot, Unknown) else slot

    def seen(look_at: Callable[[Subject], T]) -> T | Unknown | Absent:
        if not subject.streams:
            return _NO_STREAM
        # The same DSN failed a moment ago: another attempt would only take time.
        unreachable = machine is _NO_CONNECTION and subject.stream_dsn == subject.dsn
        return _NO_CONNECTION if unreachable else inspect_server.known(lambda: look_at(subject))

    yield from run_checks(machine if subject.streams else _NO_STREAM, check_replication.of_server(there))
    yield from run_checks(seen(inspect_server.link), check_replication.LINK)
    yield from run_checks(seen(decoding), check_replication.of_decoding(there))
    yield from run_checks(_replication(subject, slot, machine), check_replication.of_slot(subject))


def _replication(
    subject: Subject, slot: SlotReport | Unknown | None, machine: ServerFacts | Unknown
) -> SlotFacts | Unknown | Absent:
    if isinstance(slot, Unknown):
        return slot
    if isinstance(machine, Unknown):
        return machine
    # Also checked while the stream is off: a slot that was left behind keeps WAL.
    if slot is None and not subject.streams:
        return _NO_STREAM
    return SlotFacts(slot=slot, keep_bytes=machine.slot_keep_bytes, idle_timeout_s=machine.slot_idle_timeout_s)
