"""The terms of change capture, as frozen values. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

from cdc.core.attempts import FailedAttempt

SHARDS = 64
"""Units of ownership between consumers. The functions in sql/ compute modulo the same number."""

Key = tuple[str, str]
"""(entity_type, entity_id): the unit within which order is kept."""


class Operation(StrEnum):
    """What happened to the row. READ: nothing, a backfill has read it as it is. TRUNCATE: all rows are gone.

    SCHEMA: nothing, the columns of the table have changed, or its name, or it is gone.
    """

    INSERT = "INSERT"
    UPDATE = "UPDATE"
    DELETE = "DELETE"
    READ = "READ"
    TRUNCATE = "TRUNCATE"
    SCHEMA = "SCHEMA"


CAPTURED = (Operation.INSERT, Operation.UPDATE, Operation.DELETE)
"""What a row trigger captures."""
OF_TABLES = (Operation.TRUNCATE, Operation.SCHEMA)
"""What is about no row, and a barrier of its type. Only a handler that names such an operation gets it."""


class ChangeState(StrEnum):
    """The state of a row of ``entity_changes``, a function of its columns: the last of these that is true."""

    FRESH = "fresh"
    WAITING = "waiting"
    DEAD = "dead"
    PROCESSED = "processed"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Change:
    """One captured change of one row, as a handler gets it. Compared and hashed by identity.

    ``old`` is None for an INSERT and a READ, ``new`` for a DELETE, both for a TRUNCATE; otherwise they hold the row as
    JSON, or, if the handler names a pydantic model, an instance of it. A TRUNCATE and a SCHEMA are about no row, and
    their ``entity_id`` is empty; for a SCHEMA ``old`` and ``new`` hold the columns, whatever model is named.
    A document is parsed at its first use: ``old``, ``new`` and ``metadata`` raise UnreadableDocumentError for one that
    Python cannot parse.
    ``changed_at`` is the start of the writer's transaction.
    ``attempt`` counts from 1. ``requeued``: this attempt was waited for, after a failure, a snooze or an operator's
    requeue. ``crashed``: the attempt before ended with its consumer's process.
    ``caused_by`` is the id of the change whose handler wrote this one, and ``depth`` counts the causes before it.
    ``chain`` lists their ids, the newest first, only if there are more than a consumer follows.
    ``replay_of`` is the id of the processed change that this one repeats, because an operator had it replayed.
    ``coalesced`` is how many changes of the key this one stands for, itself among them: for a handler with ``latest``
    the first of them has given ``old``, and the last one all else. 1 otherwise.
    ``size`` is that of its documents as they were read, in bytes of JSON; 0 for a change made by hand.
    """

    id: UUID
    seq: int
    shard: int
    entity_type: str
    entity_id: str
    table_schema: str | None
    table: str
    operation: Operation
    old: Any
    new: Any
    metadata: dict[str, Any] | None
    changed_at: datetime
    attempt: int = 1
    requeued: bool = False
    crashed: bool = False
    caused_by: UUID | None = None
    depth: int = 0
    replay_of: UUID | None = None
    chain: str | None = None
    size: int = 0
    coalesced: int = 1

    @property
    def key(self) -> Key:
        return (self.entity_type, self.entity_id)

    @property
    def changed(self) -> frozenset[str]:
        """The columns whose values differ between ``old`` and ``new`` as they were captured, also with a model.

        What cannot be compared counts as changed: every column where there is one document only, as of an INSERT, a
        DELETE or a READ, or of an UPDATE without its old row; and a value that was left out (``cdc:omitted``). Numbers
        differ by their digits: 10.1 is not 10.10. A column that is not captured is never named. Empty where no
        document is an object.
        """
        return changed_columns(self.old, self.new)

    @property
    def cause(self) -> str:
        """The setting ``cdc.cause`` of a transaction whose writes this change causes.

        A transactional handler's transaction has it set. In a transaction of your own:
        ``execute("SELECT set_config('cdc.cause', %s, true)", [change.cause])``.
        """
        return f"{self.id},{self.depth}"

    def __repr__(self) -> str:
        """Without the row's content, so that a change may be logged."""
        return f"<Change {self.seq} {self.operation} {self.entity_type} {self.entity_id!r} attempt={self.attempt}>"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModelChange(Change):
    """A change whose ``old`` and ``new`` are instances of its handler's model. ``captured``: as it was read."""

    captured: Change

    @property
    def changed(self) -> frozenset[str]:
        return self.captured.changed


OMITTED = "cdc:omitted"
"""The only key of the object that stands in place of a value that no jsonb holds."""


def changed_columns(old: object, new: object) -> frozenset[str]:
    """The columns that differ between two documents, or cannot be compared; see ``Change.changed``."""
    before, after = _row(old), _row(new)
    return frozenset(column for column in before.keys() | after.keys() if differs(before, after, column))


_SCALARS = frozenset({str, int, bool, type(None)})


def differs(before: Mapping[str, object], after: Mapping[str, object], column: str) -> bool:
    """Whether the column's values differ, or may differ: one of them is not there, or was left out."""
    if column not in before or column not in after:
        return True
    one, other = before[column], after[column]
    if type(one) in _SCALARS:
        return type(one) is not type(other) or one != other
    # By text: for Python true equals 1, also inside a document, and 10.1 equals 10.10.
    return repr(one) != repr(other) or _is_omitted(one)


def _row(document: object) -> Mapping[str, object]:
    return document if isinstance(document, dict) else {}


