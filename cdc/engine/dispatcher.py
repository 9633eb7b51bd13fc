"""The tasks that run handlers: each takes runs of changes from the scheduler, one after the other, until none is ready.

A task for each change would cost more than many handlers; a fixed number of waiting tasks would have to be woken one
by one. So a worker is started when something is ready and there is room, and when it finds nothing to do it ends, or
rests (``workers``). It calls the changes of a run one after the other for as long as the calls return without waiting.
When one waits, the worker stays with it, and others are started for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from typing import Any

from cdc.core.attempts import FailedAttempt
from cdc.core.fast_change import fast_make
from cdc.core.handler_permits import HandlerPermits
from cdc.core.lost_transactions import LOSSES_MAX, Losses
from cdc.core.model import Change, Dead, Key, Outcome
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import NOTHING, Run
from cdc.core.router import Handler
from cdc.core.scheduler import KeyScheduler
from cdc.engine.batching import Batching, PutOffError
from cdc.engine.coalescing import Coalescing
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.executor import Executor, PendingCall
from cdc.engine.quarantine import Quarantine
from cdc.engine.transactions import AskTheTableError
from cdc.engine.workers import Workers
from cdc.runtime.cancelling import cancel, disregard, has_cancellations, is_being_cancelled
from cdc.runtime.deadline import wait_within

log = logging.getLogger("cdc.consumer")

_CHANGES_PER_ITERATION = 100
"""Handlers that never wait would otherwise keep the event loop busy for a whole window."""
_CUT_OFF_S = 5.0
_RUN, _SETTLEMENT = fast_make(Run), fast_make(Settlement)
_NO_LIMITS: Mapping[str, HandlerPermits] = {}
_ASK_AGAIN_S = 0.1
"""Until the change's lock or the server is free again; the key stays blocked meanwhile."""


