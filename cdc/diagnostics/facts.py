"""What the doctor has seen, as values: the checks judge these and nothing else. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cdc.core.type_filter import TypeFilter
from cdc.postgres.remarks import Remark
from cdc.postgres.tracked_tables import Tracked
from cdc.replication.slot_health import SlotReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined: the outbox in ``schema`` and its slot. DSNs are secrets.

    ``plugin`` may be "auto". ``handles(entity_type, operation)``: whether such changes are wanted, or discarded on
    purpose, and ``scope``: the types that are; both None where no handlers are named. ``handlers_error``: why they
    cannot be loaded, and the remedy.
    """

    dsn: str | None
    stream_dsn: str | None
    schema: str
    slot: str
    plugin: str = "auto"
    temporary: bool = False
    creates_slot: bool = True
    streams: bool = True
    prunes: bool = False
    handler_timeout_s: float | None = None
    handles: Callable[[str, str], bool] | None = None
    scope: TypeFilter | None = None
    handlers_error: tuple[str, str] | None = None
    exposed_files: tuple[str, ...] = ()
    old_transaction_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """An ordinary connection as the consumer makes it. ``pids`` are of backends that served one transaction each."""

    place: str
    role: str
    is_local: bool
    encrypted: bool
    sslmode: str
    handshake_pid: int
    pids: tuple[int, ...]
    sees_all_sessions: bool
    settings: Mapping[str, str]
    """Those of connect.SERVER_TCP that were asked for and are different, with what they are."""
    idle_session_timeout_s: float
    idle_in_transaction_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    version_num: int
    version: str
    in_recovery: bool
    reads_by_default: bool
    """Whether the database has default_transaction_read_only on; our own sessions write all the same."""
    server_time: datetime
    clock_ahead_s: float
    """Of this machine's clock."""
    wal_level: str
    slots: int
    slots_max: int
    idle_slots: tuple[str, ...]
    """Names of slots of any database that nobody reads."""
    walsenders: int
    walsenders_max: int
    slot_keep_bytes: int | None
    """max_slot_wal_keep_size; None: without end."""
    slot_idle_timeout_s: float | None
    """idle_replication_slot_timeout, from 18 on; None: no such limit."""
    notify_queue_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLink:
    """A replication connection as the stream makes it. ``refused``: why there is none, and the remedy."""

    role: str
    may_replicate: bool | None = None
    """None where not even an ordinary connection is to be had."""
    refused: tuple[str, str] | None = None
    encrypted: bool = False
    is_local: bool = True
    sslmode: str = ""
    wal_sender_timeout_s: float | None = None
    wanted_timeout_s: float = 0.0
    status_interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Proof:
    """One attempt to have a message decoded. ``reason`` of cdc.replication.refusals, or None: it came through.

    ``sent``: whether there was a message. Without the right to send one, the plugin has been loaded and has read on.
    """

    plugin: str
    reason: str | None = None
    sentence: str = ""
    hint: str = ""
    sent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """``proofs``: in the order in which plugins were tried; the last one counts.

    ``allowed``: output_plugin_libraries; None where the server has no such setting, "" where the role may not see it.
    """

    role: str
    proofs: tuple[Proof, ...]
    allowed: str | None
    publication: str
    published: tuple[str, ...] | None
    """What the publication publishes, which should be nothing; None: there is no such publication."""
    may_publish: bool
    """The role may create it, so the consumer does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFacts:
    """The slot as it is, None where there is none, and the limits it lives under."""

    slot: SlotReport | None
    keep_bytes: int | None
    idle_timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """An open transaction that holds something back. ``gid`` of a prepared one, which has no process."""

    pid: int | None
    gid: str | None
    database: str | None
    application_name: str | None
    state: str | None
    age_s: float
    writes: bool
    ends_it: str
    """The statement that does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTransactions:
    """Those older than the limit, the oldest first. ``waiting_commits``: pids that wait for a synchronous standby."""

    old: tuple[Transaction, ...]
    limit_s: float
    sees_all: bool
    oldest_writer: str | None
    """For a sentence, of any age."""
    waiting_commits: tuple[int, ...]
    synchronous_standbys: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The objects of the outbox. ``differences`` as ``cdc db verify`` prints them."""

    schema: str
    exists: bool
    pending: tuple[str, ...]
    differences: tuple[str, ...]
    elsewhere: tuple[str, ...]
    """Other schemas of this database with an outbox in them."""
    script: str
    """What installs or upgrades them; "" where nothing of that is to be done."""
    by_hand: tuple[str, ...] = ()
    """Statements for the differences that no upgrade fixes."""
    owner: str = ""
    """Whose the objects are, and as whom they are upgraded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFunctionFacts:
    """``lacks``: what its owner may not do and has to, if it runs with the owner's rights.

    ``others``: who owns captured tables, or types in them, and is neither a superuser nor this owner.
    """

    name: str
    owner: str
    owner_is_superuser: bool
    security_definer: bool
    settings: tuple[str, ...]
    public_may_call: bool
    owns_outbox: bool = False
    others: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()
    """Statements that give it what it lacks."""
    outbox_owner: str = ""

    @property
    def owner_is_meant(self) -> bool:
        """It is the owner of the outbox, or a role for this alone."""
        return self.owns_outbox or self.owner.startswith("cdc_capture_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Every trigger that captures, and what there is to remark about them and their tables."""

    triggers: tuple[Tracked, ...]
    remarks: tuple[Remark, ...] = ()

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(sorted({each.table for each in self.triggers}))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSecurity:
    """Row level security of the outbox's tables: all that have it, and those where it goes for this role."""

    role: str
    tables: tuple[str, ...]
    active: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReader:
    """A role that was granted the application's data in the outbox."""

    role: str
    by_default: tuple[str, ...]
    """What ends the default privileges that have done it."""
    intended: bool
    """It also has what a consumer, an operator or `cdc db grant --payload` has, and nobody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReaders:
    table: str
    owner: str
    readers: tuple[DataReader, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Senders:
    """Who may send logical messages: ``open_to_all`` are the functions that PUBLIC may call, as SQL names them.

    ``owners``: those of capture functions, in any schema, who have to. ``others``: roles that were granted it by name.
    """

    open_to_all: tuple[str, ...]
    owners: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbering:
    """``last``: the number drawn last, None where the role may not see it. ``highest``: of the rows looked at."""

    role: str
    table: str
    sequence: str
    last: int | None
    highest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """Statements that give the role what it lacks, none where it has all."""

    role: str
    grants: tuple[str, ...]
    schema: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHolders:
    """Who holds the shards. ``strangers``: (pid, application, shards) of sessions that are no consumers."""

    held: int
    consumers: int
    strangers: tuple[tuple[int, str, int], ...]
    silent: tuple[tuple[int, int, float], ...] = ()
    """(pid, shards, seconds since its last statement) of consumers that hang, or whose forked children go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """How autovacuum stands to the outbox."""

    name: str
    autovacuum: bool
    """Of the server."""
    excluded: bool
    """autovacuum_enabled is off for the table."""
    tuned: bool
    """The settings for a queue are there."""
    live: int
    dead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    fresh: int
    waiting: int
    dead: int
    oldest_ready_age_s: float


@dataclass(frozen=True, slots=True)
class Unhandled:
    """Fresh changes, by type, that no handler of those named wants; of each at least so many."""

    types: tuple[tuple[str, int], ...]
