"""The session that owns shards.

Theory
------
The owner of a shard is the session that holds the advisory lock ``(class, shard)``. A consumer is alive while it shares
the lock ``(class, SHARDS)``. ``class`` is a hash of the schema's name, so that two outboxes in one database have
separate shards. Both locks end with the session and with nothing else: no lease, no clock, no heartbeat that a pause
could outlive. Retention has one lock more in this class, ``RETENTION``, on another session, who publishes what is due
has ``DUE`` for a transaction, and observers share ``OBSERVERS``, so that they can be seen.
A row of ``cdc_shards`` names the owner of a shard, and a consumer that releases the shard removes the row. So another
process's row, of a shard that could be locked, means that its owner died; ``crash_guard`` decides what follows.
Outcomes are settled on this very session: a consumer that has lost it has lost the locks, and can settle nothing.

A dead process's locks are released as soon as its kernel closes the socket. For a vanished host the server decides, by
the TCP settings of ``connect.SERVER_TCP``; the client gives up earlier (``connect.CLIENT_TCP``). TCP notices nothing
where a proxy between the two stands still and keeps both of its links. There the client closes its link when an answer
is late (``link``). Since an owner polls the shards at least every ``POLL_MAX_S``, the server ends a session that has
sent nothing for ``SILENCE_MAX_S``. The server alone decides that: the same act ends the session and releases its locks.
"""

from __future__ import annotations

import asyncio
import json
import select
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from cdc.core import failpoints
from cdc.core.errors import SessionLostError, SubscriptionDroppedError
from cdc.core.limits import LimitSetting
from cdc.core.model import SHARDS
from cdc.core.pauses import Pause
from cdc.core.shard_ownership import Acquired
from cdc.postgres.connect import SERVER_TCP, Dsn, connect_async
from cdc.postgres.limits import controls_of
from cdc.postgres.sql_files import table

DEFAULT = 0
"""The number of the subscription whose progress is in the columns of entity_changes."""

RETENTION = SHARDS + 1
"""The number, within ``lock_class``, of the lock held by the process that removes old changes."""

OBSERVERS = SHARDS + 2
"""The number of the lock that observers share."""

READERS = SHARDS + 4
"""The number of the lock, in the class of the default subscription, that the consumers of all others share."""

DUE = SHARDS + 3
"""The number of the lock held while events are published that are due."""

SILENCE_MAX_S = 60
"""For an owner of shards that is frozen, or whose link is; its keys wait that long for another owner."""
_SILENT_S = 25.0
"""An owner polls at least every POLL_MAX_S."""
POLL_MAX_S = 15.0
"""Where a shared look shows that nothing has changed, else each second. Twice that and the time that an answer may take
are less than SILENCE_MAX_S: who is cut off knows it before the server gives its shards away."""
_SHOWN = 5
_ANSWER_LIMIT_S = 25.0
"""Longer than statement_timeout; half a minute with the second between two polls."""
SESSION = {
    **SERVER_TCP,
    "idle_session_timeout": f"{SILENCE_MAX_S}s",
    "idle_in_transaction_session_timeout": f"{SILENCE_MAX_S}s",
    "lock_timeout": "1s",  # a session that has locked a row delays its own key only: the others are written
    "statement_timeout": "20s",
}

# Any role may take these locks. A session that may not mark a change handles none, so it gets no share. A shard that
# such a session locks itself stays locked until the session is ended.
MAY_MARK = """
(to_regclass(%(outbox)s) IS NULL OR coalesce((
  SELECT has_column_privilege(marking.usesysid, to_regclass(%(outbox)s), 'processed', 'UPDATE')
  FROM pg_stat_activity AS marking WHERE marking.pid = {locks}.pid), false))
"""
"""About the session ``{locks}.pid``; ``outbox``: the table, as ``outbox_name`` writes it."""

