"""Why a slot cannot be created or read, or a stream has ended; and what to do about the slot that was found. Pure.

Decided by SQLSTATE and, where a code has several causes, by the server's function that raised it (the diagnostic
field "source function"): message texts are translated. 55000 says nothing about the slot, so a slot is recreated
only after its row was read, or when several reads came no further; and only if it is ours.

    permanent   waiting does not fix it; the stream tries again every minute
    otherwise   exponential backoff; the consumer sweeps meanwhile in either case
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cdc.core.errors import StreamError
from cdc.core.lsn import Lsn
from cdc.core.model import PLUGINS
from cdc.core.stream_reason import Reason


class Phase(StrEnum):
    PUBLISH = "publish"
    CREATE = "create"
    START = "start"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class ErrorContext:
    """Values for the sentences."""

    slot: str
    plugin: str
    database: str
    role: str
    publication: str = ""


@dataclass(frozen=True, slots=True)
class _ErrorRule:
    reason: Reason
    sentence: str
    hint: str
    permanent: bool = False


_STREAM_AGAIN = "nothing: it is tried again by itself, and a sweep finds what was written meanwhile"
_LOOK = "look at it with: cdc slot status {slot}"

_WAL_LEVEL = _ErrorRule(
    Reason.WAL_LEVEL,
    "the server's wal_level does not allow logical replication",
    "ALTER SYSTEM SET wal_level = logical, then restart the server; until then changes are found by sweeping",
    permanent=True,
)
_NO_REPLICATION = _ErrorRule(
    Reason.NO_REPLICATION_ROLE,
    "the role {role} may not use replication",
    'as a superuser: ALTER ROLE "{role}" REPLICATION (rds_replication on RDS and Aurora)',
    permanent=True,
)
_NO_FREE_SLOT = _ErrorRule(
    Reason.NO_FREE_SLOT,
    "the server has no free replication slot for {slot}",
    "drop an unused slot (cdc slot list), or raise max_replication_slots and restart the server",
    permanent=True,
)
_NO_FREE_WALSENDER = _ErrorRule(
    Reason.NO_FREE_WALSENDER,
    "the server has no free walsender",
    "raise max_wal_senders and restart the server, or end an unused replication connection",
    permanent=True,
)
_IN_RECOVERY = _ErrorRule(
    Reason.IN_RECOVERY,
    "the server is a standby and cannot decode its WAL",
    "connect to the primary: list all hosts in the DSN and add target_session_attrs=read-write",
    permanent=True,
)
_PLUGIN_REFUSED = _ErrorRule(
    Reason.PLUGIN_REFUSED,
    "the server does not allow the output plugin {plugin}",
    # Unquoted: as one quoted string it is one name and allows nothing. Without pgoutput in the list it is refused.
    'as a superuser: ALTER ROLE "{role}" SET output_plugin_libraries = pgoutput, test_decoding, wal2json;'
    " without quotes around the list",
    permanent=True,
)
_PLUGIN_MISSING = _ErrorRule(
    Reason.PLUGIN_MISSING,
    "the output plugin {plugin} is not installed on the server",
    "install it there (Debian: postgresql-NN-{plugin})",
    permanent=True,
)
_PLUGIN_OLD = _ErrorRule(
    Reason.PLUGIN_MISSING,
    "the output plugin {plugin} on the server is too old: it does not know our options",
    "install version 2.5 or later of it there, or set slot.plugin to pgoutput",
    permanent=True,
)
_PUBLICATION_MISSING = _ErrorRule(
    Reason.PUBLICATION_MISSING,
    "pgoutput needs the publication {publication}, which is not there, and this role may not create it",
    'as the owner of the database {database}: CREATE PUBLICATION "{publication}"; it publishes nothing',
    permanent=True,
)
_PUBLISHED_BY_OTHERS = _ErrorRule(
    Reason.SLOT_BUSY, "another consumer has just created the publication {publication}", _STREAM_AGAIN
)
# The publication exists, or did when the stream started, but the WAL being decoded was written without it.
_NOT_PUBLISHED_THEN = _ErrorRule(
    Reason.PUBLICATION_MISSING,
    "the publication {publication} was not there when the WAL at the slot {slot} was written",
    "nothing: it is tried again, and then the slot is recreated; a sweep finds what was written meanwhile",
)
_SLOT_BUSY = _ErrorRule(
    Reason.SLOT_BUSY,
    "another consumer reads the slot {slot}",
    "nothing: this consumer stands by and takes over when that one ends",
)
_STANDBYS_AWAY = _ErrorRule(
    Reason.STANDBYS_AWAY,
    "the slot {slot} is one for failover, and the standbys that the server waits for are away",
    "nothing: the slot goes on without failover. When they are back: cdc slot recreate {slot} --failover",
)
_ANOTHER_OUTBOX = _ErrorRule(
    Reason.SLOT_FOREIGN,
    "the slot {slot} is read by a consumer of another outbox of the database {database}",
    "a name of its own for each outbox's slot (CDC_SLOT_NAME); slot names are one for the whole server",
    permanent=True,
)
_SLOT_GONE = _ErrorRule(Reason.SLOT_MISSING, "the slot {slot} does not exist", _STREAM_AGAIN)
_CREATED_BY_OTHERS = _ErrorRule(Reason.SLOT_BUSY, "another consumer has just created the slot {slot}", _STREAM_AGAIN)
_CREATE_WAITS = _ErrorRule(
    Reason.SLOT_MISSING,
    "the slot {slot} cannot be created while a transaction that writes stays open",
    "end the oldest write transaction of the server, of any database; cdc slot create {slot} names it",
)
_CANNOT_READ = _ErrorRule(Reason.PROTOCOL, "the server cannot read the slot {slot} (55000)", _LOOK, permanent=True)
_WAL_REMOVED = _ErrorRule(Reason.SLOT_LOST, "WAL that the slot {slot} needs is not there", _STREAM_AGAIN)
_ENDED = _ErrorRule(Reason.SERVER_SHUTDOWN, "the server ended the replication connection", _STREAM_AGAIN)
_TOO_LARGE = _ErrorRule(
    Reason.PROTOCOL,
    "a row is too large for {plugin} to decode",
    "nothing: it is tried again, and then the slot is recreated; a sweep finds what was written meanwhile",
)
_MESSAGE_TOO_LONG = _ErrorRule(
    Reason.PROTOCOL,
    "somebody has sent a logical message of {size} MB, which takes twice that memory to read",
    "nothing: the stream begins again behind it; who may send one, and how to forbid it, says cdc doctor",
)
_CRASH_GUARD = _ErrorRule(
    Reason.CRASH_GUARD,
    "the slot {slot} is not read while this consumer goes through what one that died was working on",
    "nothing: it is read again within a minute; a sweep finds what is written meanwhile",
)
_BAD_OPTIONS = _ErrorRule(
    Reason.PROTOCOL,
    "the server refuses to stream the slot {slot} with our options ({sqlstate})",
    "look at the server's log",
    permanent=True,
)
_LINK = _ErrorRule(Reason.NETWORK, "the replication connection broke", _STREAM_AGAIN)
_OTHER = _ErrorRule(
    Reason.PROTOCOL, "the server ended streaming the slot {slot} ({sqlstate})", "look at the server's log"
)

_BY_CODE: Mapping[str, _ErrorRule] = {
    "08P01": _BAD_OPTIONS,
    "0A000": _BAD_OPTIONS,
    "22023": _PLUGIN_OLD,
    "25006": _IN_RECOVERY,
    "42501": _NO_REPLICATION,
    "42601": _BAD_OPTIONS,
    "42602": _BAD_OPTIONS,
    "42704": _SLOT_GONE,
    "42710": _CREATED_BY_OTHERS,
    "53300": _NO_FREE_WALSENDER,
    "53400": _NO_FREE_SLOT,
    "54000": _TOO_LARGE,
    "55000": _CANNOT_READ,
    "55006": _SLOT_BUSY,
    "55P03": _CREATE_WAITS,
    "57014": _ENDED,
    "57P01": _ENDED,
    "57P02": _ENDED,
    "57P03": _ENDED,
    "58P01": _PLUGIN_MISSING,
    "XX000": _BAD_OPTIONS,
}
_BY_FUNCTION: Mapping[tuple[str, str], _ErrorRule] = {
    ("55000", "CheckLogicalDecodingRequirements"): _WAL_LEVEL,
    ("55000", "CheckSlotRequirements"): _NO_FREE_SLOT,
    ("0A000", "CheckLogicalDecodingRequirements"): _IN_RECOVERY,
    ("42501", "StartupDecodingContext"): _PLUGIN_REFUSED,
    ("42704", "get_publication_oid"): _NOT_PUBLISHED_THEN,
}
_WHILE_PUBLISHING: Mapping[str, _ErrorRule] = {
    "23505": _PUBLISHED_BY_OTHERS,
    "42501": _PUBLICATION_MISSING,
    "42710": _PUBLISHED_BY_OTHERS,
}
_WHILE_STREAMING: Mapping[str, _ErrorRule] = {
    # At the start the missing file is the plugin's, later a WAL segment.
    "58P01": _WAL_REMOVED,
    # Our options were accepted, so the cause is in the WAL: the next session starts after it.
    "XX000": _OTHER,
    "22023": _OTHER,
    "42704": _OTHER,
    "55000": _OTHER,
}
_DURING: Mapping[Phase, Mapping[str, _ErrorRule]] = {Phase.PUBLISH: _WHILE_PUBLISHING, Phase.STREAM: _WHILE_STREAMING}


def classify(sqlstate: str | None, function: str | None, during: Phase, names: ErrorContext) -> StreamError:
    """The meaning of an ERROR or FATAL on the replication connection; ``sqlstate`` None: the link itself broke."""
    if sqlstate is None or (sqlstate.startswith("08") and sqlstate != "08P01"):
        return _error(_LINK, names)
    row = _BY_FUNCTION.get((sqlstate, function or "")) or _DURING.get(during, {}).get(sqlstate)
    return _error(row or _BY_CODE.get(sqlstate, _OTHER), names, sqlstate)


def in_recovery(names: ErrorContext) -> StreamError:
    """The server answered that it is a standby."""
    return _error(_IN_RECOVERY, names)


def another_outbox(names: ErrorContext) -> StreamError:
    """The slot's reader reads it for another outbox."""
    return _error(_ANOTHER_OUTBOX, names)


