"""The subscriptions of an outbox: how they are made and dropped, and how far they are.

Theory
------
A subscription begins at a position in each shard: what has that number or a lower one is done. For a beginning "now"
that has to be right for transactions that are open at that moment. They may have drawn numbers that nobody sees yet,
below others that are committed. So a *candidate* is noted, the number drawn last and then the first transaction id that
is not assigned yet: a number is drawn after its transaction got its id (the functions that capture see to that). Once
``xmin`` has passed that id, every change up to the number is committed or will never be. It becomes the position, by a
transaction with one snapshot: what that snapshot shows above the position is noted as done, change by change. So a
change is taken if that snapshot does not show it, and is not taken if it does; whatever its number is.

While the oldest open transaction that writes lasts, candidates are noted again and again, and the last one that is
proved counts: what is to be noted change by change is what was written while the last such transaction was open.

The changes that the default subscription has settled are read by shard and number through an index of their own. The
first subscription makes it and the last one drops it, both CONCURRENTLY: nobody who has no subscription pays for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from cdc.core.errors import CdcError, NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.model import SHARDS
from cdc.core.subscription import Start, check_name, missing
from cdc.postgres.actions import ActionLog, Actor
from cdc.postgres.admin import bounded, wake
from cdc.postgres.controls import Control, Controls
from cdc.postgres.open_transactions import end_oldest
from cdc.postgres.shard_locks import lock_class
from cdc.postgres.sql_files import load

INDEX = "entity_changes_settled"
"""The index of the changes that the default subscription has settled, or has tried."""
INDEXES = {
    INDEX: "(shard, seq) WHERE processed OR next_attempt_at IS NOT NULL OR dead_at IS NOT NULL",
    "entity_changes_barriers": "(seq) WHERE operation IN ('TRUNCATE', 'SCHEMA')",
}
"""Those that only subscriptions read by. The second one is of changes of whole tables."""

_LOCK = 0x63646303
"""First key of the lock held by who creates or drops; the second is a hash of the schema's name."""
_WAIT_LIMIT_S = 60.0
"""For the transactions that write when a subscription begins."""
_POLL_S = (0.01, 0.5)
"""Between two looks at them: at first, and at most."""
_CREATE_LIMIT_S = 600
"""For the one transaction that creates a subscription; with a time it reads what is younger than that."""
_SKIPPED_MAX = 1_000_000
"""Changes noted one by one as done: some ten seconds, and 100 MB."""
_DROP_BATCH = 10_000
_INDEX_LIMIT_S = 6 * 3600
"""For building the index; nobody waits for it but this command."""
_PER_SHARD = 1_000
"""Changes that figures examine of each shard, of each half."""
_BOUND = 10_001
"""Waiting and dead ones that figures count."""
_SUBSCRIPTIONS_MAX = 1_000

_INDEX_STATE = """
SELECT i.indisvalid FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid
WHERE n.nspname = %s AND c.relname = %s
"""


@dataclass(frozen=True, slots=True)
class Subscription:
    """``types``: those that it takes, None all. ``number``: never used for another one."""

    number: int
    name: str
    types: tuple[str, ...] | None
    created_at: datetime
    created_from: str

    @property
    def taking(self) -> str:
        """What it takes, for a sentence."""
        return "every type" if self.types is None else f"the types {', '.join(self.types)}"


@dataclass(frozen=True, slots=True)
class SubscriptionProgress:
    """How far a subscription is. Counts are lower bounds where there is ``more``.

    ``behind``: changes that are neither done nor waiting nor dead, the oldest ``oldest_age_s`` old. ``held_back``: what
    the default subscription has processed and retention keeps for this one, also of types that it does not take and has
    not passed yet. ``pauses``: those in force that concern it.
    """

    subscription: Subscription
    behind: int
    held_back: int
    more: bool
    oldest_age_s: float | None
    waiting: int
    dead: int
    consumers: int
    pauses: tuple[Control, ...] = ()

    @property
    def paused(self) -> Control | None:
        """The pause of all of it that was set first."""
        return next((each for each in self.pauses if each.pause.scope == "everything"), None)