_POLL = f"""
SELECT count(*) FILTER (WHERE objid = %(shards)s AND {MAY_MARK.format(locks="locks")})::int AS members,
       (count(DISTINCT objid) FILTER (WHERE objid < %(shards)s))::int AS taken,
       (count(*) FILTER (WHERE objid = %(readers)s))::int AS readers, {{name}} AS name,
       coalesce(has_table_privilege(to_regclass(%(controls)s), 'SELECT'), false) AS may_see_controls,
       {{controls}}
FROM pg_locks AS locks
WHERE locktype = 'advisory' AND granted AND classid = %(class)s::oid AND objsubid = 2
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""  # noqa: S608 - of pieces of our own

_NO_CONTROLS = "NULL::text"

# What is paused and limited: with each poll, as it costs no statement then. NULL where that is what was ``seen``.
_CONTROLS = """
(SELECT CASE WHEN now.ids <> %(seen)s::text THEN now.pauses END FROM (
   SELECT coalesce(string_agg(c.id::text, ',' ORDER BY c.id), '') AS ids,
          coalesce(json_agg(json_build_array(
            c.id, c.subscription, c.entity_type, c.handler, c.entity_id, c.because, c.set_by,
            extract(epoch FROM clock_timestamp() - c.set_at)::float8,
            extract(epoch FROM c.until - clock_timestamp())::float8, c.rate, c.burst, c.at_once, c.by_path)
            ORDER BY c.id), '[]')::text AS pauses
   FROM {table_of_controls} AS c
   WHERE (c.subscription IS NULL OR c.subscription = {name})
     AND (c.until IS NULL OR c.until > clock_timestamp())
 ) AS now) AS pauses
"""
_NAME = "(SELECT s.name FROM {subscriptions} AS s WHERE s.subscription = %(subscription)s)"
_NOTHING_SEEN = "-"

# Not every role may see a session's start and address.
_MEMBERS = f"""
SELECT locks.pid, owned.shards, host(activity.client_addr) AS address,
       extract(epoch FROM clock_timestamp() - activity.backend_start)::float8 AS age_s
FROM pg_locks AS locks
CROSS JOIN LATERAL (
  SELECT count(DISTINCT objid)::int AS shards FROM pg_locks
  WHERE locktype = 'advisory' AND granted AND pid = locks.pid AND classid = %(class)s::oid AND objid < %(shards)s
    AND objsubid = 2 AND database = locks.database
) AS owned
LEFT JOIN pg_stat_activity AS activity ON activity.pid = locks.pid
WHERE locks.locktype = 'advisory' AND locks.granted AND locks.classid = %(class)s::oid AND locks.objid = %(lock)s
  AND (locks.objid <> %(shards)s OR {MAY_MARK.format(locks="locks")})
  AND locks.objsubid = 2 AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
ORDER BY locks.pid
"""  # noqa: S608 - see _POLL

_HOLDERS = """
SELECT locks.pid, coalesce(activity.application_name, '') AS application, activity.usename AS role,
       count(DISTINCT locks.objid)::int AS shards,
       extract(epoch FROM clock_timestamp() - activity.state_change)::float8 AS silent_s
FROM pg_locks AS locks
LEFT JOIN pg_stat_activity AS activity ON activity.pid = locks.pid
WHERE locks.locktype = 'advisory' AND locks.granted AND locks.classid = %(class)s::oid AND locks.objid < %(shards)s
  AND locks.objsubid = 2 AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
GROUP BY locks.pid, activity.application_name, activity.usename, activity.state_change
ORDER BY count(*) DESC, locks.pid
LIMIT %(shown)s
"""

# LIMIT in the inner query keeps the planner from trying the lock of every shard.
_LOCK = """
SELECT shard FROM (
  SELECT shard FROM generate_series(0, %(shards)s - 1) AS shard
  WHERE NOT EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND classid = %(class)s::oid AND objid = shard AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  )
  ORDER BY random() LIMIT %(limit)s
) AS free
WHERE pg_try_advisory_lock(%(key)s, shard)
"""

# The inner query still sees the owners from before. A floor above all numbers is of before these started over.
_REGISTER = """
WITH before AS (
  SELECT shard, owner FROM {shards} WHERE shard = ANY (%(shards)s::int[])
), signed AS (
  INSERT INTO {shards} (shard, owner) SELECT shard, %(owner)s FROM unnest(%(shards)s::int[]) AS shard
  ON CONFLICT (shard) DO UPDATE SET owner = excluded.owner, since = excluded.since
)
SELECT ARRAY (SELECT shard::int FROM before WHERE owner <> %(owner)s),
       ARRAY (SELECT shard::int FROM before WHERE owner = %(owner)s), now(),
       ARRAY (
         SELECT ARRAY[p.shard, p.seq] FROM {positions} AS p CROSS JOIN {numbers} AS drawn
         WHERE p.subscription = 0 AND p.shard = ANY (%(shards)s::int[])
           AND p.seq < drawn.last_value + drawn.is_called::int
       )
