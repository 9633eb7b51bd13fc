"""The statements of a consumer of a subscription, in place of those for the default one. Takes the connection.

Theory
------
A subscription has a *position* in each shard, and rows of its own for the changes that are done above it, that wait,
or that are dead (``sql/0017_subscriptions.sql``). What is above the position and has no row is fresh. So nothing is
written about a change until it is handled, and one that is done leaves nothing behind once the position has passed it.

A position must not pass a change that is still to be committed: its number was drawn before, and nobody sees it yet. So
it moves as the floor of a sweep does (``core/shard_cursor``). A number that one snapshot shows becomes a *candidate*,
with the first transaction id that is not assigned at that moment. Whoever brings a lower number has a lower id, because
a number is drawn after its transaction got its id. So once no transaction below that id is open, all of them are
visible, for good; and as they get done the position moves up to the candidate, which another one follows. A row that is
written by hand may draw its number before its id: it is missed if that takes longer than from one look to the next, a
second.

The session that owns a shard moves its position, about once a second while there is something to move, and removes the
rows of what is done up to there, in one statement. A settle of many changes moves it at once, as far as it is proved,
and writes rows only for what is done behind a change that is still open (``core/position_moves`` has when). A row whose
start was recorded after a crash keeps the position below it: to who has started it the change is fresh. Nothing else
ever becomes fresh again: whoever owns the shard by then has read on, and would start a later change of the key first.

Who settles a change first wins, also if two consumers believe that they own it: a row is there once, by its key; and a
transactional handler's mark reads the position as it is then and keeps it until its commit. Beside a settle that moves
positions only marks settle changes of the same shards, as its session holds the locks of these. The settle does not see
one that is committed while it begins: its change is not passed, or, if it had waited, its row goes with the next look.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from cdc.core.errors import SchemaError, SubscriptionDroppedError
from cdc.core.model import SHARDS, Change, Coalesced, Key, Suspicion, WakeUp
from cdc.core.page_size import BYTES
from cdc.core.pauses import Pauses
from cdc.core.position_moves import PositionMoves
from cdc.core.read_planner import Sweep
from cdc.core.read_reconciler import Settlement
from cdc.core.type_filter import TypeFilter
from cdc.postgres import grants
from cdc.postgres.coalesced import CoalescedChanges
from cdc.postgres.outbox import CRASHED, INDEXED, Store, as_array
from cdc.postgres.outcomes import divide, settle_values
from cdc.postgres.pages import COUNT_BOUND, DuePage, Figures, OutboxPage
from cdc.postgres.shard_locks import change_locks
from cdc.postgres.shared_look import KnownAnswers, Seen
from cdc.postgres.sql_files import blocks, load
from cdc.postgres.subscriptions import INDEXES, Subscription
from cdc.postgres.unreadable import NUMBERS, RefusedRows

_SCAN = 2_000
"""A candidate is at most so many changes of its shard above the position: a position moves by no more at once."""
_FIGURES_SCAN, _FIGURES_HELD = 200, 200
"""Of a shard, changes above its position that are counted, and those examined in search of one that nothing blocks."""
MOVING_MIN = 4 * SHARDS
"""Fewer changes in a settle move no positions: it would take longer, and make a version of a position for a few."""
_BETWEEN_MAX = 10_000
"""Rows between the positions that a settle moves, all of which it looks at: some milliseconds."""
_PAGES, _PAGES_OF_EACH = 16, 3
"""That all positions may take: those of each subscription, and some more, which may all be versions of the same ones:
some 25 of each, which a look at one walks over."""
_AT_LEAST_S = 10.0
"""Between two looks at positions while nothing is settled: changes of other types may have come."""


def statements(schema: str) -> dict[str, bytes]:
    """By name, the statements of a consumer of a subscription of the outbox in ``schema``."""
    instead = blocks("subscription.sql")
    return {**load("outbox.sql", schema, instead=instead), **load("subscription.sql", schema, instead=_shared())}


def coalesced_statements(schema: str) -> dict[str, bytes]:
    """The same for the changes that one call stands for."""
    of_subscription, own = blocks("subscription.sql"), blocks("subscription_coalesced.sql")
    asked = {name: own[name] for name in ("as_read", "waiting_behind")}
    return {
        **load("coalesced.sql", schema, instead={**of_subscription, **asked}),
        **load("subscription_coalesced.sql", schema, instead=of_subscription),
    }


def _shared() -> dict[str, str]:
    """Blocks of other files that are used here."""
    return {"refusal": blocks("unreadable.sql")["refusal"]}


class SubscriptionStore(Store):
    """The statements for a subscription of the outbox in ``schema``. ``scope``: of its types what its handlers want."""

    session: Mapping[str, str] = {**INDEXED, "enable_sort": "off", "enable_material": "off", "jit": "off"}
    """Two halves in order are merged, never sorted. What must be sorted counts as dear, and would be compiled."""

    def __init__(
        self,
        schema: str,
        subscription: Subscription,
        max_chain_depth: int,
        scope: TypeFilter,
        *,
        page_bytes: int = BYTES,
        seen: Callable[[], Seen | None] = lambda: None,
    ) -> None:
        super().__init__(schema, max_chain_depth, scope, page_bytes=page_bytes)
        self._statements = statements(schema)
        numbers = {
            **load("outbox.sql", schema, instead={**blocks("subscription.sql"), **NUMBERS}),
            **load("subscription.sql", schema, instead={**_shared(), **NUMBERS}),
        }  # fmt: skip
        self.refused = RefusedRows(schema, numbers=numbers, mark=self._statements["refuse"], given=self._always)
        self.coalesced = CoalescedChanges(coalesced_statements(schema), self._always, self._marks)
        self._subscription = subscription
        self._always |= {
            "subscription": subscription.number,
            "subscription_name": subscription.name,
            # Of the locks by which a transactional handler says which changes it has taken.
            "locks": change_locks(schema, subscription.number),
            "shards_max": SHARDS - 1,
        }
        self.known = KnownAnswers(subscription.number, seen)
        self._unproved = True
        """Positions may be moved."""
        self._moves = PositionMoves()
        self._since: dict[int, int] = {}
        """By shard, where the position was at the last look of this process: what is done up to there has no row."""
        self._look_at = 0.0

    async def check(self, reader: psycopg.AsyncConnection, *, settles: bool = True) -> None:
        await super().check(reader, settles=False)
        rights = {
            "position_rights": list(grants.POSITION_RIGHTS), "subscription_rights": list(grants.SUBSCRIPTION_RIGHTS),
            "attempt_rights": list(grants.ATTEMPT_RIGHTS),
        }  # fmt: skip
        if denied := await self._rows(reader, "missing_rights", rights):
            lacking = [f"{rights} ON {table}" for rights, table in denied]
            raise SchemaError(
                f"the role may not settle changes: it has no {', no '.join(lacking)}",
                hint=f"run: cdc db grant{self._option} --consumer ROLE",
            )
        named = await self._rows(reader, "named", {"name": self._subscription.name})
        if not named or named[0][0] != self._subscription.number:
            raise self._gone()
        if missing := await self._rows(reader, "indexed", {"indexes": list(INDEXES)}):
            raise SchemaError(
                f"the index {missing[0][0]}, by which subscriptions read, is missing",
                hint=f"run: cdc subscription create{self._option} {self._subscription.name} --if-not-exists",
            )
        self._unproved = True

    def _gone(self) -> SubscriptionDroppedError:
        name = self._subscription.name
        return SubscriptionDroppedError(
            f"the subscription {name} was dropped",
            hint=f"stop its consumers; or cdc subscription create {name}, and start them again",
        )

    async def fetch(self, reader: psycopg.AsyncConnection, wakeups: Iterable[WakeUp]) -> OutboxPage:
        wakeups = sorted(wakeups)
        if self._everything:  # one of them is no other statement here
            return await self._page(reader, await self._rows(reader, "fetch", self._numbers(wakeups)))
        return await super().fetch(reader, wakeups)

    # --- what is known without asking ------------------------------------------------------------------------------

    def doubt(self) -> None:
        self.known.doubt()

    async def sweep(self, reader: psycopg.AsyncConnection, sweep: Sweep) -> OutboxPage:
        seen = self.known.seen
        if seen and self.known.finds_nothing(sweep, seen):
            return OutboxPage([], seen.snapshot, None if sweep.scope.everything else {})
        page = await super().sweep(reader, sweep)
        if seen and not (page.rows or page.scanned or page.cut):
            self.known.found_nothing(sweep, seen)
        return page

    async def due(
        self, reader: psycopg.AsyncConnection, shards: Iterable[int], limit: int, without: Iterable[str] = (),
        **where: Any,
    ) -> DuePage:  # fmt: skip
        if seen := self.known.seen:
            next_due_s = self.known.next_due_s(seen)
            if next_due_s is None or next_due_s > 0:
                return DuePage([], next_due_s, None)
        return await super().due(reader, shards, limit, without, **where)

    # --- positions -------------------------------------------------------------------------------------------------

    def may_advance(self, now: float) -> bool:
        """Whether there may be something to move: something was settled, a candidate waits, or it has been long."""
        return self._unproved or (now >= self._look_at and not self.known.is_at_end)

    async def advance(self, session: psycopg.AsyncConnection, shards: Collection[int]) -> None:
        """Move the positions of these shards, on the session that owns them."""
        self._unproved, self._look_at = False, time.monotonic() + _AT_LEAST_S
        before = self.known.seen
        types, include = self.scope
        parameters = {
            "shards": as_array(shards), "types": list(types), "among": include, "scan": _SCAN,
            "since": as_array(self._since.get(shard, "NULL") for shard in range(SHARDS)),
        }  # fmt: skip
        try:
            [(candidates, pages, subscriptions, at)] = await self._rows(session, "advance", parameters)
        except BaseException:
            self._unproved = True
            raise
        self._moves.looked(pages, _PAGES + _PAGES_OF_EACH * subscriptions, time.monotonic())
        self._since |= {shard: seq for shard, seq in enumerate(at) if seq is not None}
        self._unproved = self._unproved or candidates > 0
        if not self._unproved:
            self.known.at_end(before)

    # --- outcomes --------------------------------------------------------------------------------------------------

    async def settle(self, session: psycopg.AsyncConnection, batch: Sequence[Settlement], **options: Any) -> Any:
        self._unproved = True
        try:
            return await super().settle(session, batch, **options)
        finally:
            self.doubt()

    def _settle_plain(self, session: psycopg.AsyncConnection, plain: Sequence[Change]) -> Awaitable[list[Any]]:
        if len(plain) >= MOVING_MIN and self._moves.allowed(time.monotonic()):
            return self._settle_moving(session, plain)
        return super()._settle_plain(session, plain)

    async def _settle_moving(self, session: psycopg.AsyncConnection, plain: Sequence[Change]) -> list[Any]:
        types, include = self.scope
        parameters = {
            **self._numbers(plain), "lasts": _lasts(plain), "types": list(types), "among": include,
            "between_max": _BETWEEN_MAX,
        }  # fmt: skip
        try:
            [(count, at, crowded)] = await self._rows(session, "settle_moving", parameters)
        except psycopg.errors.LockNotAvailable:  # it removes rows of others, too
            self._moves.wait(time.monotonic())
            raise
        if crowded:
            self._moves.wait(time.monotonic())
        return [(count, at)]

    async def _settle_others(
        self, session: psycopg.AsyncConnection, batch: Sequence[Settlement], maybe_written: Container[int]
    ) -> list[tuple[int, datetime]]:
        encoding = session.info.parameter_status("server_encoding") or ""
        changes = [outcome.change if isinstance(outcome, Coalesced) else change for change, outcome in batch]
        values = {**settle_values(batch, encoding, maybe_written, time.monotonic()), **_keys(changes)}
        return await self._rows(session, "settle_others", values)

    async def _locked(self, session: psycopg.AsyncConnection, batch: Sequence[Settlement]) -> set[Key]:
        keys = {finished.change.seq: finished.change.key for finished in batch}
        found = await self._rows(session, "locked", self._numbers([finished.change for finished in batch]))
        locked = {keys[seq] for (seq,) in found}
        if groups := divide(batch).groups:
            locked |= await self.coalesced.locked(session, groups)
        return locked

    def take(self, changes: Sequence[Change], cause: Change) -> tuple[bytes, dict[str, Any]]:
        statement, parameters = super().take(changes, cause)
        return statement, {**self._always, **parameters, **_places(changes)}

    def mark(self, changes: Sequence[Change], xid: str) -> tuple[bytes, dict[str, Any]]:
        self._unproved = True
        requeued = as_array(change.requeued for change in changes)
        return self._statements["mark"], {**self._always, **_places(changes), "requeued": requeued, "xid": xid}

    def _marks(self) -> None:
        self._unproved = True

    # --- after a crash ---------------------------------------------------------------------------------------------

    async def start(
        self, session: psycopg.AsyncConnection, changes: Sequence[Change], handlers: Sequence[str | None]
    ) -> set[UUID]:
        ids = {change.seq: change.id for change in changes}
        parameters = {
            **_keys(changes),
            "requeued": [change.requeued for change in changes],
            "failures": [change.attempt - 1 for change in changes],
            "errors": [CRASHED if change.crashed else None for change in changes],
            "handlers": list(handlers),
        }
        started = {ids[seq] for (seq,) in await self._rows(session, "start", parameters)}
        self.doubt()
        return started

    async def unstart(self, session: psycopg.AsyncConnection, changes: Sequence[Change]) -> None:
        await session.execute(self._statements["unstart"], self._numbers(changes))
        self._unproved = True
        self.doubt()

    async def suspects(self, session: psycopg.AsyncConnection, change: Change) -> Suspicion:
        place = {"seq": change.seq, "shard": change.shard, "crashed": CRASHED}
        found = await self._rows(session, "suspect", place)
        if not found:
            return Suspicion.NONE
        return Suspicion.AGAIN if found[0][0] else Suspicion.ONCE

    # --- figures ---------------------------------------------------------------------------------------------------

    def figures(self, connection: psycopg.Connection) -> Figures:
        return self._figures(connection, self.scope)

    def oldest_ready_age_s(self, connection: psycopg.Connection, pauses: Pauses) -> float:
        """Of what is not paused: how old the oldest is that could run, in seconds; 0: none."""
        if pauses.everything:
            return 0.0
        return self._figures(connection, self.scope.within(pauses.going), pauses.keys).oldest_ready_age_s

    def _figures(self, connection: psycopg.Connection, scope: TypeFilter, without: Collection[Key] = ()) -> Figures:
        types, include = scope
        parameters = {
            **self._always, "types": list(types), "among": include, "bound": COUNT_BOUND, "scan": _FIGURES_SCAN,
            "per_shard": _FIGURES_HELD, "shards": SHARDS, "held_types": [name for name, _ in without],
            "held_ids": [id_ for _, id_ in without],
        }  # fmt: skip
        row = connection.execute(self._statements["figures"], parameters).fetchone()
        assert row is not None
        return Figures(*row)


def _places(changes: Sequence[Change]) -> dict[str, str]:
    return {
        "seqs": as_array(change.seq for change in changes), "shards": as_array(change.shard for change in changes),
    }  # fmt: skip


def _lasts(changes: Iterable[Change]) -> str:
    """By shard, the highest number; 0: there is none."""
    lasts = [0] * SHARDS
    for change in changes:
        lasts[change.shard] = max(lasts[change.shard], change.seq)
    return as_array(lasts)


def _keys(changes: Sequence[Change]) -> dict[str, list[Any]]:
    columns: dict[str, Callable[[Change], Any]] = {
        "seqs": lambda change: change.seq, "shards": lambda change: change.shard,
        "types": lambda change: change.entity_type, "entity_ids": lambda change: change.entity_id,
    }  # fmt: skip
    return {name: [value(change) for change in changes] for name, value in columns.items()}