def _is_omitted(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {OMITTED}


class UnreadableDocumentError(Exception):
    """A document that Python can never read: a number of thousands of digits, thousands of levels."""


class WakeUp(NamedTuple):
    """A notification: the change with this number is committed. It may be lost, late or doubled."""

    seq: int
    shard: int


SEQ_MAX = 2**63 - 1

PAIR = "([1-9][0-9]{0,18}),(0|[1-9][0-9]?)"
"""The text of a wake-up, ``seq,shard``, as the capture function writes it: a regular expression with two groups."""


def pair(seq: str | bytes, shard: str | bytes) -> WakeUp | None:
    """The wake-up of the two groups of ``PAIR``, or None if they do not fit: any role may notify."""
    number, owner = int(seq), int(shard)
    return WakeUp(number, owner) if number <= SEQ_MAX and owner < SHARDS else None


def message_prefix(schema: str) -> str:
    """The prefix of the logical messages for the outbox in ``schema``.

    It names the schema, so that two outboxes in one database do not wake each other. Bytes other than letters,
    digits and ``_`` are percent-encoded: commas or blanks in a plugin option would make it several.
    """
    return "entity_change:" + "".join(
        character if character.isascii() and (character.isalnum() or character == "_") else _percent(character)
        for character in schema
    )


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


PLUGINS = ("wal2json", "pgoutput")
"""Output plugins that can decode our messages, in the order in which they are tried."""


def publication_name(schema: str) -> str:
    """The publication that pgoutput requires. It publishes no table: messages travel without one.

    It names the schema also if that is public: a publication called just cdc may belong to another application and
    have tables. The name is cut as PostgreSQL would cut it; two long names may then share one, which does no harm.
    """
    return f"cdc_{schema}".encode()[:63].decode(errors="ignore")


TRIGGER = "#cdc_capture"
"""Our trigger's name on a table; an outbox outside public adds its schema, so that two may capture one table.

Triggers of one event fire in the order of their names, by bytes. What another AFTER ROW trigger writes would be
captured before the row that caused it, so ours sorts before names of letters, digits and underscores.
"""
TRUNCATE_TRIGGER = "#cdc_truncate"
"""The name of the one for TRUNCATE."""
FORMER_TRIGGER = "cdc_capture"
"""Its name in older outboxes; ``cdc db upgrade`` and ``cdc track`` rename it."""


def trigger_name(schema: str, stem: str = TRIGGER) -> str:
    """The name of our trigger, cut as PostgreSQL would cut it, between characters."""
    name = stem if schema == "public" else f"{stem}_{schema}"
    return name.encode()[:63].decode(errors="ignore")


def truncate_trigger_name(schema: str) -> str:
    return trigger_name(schema, TRUNCATE_TRIGGER)


def former_trigger_name(schema: str) -> str:
    return trigger_name(schema, FORMER_TRIGGER)


class Suspicion(IntEnum):
    """Whether a change's process ended while its handler ran. AGAIN: twice in a row, the last time alone."""

    NONE = 0
    ONCE = 1
    AGAIN = 2


@dataclass(frozen=True, slots=True)
class Processed:
    """The handler returned."""

    blocks_key: ClassVar[bool] = False
    """Whether later changes of the key have to wait for this one."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The handler returned, and its own transaction has marked the change. ``at``: the database's clock.

    ``coalesced``: what the handler was called with, where that stood for several changes.
    """

    at: datetime
    coalesced: Change | None = None
    blocks_key: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """No handler wants the change."""

    blocks_key: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Filtered:
    """Its handler's filter leaves the change out."""

    blocks_key: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Discarded:
    """The handler said that nothing is to be done."""

    reason: str
    blocks_key: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """The attempt failed; the next one is due ``delay_s`` seconds after the settle.

    ``counted``: it counts as an attempt; else what the handler needs was unavailable. ``error`` may quote the
    row; ``summary`` is what it is about, and quotes nothing. ``attempt``: what is kept of it; None: nothing.
    """

    delay_s: float
    error: str
    counted: bool = True
    summary: str = ""
    attempt: FailedAttempt | None = field(default=None, compare=False)
    blocks_key: ClassVar[bool] = True


SNOOZED = "snoozed"
"""The error_summary of a change whose handler asked to be called later."""


@dataclass(frozen=True, slots=True)
class Snoozed(Waiting):
    """The handler asked to be called later. It is no failed attempt."""

    counted: bool = False


@dataclass(frozen=True, slots=True)
class Dead:
    """The last attempt failed, or no attempt can succeed. ``pauses``: its key waits until an operator decides.

    ``error``, ``summary`` and ``attempt`` as of Waiting.
    """

    error: str
    pauses: bool = False
    summary: str = ""
    attempt: FailedAttempt | None = field(default=None, compare=False)

    @property
    def blocks_key(self) -> bool:
        return self.pauses


@dataclass(frozen=True, slots=True)
class Unmarkable(Dead):
    """The table rejected the real outcome. ``error`` fits any encoding."""


@dataclass(frozen=True, slots=True)
class Coalesced:
    """``outcome`` is that of the last of several changes of a key that shared a call; the others are processed with it.

    The attempt was made for the first of them. ``change`` is what the handler got, with the number and the id of the
    last; ``later``: the numbers of those after the first, as PostgreSQL writes an array.
    """

    change: Change
    later: str
    outcome: Processed | Skipped | Filtered | Discarded | Dead

    @property
    def blocks_key(self) -> bool:
        return self.outcome.blocks_key


Outcome = Processed | Committed | Skipped | Filtered | Discarded | Waiting | Dead | Coalesced
"""How one attempt ended. An attempt cut off by a stop or a lost session has no outcome: the change stays as it was."""
