"""The life of one handler call: resolve, validate, run under its time limit, decide the outcome.

    change(s) ──> handler? ──no──> Skipped
                    │ yes
                  depth? ──too many causes──> Dead
                    │
                  model? ──does not fit──> Dead
                    │
                  call ── returns ───────────────> Processed; Committed by a transactional handler
                       ├─ raises Discard ────────> Discarded
                       ├─ raises Reject ─────────> Dead
                       ├─ raises Retry, fails ───> Waiting, or Dead after the last attempt
                       ├─ raises Unavailable ────> Waiting, not counted; no outcome while the handler rests
                       ├─ outcome unknown ───────> AskTheTableError: no outcome, the key is read again
                       └─ cut off by a stop, or with the session ──> CancelledError: no outcome, no attempt counted

A batch is handled as one call. Of its errors, ``Failed`` names the changes it is about; ``Retry``, ``Unavailable``,
``Discard``, ``Reject`` and the time limit are about all of them. Any other error comes from one of the changes, and
it is unknown which: so they are called one by one, at once, and a key stops at its first failed change. If one of these
finds a dependency unavailable, the rest stay as they were.

Changes of a transactional handler may share a transaction, each with its own call. If one of these fails, all are
rolled back and run one by one as well. But if the handler has ended the transaction, it is unknown which of the
others were committed, and none of them may run again.

A handler in a thread cannot be stopped, nor can one that catches its cancellation and goes on. An overrun of its time
limit is reported, and the change stays running, its key blocked, until the handler returns. Its result then decides:
a return is a return, however late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter

from cdc.core import failpoints
from cdc.core.errors import Discard, Failed, OverrunError, Reject, Retry, Unavailable
from cdc.core.fast_change import fast_make
from cdc.core.lost_transactions import LOSSES_MAX, SESSIONS_MAX, Losses, pause_s
from cdc.core.model import Change, Committed, Dead, Discarded, Key, Outcome, Processed, Skipped, Suspicion, Waiting
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import Run
from cdc.core.router import Handler, Router
from cdc.core.transaction_batching import AdaptiveBatchSize
from cdc.engine.calls import Contexts, CutOffError, StartedCall, begin, call_handler, call_handler_here, call_here
from cdc.engine.error_policy import ErrorPolicy, LostTooOftenError, TooDeepError
from cdc.engine.thread_pool import Job, Threads
from cdc.engine.timeouts import Limit
from cdc.engine.transactions import (
    AskTheTableError,
    BlockedError,
    EndedTransactionError,
    LostTransactionError,
    MixedCausesError,
    Ran,
    Transactions,
)
from cdc.observability.metrics import NO_HANDLER, HandlerMetrics
from cdc.runtime.cancelling import is_being_cancelled

log = logging.getLogger("cdc.handlers")

_ABOUT_ALL = (Retry, Unavailable, Discard, Reject, OverrunError, EndedTransactionError)
"""Errors of a batch that are not about a single change."""
_AT_ONCE_S = 0.005
"""Calls in a row, before the event loop goes on with other tasks."""

_PROCESSED = Processed()
_FINISHED = fast_make(Settlement)
_LABELS: dict[type[Outcome], str] = {
    Processed: "processed",
    Committed: "processed",
    Skipped: "skipped",
    Discarded: "discarded",
    Waiting: "retried",
    Dead: "dead",
}


class PendingCall(NamedTuple):
    """A call that waits, or has failed."""

    change: Change
    call: StartedCall[object]


class Executor:
    """``timeout_s`` holds for handlers that name none of their own."""

    def __init__(
        self,
        router: Router,
        *,
        error_policy: ErrorPolicy,
        timeout_s: float | None,
        threads: Threads,
        transactions: Transactions,
        metrics: HandlerMetrics,
    ) -> None:
        self._router = router
        self._scope = router.scope
        self._error_policy = error_policy
        self.breakers = error_policy.breakers
        self._troubled = self.breakers.troubled
        self._timeout_s = timeout_s
        self._limits = {
            seconds: Limit(seconds, self._ignored)
            for seconds in (timeout_s, *(h.timeout_s for h in router.handlers.values()))
        }
        self._threads = threads
        self._transactions = transactions
        self._metrics = metrics
        handlers = set(router.handlers.values())
        self._durations = {h.name: metrics.duration.labels(h.name) for h in handlers}
        self._sessions_lost = 0
        self._jobs: dict[int, Job] = {}
        """Calls in threads, by the first of their changes."""
        self._losses = Losses()
        """Losses of connections."""
        self._delays = Losses()
        """Attempts that a temporary obstacle ended."""
        self._groupings = {h.name: AdaptiveBatchSize(h.group) for h in handlers if h.group > 1}
        self._adapters = {h.name: TypeAdapter(h.model) for h in handlers if h.model is not None}
        self.tasks: Mapping[asyncio.Task[Any], Run] = {}
        """What each calling task works on; the tasks keep it."""

    @cached_property
    def _contexts(self) -> Contexts:
        """As they are at the first call, for all."""
        return Contexts.current_for_many()

    def group_limit(self, handler: Handler) -> int:
        """How many changes may share the handler's next transaction: one while its breaker is tripped."""
        grouping = self._groupings.get(handler.name)
        return grouping.limit if grouping and not self.breakers.of[handler.name].tripped else 1

    def in_thread(self, change: Change) -> bool:
        """Whether its handler runs in a thread, where it cannot be cut off any more."""
        job = self._jobs.get(change.seq)
        return job is not None and job.started_at is not None

    def interrupted(self, run: Run) -> None:
        """The call was cut off."""
        if run.handler:
            for change in run.changes:
                self._metrics.handled(change.entity_type, run.handler.name, "interrupted")

    def session_lost(self) -> None:
        """Nothing more of what has begun may start."""
        self._sessions_lost += 1

    def after_crash(self, handler: Handler | None, change: Change, suspicion: Suspicion) -> Outcome | None:
        """The outcome of a change whose attempts have all ended with their process; None: it may run."""
        again = suspicion is Suspicion.AGAIN
        return self._error_policy.after_crash(handler, change, again=again) if handler else None

    def pause_s(self, change: Change) -> float:
        """Seconds to wait before a change that was lost runs again."""
        return pause_s(max(self._losses.times(change.id), self._delays.times(change.id)))

    def after_losses(self, handler: Handler | None, change: Change) -> Outcome | None:
        """The outcome of a suspect that lost its transaction or session too often; None: it may run."""
        times = self._losses.times(change.id)
        if times < LOSSES_MAX or handler is None:
            return None
        self._forget([change])
        why = "the connection was lost" if handler.transactional else "the consumer's session was lost"
        return self._error_policy.on(handler, change, LostTooOftenError(handler, times, LostTransactionError(why)))

    def decide(self, handler: Handler | None, change: Change, error: BaseException) -> Outcome:
        """The outcome of a change that got none because of ``error``."""
        return self._error_policy.on(handler, change, error) if handler else Skipped()

    def _unwanted(self, change: Change) -> Outcome:
        """For an operation that no handler of the type names, as is usual; or for an ignored type."""
        if self._router.ignores(change.entity_type):
            return Discarded("no handler wants it, for the router ignores its type")
        if self._scope.has(change.entity_type):
            return Skipped()
        return Discarded("no handler wants its type, and unhandled is discard")

    def suspects(self, change: Change) -> bool:
        """Whether it may be the cause of lost transactions or sessions: such changes run one at a time."""
        return self._losses.doubts(change)

    def lost(self, change: Change) -> bool:
        """Whether its transaction was lost the last time: it runs after a pause, and shares no transaction."""
        return self._losses.doubts(change) or self._delays.doubts(change)

    async def run(self, handler: Handler | None, changes: Sequence[Change]) -> dict[Change, Outcome]:
        """One attempt at the handler's changes: one, or a batch. A change may have no outcome: not tried.

        Raises only a cancellation and AskTheTableError: there is no outcome at all then.
        """
        if handler is None:
            for change in changes:
                self._metrics.handled(change.entity_type, NO_HANDLER, "skipped")
            return {change: self._unwanted(change) for change in changes}
        failpoints.here("run.before_handler")
        outcomes: dict[Change, Outcome] = {}
        given = changes
        if handler.model is not None or any(change.chain for change in changes):
            changes, given = self._refuse(handler, changes, outcomes)
        if changes:
            started = time.monotonic()
            outcomes |= await self._attempt(handler, changes, given, started)
            self._took(handler, changes, time.monotonic() - started)
        self._count(handler, outcomes)
        if self._troubled and any(isinstance(outcome, Processed | Committed) for outcome in outcomes.values()):
            self.breakers.succeeded(handler.name)
        failpoints.here("run.after_handler")
        return outcomes

    def run_inline(
        self, handler: Handler | None, changes: deque[Change]
    ) -> tuple[list[Settlement], PendingCall | None]:
        """Call a handler for one change after the other, for as long as the calls return without waiting.

        The steps of a task cost more than many handlers; these calls share them. Takes the changes it calls from
        ``changes``: none if their call is not that simple. Returns what has ended, and the call that has not, for
        ``resume``. Stops after a call that has cancelled the task (``cancelling.disregard``).
        """
        done: list[Settlement] = []
        if handler is None or not handler.single:
            return done, None
        adapter = self._adapters.get(handler.name)
        call_one = partial(_call_with_model, handler.function, adapter) if adapter else handler.function
        seconds: list[float] = []
        unfinished = None
        task, suspects, contexts = asyncio.current_task(), self._losses.suspects, self._contexts
        assert task is not None
        began = now = time.monotonic()
        while changes and now - began < _AT_ONCE_S and not (changes[0].crashed or changes[0].chain):
            if suspects and changes[0].id in suspects:
                break
            change, started = changes.popleft(), now
            failpoints.here("run.before_handler")
            try:
                rest = begin(contexts, call_one, (change,))
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised where the call is awaited
                unfinished = PendingCall(change, StartedCall(None, None, started, error))
                break
            if rest:
                unfinished = PendingCall(change, StartedCall(rest, rest.send(None), started))
                break
            done.append(_FINISHED((change, _PROCESSED)))
            now = time.monotonic()
            seconds.append(now - started)
            if task.cancelling():
                break
        if done:
            self._losses.forget(finished.change for finished in done)
            self._durations[handler.name].observe_each(seconds)
            self._metrics.handled(done[0].change.entity_type, handler.name, "processed", len(done))
            if self._troubled:
                self.breakers.succeeded(handler.name)
            failpoints.here("run.after_handler")
        return done, unfinished

    async def resume(self, handler: Handler, unfinished: PendingCall) -> Outcome | None:
        """The rest of an attempt that was begun. Raises only a cancellation. None: as in ``run``."""
        change, call = unfinished
        failure: BaseException | None = None
        session = self._sessions_lost
        try:
            await self._limit(handler).resume(call, call.started)
        except Failed as failed:
            failure = failed.errors.get(change.seq)
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                self._ended([change], session)
                raise
            failure = error
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is that change's failure
            failure = error
        self._ended([change], session)
        took_s = time.monotonic() - call.started
        self._durations[handler.name].observe(took_s)
        outcome: Outcome | None = _PROCESSED
        if failure is not None:
            outcome = self._error_policy.of_call(handler, [change], {change.seq: failure}, took_s).get(change)
        elif self._troubled:
            self.breakers.succeeded(handler.name)
        if outcome is not None:
            self._count(handler, {change: outcome})
        failpoints.here("run.after_handler")
        return outcome

    def _count(self, handler: Handler, outcomes: Mapping[Change, Outcome]) -> None:
        alike: dict[tuple[str, str], int] = {}
        for change, outcome in outcomes.items():
            if not _is_away(outcome):  # counted with its call
                kind = change.entity_type, _LABELS[type(outcome)]
                alike[kind] = alike.get(kind, 0) + 1
        for (entity_type, label), changes in alike.items():
            self._metrics.handled(entity_type, handler.name, label, changes)

    def _refuse(
        self, handler: Handler, changes: Sequence[Change], outcomes: dict[Change, Outcome]
    ) -> tuple[Sequence[Change], Sequence[Change]]:
        """The changes that may run, as they are and as the handler gets them; sets the outcome of the others."""
        changes = given = self._refuse_deep(handler, changes, outcomes)
        if adapter := self._adapters.get(handler.name):
            changes, given = self._validate(handler, adapter, changes, outcomes)
        shut = {change.key for change, outcome in outcomes.items() if handler.transactional or outcome.blocks_key}
        pairs = [(c, g) for c, g in zip(changes, given, strict=True) if c.key not in shut]
        return [c for c, _ in pairs], [g for _, g in pairs]

    def _refuse_deep(
        self, handler: Handler, changes: Sequence[Change], outcomes: dict[Change, Outcome]
    ) -> list[Change]:
        """The changes that may run; sets the outcome of those with too many causes."""
        outcomes |= {
            change: self._error_policy.on(handler, change, TooDeepError(change)) for change in changes if change.chain
        }
        return [change for change in changes if not change.chain]

    def _validate(
        self, handler: Handler, adapter: TypeAdapter[Any], changes: Sequence[Change], outcomes: dict[Change, Outcome]
    ) -> tuple[list[Change], list[Change]]:
        """The changes that fit, as they are and as the handler gets them; sets the outcome of the others."""
        fitting: list[Change] = []
        given: list[Change] = []
        for change in changes:
            try:
                given.append(call_here(_with_model, adapter, change))
                fitting.append(change)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - validators are the handler's code, too
                outcomes[change] = self._error_policy.on(handler, change, error)
        return fitting, given

    def _took(self, handler: Handler, changes: Sequence[Change], seconds: float) -> None:
        calls = 1 if handler.batch else len(changes)
        self._durations[handler.name].observe(seconds / calls, calls)

    async def _attempt(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change], started: float
    ) -> dict[Change, Outcome]:
        grouping = self._groupings.get(handler.name)
        session = self._sessions_lost
        try:
            call = self._call if handler.is_async else self._call_in_thread
            ran = await call(handler, changes, given)
            if grouping:
                grouping.committed(len(changes), ran.calls_s, captured=ran.captured)
        except LostTransactionError as lost:
            return self._lost(handler, changes, lost)
        except AskTheTableError:
            raise
        except MixedCausesError:
            self._groupings[handler.name].captured = True
            return await self._attempt(handler, changes, given, started)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
                if isinstance(error, CutOffError):
                    self._ended(changes, session)
                raise
            if len(changes) > 1 and not isinstance(error, _ABOUT_ALL if handler.batch else EndedTransactionError):
                if grouping:
                    grouping.rolled_back()
                return await self._one_by_one(handler, changes, given)
            ran = Ran({change.seq: error for change in changes})
        self._ended(changes, session)
        done: Outcome = Committed(ran.at) if ran.at else _PROCESSED
        if not ran.errors:
            return dict.fromkeys(changes, done)
        failed = self._error_policy.of_call(handler, changes, ran.errors, time.monotonic() - started)
        return {change: done for change in changes if change.seq not in ran.errors} | failed

    def _ended(self, changes: Sequence[Change], session: int) -> None:
        """Their call, begun in this session, returned or was cut off. If the session was lost, so is the outcome."""
        if session == self._sessions_lost:
            self._forget(changes)
        else:
            self._losses.add(changes, suspect_at=SESSIONS_MAX)

    def _lost(self, handler: Handler, changes: Sequence[Change], lost: LostTransactionError) -> dict[Change, Outcome]:
        """Raise ``lost`` again, unless it is an obstacle that does not end.

        A change that lost its connection too often is decided about when it is to run again: the session may be lost
        as well, and the outcome with it.
        """
        blocked = isinstance(lost, BlockedError)
        times = (self._delays if blocked else self._losses).add(changes)
        if len(changes) > 1 or times < LOSSES_MAX or not blocked:
            lost.pause_s = 0.0  # it pauses before it runs again
            raise lost
        self._forget(changes)
        return {change: self._error_policy.on(handler, change, lost.cause) for change in changes}

    def _forget(self, changes: Sequence[Change]) -> None:
        """These changes have an outcome."""
        self._losses.forget(changes)
        self._delays.forget(changes)

    async def _one_by_one(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]
    ) -> dict[Change, Outcome]:
        failpoints.here("run.before_one_by_one")
        outcomes: dict[Change, Outcome] = {}
        held: set[Key] = set()
        session = self._sessions_lost
        for change, one in zip(changes, given, strict=True):
            if session != self._sessions_lost:
                break  # a call in a thread could not be cut off; the next must not start
            if change.key not in held:
                outcomes |= await self._attempt(handler, [change], [one], time.monotonic())
                outcome = outcomes.get(change)
                if outcome is None or _is_away(outcome):
                    break  # the others need the same dependency, and each call might take long to find it unavailable
                # The settle marks what a transactional handler leaves to it, and its successor would not wait for that.
                if outcome.blocks_key or (handler.transactional and not isinstance(outcome, Committed)):
                    held.add(change.key)
        return outcomes

    async def _call(self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]) -> Ran:
        limit, contexts = self._limit(handler), self._contexts
        if handler.transactional:
            calls = [partial(call_handler, handler, contexts, part) for part in _calls(handler, given)]
            running = self._transactions.run(changes, calls, causes=self._names_causes(handler))
            return await limit.resume(running, time.monotonic())
        return Ran(await limit.call(call_handler(handler, contexts, given)))

    def _ignored(self, task: asyncio.Task[Any]) -> None:
        handler, changes = self.tasks.get(task, (None, ()))
        if changes and handler:
            self._error_policy.count(handler, "timeout")
            log.error(
                "handler %s goes on though its limit of %g s has passed, on change %s of %s: it caught its"
                " cancellation, so its key is held until it returns",
                handler.name, handler.timeout_s or self._timeout_s, changes[0].id, changes[0].entity_type,
            )  # fmt: skip

    def _limit(self, handler: Handler) -> Limit:
        return self._limits[handler.timeout_s or self._timeout_s]

    def _names_causes(self, handler: Handler) -> bool:
        grouping = self._groupings.get(handler.name)
        return grouping is not None and grouping.captured

    async def _call_in_thread(self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]) -> Ran:
        limit_s = handler.timeout_s or self._timeout_s
        causes, session = self._names_causes(handler), self._sessions_lost

        def owned() -> bool:
            return session == self._sessions_lost

        contexts = self._contexts

        def call() -> Ran:
            if handler.transactional:
                calls = [partial(call_handler_here, handler, contexts, part) for part in _calls(handler, given)]
                return self._transactions.run_in_thread(changes, calls, causes=causes, owned=owned)
            return Ran(call_handler_here(handler, contexts, given))

        def overran() -> None:
            self._error_policy.count(handler, "timeout")
            log.error(
                "handler %s is still running after %g s on change %s of %s; a thread cannot be stopped, so its key"
                " is held until it returns",
                handler.name, limit_s, changes[0].id, changes[0].entity_type,
            )  # fmt: skip

        job = self._jobs[changes[0].seq] = self._threads.submit(call, limit_s, overran)
        try:
            return cast("Ran", await job.outcome())
        finally:
            del self._jobs[changes[0].seq]


def _is_away(outcome: Outcome) -> bool:
    return type(outcome) is Waiting and not outcome.counted


def _calls(handler: Handler, given: Sequence[Change]) -> list[Sequence[Change]]:
    """What each call of the handler gets: a batch all at once."""
    return [given] if handler.batch else [[change] for change in given]


def _call_with_model(function: Callable[..., Any], adapter: TypeAdapter[Any], change: Change) -> Any:
    return function(_with_model(adapter, change))


def _with_model(adapter: TypeAdapter[Any], change: Change) -> Change:
    new = None if change.new is None else adapter.validate_python(change.new)
    old = None if change.old is None else adapter.validate_python(change.old)
    return replace(change, new=new, old=old)
