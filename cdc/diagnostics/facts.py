"""What the doctor has read, as values: the checks judge these and nothing else. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cdc.core.pauses import Pause
from cdc.core.type_filter import TypeFilter
from cdc.postgres.pages import Barrier, DueLater
from cdc.postgres.remarks import Remark
from cdc.postgres.tracked_tables import Tracked
from cdc.replication.slot_health import SlotReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is inspected: the outbox in ``schema`` and its slot. DSNs are secrets.

    ``plugin`` may be "auto". ``handles(entity_type, operation)``: whether a handler wants such changes, or discards
    them on purpose. ``scope``: the types it holds for. Both are None where no handlers are named.
    ``handlers_error``: why they cannot be loaded, and the remedy.
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
    """An ordinary connection, made as the consumer makes it. ``pids``: backends that served one transaction each."""

    place: str
    role: str
    is_local: bool
    encrypted: bool
    sslmode: str
    handshake_pid: int
    pids: tuple[int, ...]
    sees_all_sessions: bool
    settings: Mapping[str, str]
    """Settings of connect.SERVER_TCP that differ from what we asked for, with their values."""
    idle_session_timeout_s: float
    idle_in_transaction_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    version_num: int
    version: str
    in_recovery: bool
    reads_by_default: bool
    """Whether the database has default_transaction_read_only on; our own sessions can write nevertheless."""
    server_time: datetime
    clock_ahead_s: float
    """How far this machine's clock is ahead of the server's."""
    wal_level: str
    slots: int
    slots_max: int
    idle_slots: tuple[str, ...]
    """Names of slots of any database that have no reader."""
    walsenders: int
    walsenders_max: int
    slot_keep_bytes: int | None
    """max_slot_wal_keep_size; None: unlimited."""
    slot_idle_timeout_s: float | None
    """idle_replication_slot_timeout, from 18 on; None: no such limit."""
    notify_queue_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLink:
    """A replication connection, made as the stream makes it. ``refused``: why it failed, and the remedy."""

    role: str
    may_replicate: bool | None = None
    """None where an ordinary connection fails, too."""
    refused: tuple[str, str] | None = None
    encrypted: bool = False
    is_local: bool = True
    sslmode: str = ""
    wal_sender_timeout_s: float | None = None
    wanted_timeout_s: float = 0.0
    status_interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Proof:
    """One attempt to decode a message. ``reason`` of cdc.replication.refusals, or None: the message came through.

    ``sent``: whether a message was sent. Without the right to send one, only loading the plugin and reading are tested.
    """

    plugin: str
    reason: str | None = None
    sentence: str = ""
    hint: str = ""
    sent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """``proofs``: in the order in which the plugins were tried; the last one counts.

    ``allowed``: output_plugin_libraries; None where the server has no such setting, "" where the role may not see it.
    """

    role: str
    proofs: tuple[Proof, ...]
    allowed: str | None
    publication: str
    published: tuple[str, ...] | None
    """What the publication publishes, which should be nothing; None: the publication is missing."""
    may_publish: bool
    """The role may create it, so the consumer will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFacts:
    """The slot, None where it is missing, and the server's limits on it."""

    slot: SlotReport | None
    keep_bytes: int | None
    idle_timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """An open transaction that holds something back. ``gid``: of a prepared one, which has no process."""

    pid: int | None
    gid: str | None
    database: str | None
    application_name: str | None
    state: str | None
    age_s: float
    writes: bool
    ends_it: str
    """The statement that ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTransactions:
    """Those older than the limit, the oldest first. ``waiting_commits``: pids that await a synchronous standby."""

    old: tuple[Transaction, ...]
    limit_s: float
    sees_all: bool
    oldest_writer: str | None
    """A phrase for the finding, whatever the transaction's age."""
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
    """Other schemas of this database that have an outbox."""
    script: str
    """The SQL that installs or upgrades them; "" where they are complete."""
    by_hand: tuple[str, ...] = ()
    """Statements for the differences that the upgrade does not fix."""
    owner: str = ""
    """The owner of the objects, who must run the upgrade."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFunctionFacts:
    """``lacks``: rights that its owner needs and does not have, if it runs with the owner's rights.

    ``others``: owners of captured tables, or of types in them, that are neither superusers nor this owner.
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
    """Statements that grant its owner the rights it lacks."""
    outbox_owner: str = ""

    @property
    def owner_is_meant(self) -> bool:
        """The owner is that of the outbox, or a role for this function alone."""
        return self.owns_outbox or self.owner.startswith("cdc_capture_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Every trigger that captures, and the remarks about them and their tables.

    ``general``: of each table that could have a capture function of its own, a trigger that calls the general one.
    """

    triggers: tuple[Tracked, ...]
    remarks: tuple[Remark, ...] = ()
    general: tuple[Tracked, ...] = ()

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(sorted({each.table for each in self.triggers}))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSecurity:
    """Row-level security of the outbox's tables: those that have it, and those where it applies to this role."""

    role: str
    tables: tuple[str, ...]
    active: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReader:
    """A role that was granted the application's data in the outbox."""

    role: str
    tables: tuple[str, ...]
    """Which hold it, as SQL names them."""
    by_default: tuple[str, ...]
    """Statements that revoke the default privileges which granted it."""
    intended: bool
    """It also has a right that only consumers, operators and roles of `cdc db grant --payload` have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReaders:
    owner: str
    readers: tuple[DataReader, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Creators:
    """Who may create objects in the outbox's schema, and is neither an owner of one of the two nor a superuser."""

    schema: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Senders:
    """Who may send logical messages: ``open_to_all`` are the functions that PUBLIC may call, as SQL names them.

    ``owners``: owners of capture functions, in any schema, who need the right. ``others``: roles granted it by name.
    """

    open_to_all: tuple[str, ...]
    owners: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbering:
    """``last``: the number drawn last, None where the role may not see it. ``highest``: of the rows examined."""

    role: str
    table: str
    sequence: str
    last: int | None
    highest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Astray:
    """``rows``: how many of the changes examined are not in the shard of their key, up to 1,000."""

    table: str
    rows: int


@dataclass(frozen=True, slots=True)
class Operators:
    """Roles that may decide about changes or pause. ``lacking``: those that lack what goes with it, and the grants."""

    roles: tuple[str, ...]
    lacking: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """Statements that grant the role the rights it lacks, none where it has all."""

    role: str
    grants: tuple[str, ...]
    schema: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHolders:
    """Holders of shards. ``strangers``: (pid, application, shards) of sessions that are not consumers."""

    held: int
    consumers: int
    strangers: tuple[tuple[int, str, int], ...]
    silent: tuple[tuple[int, int, float], ...] = ()
    """(pid, shards, seconds since its last statement) of consumers that hang, or whose forked children still run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """The autovacuum settings for the outbox."""

    name: str
    autovacuum: bool
    """Whether the server runs it."""
    excluded: bool
    """autovacuum_enabled is off for the table."""
    tuned: bool
    """The settings for a queue are set."""
    live: int
    dead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    fresh: int
    waiting: int
    dead: int
    oldest_ready_age_s: float
    snoozed: int = 0
    """Waiting changes that their handler snoozed last and that were captured more than a day ago: a lower bound."""
    due_later: DueLater | None = None
    """None: the role may not see them."""
    barrier: Barrier | None = None
    """The one that stands the longest, as far as the role may see them."""
    pauses: tuple[Pause, ...] | None = None
    """What is paused; None: the role may not see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionFacts:
    """Counts are lower bounds. ``paused``: all of it is. ``held_back``: what retention keeps for it.

    ``unknown_types``: those of its types that no trigger captures and no change that was examined has.
    """

    name: str
    consumers: int
    paused: bool
    behind: int
    held_back: int
    oldest_age_s: float | None
    unknown_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFacts:
    """An index that only subscriptions read by. ``valid``: None where it is not there. ``creation``: what makes it."""

    name: str
    valid: bool | None
    creation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionsFacts:
    """Those beside the default one."""

    indexes: tuple[IndexFacts, ...]
    each: tuple[SubscriptionFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Unhandled:
    """Fresh changes that none of the named handlers wants, by type; each number is a lower bound."""

    types: tuple[tuple[str, int], ...]