def standbys_away(names: ErrorContext) -> StreamError:
    """The failover slot has delivered nothing for a while."""
    return _error(_STANDBYS_AWAY, names)


def crash_guard(names: ErrorContext) -> StreamError:
    """Reading could end the process, which might cost a running change an attempt."""
    return _error(_CRASH_GUARD, names)


def server_ended(names: ErrorContext) -> StreamError:
    """The server closed the stream in good order, as it does at a shutdown."""
    return _error(_ENDED, names)


def message_too_long(size: int, names: ErrorContext) -> StreamError:
    """A message of ``size`` bytes; the session has read it, and keeps the memory that it took."""
    return _error(_MESSAGE_TOO_LONG, names, size=size >> 20)


def _error(row: _ErrorRule, names: ErrorContext, sqlstate: str = "", size: int = 0) -> StreamError:
    words = {
        "size": size,
        "slot": names.slot,
        "plugin": names.plugin,
        "role": names.role.replace('"', '""'),
        "database": names.database,
        "publication": names.publication.replace('"', '""'),
        "sqlstate": sqlstate,
    }
    return StreamError(
        row.sentence.format_map(words),
        reason=row.reason.value,
        hint=row.hint.format_map(words),
        permanent=row.permanent,
    )


@dataclass(frozen=True, slots=True)
class ServerState:
    """Read over an ordinary connection after the server refused a replication connection, which has no SQLSTATE."""

    wal_level: str
    may_replicate: bool
    walsenders: int
    walsenders_max: int


