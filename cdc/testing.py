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
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic import TypeAdapter

from cdc.app import config
from cdc.app.application import App
from cdc.core.errors import CdcError, UsageError
from cdc.core.model import Change, ChangeState, Operation
from cdc.core.router import Router
from cdc.core.type_filter import TypeFilter
from cdc.postgres.admin import ChangeSummary, Filter, OutboxAdmin
from cdc.postgres.connect import connect, connect_async
from cdc.postgres.loaders import read_anything
from cdc.postgres.outbox import Store
from cdc.runtime.deadline import deadline

if TYPE_CHECKING:
    from cdc.postgres.connect import Connection

_POLL_INTERVAL_S = 0.01
_NAMED_MAX = 20
_ROWS_EXAMINED_MAX = 1_000
"""Changes of a state. Behind so many that are held back no others are seen: a test has fewer."""
_QUICK: Mapping[str, Any] = {
    "http_port": 0,
    "stream": False,
    "poll_interval": 0.02,
    "backoff_base": 0.01,
    "drain_time": 0.5,
}
"""Settings of a drain, unless it is given others: no slot, and no waiting that a test would feel."""

_numbers = itertools.count(1)


class UnsettledError(CdcError):
    """A drain's time is up, and there are changes that could still run."""


class DeadLetterError(CdcError):
    """There are dead letters, and the test has not said that it expects them."""


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain did, and what it left. ``retried`` counts failed attempts that were made again, the rest changes.

    ``dead_letters``: those that died meanwhile, each with its ``last_error``. ``waiting``: for a retry that is due only
    after the drain's time limit. ``held``: fresh changes behind one of these, or behind a dead letter that pauses.
    ``unhandled``: fresh ones of types that no handler wants, which stay as they are.
    """

    processed: int
    skipped: int
    discarded: int
    retried: int
    dead_letters: tuple[ChangeSummary, ...]
    waiting: int
    held: int
    unhandled: int = 0

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

    What is left out fits the rest: ``entity_id`` is the row's ``id``, ``seq`` is above those of all made before, the
    table is called like the type.
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
    """Call the handler that a consumer would call, as it would be called; no server is needed.

    Its model is applied, its own time limit holds if it is async, a plain function runs in a thread, and one for
    batches gets a batch of one. Returns the handler's name, or None where no handler wants it. Raises whatever the
    handler raises, ``cdc.Discard`` and ``cdc.Retry`` too, and pydantic's ValidationError for a row that does not fit.
    ``connection`` is for a handler that asks for one; its transaction is the caller's.
    """
    handler = router.match(change.entity_type, change.operation)
    if handler is None:
        return None
    if handler.transactional and connection is None:
        raise UsageError(f"handler {handler.name} asks for a connection", hint="pass it: handle(..., connection=...)")
    if handler.model is not None:
        adapter: TypeAdapter[Any] = TypeAdapter(handler.model)
        new = None if change.new is None else adapter.validate_python(change.new)
        old = None if change.old is None else adapter.validate_python(change.old)
        change = replace(change, new=new, old=old)
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

    Settled: nothing is left that could run before ``within_s`` seconds are over. Retries are made too, after waits of
    some hundredths of a second at most. A change that asked to wait for longer than the limit is left as it is and
    counted, and so is what it holds back. ``settings`` are those of ``cdc.run``; no slot is used unless they say so.

    Raises DeadLetterError where changes became dead letters, unless ``allow_dead``; UnsettledError where time is up,
    naming what is left by number, id, type and state; SchemaError where there is no outbox.
    """
    chosen = config.from_options({**_QUICK, **settings, "dsn": dsn, **_cap(settings)})
    app = App(chosen, router)
    async with await connect_async(chosen.dsn_text, application_name="cdc: drain") as reader:
        await Store(chosen.schema_).check(reader)
    with closing(await asyncio.to_thread(connect, chosen.dsn_text, application_name="cdc: drain")) as connection:
        look = _OutboxState(connection, OutboxAdmin(chosen.schema_), app.scope)
        work = asyncio.create_task(app.run())
        try:
            await _until_settled(work, look, within_s)
        finally:
            app.consumer.stop()
            await asyncio.wait([work])
        work.result()
        drained = await asyncio.to_thread(look.result, app.status.handlers.attempts)
    if drained.dead and not allow_dead:
        raise DeadLetterError(
            f"{drained.dead} changes became dead letters: {_named(drained.dead_letters)}",
            hint="a test that expects them says so: drain(..., allow_dead=True)",
        )
    return drained


def _cap(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The longest wait, so that a test need not know of it to set the shortest."""
    return {} if "backoff_cap" in settings else {"backoff_cap": max(0.05, settings.get("backoff_base", 0.0))}


async def _until_settled(work: asyncio.Task[None], look: _OutboxState, within_s: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while left := await asyncio.to_thread(look.runnable, max(0.0, deadline - loop.time())):
        if loop.time() >= deadline:
            raise UnsettledError(
                f"not settled within {within_s:g} s: {_named(left)}",
                hint="a handler hangs, is slow, or causes changes without end; within_s= is the limit",
            )
        await asyncio.wait([work], timeout=_POLL_INTERVAL_S)
        if work.done():
            work.result()


class _OutboxState:
    """What the table says, from a thread."""

    def __init__(self, connection: Connection, admin: OutboxAdmin, scope: TypeFilter) -> None:
        read_anything(connection)  # a change that cannot be read is one of those that are left
        self._scope = scope
        self._connection = connection
        self._admin = admin
        self._began = self._now()

    def runnable(self, within_s: float) -> list[ChangeSummary]:
        """Changes that could run within so many seconds; some of them, if there are many."""
        # By one snapshot: what changed its state between two looks would be in neither.
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            soon = self._now() + timedelta(seconds=within_s)
            fresh = self._find("fresh", _ROWS_EXAMINED_MAX)
            waiting = self._find("waiting", _ROWS_EXAMINED_MAX)
        ready = [entry for entry in fresh if not entry.blocked]
        ready += [entry for entry in waiting if entry.next_attempt_at and entry.next_attempt_at <= soon]
        return [entry for entry in ready if self._scope.has(entry.entity_type)]  # which may be all but some

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
        return Drained(
            processed=outcomes.get("processed", 0),
            skipped=outcomes.get("skipped", 0),
            discarded=outcomes.get("discarded", 0),
            retried=outcomes.get("retried", 0),
            dead_letters=tuple(entry for entry in dead if entry.dead_at and entry.dead_at >= self._began),
            waiting=sum(each.waiting for each in stats.types if self._scope.has(each.entity_type)),
            held=sum(each.blocked for each in stats.types if self._scope.has(each.entity_type)),
            unhandled=sum(each.fresh for each in stats.types if not self._scope.has(each.entity_type)),
        )


def _named(entries: Iterable[ChangeSummary]) -> str:
    """Without what the rows hold, and without the text of their errors, which may quote it."""
    shown = list(itertools.islice(entries, _NAMED_MAX + 1))
    names = [f"{each.seq} ({each.id}) of {each.entity_type}, {_state(each)}" for each in shown[:_NAMED_MAX]]
    return "; ".join([*names, "..."] if len(shown) > _NAMED_MAX else names)


def _state(entry: ChangeSummary) -> str:
    failures = f" after {entry.error_count} failed attempts" if entry.error_count else ""
    return f"{ChangeState(entry.state).value}{failures}"
