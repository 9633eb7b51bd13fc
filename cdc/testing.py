"""For tests of handlers: changes made by hand, one handler call without a server, and a consumer that ends by itself.

    from cdc import testing

    await testing.handle(router, testing.change("order", "UPDATE", old={"total": 1}, new={"total": 2}))
    await testing.drain(dsn, router)

``import cdc`` does not load this module.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cdc.app import config
from cdc.app.application import App
from cdc.core.errors import CdcError, UsageError
from cdc.core.model import OF_TABLES, Change, ChangeState, Operation
from cdc.core.router import Router
from cdc.core.type_filter import TypeFilter
from cdc.engine.handler_input import preparation
from cdc.postgres.admin import ChangeSummary, Filter, OutboxAdmin
from cdc.postgres.connect import connect, connect_async
from cdc.postgres.due import DueChanges
from cdc.postgres.loaders import read_anything
from cdc.postgres.outbox import Store
from cdc.runtime.deadline import deadline

if TYPE_CHECKING:
    from cdc.postgres.connect import Connection

_POLL_INTERVAL_S = 0.01
_NAMED_MAX = 20
_ROWS_EXAMINED_MAX = 1_000
"""Changes examined in each state: a test has fewer. Behind this many blocked ones no other is seen."""
_QUICK: Mapping[str, Any] = {
    "http_port": 0,
    "stream": False,
    "poll_interval": 0.02,
    "backoff_base": 0.01,
    "drain_time": 0.5,
}
"""Settings of a drain, unless others are given: no slot, and no noticeable waiting."""

_numbers = itertools.count(1)


class UnsettledError(CdcError):
    """A drain's time is up, and some changes could still run."""


class DeadLetterError(CdcError):
    """Changes became dead letters, and the test did not allow it."""


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain did, and what it left. ``retried`` and ``snoozed`` count attempts, the other fields changes.

    ``dead_letters``: those that died during the drain, each with its ``last_error``. ``waiting``: for a retry that is
    due only after the drain's time limit. ``held``: fresh changes behind one of these, or behind a dead letter that
    pauses, also with a barrier in between. ``unhandled``: fresh ones of types that no handler wants, which stay as
    they are. ``filtered``: those that a handler's filter left out. ``due_later``: events that are due only after the
    drain's time limit.
    ``coalesced``: those processed with another one, by a call that stood for both.
    """

    processed: int
    skipped: int
    discarded: int
    retried: int
    dead_letters: tuple[ChangeSummary, ...]
    waiting: int
    held: int
    unhandled: int = 0
    filtered: int = 0
    snoozed: int = 0
    due_later: int = 0
    coalesced: int = 0

    @property
    def dead(self) -> int:
        return len(self.dead_letters)


def change(
    entity_type: str,
    operation: str = "INSERT",
    entity_id: str | None = None,
    *,
    old: Any = None,
    new: Any = None,
    **fields: Any,
) -> Change:
    """A change as a handler gets it, made by hand. ``fields``: any other field of ``cdc.Change``.

    Defaults fit the arguments: ``entity_id`` is the row's ``id``, ``seq`` is above those of all changes made before,
    the table has the type's name.
    """
    row = new or old
    if entity_id is None:
        entity_id = str(row["id"]) if isinstance(row, Mapping) and "id" in row else "1"
    defaults: dict[str, Any] = {
        "id": uuid4(),
        "seq": next(_numbers),
        "shard": 0,
        "table_schema": "public",
        "table": entity_type,
        "metadata": None,
        "changed_at": datetime.now(UTC),
    }
    return Change(
        entity_type=entity_type,
        entity_id=entity_id,
        operation=Operation(operation),
        old=old,
        new=new,
        **{**defaults, **fields},
    )


async def handle(router: Router, change: Change, *, connection: Any = None) -> str | None:
    """Call the handler as a consumer would; no server is needed.

    Its filter and its model are applied, its own time limit holds if it is async, a plain function runs in a thread,
    and one for batches gets a batch of one. Returns the handler's name, or None where no handler wants the change, or
    its filter leaves it out. Raises every error of the handler, ``cdc.Discard``, ``cdc.Snooze`` and ``cdc.Retry`` too,
    and pydantic's ValidationError for a row that does not fit. ``connection`` is for a handler that asks for one; its
    transaction is the caller's.
    """
    handler = router.match(change.entity_type, change.operation)
    if handler is None:
        return None
    if handler.transactional and connection is None:
        raise UsageError(f"handler {handler.name} asks for a connection", hint="pass it: handle(..., connection=...)")
    if prepare := preparation(handler):
        given = prepare(change)
        if given is None:
            return None
        change = given
    if handler.is_async:
        async with deadline(handler.timeout_s):
            await handler.call([change], connection)
    else:
        await asyncio.to_thread(handler.call, [change], connection)
    return handler.name


async def drain(
    dsn: str | None, router: Router, *, within_s: float = 10.0, allow_dead: bool = False, **settings: Any
) -> Drained:
    """Run a consumer on the database until every change is settled, then stop it.

    Settled: no change is left that could run within ``within_s`` seconds, and no event of its types is due by then.
    Retries run too, after waits of at most some
    hundredths of a second. A change that asked to wait for longer than the limit stays as it is and is counted, like
    the changes that it blocks. ``settings`` are those of ``cdc.run``; no slot is used unless they ask for one.

    Raises DeadLetterError where changes became dead letters, unless ``allow_dead``; UnsettledError where time is up,
    naming the changes left by number, id, type and state; SchemaError where there is no outbox.
    """
    chosen = config.from_options({**_QUICK, **settings, "dsn": dsn, **_cap(settings)})
    app = App(chosen, router)
    async with await connect_async(chosen.dsn_text, application_name="cdc: drain") as reader:
        await Store(chosen.schema_).check(reader)
    with closing(await asyncio.to_thread(connect, chosen.dsn_text, application_name="cdc: drain")) as connection:
        look = _OutboxState(connection, chosen.schema_, app.scope)
        work = asyncio.create_task(app.run())
        try:
            await _until_settled(work, look, within_s, hint=_hint(router, within_s))
        finally:
            app.consumer.stop()
            await asyncio.wait([work])
        work.result()
        drained = await asyncio.to_thread(look.result, app.status.handlers.attempts)
    if drained.dead and not allow_dead:
        raise DeadLetterError(
            f"{drained.dead} changes became dead letters: {_listed(map(_name, drained.dead_letters))}",
            hint="a test that expects them says so: drain(..., allow_dead=True)",
        )
    return drained


def _cap(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The longest backoff, so that a test that sets the shortest need not set both."""
    return {} if "backoff_cap" in settings else {"backoff_cap": max(0.05, settings.get("backoff_base", 0.0))}