def classify_connect(look: ServerState | None, refused: str, hint: str, names: ErrorContext) -> StreamError:
    """A refused connection. ``look`` is None when an ordinary one is refused as well; ``refused``: the sentence."""
    if look is not None:
        if look.wal_level == "minimal":
            return _error(_WAL_LEVEL, names)
        if not look.may_replicate:
            return _error(_NO_REPLICATION, names)
        if look.walsenders >= look.walsenders_max:
            return _error(_NO_FREE_WALSENDER, names)
    return StreamError(refused, reason=Reason.NETWORK.value, hint=hint)


@dataclass(frozen=True, slots=True)
class FoundSlot:
    """A row of pg_replication_slots."""

    plugin: str | None
    database: str | None
    wal_status: str | None
    confirmed: Lsn | None
    temporary: bool = False
    lost_by: str = ""
    """The server's reason, from 17 on."""
    failover: bool = False
    held_by: str = ""
    """Standbys' slots for which the server delays the messages of a failover slot; all of these are away."""


@dataclass(frozen=True, slots=True)
class SlotPolicy:
    """The settings, and what earlier attempts have shown.

    ``plugins`` in the order in which they are tried, without those in ``refused``, which the server lacks or forbids.
    ``stuck``: several reads of the slot never came further. ``failover``: the slot that a new one replaces was a
    failover slot, and so will the new one be. ``from_end``: what the slot holds so far must not be read.
    """

    plugins: tuple[str, ...] = PLUGINS
    refused: tuple[str, ...] = ()
    temporary: bool = False
    may_create: bool = True
    may_recreate: bool = True
    stuck: bool = False
    failover: bool = False
    from_end: bool = False


