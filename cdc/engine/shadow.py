"""A consumer that only reads: ``cdc run --observe``, for the time before it may handle changes.

It reads every change as a consumer would, by wake-ups and sweeps, and counts which handler it would have gone to, as
its filter says, and whether it fits that handler's model; and it reads what another program marks processed, and how
long that took. It owns no shard and is no member, so it takes no work from others, and its session is read-only: the
server would refuse a mark.
What it is notified of, and how it connects again, are those of a consumer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import psycopg
from pydantic import ValidationError

from cdc.core.model import SHARDS, Change, WakeUp
from cdc.core.page_size import PageSize
from cdc.core.pauses import NONE, Pauses
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.router import Handler, Router
from cdc.core.shard_ownership import Acquired
from cdc.engine.calls import call_here
from cdc.engine.consumer_port import ConsumerSettings
from cdc.engine.handler_input import Prepare, preparations
from cdc.engine.hooks import where
from cdc.engine.notifications import Notifications
from cdc.engine.reconnecting import Lifecycle
from cdc.observability.metrics import NO_HANDLER, Metrics, ShadowMetrics
from cdc.observability.snapshots import ConsumerStatus
from cdc.postgres.connect import connect_async
from cdc.postgres.loaders import read_changes
from cdc.postgres.outbox import READ_LIMIT_S, READ_SESSION, Store
from cdc.postgres.pages import Place
from cdc.postgres.shard_locks import observe
from cdc.postgres.unreadable import RefusedReadError
from cdc.runtime.cancelling import disregard
from cdc.runtime.deadline import unless

log = logging.getLogger("cdc.shadow")

_MARKS_EVERY_S = 1.0
_LATE = timedelta(seconds=2)
"""Marks are read in the order in which their transactions began: one that takes longer to commit is not measured."""
_REMEMBERED = 50_000
"""Numbers seen lately, so that a change that is read twice counts once."""
_SKIPPED = 1_000
"""Changes that the server refuses to hand over and that are left out: if there are more, some are read again."""
_ITERATION_MAX_S = 5.0
_SESSION = {
    **READ_SESSION,
    "idle_session_timeout": "0",
    "default_transaction_read_only": "on",
}


class Shadow:
    """``run`` returns when ``stop`` was called."""

    def __init__(self, settings: ConsumerSettings, *, router: Router, store: Store, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._paging = PageSize()
        self._planner = ReadPlanner(sweep_interval_s=settings.poll_interval_s, scope=settings.scope)
        self._planner.acquired(Acquired(range(SHARDS)))
        self._dry_run = _DryRun(router, metrics.shadow)
        self._marks = _MarksOfOthers(store, metrics.shadow, self._dry_run)
        self._skipped = _Lately(_SKIPPED)
        self.lifecycle = Lifecycle(metrics.consumer)
        # As if it owned all shards: the consumers that handle changes have a stream of their own.
        self.notifications = Notifications(
            self._planner, metrics.wakeups.dropped, owned=frozenset(range(SHARDS)),
            sweep_interval_s=settings.sweep_interval_s, poll_interval_s=settings.poll_interval_s,
        )  # fmt: skip

    def stop(self) -> None:
        self.lifecycle.stopping.set()

    @property
    def pauses(self) -> Pauses:
        """It runs nothing that could be paused."""
        return NONE

    def owns(self, shard: int) -> bool:
        """It owns none."""
        return False

    def exposed(self) -> bool:
        """It calls no handler."""
        return False

    def sweep_now(self) -> None:
        """Not from the beginning, as a consumer does: what was seen once need not be seen again."""
        self.notifications.captured()

    @property
    def status(self) -> ConsumerStatus:
        """From any thread."""
        return ConsumerStatus(
            observing=True,
            in_service=self.lifecycle.in_service,
            stopping=self.lifecycle.stopping.is_set(),
            answered_at=self.lifecycle.answered_at,
            last_iteration=dict(self.lifecycle.last_iteration),
            waiting_wakeups=self._planner.queue_length,
        )

    async def run(self) -> None:
        """Read until stopped. Raises the error when the very first connection is refused."""
        log.info("only observing %s: no handler runs, nothing is marked", self._settings.scope)
        await self.lifecycle.run(self._until_stopped)

    async def _until_stopped(self) -> None:
        """A stop does not wait for a read: it may wait for a lock."""
        try:
            await unless(self.lifecycle.stopping, self._run_connected())
        finally:
            self.lifecycle.in_service = False
            self.notifications.due.close()

    async def _run_connected(self) -> None:
        settings, due = self._settings, self.notifications.due
        async with await connect_async(
            settings.dsn, application_name="cdc: observer", session=_SESSION, answer_limit_s=READ_LIMIT_S
        ) as reader:
            read_changes(reader)
            self.lifecycle.connected.set()
            await observe(reader, settings.schema)
            await self._wait_for_schema(reader)
            self.lifecycle.in_service = True
            while True:
                due.clear()
                while await self._read_once(reader):
                    pass
                wait_s = min(self._planner.wait_s(_now()), self._marks.at - _now(), _ITERATION_MAX_S)
                await due.wait_within(max(0.0, wait_s))

    async def _wait_for_schema(self, reader: psycopg.AsyncConnection) -> None:
        async def check() -> None:
            self.lifecycle.iterated("consumer")
            await self._store.check(reader, settles=False)
            self.lifecycle.iterated("consumer", answered=True)

        await self.lifecycle.wait_for_schema(check)

    async def _read_once(self, reader: psycopg.AsyncConnection) -> bool:
        """False: there is nothing more to read."""
        self.lifecycle.iterated("consumer")
        try:
            if _now() >= self._marks.at:
                await self._marks.read(reader, self._paging)
            request = self._planner.next(_now(), self._paging.rows, 1)
            if request is not None:
                await self._read(reader, request)
        except RefusedReadError as refused:
            await self._skip(reader, refused)
            return True
        self.lifecycle.iterated("consumer", answered=True)
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
            self._dry_run.take(row.change)
        await disregard()

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
            log.warning("change %d (%s) is left out: %s: %s", each.seq, each.id, each.summary, each.words)
        self._store.skip(self._skipped)
        self._planner.wakeups_lost()  # the read brought nothing


class _DryRun:
    """Counts which handler a change would have gone to, and whether it fits that handler's filter and model."""

    def __init__(self, router: Router, metrics: ShadowMetrics) -> None:
        self._router = router
        self._metrics = metrics
        self._preparations = preparations(set(router.handlers.values()))
        self._seen = _Lately(_REMEMBERED)

    def take(self, change: Change) -> None:
        if not self._seen.add(change.seq):
            return
        handler = self._router.match(change.entity_type, change.operation)
        if handler and (prepare := self._preparations.get(handler.name)) and not self._wants(handler, prepare, change):
            handler = None
        self._metrics.saw(change.entity_type, handler.name if handler else NO_HANDLER)

    def _wants(self, handler: Handler, prepare: Prepare, change: Change) -> bool:
        """Whether the handler would be called, or the attempt fail before."""
        try:
            return call_here(prepare, change) is not None
        except ValidationError as error:
            self._report_invalid(handler, change, ", ".join(sorted(_places(error))))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - filter and validators are the handler's
            self._report_invalid(handler, change, where(error, handler.function))
        return True

    def _report_invalid(self, handler: Handler, change: Change, why: str) -> None:
        self._metrics.invalid(handler.name)
        log.warning(
            "change %s of %s does not fit the model%s of handler %s: %s",
            change.id, change.entity_type, " or filter" if handler.filter else "", handler.name, why,
        )  # fmt: skip