class Dispatcher:
    """At most ``concurrency`` workers; ``connections`` for transactional handlers; ``permits`` of those with a limit.

    ``finished`` is given the outcomes, and hands them on to the scheduler (``Settler.put``). ``reread`` is called when
    the scheduler wants a key to be read again, ``put_off`` when it wants one to be read again later.
    """

    def __init__(
        self,
        scheduler: KeyScheduler,
        executor: Executor,
        concurrency: int,
        *,
        connections: int,
        crash_guard: CrashGuard,
        coalescing: Coalescing,
        finished: Callable[[Sequence[Settlement]], None],
        reread: Callable[[], None],
        put_off: Callable[[], None],
        permits: Mapping[str, HandlerPermits] = _NO_LIMITS,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._concurrency = concurrency
        self._crash_guard = crash_guard
        self._permits = permits
        self._batching = Batching(scheduler, executor, connections, coalescing, put_off)
        self._finished = finished
        self._reread = reread
        self._handler: Handler | None = None
        self._started = deque[Change]()
        """A run of this handler, which the workers go through together, each calling what it can."""
        self._workers = Workers(self._work, self._ended)
        self._quarantine = Quarantine(scheduler.knows)
        self._uncancellable = set[asyncio.Task[None]]()
        """The tasks that were cut off and go on; they are not waited for again."""
        self._escapes = Losses()
        """Attempts that ended without an outcome, and not because of their call."""
        self._stopping = asyncio.Event()

    def __len__(self) -> int:
        return len(self._workers.tasks)

    @property
    def coalescing(self) -> Coalescing:
        return self._batching.coalescing

    def dispatch(self) -> None:
        """Start workers for what is ready."""
        if self._stopping.is_set():
            return
        ready = (
            self._scheduler.ready_queues.ready
            + len(self._started)
            + len(self._quarantine.freed)
            - len(self._workers.unstarted)
        )
        if ready <= 0:
            return
        workers = len(self._workers.tasks) - len(self._quarantine.tasks)
        self._workers.start(min(ready, self._concurrency - workers))

    def breaker_changed(self) -> None:
        """The breaker of a handler has opened, lets a call through, or has closed."""
        handler = self._handler
        while handler and self._started and self._executor.breakers.rests(handler.name):
            self._abandon([self._started.popleft()])
        self.dispatch()

    def hold(self, holds: Callable[[Key], bool]) -> None:
        """These keys are paused: what was taken for a call and is not called yet goes back."""
        for waiting in (self._quarantine.held, self._quarantine.freed):
            taken = list(waiting)
            waiting.clear()
            waiting.extend(each for each in taken if not holds(each[1].key))
            self._abandon([change for _, change in taken if holds(change.key)])
        taken_changes = list(self._started)
        self._started.clear()
        self._started.extend(change for change in taken_changes if not holds(change.key))
        self._abandon([change for change in taken_changes if holds(change.key)])

    def settled(self) -> None:
        """Some of the outcomes are in the table."""
        if self._quarantine.suspects:
            self._quarantine.settled()

    async def drain(self, seconds: float) -> None:
        """Start nothing more; give what runs this many seconds, then cut it off."""
        self._stopping.set()
        self._workers.dismiss()
        self._abandon_waiting()
        if not self._workers.tasks:
            return
        log.info("stopping: %d handlers have %g s to finish", len(self._workers.tasks), seconds)
        await asyncio.wait(list(self._workers.tasks), timeout=seconds)
        await self._cut_off(list(self._workers.tasks))

    async def session_lost(self) -> None:
        """Cut off what can be. A call in a thread goes on; its key stays blocked until it returns."""
        self._workers.dismiss()
        self._abandon_waiting()
        self._executor.lost.session_lost()
        in_thread = {
            task for task, run in self._workers.tasks.items() if any(map(self._executor.in_thread, run.changes))
        }
        if in_thread:
            log.warning("%d handlers in threads go on without their session; their keys wait for them", len(in_thread))
        await self._cut_off([task for task in self._workers.tasks if task not in in_thread])

    async def _cut_off(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        running = [(task, self._workers.tasks[task]) for task in tasks if task not in self._uncancellable]
        for task, run in running:
            self._executor.interrupted(run)
            cancel(task)
        if running:
            log.warning("%d handlers were cut off; their changes stay as they were", len(running))
            _, uncancellable = await asyncio.wait([task for task, _ in running], timeout=_CUT_OFF_S)
            self._uncancellable |= uncancellable
            if uncancellable:
                log.error(
                    "%d handlers caught their cancellation and go on; the consumer does not wait for them",
                    len(uncancellable),
                )

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        unstarted = self._workers.unstarted
        unstarted.discard(task)
        calls, waited = 0, False
        while not self._stopping.is_set():
            if not self._have_started():
                # After a wait it may have been cancelled, as all tasks are when a loop is closed: it is to end then.
                if waited or not await self._workers.rest(task):
                    return
                unstarted.discard(task)
                calls = 0
                continue
            handler = self._handler
            done, unfinished = self._run_inline(handler, task)
            if unfinished:
                await self._resume(task, handler, unfinished)
            elif not done:
                await self._execute_next(task, handler)
            if has_cancellations(task):
                await disregard()
            waited = waited or not done or unfinished is not None
            calls += done or 1
            if calls >= _CHANGES_PER_ITERATION or (done and self._started):
                calls = 0
                await OtherTasks()

    def _have_started(self) -> bool:
        """Whether there is a change to call."""
        if self._started:
            return True
        if self._quarantine.freed:
            self._handler, change = self._quarantine.freed.popleft()
            self._started.append(change)
            return True
        if not self._scheduler.ready_queues.queues:
            return False
        self._handler, run = self._scheduler.start()
        self._started.extend(run)
        return bool(run)

    def _dispatch_others(self) -> None:
        """The rest of a run does not wait for the call that waits."""
        if self._started:
            self.dispatch()

    def _run_inline(self, handler: Handler | None, task: asyncio.Task[Any]) -> tuple[int, PendingCall | None]:
        """Call what may return at once. Returns how many calls did, and the call that did not."""
        if handler is not None and not handler.single:
            return 0, None
        if self._crash_guard.watched and any(map(self._crash_guard.must_record_start, self._started)):
            return 0, None
        if handler is not None and handler.name in self._permits and self._started:
            self._scheduler.ready_queues.begins(self._started[0])
        done, unfinished = self._executor.run_inline(handler, self._started, task)
        if done:
            self._report(done)
        return len(done), unfinished

    async def _resume(self, task: asyncio.Task[None], handler: Handler | None, unfinished: PendingCall) -> None:
        assert handler is not None
        change = unfinished.change
        self._dispatch_others()
        self._workers.tasks[task] = _RUN((handler, [change]))
        try:
            outcome = await self._executor.resume(handler, unfinished)
        except asyncio.CancelledError:  # see Executor.resume
            self._abandon([change])
            raise
        except Exception as error:  # noqa: BLE001 - see _bug
            outcome = self._bug(handler, [change], error)[change]
        self._workers.tasks[task] = NOTHING
        if outcome is None:
            self._abandon([change])
        else:
            self._report([_SETTLEMENT((change, outcome))])

    async def _execute_next(self, task: asyncio.Task[None], handler: Handler | None) -> None:
        change = self._started.popleft()
        self._dispatch_others()
        if change.crashed:
            self._run_suspect(handler, change)
        elif self._quarantine.suspects and self._crash_guard.must_record_start(change):
            self._quarantine.held.append((handler, change))
        elif self._executor.lost.has(change):
            self._in_own_task(handler, change, self._execute_lost(handler, change))
        elif handler is not None and handler in self._batching.lingering and not self._batching.runs_alone(change):
            self._batching.join(handler, change)
        else:
            batch = [change]
            self._workers.tasks[task] = Run(handler, batch)
            await self._execute(task, handler, batch)
            self._workers.tasks[task] = NOTHING

    async def _execute(self, task: asyncio.Task[Any], handler: Handler | None, batch: list[Change]) -> None:
        """Run a change, or the batch that is gathered around it, and report. ``task``: the current one."""
        try:
            if handler is not None and handler.transactional:
                async with self._batching.transactions[handler.is_async]:
                    outcomes = await self._run(handler, batch)
            else:
                outcomes = await self._run(handler, batch)
        except asyncio.CancelledError as error:
            if not is_being_cancelled():  # nor did their call raise it
                self._workers.tasks[task] = NOTHING
                self._escaped(batch, error)
                return
            self._abandon(batch)
            raise
        except PutOffError:
            return
        except AskTheTableError as unknown:
            log.info("change %s of %s is read again: %s", batch[0].id, batch[0].entity_type, unknown)
            try:
                await wait_within(self._stopping, unknown.pause_s)
            finally:
                self._abandon(batch)  # also when the session is lost meanwhile: else its key would stay blocked
            return
        except Exception as error:  # noqa: BLE001 - see _bug
            outcomes = self._bug(handler, batch, error)
        self._crash_guard.returned([one for one in batch if one in outcomes])
        self._report_outcomes(task, handler, batch, outcomes)

    async def _run(self, handler: Handler | None, batch: list[Change]) -> dict[Change, Outcome]:
        latest = None
        if handler is not None:
            if handler.batch or handler.group > 1:
                await self._batching.gather(handler, batch)
            if handler.latest:
                latest = await self._batching.latest(handler, batch[0])
            if batch[0].crashed or self._crash_guard.watched:
                await self._crash_guard.record_start(batch, handler.name if handler else None)
            if handler.name in self._permits:
                self._scheduler.ready_queues.begins(batch[0])
        return await self._executor.run(handler, batch, latest)

    def _bug(self, handler: Handler | None, batch: Sequence[Change], error: Exception) -> dict[Change, Outcome]:
        """An error that only a bug in cdc raises costs its changes an attempt, and never their places."""
        log.critical("a worker failed; this is a bug", exc_info=error)
        return {change: self._executor.decide(handler, change, error) for change in batch}

    def _escaped(self, batch: Sequence[Change], error: BaseException) -> None:
        """The attempt was ended neither by its call nor by this program's order: not counted, up to a bound."""
        for change in batch:
            if (times := self._escapes.add([change])) < LOSSES_MAX:
                self._abandon([change])
            else:
                text = f"its attempt was ended {times} times in a row by {type(error).__name__}, which is a bug"
                log.critical("change %s of %s: %s: now a dead letter", change.id, change.entity_type, text)
                attempt = FailedAttempt(None, "lost", type(error).__name__, text, time.monotonic())
                self._report([Settlement(change, Dead(text, summary=text, attempt=attempt))])

    def _abandon_waiting(self) -> None:
        for waiting in (self._quarantine.held, self._quarantine.freed):
            while waiting:
                self._abandon([waiting.popleft()[1]])
        while self._started:
            self._abandon([self._started.popleft()])

    def _report_outcomes(
        self,
        task: asyncio.Task[Any],
        handler: Handler | None,
        batch: Sequence[Change],
        outcomes: Mapping[Change, Outcome],
    ) -> None:
        left = [one for one in batch if one not in outcomes] if len(outcomes) < len(batch) else []
        # An error that escapes from here is about what has no outcome.
        self._workers.tasks[task] = Run(handler, left) if left else NOTHING
        # In seq order within a key: they are settled in this order.
        in_order = outcomes.items() if len(batch) == 1 else [(one, outcomes[one]) for one in batch if one in outcomes]
        self._report(list(map(_SETTLEMENT, in_order)))
        if left:
            self._workers.tasks[task] = NOTHING
            self._abandon(left)

    def _report(self, batch: Sequence[Settlement]) -> None:
        if batch:
            self._finished(batch)
            if self._escapes.suspects:
                self._escapes.forget(finished.change for finished in batch)

    def _run_suspect(self, handler: Handler | None, change: Change) -> None:
        if self._crash_guard.owner_may_be_alive(change):
            self._in_own_task(handler, change, asyncio.sleep(_ASK_AGAIN_S))  # and read again
        else:
            self._in_own_task(handler, change, self._execute_suspect(handler, change), suspect=True)

    def _in_own_task(
        self, handler: Handler | None, change: Change, work: Coroutine[Any, Any, None], *, suspect: bool = False
    ) -> None:
        """Work in a task that is no worker, and takes no place of one."""
        self._scheduler.free_places(change)
        task = self._quarantine.start(change, work, suspect=suspect)
        self._workers.tasks[task] = Run(handler, [change])
        task.add_done_callback(self._ended)

    async def _within_limit(self, handler: Handler | None, change: Change) -> None:
        """Wait until the handler's limit has room for a call outside of the workers, which counts at once."""
        alone = self._scheduler.ready_queues.alone
        try:
            while handler is not None and (permits := self._permits.get(handler.name)) and not self._stopping.is_set():
                by = permits.key(change)
                if permits.room(by) or self._gave_way(permits, by):
                    permits.take(by, 1)
                    permits.begins(by, change)
                    permits.ended(by, change)
                    return
                alone[change] = handler.name, by
                await wait_within(self._stopping, _ASK_AGAIN_S)
        finally:
            alone.pop(change, None)

    def _gave_way(self, permits: HandlerPermits, by: str) -> bool:
        """Give up a change that is held and has taken a permit, as it waits for the suspect that needs one."""
        for waiting in self._quarantine.held:
            handler, change = waiting
            if handler is not None and handler.name == permits.name and permits.key(change) == by:
                self._quarantine.held.remove(waiting)
                self._abandon([change])
                return permits.room(by) > 0
        return False

    async def _execute_lost(self, handler: Handler | None, change: Change) -> None:
        await wait_within(self._stopping, self._executor.lost.pause_s(change))
        async with self._quarantine.turn if self._executor.lost.is_suspect(change) else contextlib.nullcontext():
            await self._within_limit(handler, change)
            if not self._stopping.is_set():
                await self._execute_alone(handler, change, self._executor.after_losses(handler, change))

    async def _execute_suspect(self, handler: Handler | None, change: Change) -> None:
        async with self._quarantine.turn:
            await self._within_limit(handler, change)
            if self._stopping.is_set() or not (suspicion := await self._crash_guard.suspicion(change)):
                return
            await self._execute_alone(handler, change, self._executor.after_crash(handler, change, suspicion))
            await self._quarantine.until_settled(change)

    async def _execute_alone(self, handler: Handler | None, change: Change, outcome: Outcome | None) -> None:
        """``outcome``: without another attempt."""
        self._quarantine.attend()
        task = asyncio.current_task()
        assert task is not None
        if outcome and handler and handler.latest:
            await self._give_up_all(task, handler, change, outcome)
        elif outcome:
            self._report_outcomes(task, handler, [change], {change: outcome})
        else:
            await self._execute(task, handler, [change])

    async def _give_up_all(self, task: asyncio.Task[Any], handler: Handler, change: Change, outcome: Outcome) -> None:
        """The attempts were those of all that the next call would stand for."""
        try:
            latest = await self._batching.latest(handler, change, may_wait=False)
        except AskTheTableError:
            self._abandon([change])
        except asyncio.CancelledError:
            self._abandon([change])
            raise
        else:
            self._report_outcomes(task, handler, [change], {change: latest.outcome(outcome)})

    def _abandon(self, batch: Iterable[Change]) -> None:
        """Leave these without an outcome: only the table has it."""
        for change in batch:
            self._scheduler.interrupted(change)
        self._reread()

    def _ended(self, task: asyncio.Task[None]) -> None:
        run = self._workers.tasks.pop(task, NOTHING)
        self._uncancellable.discard(task)
        self._workers.unstarted.discard(task)  # it may have been cut off before its first step
        unattended = self._quarantine.ended(task) if task in self._quarantine.tasks else None
        failed = None if task.cancelled() else task.exception()
        if failed:
            log.critical("a worker failed; this is a bug", exc_info=failed)
        if unattended:
            self._abandon([unattended])
        elif failed:
            self._escaped(run.changes, failed)
        self.dispatch()


class OtherTasks:
    """Awaiting it lets every other task run once."""

    def __await__(self) -> Generator[None, None, None]:
        yield