"""

_OTHERS = """
SELECT shard FROM unnest(%(shards)s::int[]) AS shard
WHERE NOT EXISTS (SELECT FROM {shards} AS o WHERE o.shard = shard.shard AND o.owner = %(owner)s)
"""
_UNREGISTER = "DELETE FROM {shards} WHERE shard = ANY (%(shards)s::int[]) AND owner = %(owner)s"

# Of a subscription the owners stand beside its positions, which are there from its creation to its drop.
_REGISTER_READER = """
WITH before AS (
  SELECT shard, owner FROM {shards} WHERE subscription = %(subscription)s AND shard = ANY (%(shards)s::int[])
), signed AS (
  UPDATE {shards} SET owner = %(owner)s, owned_since = now()
  WHERE subscription = %(subscription)s AND shard = ANY (%(shards)s::int[])
)
SELECT ARRAY (SELECT shard::int FROM before WHERE owner <> %(owner)s),
       ARRAY (SELECT shard::int FROM before WHERE owner = %(owner)s), now(), '{{}}'::bigint[]
"""
_OTHERS_READER = """
SELECT shard FROM unnest(%(shards)s::int[]) AS shard
WHERE NOT EXISTS (
  SELECT FROM {shards} AS o
  WHERE o.subscription = %(subscription)s AND o.shard = shard.shard AND o.owner = %(owner)s
)
"""
_UNREGISTER_READER = """
UPDATE {shards} SET owner = NULL, owned_since = NULL
WHERE subscription = %(subscription)s AND shard = ANY (%(shards)s::int[]) AND owner = %(owner)s
"""


def lock_class(schema: str, subscription: int = 0) -> int:
    """The first number of the advisory locks of this outbox, as ``pg_advisory_lock(int, int)`` takes it.

    Each subscription has one of its own; 0 is the default one.
    """
    # No name of a schema has a zero byte in it.
    hashed = _hashed(f"{schema}\0{subscription}" if subscription else schema)
    return hashed - (1 << 32) if hashed >= 1 << 31 else hashed


def change_locks(schema: str, subscription: int) -> int:
    """The seed of the numbers that handlers lock in their transactions: a fresh change of a subscription has no row."""
    return zlib.crc32(f"cdc:{schema}\0{subscription}".encode()) << 31


def outbox_name(schema: str) -> str:
    """The outbox as ``to_regclass`` reads it."""
    return sql.Identifier(schema, "entity_changes").as_string()


def _hashed(schema: str) -> int:
    return zlib.crc32(f"cdc:{schema}".encode())


class Member(NamedTuple):
    """A live consumer's session on the server. None: this role may not see it, or a local socket has no address."""

    pid: int
    shards: int
    address: str | None
    age_s: float | None


def members(connection: psycopg.Connection, schema: str, subscription: int = DEFAULT) -> list[Member]:
    """The live consumers of a subscription."""
    return _sharing(connection, schema, SHARDS, subscription)


def observers(connection: psycopg.Connection, schema: str) -> list[Member]:
    """Sessions that only observe; they own no shard."""
    return _sharing(connection, schema, OBSERVERS)


def _sharing(connection: psycopg.Connection, schema: str, lock: int, subscription: int = DEFAULT) -> list[Member]:
    statement = _MEMBERS if subscription == DEFAULT else _MEMBERS.replace("'processed'", "'seq'")
    parameters = {
        "shards": SHARDS, "class": lock_class(schema, subscription) & 0xFFFFFFFF, "lock": lock,
        "outbox": _marked(schema, subscription),
    }  # fmt: skip
    with connection.cursor(row_factory=class_row(Member)) as cursor:
        return cursor.execute(statement.encode(), parameters).fetchall()


def _marked(schema: str, subscription: int) -> str:
    """The table that a consumer writes outcomes to, as ``to_regclass`` reads it."""
    if subscription == DEFAULT:
        return outbox_name(schema)
    return sql.Identifier(schema, "cdc_positions").as_string()


