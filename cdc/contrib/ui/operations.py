"""What the interface and its API read and do, by the functions of the commands. Nothing here writes a statement.

A decision about many changes goes on for some seconds, round by round, and then says how many it has left: a request
ends before a proxy gives it up, and what is done stays done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from cdc.core.errors import ConnectError, NotFoundError, RefusedError, UsageError
from cdc.core.limits import LimitSetting
from cdc.core.model import ChangeState, Operation
from cdc.core.pauses import Pause, Pauses
from cdc.core.router import Router
from cdc.core.subscription import DEFAULT
from cdc.diagnostics import doctor, status
from cdc.diagnostics.facts import Subject
from cdc.diagnostics.findings import Finding
from cdc.postgres.actions import Action, ActionLog, Actor
from cdc.postgres.activity import Activity, FailedAttempts, ProcessingRate
from cdc.postgres.admin import Attempt, CauseLink, ChangeSummary, Filter, OutboxAdmin, Reference
from cdc.postgres.backfill import UNFINISHED, Backfill, Backfills
from cdc.postgres.bulk import Bulk, Round, Wanted
from cdc.postgres.connect import SERVER_TCP, Connection, Dsn, connect
from cdc.postgres.controls import Control, Controls
from cdc.postgres.limit_admin import LimitAdmin, LimitInUse, SetLimit
from cdc.postgres.loaders import read_anything
from cdc.postgres.rights import RoleRights, rights
from cdc.postgres.search import Search, SearchPage, SearchPlace
from cdc.postgres.subscription_admin import SubscriptionAdmin
from cdc.postgres.subscriptions import Subscription, SubscriptionProgress, Subscriptions
from cdc.replication import slots
from cdc.replication.slot_health import SlotReport

Deed = Literal["retry", "discard", "replay"]
BUDGET_S = 10.0
"""Of one request; the round that is then under way is finished."""
_COUNT_LIMIT_S = 25
"""To find what matches; beyond it the filters are too wide for a page."""
_PER_SHARD = 200
_SCAN = 10_000
_KEY_MAX = 1_000
"""Characters of a key that a summary has."""
_CONNECTIONS_MAX = 8
_WAIT_S = 5.0
_ANSWER_LIMIT_S = 140.0
"""Longer than the longest statement, a round of a decision, may take on the server."""
_SESSION = {**SERVER_TCP, "statement_timeout": "30s", "lock_timeout": "5s"}


_EVERYTHING = Wanted()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionAsked:
    """``changes`` that are named, or all in ``state`` that match. ``latest_per_key``: of a replay.

    ``since``: of a replay by filters, when it was decided: what has a replay made since then is left out.
    """

    deed: Deed
    changes: Sequence[Reference] = ()
    state: ChangeState = ChangeState.DEAD
    wanted: Wanted = _EVERYTHING
    latest_per_key: bool = False
    subscription: str | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """``done`` of the ``count`` that matched; ``looked_at`` are decided about, some by others. ``left``: not yet."""

    count: int
    done: int
    looked_at: int

    @property
    def left(self) -> int:
        return max(0, self.count - self.looked_at)


@dataclass(frozen=True, slots=True)
class Shown:
    """A change. ``payload``: None where it was not asked for. ``handler``: of its name, where that is known."""

    entry: ChangeSummary
    chain: list[CauseLink]
    attempts: list[Attempt]
    payload: Mapping[str, Any] | None
    handler: str | None = None


@dataclass(frozen=True, slots=True)
class Unprocessed:
    """``more``: than were looked at. ``types``: of these; None: of all."""

    count: int
    more: bool
    types: frozenset[str] | None


class Source:
    """The outbox in ``schema``, and what is known of who consumes it. ``router``: the consumer's, if it is known.

    A connection is made for each request: so an outage, a new password and a new grant are seen at once.
    """

    def __init__(self, dsn: Dsn, schema: str, *, slot: str, subject: Subject, router: Router | None = None) -> None:
        self._dsn = dsn
        self._free = threading.BoundedSemaphore(_CONNECTIONS_MAX)
        self.schema = schema
        self.slot = slot
        self.subject = subject
        self.router = router

    @contextmanager
    def open(self) -> Iterator[Operations]:
        """Raises ConnectError where the database does not answer, or too many are asking it."""
        if not self._free.acquire(timeout=_WAIT_S):
            raise ConnectError("too many requests at once ask the database", hint="try again in a moment")
        try:
            with closing(
                connect(self._dsn, application_name="cdc ui", session=_SESSION, answer_limit_s=_ANSWER_LIMIT_S)
            ) as connection:
                read_anything(connection)
                yield Operations(connection, self)
        finally:
            self._free.release()

    @property
    def handlers(self) -> list[str]:
        """Their names, where they are known."""
        return sorted({each.name for each in self.router.handlers.values()}) if self.router else []

    def handler(self, entity_type: str, operation: str) -> str | None:
        """The one that gets such changes. None: nobody, or it is not known."""
        try:
            found = self.router and self.router.match(entity_type, Operation(operation))
        except ValueError:
            return None
        return found.name if found else None


class Operations:
    """Of one request."""

    def __init__(self, connection: Connection, source: Source) -> None:
        self._connection = connection
        self._source = source
        self._schema = source.schema

    @property
    def slot_name(self) -> str:
        return self._source.slot

    @property
    def schema(self) -> str:
        return self._schema

    # --- reading ---------------------------------------------------------------------------------------------------

    def rights(self) -> RoleRights:
        return rights(self._connection, self._schema)

    def status(self) -> status.Status:
        return status.read(self._connection, self._schema, self._source.slot)

    def slot(self) -> SlotReport | None:
        return slots.snapshot(self._connection, self._source.slot)

    def processed(self) -> list[tuple[str | None, ProcessingRate]]:
        """With the handler of each, where that is known."""
        found = Activity(self._schema).processed(self._connection)
        return [(self._source.handler(each.entity_type, each.operation), each) for each in found]

    def failed(self) -> list[FailedAttempts] | None:
        return Activity(self._schema).failed(self._connection)

    def search(
        self, state: ChangeState, wanted: Wanted, limit: int, *, behind: SearchPlace | None, subscription: str | None
    ) -> SearchPage:
        """Of a subscription by type and key only, and one page. Raises UsageError for another filter there."""
        if subscription in (None, DEFAULT):
            return Search(self._schema).page(self._connection, state, wanted, limit, behind=behind)
        if wanted != Wanted(entity_type=wanted.entity_type, entity_id=wanted.entity_id):
            raise UsageError("a subscription is searched by type and key", hint="leave the other filters empty")
        found = self._admin(subscription).find(
            self._connection, state, Filter(wanted.entity_type, wanted.entity_id), limit
        )
        return SearchPage(found.entries, None, found.more or found.cut)

    def show(self, reference: Reference, *, subscription: str | None, payload: bool) -> Shown:
        """Raises NotFoundError; RefusedError where the server refuses the payload."""
        admin = self._admin(subscription)
        entry = admin.show(self._connection, reference)
        return Shown(
            entry, admin.chain(self._connection, entry), admin.attempts(self._connection, entry),
            admin.payload(self._connection, entry) if payload else None,
            self._source.handler(entry.entity_type, entry.operation),
        )  # fmt: skip

    def controls(self) -> list[Control]:
        return Controls(self._schema).all(self._connection)

    def held_by(self, shown: Shown, subscription: str | None) -> list[Control]:
        """What keeps a change from being started, as far as this role may see it."""
        entry = shown.entry
        if entry.state == ChangeState.PROCESSED:
            return []
        return [
            each for each in Controls(self._schema).seen(self._connection) or []
            if each.pause.subscription in (None, subscription or DEFAULT)
            and Pauses([each.pause], self._source.router).hold((entry.entity_type, entry.entity_id))
        ]  # fmt: skip

    def limits(self) -> list[SetLimit]:
        return LimitAdmin(self._schema).all(self._connection)

    def limits_in_use(self) -> list[LimitInUse] | None:
        return LimitAdmin(self._schema).in_use(self._connection)

    def actions(self, limit: int, before: int | None = None) -> list[Action]:
        return ActionLog(self._schema).latest(self._connection, limit, before=before)

    def backfills(self) -> list[Backfill]:
        return Backfills(self._schema).newest(self._connection)

    def subscriptions(self) -> list[SubscriptionProgress]:
        return Subscriptions(self._schema).figures(self._connection, None, _PER_SHARD) or []

    def examine(self) -> list[Finding]:
        """What ``cdc doctor`` finds with the role of this interface, but for what concerns the stream."""
        return doctor.examine(self._source.subject)

    # --- deciding --------------------------------------------------------------------------------------------------

    def wanted(self, *, handler: str | None, **filters: Any) -> Wanted:
        """Raises UsageError for a handler that nobody knows."""
        if handler is None:
            return Wanted(**filters)
        if self._source.router is None:
            raise UsageError("which changes a handler gets is not known here", hint="start cdc ui with --handlers")
        return Wanted(handled=self._source.router.handled_by(handler), handler=handler, **filters)

    def count(self, decision: DecisionAsked) -> int:
        """To how many it would be done now. Raises NotFoundError for one that is named and not there."""
        admin = self._admin(decision.subscription)
        if decision.changes:
            return len(admin.named(self._connection, decision.changes))
        bulk = Bulk(self._schema, admin, select_limit_s=_COUNT_LIMIT_S)
        if decision.deed == "replay":
            self._refuse_replay(decision)
            with bulk.replayable(
                self._connection, decision.wanted, latest_per_key=decision.latest_per_key, only_count=True,
                unless_since=decision.since,
            ) as found:  # fmt: skip
                return found.count
        with bulk.selected(self._connection, decision.state, decision.wanted) as selection:
            return selection.count

    def carry_out(self, decision: DecisionAsked, actor: Actor, *, at_most: int) -> Done:
        """Raises RefusedError, and has done nothing, where more than ``at_most`` match, or a named one cannot be.

        A command that has been carried out already is not again.
        """
        admin = self._admin(decision.subscription, actor)
        if decision.changes:
            return self._named(admin, decision, actor)
        bulk = Bulk(self._schema, admin, select_limit_s=_COUNT_LIMIT_S)
        if decision.deed == "replay":
            self._refuse_replay(decision)
            with bulk.replayable(
                self._connection, decision.wanted, latest_per_key=decision.latest_per_key, unless_since=decision.since
            ) as replay:
                _refuse_more(replay.count, at_most)
                return _work(replay.rounds(), replay.count)
        with bulk.selected(self._connection, decision.state, decision.wanted) as selection:
            _refuse_more(selection.count, at_most)
            return _work(selection.decide(decision.deed), selection.count)

    def _named(self, admin: OutboxAdmin, decision: DecisionAsked, actor: Actor) -> Done:
        if not ActionLog(self._schema, actor).claim(self._connection):
            raise RefusedError("this has been done already", hint="the log of actions has it")
        if decision.deed == "replay":
            self._refuse_replay(decision)
            return _work(
                Bulk(self._schema, admin).replay_named(self._connection, decision.changes), len(decision.changes)
            )
        decide = admin.retry if decision.deed == "retry" else admin.discard
        count = len(decide(self._connection, decision.changes))
        return Done(count, count, count)

    def pause(self, pause: Pause, for_s: float | None, actor: Actor) -> Control:
        """Raises NotFoundError for a subscription that is not there."""
        self._refuse_unknown(pause.subscription)
        return Controls(self._schema, actor).pause(self._connection, pause, for_s)

    def keys_of(self, changes: Sequence[Reference], subscription: str | None) -> list[Pause]:
        """The keys of these changes, each once. Raises NotFoundError, and RefusedError for a key that is too long."""
        found = self._admin(subscription).named(self._connection, changes)
        if any(len(each.entity_id) >= _KEY_MAX for each in found):
            raise RefusedError("one of these keys is too long to be paused", hint="pause its type")
        keys = dict.fromkeys((each.entity_type, each.entity_id) for each in found)
        return [Pause(0, subscription, entity_type, entity_id=entity_id) for entity_type, entity_id in keys]

    def pause_keys(self, keys: Sequence[Pause], subscription: str | None, for_s: float | None, actor: Actor) -> int:
        """Raises RefusedError for too many pauses."""
        self._refuse_unknown(subscription)
        said = [replace(each, because=actor.because or "", set_by=actor.person) for each in keys]
        return Controls(self._schema, actor).pause_keys(self._connection, said, for_s)

    def resume_these(self, pauses: Sequence[Pause], actor: Actor) -> int:
        """Raises NotFoundError where none of them is paused any more."""
        return Controls(self._schema, actor).resume_these(self._connection, pauses)

    def resume(self, pause: Pause | None, actor: Actor) -> list[Control]:
        """None: every pause. Raises NotFoundError where it is not paused."""
        return Controls(self._schema, actor).resume(self._connection, pause)

    def set_limit(self, setting: LimitSetting, actor: Actor) -> SetLimit:
        """In place of another one of the handler. Raises NotFoundError for a subscription that is not there."""
        self._refuse_unknown(setting.subscription)
        return LimitAdmin(self._schema, actor).set(self._connection, setting)

    def clear_limit(self, handler: str | None, subscription: str | None, actor: Actor) -> list[SetLimit]:
        """``handler`` None: all that are set. Raises NotFoundError where none is set."""
        return LimitAdmin(self._schema, actor).clear(self._connection, handler, subscription)

    def unprocessed(self, *, entity_type: str | None = None, handler: str | None = None) -> Unprocessed:
        """How many changes are not processed: of the type, else of those that the handler gets where that is known."""
        stats = OutboxAdmin(self._schema).stats(self._connection, per_shard=_PER_SHARD, scan=_SCAN)
        types: frozenset[str] | None = None if entity_type is None else frozenset({entity_type})
        if types is None and handler is not None:
            types = self._types_of(handler)
        found = [each for each in stats.types if types is None or each.entity_type in types]
        return Unprocessed(
            sum(each.fresh + each.waiting for each in found), stats.more_fresh or stats.more_waiting, types
        )

    def _types_of(self, handler: str) -> frozenset[str] | None:
        """Those it gets by name. None: not known, or all that no other one gets."""
        if self._source.router is None or handler not in self._source.handlers:
            return None
        handled = self._source.router.handled_by(handler)
        return None if handled.others else frozenset(entity_type for entity_type, _ in handled.named)

    def move_backfill(self, number: int, to: Literal["paused", "cancelled"], actor: Actor) -> Backfill:
        """To go on is for a command, which does the work. Raises NotFoundError, RefusedError."""
        backfills = Backfills(self._schema, actor)
        found = backfills.named(self._connection, str(number))
        backfills.set_state(self._connection, found, to, ["running"] if to == "paused" else UNFINISHED)
        return backfills.named(self._connection, str(number))

    def subscription(self, name: str) -> SubscriptionProgress:
        """Raises NotFoundError."""
        number = Subscriptions(self._schema).named(self._connection, name).number
        found = Subscriptions(self._schema).figures(self._connection, number, _PER_SHARD)
        if not found:
            raise NotFoundError(f"there is no subscription {name}", hint="somebody has dropped it")
        return found[0]

    def drop_subscription(self, name: str, number: int | None, actor: Actor) -> Subscription:
        """For good. ``number``: of the one that is meant, or None. Raises NotFoundError."""
        return Subscriptions(self._schema, actor).drop(self._connection, name, number=number)

    def _refuse_unknown(self, subscription: str | None) -> None:
        if subscription not in (None, DEFAULT):
            Subscriptions(self._schema).named(self._connection, str(subscription))

    def _admin(self, subscription: str | None, actor: Actor | None = None) -> OutboxAdmin:
        if subscription in (None, DEFAULT):
            return OutboxAdmin(self._schema, actor)
        found = Subscriptions(self._schema).named(self._connection, str(subscription))
        return SubscriptionAdmin(self._schema, found, actor)

    def _refuse_replay(self, decision: DecisionAsked) -> None:
        if decision.subscription not in (None, DEFAULT):
            raise UsageError("a replay is for all subscriptions", hint="name none")


def _refuse_more(count: int, at_most: int) -> None:
    if count > at_most:
        raise RefusedError(
            f"{count:,} match now, more than the {at_most:,} that were confirmed; nothing was changed",
            hint="look again, and confirm again",
        )


def _work(rounds: Iterable[Round], count: int) -> Done:
    """Rounds until the time is over."""
    until, done, looked_at = time.monotonic() + BUDGET_S, 0, 0
    for each in rounds:
        done += each.done
        looked_at += each.looked_at
        if time.monotonic() >= until:
            break
    return Done(count, done, looked_at)
