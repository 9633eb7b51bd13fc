"""A consumer that only reads: ``cdc run --observe``, for the time before it may handle changes.

It reads every change as a consumer would, by wake-ups and sweeps, and counts which handler it would have gone to and
whether it fits that handler's model; and it reads what another program marks processed, and how long that took. It owns
no shard and is no member, so it takes no work from others, and its session is read-only: the server would refuse a
mark.
For the stream, the listener and the probes it has the interface of ``Consumer``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from pydantic import TypeAdapter, ValidationError

from cdc.core.model import SHARDS, Change, WakeUp
from cdc.core.page_size import PageSize
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.router import Handler, Router
from cdc.core.shard_ownership import Acquired
from cdc.core.type_filter import TypeFilter
from cdc.engine.calls import call_here
from cdc.engine.hooks import where
from cdc.engine.reconnecting import wait_for_schema, work_until
from cdc.observability.metrics import NO_HANDLER, Metrics
from cdc.observability.snapshots import ConsumerStatus
from cdc.postgres.connect import Dsn, connect_async
from cdc.postgres.loaders import leave_unread
from cdc.postgres.outbox import READ_LIMIT_S, READ_SESSION, Store
from cdc.postgres.pages import Place
from cdc.postgres.shard_locks import observe
from cdc.postgres.unreadable import RefusedReadError
from cdc.runtime.cancelling import disregard
from cdc.runtime.deadline import unless, wait_within

log = logging.getLogger("cdc.observer")

_MARKS_EVERY_S = 1.0
_LATE = timedelta(seconds=2)
"""Marks are read in the order in which their transactions began: one that takes longer to commit is not measured."""
_REMEMBERED = 50_000
"""Numbers seen lately, so that a change that is read twice counts once."""
_SKIPPED = 1_000
"""Changes that the server refuses to hand over and that are left out: if there are more, some are read again."""
_SOON_S = 0.05
_ITERATION_MAX_S = 5.0
_SESSION = {
    **READ_SESSION,
    "idle_session_timeout": "0",
    "default_transaction_read_only": "on",
}


@dataclass(frozen=True, slots=True)
class ObserverSettings:
    """Durations in seconds."""

    dsn: Dsn
    schema: str
    sweep_interval_s: float
    poll_interval_s: float
    scope: TypeFilter


class Shadow:
    """``run`` returns when ``stop`` was called."""

    is_sharing = False
    """Wake-ups are not relayed: the consumers that handle changes have a stream of their own."""

    def __init__(self, settings: ObserverSettings, *, router: Router, store: Store, metrics: Metrics) -> None:
        self._settings = settings
        self._router = router
        self._store = store
        self._metrics = metrics
        handlers = set(router.handlers.values())
        self._adapters = {h.name: TypeAdapter(h.model) for h in handlers if h.model is not None}
        self._paging = PageSize()
        self._planner = ReadPlanner(sweep_interval_s=settings.poll_interval_s, scope=settings.scope)
        self._planner.acquired(Acquired(range(SHARDS)))
        self._captured, self._marked = _Lately(_REMEMBERED), _Lately(_REMEMBERED)
        self._skipped = _Lately(_SKIPPED)
        self._marks_after: Place | None = None
        self._marks_at = 0.0
        self._stopping = asyncio.Event()
        self._due = asyncio.Event()
        self.last_iteration: dict[str, float] = {}
        self.answered_at: float | None = None
        self.in_service = False
        self.connected = asyncio.Event()

    # --- from outside, on the event loop ---------------------------------------------------------------------------

    def stop(self) -> None:
        self._stopping.set()
        self._due.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def exposed(self) -> bool:
        """It calls no handler."""
        return False

    def notified(self, wakeups: Sequence[WakeUp], *, relayed: bool = False) -> Sequence[WakeUp]:
        """Wake-ups have come in. None of them is to be relayed."""
        if dropped := self._planner.notified(wakeups, relayed=relayed):
            self._metrics.wakeups.dropped.inc(dropped)
        self._due.set()
        return ()

    def sweep_now(self) -> None:
        """Not from the beginning, as a consumer does: what was seen once need not be seen again."""
        self.captured()

    def captured(self) -> None:
        self._planner.sweep_by(_now() + _SOON_S)
        self._due.set()

    def missed(self) -> None:
        self._planner.wakeups_lost()
        self._due.set()

    def streaming(self, *, connected: bool) -> None:
        settings = self._settings
        self._planner.interval(settings.sweep_interval_s if connected else settings.poll_interval_s, _now())
        self._planner.streaming(connected=connected)
        self._due.set()

    @property
    def status(self) -> ConsumerStatus:
        """From any thread."""
        return ConsumerStatus(
            observing=True,
            in_service=self.in_service,
            stopping=self.stopping,
            answered_at=self.answered_at,
            last_iteration=dict(self.last_iteration),
            waiting_wakeups=self._planner.queue_length,
        )

    # --- connections -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until stopped. Raises the error when the very first connection is refused."""
        log.info("only observing %s: no handler runs, nothing is marked", self._settings.scope)
        metrics = self._metrics.consumer
        await work_until(self._stopping, self._until_stopped, connected=self.connected, metrics=metrics)

    async def _until_stopped(self) -> None:
        """A stop does not wait for a read: it may wait for a lock."""
        try:
            await unless(self._stopping, self._run_connected())
        finally:
            self.in_service = False

    async def _run_connected(self) -> None:
        settings = self._settings
        async with await connect_async(
            settings.dsn, application_name="cdc: observer", session=_SESSION, answer_limit_s=READ_LIMIT_S
        ) as reader:
            leave_unread(reader)
            self.connected.set()
            await observe(reader, settings.schema)
            await self._wait_for_schema(reader)
            self.in_service = True
            while not self.stopping:
                self._due.clear()
                await self._read_all(reader)
                wait_s = min(self._planner.wait_s(_now()), self._marks_at - _now(), _ITERATION_MAX_S)
                await wait_within(self._due, max(0.0, wait_s))

    async def _wait_for_schema(self, reader: psycopg.AsyncConnection) -> None:
        async def check() -> None:
            self._mark_iteration()
            await self._store.check(reader, settles=False)
            self._answered()

        await wait_for_schema(self._stopping, check)

    async def _read_all(self, reader: psycopg.AsyncConnection) -> None:
        """Read all that can be read."""
        while not self.stopping:
            self._mark_iteration()
            try:
                more = await self._read_once(reader)
                self._answered()
                if not more:
                    return
            except RefusedReadError as refused:
                await self._skip(reader, refused)

    async def _read_once(self, reader: psycopg.AsyncConnection) -> bool:
        """False: there is nothing more to read."""
        if _now() >= self._marks_at and not await self._read_marks(reader):
            self._marks_at = _now() + _MARKS_EVERY_S
        request = self._planner.next(_now(), self._paging.rows, 1)
        if request is not None:
            await self._read(reader, request)
        return request is not None

    async def _read(self, reader: psycopg.AsyncConnection, request: Fetch | Sweep) -> None:
        if isinstance(request, Fetch):
            page = await self._store.fetch(reader, request.wakeups)
            seen = page.others.union((row.change.seq for row in page.rows), self._skipped)
            self._planner.fetched(request, seen, page.snapshot, _now(), page.cut)
        else:
            page = await self._store.sweep(reader, request)
            rows = [WakeUp(row.change.seq, row.change.shard) for row in page.rows]
            self._planner.swept(request, rows, {}, page.snapshot, _now(), scanned=page.scanned)
        self._paging.read([row.change.size for row in page.rows])
        for row in page.rows:
            self._note(row.change)
        await disregard()

    async def _read_marks(self, reader: psycopg.AsyncConnection) -> bool:
        """Read a page of what others have marked since the last read. Returns whether there is more."""
        found = await self._store.marked_since(reader, self._marks_after, self._paging.rows)
        self._paging.read([change.size for change, _ in found.marks])
        for change, processed_at in found.marks:
            self._note(change)  # it may have been marked before it was seen fresh
            if self._marked.add(change.seq):
                took_s = (processed_at - change.changed_at).total_seconds()
                self._metrics.shadow.others_took(change.entity_type, took_s)
        await disregard()
        self._marks_after = found.go_on or Place(found.now - _LATE)
        return found.go_on is not None

    async def _skip(self, reader: psycopg.AsyncConnection, read: RefusedReadError) -> None:
        """Leave out from now on what the server refuses to hand over; a working consumer makes it a dead letter."""
        found = await self._store.refused.find(reader, read)
        if not found and not read.took_too_long:
            raise read.error
        if not found:
            self._paging.refused()
        for each in found:
            self._skipped.add(each.seq)
            self._metrics.outbox.rows_refused.labels("read").inc()
            log.warning("the database refuses to hand over change %d (%s): %s", each.seq, each.id, each.words)
        self._store.skip(self._skipped)
        self._planner.wakeups_lost()  # the read brought nothing

    # --- counting --------------------------------------------------------------------------------------------------

    def _note(self, change: Change) -> None:
        if not self._captured.add(change.seq):
            return
        handler = self._router.match(change.entity_type, change.operation)
        self._metrics.shadow.saw(change.entity_type, handler.name if handler else NO_HANDLER)
        if handler and (adapter := self._adapters.get(handler.name)):
            self._validate(handler, adapter, change)

    def _validate(self, handler: Handler, adapter: TypeAdapter[Any], change: Change) -> None:
        try:
            call_here(_validate_both, adapter, change)
        except ValidationError as error:
            self._report_invalid(handler, change, ", ".join(sorted(_places(error))))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - validators are the handler's code, too
            self._report_invalid(handler, change, where(error, handler.function))

    def _report_invalid(self, handler: Handler, change: Change, why: str) -> None:
        self._metrics.shadow.invalid(handler.name)
        log.warning(
            "change %s of %s does not fit the model of handler %s: %s", change.id, change.entity_type, handler.name, why
        )

    def _mark_iteration(self) -> None:
        self.last_iteration["consumer"] = _now()

    def _answered(self) -> None:
        self.answered_at = _now()


class _Lately:
    """The numbers added last, up to a bound."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._numbers: dict[int, None] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def add(self, number: int) -> bool:
        """Returns False if it is among them already."""
        if number in self._numbers:
            return False
        self._numbers[number] = None
        if len(self._numbers) > self._bound:
            del self._numbers[next(iter(self._numbers))]
        return True


def _validate_both(adapter: TypeAdapter[Any], change: Change) -> None:
    for row in (change.new, change.old):
        if row is not None:
            adapter.validate_python(row)


def _places(error: ValidationError) -> Iterable[str]:
    """The fields that do not fit, without their values."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    return {".".join(map(str, fault["loc"])) or "row" for fault in faults}


def _now() -> float:
    return asyncio.get_running_loop().time()