class Polled(NamedTuple):
    """As the server sees them now. ``pauses`` and ``limits``: those in force; None: as at the poll before, or not to be
    seen."""

    members: int
    free: int
    pauses: Sequence[Pause] | None
    limits: Sequence[LimitSetting] | None = None


class Holder(NamedTuple):
    """A session that holds shards. ``silent_s``: since its last statement; None: this role may not see it."""

    pid: int
    application: str
    role: str | None
    shards: int
    silent_s: float | None

    def __str__(self) -> str:
        silent = (
            f", silent for {self.silent_s:.0f} s" if self.silent_s is not None and self.silent_s > _SILENT_S else ""
        )
        who = f"({self.application or 'no application name'})" + (f" of role {self.role}" if self.role else "")
        return f"process {self.pid} {who} holds {self.shards}{silent}"


def without(holders: Sequence[Holder]) -> str:
    """For the log of a consumer that owns no shard."""
    who = "; ".join(map(str, holders)) or "no session holds one any more"
    return (
        f"owns none of {SHARDS} shards, so it handles nothing: {who}; a consumer gives its surplus away when what runs"
        " there has ended. One that is silent hangs, or is a child of one that was killed: end it by"
        " pg_terminate_backend(PROCESS)"
    )


async def observe(connection: psycopg.AsyncConnection, schema: str) -> None:
    """Register as an observer until the connection ends."""
    await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class(schema), OBSERVERS])