class Subscriptions:
    """The statements for the outbox in ``schema``, on an autocommit connection. What ``actor`` decides is recorded."""

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._schema = schema
        self._log = ActionLog(schema, actor)
        self._statements = load("subscriptions.sql", schema)
        self._controls = Controls(schema)

    # --- reading ---------------------------------------------------------------------------------------------------

    def all(self, connection: psycopg.Connection) -> list[Subscription]:
        """By name. Raises SchemaError where the outbox is of an earlier version."""
        with self._explained():
            return self._find(connection, None)

    def named(self, connection: psycopg.Connection, name: str) -> Subscription:
        """Raises NotFoundError."""
        check_name(name)
        with self._explained():
            found = self._find(connection, name)
            if not found:
                raise missing(name, [each.name for each in self._find(connection, None)])
            return found[0]

    def progress(self, connection: psycopg.Connection, number: int | None = None) -> list[SubscriptionProgress]:
        """Of each subscription, or of that with this number; by name."""
        with self._explained():
            return self._progress(connection, number, _PER_SHARD)

    def figures(
        self, connection: psycopg.Connection, number: int | None, per_shard: int
    ) -> list[SubscriptionProgress] | None:
        """As ``progress``, with fewer or more changes examined of each shard.

        None where the outbox is of an earlier version, or the role may not see them.
        """
        try:
            return self._progress(connection, number, per_shard)
        except (errors.UndefinedTable, errors.InsufficientPrivilege):
            return None

    # --- deciding --------------------------------------------------------------------------------------------------

    def create(
        self,
        connection: psycopg.Connection,
        name: str,
        *,
        types: Sequence[str] | None = None,
        start: Start = "now",
        if_not_exists: bool = False,
        wait_s: float = _WAIT_LIMIT_S,
    ) -> tuple[Subscription, bool]:
        """Returns it, and whether it is new. ``start``: see ``cdc.core.subscription``; the theory is above.

        ``wait_s``: for transactions that write when it begins. Raises RefusedError where the name is taken, where such
        a transaction stays open for longer, or where another one is being created; UsageError for a number or a time
        that is still to come.
        """
        check_name(name)
        with self._explained(), self._alone(connection):
            if there := self._find(connection, name):
                accepted = self._accept(there[0], types, if_not_exists=if_not_exists)
                self._make_indexes(connection)
                return accepted, False
            self._refuse_future(connection, start)
            made = self._make_indexes(connection)
            try:
                self._place(connection, name, types, start, wait_s)
            except BaseException:
                with suppress(psycopg.Error):
                    self._drop_indexes(connection, made)
                raise
            wake(connection)
            return self.named(connection, name), True

    def drop(self, connection: psycopg.Connection, name: str, *, number: int | None = None) -> Subscription:
        """For good; what was kept for it alone is free for retention. Returns what it was.

        ``number``: of the one that is meant: another one of its name is not dropped. Raises NotFoundError.
        """
        with self._explained(), self._alone(connection):
            found = self.named(connection, name)
            if number not in (None, found.number):
                raise NotFoundError(
                    f"the subscription {name} that was meant is dropped, and another one has its name",
                    hint="look at what that one is for before it is dropped as well",
                )
            with bounded(connection):
                connection.execute(self._statements["drop"], {"name": name})
                self._log.record(connection, "subscription drop", {"subscription": name})
            wake(connection)
            self._sweep_up(connection)
            if not self.all(connection):
                self._drop_indexes(connection, INDEXES)
        return found

    # --- inside ----------------------------------------------------------------------------------------------------

    def _find(self, connection: psycopg.Connection, name: str | None) -> list[Subscription]:
        with bounded(connection), connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(self._statements["find"], {"name": name}).fetchall()
        return [Subscription(**{**row, "types": _listed(row["types"])}) for row in rows]

    def _progress(
        self, connection: psycopg.Connection, number: int | None, per_shard: int
    ) -> list[SubscriptionProgress]:
        subscriptions = {each.number: each for each in self._find(connection, None)}
        if not subscriptions:
            return []
        parameters = {"number": number, "per_shard": per_shard, "bound": _BOUND, "subscriptions": _SUBSCRIPTIONS_MAX}
        with bounded(connection), connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(self._statements["figures"], parameters).fetchall()
        asked = [(row, subscriptions[row.pop("number")]) for row in rows if row["number"] in subscriptions]
        consumers = self._consumers(connection, [each.number for _, each in asked])
        controls = self._controls.seen(connection) or []
        found = [
            SubscriptionProgress(
                subscription=each,
                consumers=consumers[each.number],
                pauses=tuple(one for one in controls if one.pause.subscription in {None, each.name}),
                **row,
            )
            for row, each in asked
        ]
        return sorted(found, key=lambda each: each.subscription.name)

    def _consumers(self, connection: psycopg.Connection, numbers: Sequence[int]) -> dict[int, int]:
        classes = {lock_class(self._schema, number): number for number in numbers}
        with bounded(connection):
            rows = connection.execute(self._statements["consumers"], {"classes": list(classes), "shards": SHARDS})
            by_class = {_signed(unsigned): count for unsigned, count in rows}
        return {number: by_class.get(each, 0) for each, number in classes.items()}

    def _accept(self, there: Subscription, types: Sequence[str] | None, *, if_not_exists: bool) -> Subscription:
        asked = Subscription(there.number, there.name, _listed(types), there.created_at, "")
        same = asked.types == there.types
        if same and if_not_exists:
            return there
        differs = f"it takes {there.taking}" + ("" if same else f", and not {asked.taking}")
        since = f"{there.created_at.astimezone(UTC):%Y-%m-%dT%H:%MZ}"
        raise RefusedError(
            f"there is a subscription {there.name} already: {differs}; since {since}",
            hint="nothing needs to be done; --if-not-exists accepts it; another beginning is a drop and a create"
            if same
            else f"choose another name, or drop it first, with its progress: cdc subscription drop {there.name}",
        )

    def _refuse_future(self, connection: psycopg.Connection, start: Start) -> None:
        if isinstance(start, int) and start > (last := self._last(connection)) + 1:
            raise UsageError(f"the seq {start} is still to come: the last one drawn is {last}", hint="--from now")
        if isinstance(start, datetime):
            [(ahead,)] = connection.execute("SELECT %s::timestamptz > clock_timestamp()", [start]).fetchall()
            if ahead:
                raise UsageError(
                    f"{start.isoformat()} is still to come, by the server's clock",
                    hint="--from now, or an earlier time",
                )

    def _place(
        self, connection: psycopg.Connection, name: str, types: Sequence[str] | None, start: Start, wait_s: float
    ) -> None:
        """The subscription and its positions, in one transaction."""
        written = start.isoformat() if isinstance(start, datetime) else f"{start}"
        at = start - 1 if isinstance(start, int) else 0 if start == "beginning" else None
        proved = self._proved(connection, wait_s) if at is None else at
        with _one_snapshot(connection):
            if isinstance(start, timedelta):
                [(start, written)] = connection.execute("SELECT t, t::text FROM (SELECT now() - %s) AS a(t)", [start])
            given = {
                "name": name, "types": None if types is None else list(_listed(types) or ()), "proved": proved,
                "created_from": written, "shards": SHARDS,
                "since": start if isinstance(start, datetime) else None, "bound": _SKIPPED_MAX,
            }  # fmt: skip
            [(number,)] = connection.execute(self._statements["insert"], given).fetchall()
            given["subscription"] = number
            connection.execute(self._statements["place" if at is None else "place_at"], given)
            self._log.record(connection, "subscription create", {"subscription": name, "from": written})
            if at is None and connection.execute(self._statements["skip"], given).rowcount >= _SKIPPED_MAX:
                raise RefusedError(
                    f"the subscription {name} cannot begin now: too much was written while a transaction was open",
                    hint="try again when the long transactions that write have ended: see pg_stat_activity",
                )

    def _proved(self, connection: psycopg.Connection, wait_s: float) -> int:
        """The highest number of which it is proved that nothing at or below it is still to be committed."""
        candidates: list[tuple[int, int]] = []
        until, pause_s, pause = time.monotonic() + wait_s, _POLL_S[0], threading.Event()
        while True:
            last = self._last(connection)
            [(xmin, next_xid)] = connection.execute(self._statements["horizon"], {}).fetchall()
            candidates.append((last, next_xid))
            proved = [number for number, needed in candidates if xmin >= needed]
            if proved:
                return max(proved)
            if time.monotonic() >= until:
                raise RefusedError(
                    "a subscription cannot begin while a transaction that writes stays open",
                    hint=end_oldest(connection),
                )
            pause.wait(pause_s)
            pause_s = min(2 * pause_s, _POLL_S[1])

    def _last(self, connection: psycopg.Connection) -> int:
        [(last,)] = connection.execute(self._statements["last"], {}).fetchall()
        return int(last)

    def _sweep_up(self, connection: psycopg.Connection) -> None:
        """Remove what dropped subscriptions have left, in short transactions."""
        removed = _DROP_BATCH
        while removed == _DROP_BATCH:
            with bounded(connection):
                removed = connection.execute(self._statements["drop_changes"], {"limit": _DROP_BATCH}).rowcount

    # --- the index -------------------------------------------------------------------------------------------------

    def _make_indexes(self, connection: psycopg.Connection) -> list[str]:
        """Returns those that were missing. What an interrupted command has left is dropped first."""
        made: list[str] = []
        for name in INDEXES:
            there = index_is_valid(connection, self._schema, name)
            if there:
                continue
            if there is not None:
                self._drop_indexes(connection, [name])
            made.append(name)
            with _unhurried(connection):
                try:
                    connection.execute(index_statement(self._schema, name))
                except BaseException:
                    # Half of it would cost every mark a write, and serve nobody.
                    with suppress(psycopg.Error):
                        self._drop_indexes(connection, made)
                    raise
        return made

    def _drop_indexes(self, connection: psycopg.Connection, names: Iterable[str]) -> None:
        with _unhurried(connection):
            for name in names:
                connection.execute(
                    sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(self._schema, name))
                )

    # --- around ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self, connection: psycopg.Connection) -> Iterator[None]:
        """Two that made or dropped the index at once would wait for each other."""
        lock = {"lock": _LOCK, "schema": self._schema}
        [(taken,)] = connection.execute(self._statements["alone"], lock).fetchall()
        if not taken:
            raise RefusedError(
                "another subscription of this outbox is being created or dropped", hint="wait until that has ended"
            )
        try:
            yield
        finally:
            with suppress(psycopg.OperationalError):  # the connection is gone, and the lock with it
                connection.execute(self._statements["not_alone"], lock)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (errors.UndefinedTable, errors.UndefinedColumn) as error:
            raise SchemaError(
                f"schema {self._schema} has no outbox of this version",
                hint="run `cdc db upgrade`, or look into --schema",
            ) from error
        except errors.InsufficientPrivilege as error:
            raise CdcError(
                f"the role may not: {error.diag.message_primary}",
                hint="the owner of the outbox creates and drops; see docs/operations/roles.md",
            ) from error


