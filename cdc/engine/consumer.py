"""The consumer's loops: wake-ups -> planner -> reads -> scheduler -> handlers -> settle.

    read loop      reads what ``ReadPlanner`` and ``KeyScheduler`` request, on the reader's connection
    workers        run the handlers of the changes that the scheduler starts
    settle loop    writes outcomes, in batches, on the session that holds the shard locks
    shard loop     keeps membership and fair share, on the same session

All of it runs on one event loop, so that the pure parts need no locks; other threads reach it through
``call_soon_threadsafe`` alone. A lost connection resets the scheduler and cuts off the handlers that can be cut off;
then the loops start again with new connections and a sweep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from functools import partial

import psycopg

from cdc.core import failpoints
from cdc.core.handler_limits import HandlerLimits
from cdc.core.model import Change, Coalesced, Committed, Processed, Waiting
from cdc.core.pauses import Pauses
from cdc.core.read_planner import ReadPlanner
from cdc.core.read_reconciler import Settlement
from cdc.core.scheduler import KeyScheduler
from cdc.engine.balancing import Balancing
from cdc.engine.coalescing import Coalescing
from cdc.engine.consumer_port import ConsumerSettings
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.dispatcher import Dispatcher
from cdc.engine.executor import Executor
from cdc.engine.hooks import Hooks
from cdc.engine.limiting import Limiting
from cdc.engine.notifications import Notifications
from cdc.engine.pausing import Pausing
from cdc.engine.reader import Reader
from cdc.engine.reconnecting import Lifecycle
from cdc.engine.settler import Settler
from cdc.observability.metrics import Metrics
from cdc.observability.snapshots import ConsumerStatus
from cdc.postgres.barriers import Barriers
from cdc.postgres.connect import connect_async
from cdc.postgres.limits import Leases
from cdc.postgres.loaders import read_changes
from cdc.postgres.outbox import READ_LIMIT_S, READ_LIMITS, Store
from cdc.postgres.pages import Settled
from cdc.postgres.shard_locks import DEFAULT, ShardSession
from cdc.runtime.deadline import deadline, unless, wait_within

log = logging.getLogger("cdc.consumer")

_POLL_SHARDS_S = 1.0
_ITERATION_MAX_S = 5.0
_LAST_SETTLE_S = 3.0
"""A commit may hang for as long as a synchronous standby is away; a stop must not."""


class Consumer:
    """One consumer. ``run`` returns when ``stop`` was called and what ran has been drained."""

    def __init__(
        self,
        settings: ConsumerSettings,
        *,
        executor: Executor,
        demand: HandlerLimits,
        store: Store,
        hooks: Hooks,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._store = store
        self._hooks = hooks
        self._metrics = metrics
        scheduler = partial(KeyScheduler, settings.window, place_bytes=max(1, settings.window_bytes // settings.window))
        self._scheduler = scheduler(
            ready_queues=demand.ready_queues, needs=demand.needs, sole=demand.sole_type, coalesces=demand.coalesces
        )
        self._planner = ReadPlanner(
            sweep_interval_s=settings.poll_interval_s, room_for=self._scheduler.room_for, scope=settings.scope
        )
        self._reads = Reader(
            self._scheduler, self._planner, store,
            Barriers(settings.schema, of_default=settings.subscription == DEFAULT), metrics, pauses=demand.pauses,
            sweep_interval_s=settings.sweep_interval_s, poll_interval_s=settings.poll_interval_s,
        )  # fmt: skip
        ownership = self._scheduler.ownership
        self.lifecycle = Lifecycle(metrics.consumer)
        self.notifications = Notifications(
            self._planner, metrics.wakeups.dropped, owned=ownership.owned,
            sweep_interval_s=settings.sweep_interval_s, poll_interval_s=settings.poll_interval_s,
        )  # fmt: skip
        self.crash_guard = CrashGuard(store, settings.window)
        self.exposed = self.crash_guard.exposed
        self._settler = Settler(
            self._scheduler,
            store,
            metrics.outbox,
            committed=self._committed,
            settled=self._settled,
            iterated=partial(self.lifecycle.iterated, "settle"),
        )
        self._scheduler.fenced = self._settler.hurry
        self._dispatcher = Dispatcher(
            self._scheduler, executor, settings.concurrency, connections=settings.transactions,
            crash_guard=self.crash_guard, coalescing=Coalescing(demand.router, store), permits=demand.limits.of,
            finished=self._settler.put, reread=self._reread, put_off=self.notifications.due.set,
        )  # fmt: skip
        executor.breakers.changed = self._dispatcher.breaker_changed
        ownership.subscribe(self._planner, self._settler, self.crash_guard)
        pausing = Pausing(self._scheduler, demand.router, give_back=self._dispatcher.hold, reread=self.sweep_now)
        limiting = Limiting(
            self._scheduler, demand, Leases(settings.schema, str(store.process), settings.subscription_name),
            str(store.process), free=self._may_start, soon=pausing.ask_soon,
        )  # fmt: skip
        self._balancing = Balancing(
            ownership, self._settler, self.crash_guard, metrics.consumer, acquired=self._reread,
            pausing=pausing, readers=self._others_read, limiting=limiting,
        )  # fmt: skip
        self._drained = asyncio.Event()

    # --- from outside, on the event loop ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Start nothing more, give what runs its drain time, settle, and leave."""
        self.lifecycle.stopping.set()

    def sweep_now(self) -> None:
        """The table changed without a wake-up for each row: sweep from the start."""
        self._reads.restart()
        self.notifications.due.set()
        self._balancing.pausing.ask_soon()

    @property
    def pauses(self) -> Pauses:
        """What is paused, as far as this consumer knows. From any thread."""
        return self._balancing.pausing.all

    def owns(self, shard: int) -> bool:
        """Whether this process owns the shard now."""
        return shard in self._scheduler.ownership.owned

    @property
    def status(self) -> ConsumerStatus:
        """From any thread."""
        life, scheduler, planner = self.lifecycle, self._scheduler, self._planner
        return ConsumerStatus(
            in_service=life.in_service,
            stopping=life.stopping.is_set(),
            answered_at=life.answered_at,
            last_iteration=dict(life.last_iteration),
            owned_shards=len(scheduler.ownership.owned),
            members=self._balancing.members,
            running=scheduler.running,
            queued=scheduler.queued,
            settling=scheduler.settling,
            window=self._settings.window,
            waiting_wakeups=planner.queue_length,
            uncommitted_wakeups=planner.uncommitted,
            live_shards=planner.live_shards,
            catching_up=planner.catching_up,
            throttled_types=len(planner.throttled),
            held_up_s=_since(self._settler.held_up_since),
            unread_s=_since(self._reads.delayed_since),
            pauses=self.pauses.all,
            pauses_read_at=self._balancing.pausing.read_at,
            limits=self._balancing.limiting.status,
        )

    # --- connections -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until stopped. Raises the error when the very first connection is refused."""
        await self.lifecycle.run(self._run_connected)
        await self._hooks.drain(self._settings.drain_time_s)

    async def _run_connected(self) -> None:
        """Work with one set of connections until one of them fails or the consumer is stopped."""
        async with contextlib.AsyncExitStack() as connections:
            opened = await unless(self.lifecycle.stopping, connections.enter_async_context(self._connections()))
            if opened is None:
                return
            session, reader = opened
            try:
                async with asyncio.TaskGroup() as loops:
                    readers = [
                        loops.create_task(self._shard_loop(session)),
                        loops.create_task(self._read_loop(session, reader)),
                    ]
                    settling = loops.create_task(self._settler.run(session, reader))
                    loops.create_task(self._drain_at_stop(session, readers, settling))
            finally:
                await self._end_connection()

    @contextlib.asynccontextmanager
    async def _connections(self) -> AsyncIterator[tuple[ShardSession, psycopg.AsyncConnection]]:
        dsn, schema = self._settings.dsn, self._settings.schema
        session = await ShardSession.open(
            dsn, schema, self._store.process, self._store.session, self._settings.subscription
        )
        self.crash_guard.use_session(session)
        try:
            reader = await connect_async(
                dsn,
                application_name="cdc: reader",
                session={**self._store.session, **READ_LIMITS},
                answer_limit_s=READ_LIMIT_S,
            )
            read_changes(reader)
            self._dispatcher.coalescing.use_reader(reader)
            async with reader:
                self.lifecycle.connected.set()
                await self._wait_for_schema(session, reader)
                await self.crash_guard.clear()
                self.lifecycle.in_service = True
                yield session, reader
        finally:
            self.lifecycle.in_service = False
            await session.close()

    async def _wait_for_schema(self, session: ShardSession, reader: psycopg.AsyncConnection) -> None:
        async def check() -> None:
            self.lifecycle.iterated("consumer")
            await self._balancing.look(session)  # before anything is read
            self.lifecycle.iterated("consumer", answered=True)
            await self._store.check(reader)

        await self.lifecycle.wait_for_schema(check)

    async def _drain_at_stop(
        self, session: ShardSession, readers: Sequence[asyncio.Task[None]], settling: asyncio.Task[None]
    ) -> None:
        await self.lifecycle.stopping.wait()
        await self._dispatcher.drain(self._settings.drain_time_s)
        self._drained.set()
        self._settler.finish()
        for loop in readers:
            loop.cancel()
        await asyncio.wait([settling], timeout=_LAST_SETTLE_S)
        if settling.done():
            await self._leave_in_peace(session)
        else:
            log.warning("what was done last could not be settled within %g s; it may run again", _LAST_SETTLE_S)
            settling.cancel()

    async def _leave_in_peace(self, session: ShardSession) -> None:
        """Leave no sign of a crash for the next owner to check. If it is not done in time, that check is in vain."""
        with contextlib.suppress(psycopg.Error, OSError):
            async with deadline(_LAST_SETTLE_S):
                await self.crash_guard.clear()
                await self._balancing.limiting.give_back(session)
                async with session.writing:
                    if self._store.may_advance(time.monotonic()):
                        await self._store.advance(session.connection, self._scheduler.ownership.owned)
                await session.unregister()

    async def _end_connection(self) -> None:
        """The locks are gone, or about to be: forget what was queued and cut off what can be."""
        lost = self._scheduler.ownership.lose()
        if lost and not self.lifecycle.stopping.is_set():
            self._metrics.consumer.shard_moves.labels("lost").inc(lost)
        self._reads.due_within(0.0)
        self.notifications.due.close()
        await self._dispatcher.session_lost()

    # --- shards ----------------------------------------------------------------------------------------------------

    async def _shard_loop(self, session: ShardSession) -> None:
        asked = True
        while not self.lifecycle.stopping.is_set():
            self.lifecycle.iterated("shards")
            seen = self._settings.seen()
            shares = seen.shares.get(self._settings.subscription) if seen else None
            if await self._balancing.poll_if_changed(session, time.monotonic(), None if asked else shares):
                self.lifecycle.iterated("shards", answered=True)
                await self._advance(session)
                await self._lease(session)
            asked = await self._balancing.pausing.until_asked(self.lifecycle.stopping)
        while not self._drained.is_set():  # the server ends a session that is silent
            await self._balancing.ask(session, time.monotonic())
            await wait_within(self._drained, _POLL_SHARDS_S)

    async def _advance(self, session: ShardSession) -> None:
        """Move the positions of a subscription. What this does not do now it does the next time."""
        if (owned := self._scheduler.ownership.owned) and self._store.may_advance(time.monotonic()):
            with self._balancing.patience(session, time.monotonic()):
                async with session.writing:
                    await self._store.advance(session.connection, owned)

    async def _lease(self, session: ShardSession) -> None:
        with self._balancing.patience(session, time.monotonic()):
            await self._balancing.limiting.renew(session)

    def _may_start(self) -> None:
        """Something that a limit held back may go on."""
        self._dispatcher.dispatch()
        self._read_if_room_helps()

    def _others_read(self, session: ShardSession) -> None:
        self.notifications.relays_all = session.others_read(len(self._settings.beside))

    def _reread(self) -> None:
        """Changes were left without an outcome. Only a read of due changes finds one that waits and is due."""
        self._reads.due_within(0.0)
        self.notifications.due.set()

    # --- reads -----------------------------------------------------------------------------------------------------

    async def _read_loop(self, session: ShardSession, reader: psycopg.AsyncConnection) -> None:
        while not self.lifecycle.stopping.is_set():
            self.notifications.due.clear()
            read = await self._reads.once(reader, session)
            self.lifecycle.iterated("consumer", answered=read)
            if read:
                if not self._scheduler.settling and session.has_server_message:
                    # Another consumer takes the shards if the session has ended: check before starting more.
                    await self._balancing.ask(session, time.monotonic())
                failpoints.here("fetch.after_rows")
            self._dispatcher.dispatch()
            failpoints.here("fetch.after_dispatch")
            wait_s = self._reads.wait_s(read=read)
            if wait_s or not read:
                await self.notifications.due.wait_within(wait_s if wait_s < _ITERATION_MAX_S else _ITERATION_MAX_S)

    # --- settle ----------------------------------------------------------------------------------------------------

    def _committed(self, changes: Sequence[tuple[Change, Committed]]) -> None:
        together: dict[datetime, list[Change]] = {}
        for change, outcome in changes:
            together.setdefault(outcome.at, []).append(outcome.coalesced or change)
        for at, processed in together.items():
            self._processed(processed, at)
        self._read_if_room_helps()

    def _settled(self, batch: Sequence[Settlement], settled: Settled) -> None:
        self._dispatcher.settled()
        if settled.missed:
            self._metrics.outbox.settle_skipped.inc(settled.missed)
            self.sweep_now()  # another session had settled one: changes that the queues hold as waiting may be done
        self._follow_up(batch, settled.at)
        self._dispatcher.dispatch()
        self._read_if_room_helps()

    def _read_if_room_helps(self) -> None:
        if self._reads.next.wants_room or self._scheduler.deferred.reads:
            self.notifications.due.set()

    def _follow_up(self, batch: Sequence[Settlement], settled_at: datetime) -> None:
        """Read again when what waits is due, and call the hooks for what is processed."""
        processed: list[Change] = []
        for change, outcome in batch:
            if isinstance(outcome, Processed):
                processed.append(change)
                if not change.requeued:
                    continue
            elif isinstance(outcome, Coalesced) and isinstance(outcome.outcome, Processed):
                processed.append(outcome.change)
            if change.requeued:
                self._reread()  # it may have held back another one that is due
            if isinstance(outcome, Waiting):
                self._reads.due_within(outcome.delay_s)
                self.notifications.due.set()
        self._processed(processed, settled_at)

    def _processed(self, changes: Sequence[Change], at: datetime) -> None:
        took_s: dict[str, list[float]] = {}
        for change in changes:
            took_s.setdefault(change.entity_type, []).append(max(0.0, (at - change.changed_at).total_seconds()))
        for entity_type, seconds in took_s.items():
            self._metrics.handlers.took(entity_type, seconds)
        if self._hooks.for_processed:
            self._hooks.processed(changes)


def _since(moment: float | None) -> float:
    return 0.0 if moment is None else time.monotonic() - moment