class ShardSession:
    """One server session: member, owner of shards, and the connection on which their changes are settled."""

    def __init__(
        self, connection: psycopg.AsyncConnection, schema: str, owner: UUID, subscription: int = DEFAULT
    ) -> None:
        self.connection = connection
        self.writing = asyncio.Lock()
        """Held by the task that writes: another task's statement would become part of its transaction."""
        self.unregistered: list[int] = []
        """Locked shards for which this process has not registered yet."""
        self._readers = 0
        self._owner = owner
        self._subscription = subscription
        names = {
            "shards": table(schema, "cdc_shards" if subscription == DEFAULT else "cdc_positions"),
            "subscriptions": table(schema, "cdc_subscriptions"),
            "positions": table(schema, "cdc_positions"),
            "numbers": table(schema, "entity_changes_seq_seq"),
            "table_of_controls": table(schema, "cdc_controls"),
        }  # fmt: skip
        polled = _POLL if subscription == DEFAULT else _POLL.replace("'processed'", "'seq'")
        texts = (_REGISTER, _OTHERS, _UNREGISTER) if subscription == DEFAULT else (
            _REGISTER_READER, _OTHERS_READER, _UNREGISTER_READER
        )  # fmt: skip
        ours = "'default'" if subscription == DEFAULT else _NAME
        self._polled = {
            may_see: sql.SQL(polled.replace("{controls}", of_controls).replace("{name}", ours)).format(**names)
            for may_see, of_controls in ((True, _CONTROLS), (False, _NO_CONTROLS))
        }
        self._register, self._others, self._unregistered = (sql.SQL(text).format(**names) for text in texts)
        self._key = lock_class(schema, subscription)
        self._parameters = {
            "shards": SHARDS, "class": self._key & 0xFFFFFFFF, "key": self._key, "readers": READERS,
            "subscription": subscription,
            "outbox": _marked(schema, subscription),
            "controls": sql.Identifier(schema, "cdc_controls").as_string(), "seen": _NOTHING_SEEN,
        }  # fmt: skip
        self.may_see_controls: bool | None = None
        """Whether this role may see what is paused; None: not known yet."""
        self._poll = select.poll()  # select.select knows no descriptor beyond 1,023
        self._poll.register(connection.fileno(), select.POLLIN)

    @classmethod
    async def open(
        cls, dsn: Dsn, schema: str, owner: UUID, settings: Mapping[str, str], subscription: int = DEFAULT
    ) -> ShardSession:
        """Connect with these server settings besides our own, and register as a member. ``owner``: this process."""
        connection = await connect_async(
            dsn,
            application_name="cdc: shards",
            session={**settings, **SESSION},
            answer_limit_s=_ANSWER_LIMIT_S,
        )
        session = cls(connection, schema, owner, subscription)
        try:
            await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", [session._key, SHARDS])
            if subscription != DEFAULT:  # who streams is to wake this one, too
                await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", [lock_class(schema), READERS])
        except BaseException:
            await connection.close()
            raise
        failpoints.here("shards.after_join")
        return session

    async def poll(self) -> Polled:
        """Members, free shards, and what is paused."""
        statement = self._polled[bool(self.may_see_controls)]
        [(members, taken, readers, name, may_see, found)] = await self._rows(statement, self._parameters)
        if self._subscription == DEFAULT:
            self._readers = readers
        elif name is None:
            raise SubscriptionDroppedError("the subscription was dropped", hint="stop its consumers")
        if may_see != self.may_see_controls:
            self.may_see_controls = may_see
            if may_see:
                return await self.poll()
        if found is None:
            return Polled(members, SHARDS - taken, None)
        controls = json.loads(found)
        self._parameters["seen"] = ",".join(str(fields[0]) for fields in controls)
        return Polled(members, SHARDS - taken, *controls_of(controls))

    def others_read(self, here: int) -> bool:
        """At the last poll: there are consumers of other subscriptions, besides so many in this process."""
        return self._subscription != DEFAULT or self._readers > here

    async def holders(self) -> list[Holder]:
        """The sessions that hold the most shards."""
        async with self.writing:
            cursor = self.connection.cursor(row_factory=class_row(Holder))
            return await (await cursor.execute(_HOLDERS, {**self._parameters, "shown": _SHOWN})).fetchall()

    async def acquire(self, limit: int) -> Acquired:
        """Lock up to ``limit`` shards that no session holds; or go on with those locked by a call that failed.

        Raises SessionLostError when it is unknown which of the locks were taken.
        """
        self.unregistered = self.unregistered or await self._lock(limit)
        failpoints.here("shards.after_lock")
        [(orphaned, kept, at, floors)] = await self._rows(self._register, self._owning(self.unregistered))
        shards, self.unregistered = self.unregistered, []
        failpoints.here("shards.after_register")
        return Acquired(shards, orphaned, kept, at, dict(floors))

    async def _lock(self, limit: int) -> list[int]:
        try:
            return [shard for (shard,) in await self._rows(_LOCK, {**self._parameters, "limit": limit})]
        except psycopg.Error as error:
            if self.connection.closed:
                raise
            raise SessionLostError(
                f"it is not known which shards were locked: {error.diag.message_primary} [{error.sqlstate}]"
            ) from error

    async def others(self, shards: Iterable[int]) -> list[int]:
        """Those of these shards whose owner is another process, or none."""
        return [shard for (shard,) in await self._rows(self._others, self._owning(shards))]

    async def release(self, shards: Iterable[int]) -> None:
        """Unlock shards on which nothing is in flight."""
        failpoints.here("shards.before_release")
        idle = list(shards)
        await self._unregister(idle)
        failpoints.here("shards.after_unregister")
        await self._rows("SELECT pg_advisory_unlock(%s, shard) FROM unnest(%s::int[]) AS shard", [self._key, idle])
        failpoints.here("shards.after_release")

    async def unregister(self) -> None:
        """Nothing is in flight: the next owner need not suspect a crash. The locks end with the session."""
        await self._unregister(range(SHARDS))

    async def _unregister(self, shards: Iterable[int]) -> None:
        async with self.writing:
            await self.connection.execute(self._unregistered, self._owning(shards))

    def _owning(self, shards: Iterable[int]) -> dict[str, Any]:
        return {"shards": list(shards), "owner": self._owner, "subscription": self._subscription}

    async def _rows(
        self, statement: LiteralString | sql.Composed, parameters: Mapping[str, Any] | Sequence[Any]
    ) -> list[Any]:
        async with self.writing:  # not within a settle's transaction, which may have failed
            return await (await self.connection.execute(statement, parameters)).fetchall()

    @property
    def has_server_message(self) -> bool:
        """The server has sent something. While no statement runs, that means trouble: check before going on."""
        if self.connection.closed:
            return True
        return bool(self._poll.poll(0))

    async def close(self) -> None:
        await self.connection.close()