class _MarksOfOthers:
    """Measures how long others take. ``at``: when to read what they have marked, by ``time.monotonic()``."""

    def __init__(self, store: Store, metrics: ShadowMetrics, dry_run: _DryRun) -> None:
        self._store = store
        self._metrics = metrics
        self._dry_run = dry_run
        self._measured = _Lately(_REMEMBERED)
        self._after: Place | None = None
        self.at = 0.0

    async def read(self, reader: psycopg.AsyncConnection, paging: PageSize) -> None:
        """Read a page of what others have marked since the last read."""
        found = await self._store.marked_since(reader, self._after, paging.rows)
        paging.read([change.size for change, _ in found.marks])
        for change, processed_at in found.marks:
            self._dry_run.take(change)  # it may have been marked before it was seen fresh
            if self._measured.add(change.seq):
                self._metrics.others_took(change.entity_type, (processed_at - change.changed_at).total_seconds())
        await disregard()
        self._after = found.go_on or Place(found.now - _LATE)
        if found.go_on is None:
            self.at = _now() + _MARKS_EVERY_S


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


def _places(error: ValidationError) -> Iterable[str]:
    """The fields that do not fit, without their values."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    return {".".join(map(str, fault["loc"])) or "row" for fault in faults}


def _now() -> float:
    return time.monotonic()