def _hint(router: Router, within_s: float) -> str:
    """What to do about changes that are not settled in time."""
    slow = [each for each in router.handlers.values() if each.latest and each.quiet_s >= within_s]
    if slow:
        each = max(slow, key=attrgetter("quiet_s"))
        return (
            f"handler {each.name} is called when its key has been quiet for {each.quiet_s:g} s (settle=);"
            f" within_s={within_s:g} is shorter: let tests declare it with a shorter settle="
        )
    return "a handler hangs, is slow, or causes changes without end; within_s= is the limit"


async def _until_settled(work: asyncio.Task[None], look: _OutboxState, within_s: float, *, hint: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while left := await asyncio.to_thread(look.unsettled, max(0.0, deadline - loop.time())):
        if loop.time() >= deadline:
            raise UnsettledError(
                f"not settled within {within_s:g} s: {_listed(left)}",
                hint=hint,
            )
        await asyncio.wait([work], timeout=_POLL_INTERVAL_S)
        if work.done():
            work.result()


class _OutboxState:
    """What the table holds, read from a thread."""

    def __init__(self, connection: Connection, schema: str, scope: TypeFilter) -> None:
        read_anything(connection)  # an unreadable change may be among those left
        self._scope = scope
        self._connection = connection
        self._admin = OutboxAdmin(schema)
        self._due = DueChanges(schema)
        self._began = self._now()

    def unsettled(self, within_s: float) -> list[str]:
        """The names of what could run within ``within_s`` seconds; of some of it, if there is much."""
        # In this order: an event that is published between the two reads is in both.
        due = sorted(filter(self._scope.has, self._due.types(self._connection, within_s)))
        return [f"events of {name} that are due" for name in due] + [_name(each) for each in self._runnable(within_s)]

    def _runnable(self, within_s: float) -> list[ChangeSummary]:
        """Changes that could run within ``within_s`` seconds; some of them, if there are many."""
        fresh, due, barred = self._look(within_s)
        ready = [entry for entry in fresh if not entry.blocked and entry not in barred] + due
        return [entry for entry in ready if self._scope.has(entry.entity_type)]  # the scope may exclude types

    def _look(self, within_s: float) -> tuple[list[ChangeSummary], list[ChangeSummary], set[ChangeSummary]]:
        """What is fresh; what waits and is due in time; which of the fresh ones a barrier holds back for longer."""
        # In one snapshot: a change whose state changes between two reads would be in neither.
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            soon = self._now() + timedelta(seconds=within_s)
            fresh = self._find("fresh", _ROWS_EXAMINED_MAX)
            waiting = self._find("waiting", _ROWS_EXAMINED_MAX)
            dead = self._find("dead", _ROWS_EXAMINED_MAX)
        due = [entry for entry in waiting if entry.next_attempt_at and entry.next_attempt_at <= soon]
        stuck = [entry for entry in waiting if not entry.next_attempt_at or entry.next_attempt_at > soon]
        stuck += [entry for entry in dead if entry.pauses_key and entry.operation in OF_TABLES]
        return fresh, due, _barred([*fresh, *stuck])

    def _now(self) -> datetime:
        row = self._connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        now: datetime = row[0]
        return now

    def _find(self, state: str, limit: int) -> list[ChangeSummary]:
        types = self._scope.types if self._scope.include else (None,)
        wanted = (Filter(entity_type) for entity_type in types)
        return [entry for each in wanted for entry in self._admin.find(self._connection, state, each, limit).entries]

    def result(self, outcomes: Mapping[str, int]) -> Drained:
        """``outcomes``: attempts, by how they ended."""
        stats = self._admin.stats(self._connection)
        dead = self._find("dead", _ROWS_EXAMINED_MAX)
        due = self._due.count(self._connection)
        return Drained(
            processed=outcomes.get("processed", 0),
            skipped=outcomes.get("skipped", 0),
            discarded=outcomes.get("discarded", 0),
            retried=outcomes.get("retried", 0),
            filtered=outcomes.get("filtered", 0),
            snoozed=outcomes.get("snoozed", 0),
            coalesced=outcomes.get("coalesced", 0),
            dead_letters=tuple(entry for entry in dead if entry.dead_at and entry.dead_at >= self._began),
            waiting=sum(each.waiting for each in stats.types if self._scope.has(each.entity_type)),
            held=sum(each.blocked for each in stats.types if self._scope.has(each.entity_type))
            + sum(not each.blocked and self._scope.has(each.entity_type) for each in self._look(0.0)[2]),
            due_later=due.count if due else 0,
            unhandled=sum(each.fresh for each in stats.types if not self._scope.has(each.entity_type)),
        )


def _barred(entries: Iterable[ChangeSummary]) -> set[ChangeSummary]:
    """The fresh ones from a barrier on that cannot start: it is not fresh itself, or something before it stays."""
    barred = set[ChangeSummary]()
    staying, closed = set[str](), set[str]()
    for entry in sorted(entries, key=lambda entry: entry.seq):
        stays = entry.state != ChangeState.FRESH or entry.blocked
        if entry.operation in OF_TABLES and (stays or entry.entity_type in staying):
            closed.add(entry.entity_type)
        if entry.state == ChangeState.FRESH and entry.entity_type in closed:
            barred.add(entry)
        if stays:
            staying.add(entry.entity_type)
    return barred


def _listed(names: Iterable[str]) -> str:
    shown = list(itertools.islice(names, _NAMED_MAX + 1))
    return "; ".join([*shown[:_NAMED_MAX], "..."] if len(shown) > _NAMED_MAX else shown)


def _name(entry: ChangeSummary) -> str:
    """Without row content, and without the text of errors, which may quote it."""
    return f"{entry.seq} ({entry.id}) of {entry.entity_type}, {_state(entry)}"


def _state(entry: ChangeSummary) -> str:
    failures = f" after {entry.error_count} failed attempts" if entry.error_count else ""
    return f"{ChangeState(entry.state).value}{failures}"