def index_is_valid(connection: psycopg.Connection, schema: str, name: str) -> bool | None:
    """Of one of INDEXES. None: it is not there."""
    row = connection.execute(_INDEX_STATE, [schema, name]).fetchone()
    return None if row is None else bool(row[0])


def index_statement(schema: str, name: str) -> sql.Composed:
    """What makes one of INDEXES. It may not stand in a transaction."""
    named = sql.Identifier(name), sql.Identifier(schema, "entity_changes")
    return sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} ").format(*named) + sql.SQL(INDEXES[name])


@contextmanager
def _one_snapshot(connection: psycopg.Connection) -> Iterator[None]:
    """A transaction whose statements all see the same. As ``bounded``, and for longer."""
    before = connection.isolation_level
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    try:
        with bounded(connection, _CREATE_LIMIT_S):
            yield
    finally:
        connection.isolation_level = before


@contextmanager
def _unhurried(connection: psycopg.Connection) -> Iterator[None]:
    """For a statement that may not stand in a transaction, and waits for the old ones of the database."""
    limits = {"statement_timeout": f"{_INDEX_LIMIT_S}s", "lock_timeout": "0"}
    before = {name: connection.execute("SELECT current_setting(%s)", [name]).fetchall()[0][0] for name in limits}
    try:
        _set(connection, limits)
        yield
    except errors.LockNotAvailable as busy:
        raise RefusedError("entity_changes is locked by another command", hint="try again when it has ended") from busy
    finally:
        with suppress(psycopg.OperationalError):
            _set(connection, before)


def _set(connection: psycopg.Connection, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", [name, value])


def _listed(types: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if types is None else tuple(sorted(set(types)))


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number