class SlotAction(StrEnum):
    """What the stream does with the slot before it starts reading."""

    START = "start"
    CREATE = "create"
    RECREATE = "recreate"
    NO_FAILOVER = "no failover"
    """The slot stays, without failover."""


def next_step(found: FoundSlot | None, server_end: Lsn, names: ErrorContext, policy: SlotPolicy) -> SlotAction:
    """Raises StreamError for a missing slot that we may not create, or one that is not ours."""
    if found is None:
        if policy.may_create:
            return SlotAction.CREATE
        hint = f"create it with: cdc slot create {names.slot}"
        raise StreamError(
            f"the slot {names.slot} does not exist", reason=Reason.SLOT_MISSING.value, hint=hint, permanent=True
        )
    if (foreign := _foreign(found, names, policy)) is not None:
        raise foreign
    broken = _broken(found, server_end, names, policy)
    if broken is None:
        return SlotAction.NO_FAILOVER if found.failover and found.held_by and policy.may_recreate else SlotAction.START
    if policy.may_recreate:
        return SlotAction.RECREATE
    reason, sentence = broken
    hint = f"nothing is lost with it: cdc slot recreate {names.slot}"
    raise StreamError(sentence, reason=reason.value, hint=hint, permanent=True)


def _foreign(found: FoundSlot, names: ErrorContext, policy: SlotPolicy) -> StreamError | None:
    if found.plugin not in PLUGINS or found.database != names.database:
        kind = f"a slot of {found.plugin} in database {found.database}" if found.plugin else "a physical slot"
        return _not_ours(
            f"the name {names.slot} belongs to {kind}, not to a slot of ours in {names.database}",
            "choose another name for our slot (CDC_SLOT_NAME); slot names are one for the whole server",
        )
    if found.plugin not in policy.plugins + policy.refused:
        asked = policy.plugins[0]
        return _not_ours(
            f"the slot {names.slot} is one of {found.plugin}, and the setting slot.plugin asks for {asked}",
            f"cdc slot recreate {names.slot} --plugin {asked}, or slot.plugin = auto; no change is lost either way",
        )
    return None


def _not_ours(sentence: str, hint: str) -> StreamError:
    return StreamError(sentence, reason=Reason.SLOT_FOREIGN.value, hint=hint, permanent=True)


def why_broken(found: FoundSlot, server_end: Lsn, names: ErrorContext, policy: SlotPolicy) -> str:
    """A sentence about a slot of ours that is unusable; "" for one that can be read."""
    broken = _broken(found, server_end, names, policy)
    return broken[1] if broken else ""


def _broken(found: FoundSlot, server_end: Lsn, names: ErrorContext, policy: SlotPolicy) -> tuple[Reason, str] | None:
    slot = names.slot
    # The server accepts any confirmed position; from one ahead of its WAL it delivers nothing, without an error.
    ahead = found.confirmed is not None and found.confirmed > server_end
    if found.wal_status == "lost":
        return (
            Reason.SLOT_LOST,
            f"the server has invalidated the slot {slot} ({found.lost_by or 'it fell too far behind'})",
        )
    if ahead:
        return Reason.SLOT_LOST, f"the slot {slot} was confirmed ahead of the server's WAL and delivers nothing"
    if found.plugin in policy.refused:
        return Reason.PLUGIN_REFUSED, f"the slot {slot} needs {found.plugin}, which cannot be used"
    # If both are temporary, START reports that another consumer reads it.
    if policy.temporary and not found.temporary:
        return Reason.SLOT_FOREIGN, f"the slot {slot} is durable, and slot.mode asks for a temporary one"
    if policy.stuck:
        return Reason.SLOT_STUCK, f"the stream of the slot {slot} ends at the same place at every start"
    return None
