"""The life of one handler call: resolve, validate, run under its time limit, decide the outcome.

    change(s) ──> handler? ──no──> Skipped
                    │ yes
                  depth? ──too many causes──> Dead
                    │
                  filter? ──leaves it out──> Filtered; if it fails, as the call
                    │
                  model? ──does not fit──> Dead
                    │
                  call ── returns ───────────────> Processed; Committed by a transactional handler
                       ├─ raises Discard ────────> Discarded
                       ├─ raises Reject ─────────> Dead
                       ├─ raises Retry, fails ───> Waiting, or Dead after the last attempt
                       ├─ raises Snooze ─────────> Snoozed: waiting, not counted
                       ├─ raises Unavailable ────> Waiting, not counted; no outcome while the handler rests
                       ├─ outcome unknown ───────> AskTheTableError: no outcome, the key is read again
                       └─ cut off by a stop, or with the session ──> CancelledError: no outcome, no attempt counted

A batch is handled as one call. Of its errors, ``Failed`` names the changes it is about; ``Retry``, ``Snooze``,
``Unavailable``, ``Discard``, ``Reject`` and the time limit are about all of them. Any other error comes from one of the
changes, and it is unknown which: so they are called one by one, at once, and a key stops at its first failed change. If
one of these finds a dependency unavailable, the rest stay as they were.

Changes of a transactional handler may share a transaction, each with its own call. If one of these fails, all are
rolled back and run one by one as well. But if the handler has ended the transaction, it is unknown which of the
others were committed, and none of them may run again.

An overrun in a thread, and one whose cancellation the handler catches, ends nothing: its result then decides, a return
is a return, however late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from cdc.core import failpoints
from cdc.core.errors import Discard, Failed, OverrunError, Reject, Retry, Snooze, Unavailable
from cdc.core.fast_change import fast_make
from cdc.core.latest import Latest
from cdc.core.lost_transactions import LOSSES_MAX, LostCalls
from cdc.core.model import (
    OF_TABLES,
    Change,
    Committed,
    Dead,
    Discarded,
    Filtered,
    Key,
    Outcome,
    Processed,
    Skipped,
    Snoozed,
    Suspicion,
    Waiting,
)  # fmt: skip
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import Run
from cdc.core.router import Handler, Router
from cdc.engine.calls import CutOffError, begin, call_in
from cdc.engine.error_policy import ErrorPolicy, LostTooOftenError
from cdc.engine.handler_calls import HandlerCalls
from cdc.engine.thread_pool import Threads
from cdc.engine.transactions import (
    AskTheTableError,
    BlockedError,
    EndedTransactionError,
    LostTransactionError,
    Ran,
    Transactions,
)
from cdc.engine.validation import FILTERED, Validation, keep_order
from cdc.observability.metrics import NO_HANDLER, HandlerMetrics
from cdc.runtime.cancelling import is_being_cancelled

log = logging.getLogger("cdc.handlers")

_ABOUT_ALL = (Retry, Snooze, Unavailable, Discard, Reject, OverrunError, EndedTransactionError)
"""Errors of a batch that are not about a single change."""
_AT_ONCE_S = 0.005
"""Calls in a row, before the event loop goes on with other tasks."""

_CHANGE = attrgetter("change")
_PROCESSED = Processed()
_FINISHED = fast_make(Settlement)
_LABELS: dict[type[Outcome], str] = {
    Processed: "processed",
    Committed: "processed",
    Skipped: "skipped",
    Filtered: "filtered",
    Discarded: "discarded",
    Waiting: "retried",
    Snoozed: "snoozed",
    Dead: "dead",
}


class PendingCall(NamedTuple):
    """The call of a change that waits, or has failed: ``rest`` returns or raises what it does.

    ``started`` on the monotonic clock.
    """

    change: Change
    rest: Awaitable[object]
    started: float


_PENDING = fast_make(PendingCall)


class Executor:
    """``timeout_s`` holds for handlers that name none of their own. ``lost``: what its calls have lost."""

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
        self._error_policy = error_policy
        self.breakers = error_policy.breakers
        self._troubled = self.breakers.troubled
        self._metrics = metrics
        self.lost = LostCalls()
        handlers = set(router.handlers.values())
        self._validation = Validation(handlers, error_policy)
        self._inline = {handler.name: self._validation.of(handler) for handler in handlers if handler.single}
        self._calls = HandlerCalls(
            handlers, timeout_s=timeout_s, threads=threads, transactions=transactions, lost=self.lost,
            overran=partial(error_policy.count, kind="timeout"),
        )  # fmt: skip
        self.in_thread = self._calls.in_thread

    def group_limit(self, handler: Handler) -> int:
        """How many changes may share the handler's next transaction: one while its breaker is tripped."""
        return 1 if self.breakers.of[handler.name].tripped else self._calls.group_limit(handler)

    def interrupted(self, run: Run) -> None:
        """The call was cut off."""
        if run.handler:
            for change in run.changes:
                self._metrics.handled(change.entity_type, run.handler.name, "interrupted")

    def after_crash(self, handler: Handler | None, change: Change, suspicion: Suspicion) -> Outcome | None:
        """The outcome of a change whose attempts have all ended with their process; None: it may run."""
        again = suspicion is Suspicion.AGAIN
        return self._error_policy.after_crash(handler, change, again=again) if handler else None

    def after_losses(self, handler: Handler | None, change: Change) -> Outcome | None:
        """The outcome of a suspect that lost its transaction or session too often; None: it may run."""
        times = self.lost.times(change)
        if times < LOSSES_MAX or handler is None:
            return None
        self.lost.forget([change])
        why = "the connection was lost" if handler.transactional else "the consumer's session was lost"
        return self._error_policy.on(handler, change, LostTooOftenError(handler, times, LostTransactionError(why)))

    def decide(self, handler: Handler | None, change: Change, error: BaseException) -> Outcome:
        """The outcome of a change that got none because of ``error``."""
        return self._error_policy.on(handler, change, error) if handler else Skipped()

    def _unwanted(self, change: Change) -> Outcome:
        """For an operation that no handler of the type names, as is usual; or for an ignored type."""
        if self._router.ignores(change.entity_type):
            return Discarded("no handler wants it, for the router ignores its type")
        if self._router.scope.has(change.entity_type):
            if change.operation in OF_TABLES:
                log.info("a %s of the type %s is skipped: no handler names it", change.operation, change.entity_type)
            return Skipped()
        return Discarded("no handler wants its type, and unhandled is discard")

    async def run(
        self, handler: Handler | None, changes: Sequence[Change], latest: Latest | None = None
    ) -> dict[Change, Outcome]:
        """One attempt at the handler's changes: one, or a batch. A change may have no outcome: not tried.

        ``latest``: what the call for the only change stands for.
        Raises only a cancellation and AskTheTableError: there is no outcome at all then.
        """
        if handler is None:
            outcomes = {change: self._unwanted(change) for change in changes}
            for change, outcome in outcomes.items():
                self._metrics.handled(change.entity_type, NO_HANDLER, _LABELS[type(outcome)])
            return outcomes
        failpoints.here("run.before_handler")
        outcomes = {}
        batch = changes
        changes, given = self._validation.split(handler, changes, outcomes, self._calls.contexts, latest)
        if changes:
            started = time.monotonic()
            tried = await self._attempt(handler, changes, given, latest)
            outcomes |= await self._one_by_one(handler, changes, given) if tried is None else tried
            if handler.filter and len(batch) > 1:
                keep_order(batch, outcomes)
            calls = 1 if handler.batch else len(changes)
            self._metrics.duration_of(handler.name).observe_times((time.monotonic() - started) / calls, calls)
        self._count(handler, outcomes)
        if latest and latest.later:
            outcomes = self._for_all(handler, outcomes, latest)
        if self._troubled and any(isinstance(outcome, Processed | Committed) for outcome in outcomes.values()):
            self.breakers.succeeded(handler.name)
        failpoints.here("run.after_handler")
        return outcomes

    def _for_all(self, handler: Handler, outcomes: dict[Change, Outcome], latest: Latest) -> dict[Change, Outcome]:
        """What the outcome of the call means for all the changes that it stood for."""
        for change, outcome in outcomes.items():
            if not isinstance(outcome, Waiting):
                self._metrics.handled(change.entity_type, handler.name, "coalesced", latest.change.coalesced - 1)
        return {change: latest.outcome(outcome) for change, outcome in outcomes.items()}

    def run_inline(
        self, handler: Handler | None, changes: deque[Change], task: asyncio.Task[Any]
    ) -> tuple[list[Settlement], PendingCall | None]:
        """Call a handler for one change after the other, for as long as the calls return without waiting.

        The steps of a task cost more than many handlers; these calls share them. A call in a thread is begun only.
        Takes the changes it calls from ``changes``: none if their call is not that simple. Returns what has ended, and
        the call that has not, for ``resume``. Stops after a call that has cancelled ``task``, the current one
        (``cancelling.disregard``).
        """
        done: list[Settlement] = []
        if handler is None or handler.name not in self._inline:
            return done, None
        function, prepare = handler.function, self._inline[handler.name]
        seconds: list[float] = []
        unfinished = None
        suspects, contexts = self.lost.suspects, self._calls.contexts
        began = now = time.monotonic()
        while changes and now - began < _AT_ONCE_S:
            change, started = changes[0], now
            if change.crashed or change.chain or (suspects and change.id in suspects):
                break
            changes.popleft()
            failpoints.here("run.before_handler")
            try:
                given = call_in(contexts, prepare, change) if prepare else change
                if given is None:
                    rest = None
                elif handler.is_async:
                    rest = begin(contexts, function, (given,))
                else:
                    rest = self._calls.begin_in_thread(handler, change, given)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised where the call is awaited
                unfinished = PendingCall(change, _raise(error), started)
                break
            if rest:
                unfinished = _PENDING((change, rest, started))
                break
            done.append(_FINISHED((change, FILTERED if given is None else _PROCESSED)))
            now = time.monotonic()
            if given is not None:
                seconds.append(now - started)
            if task.cancelling():
                break
        if done:
            self.lost.forget(list(map(_CHANGE, done)))
            self._count_inline(handler, done[0].change.entity_type, seconds, len(done) - len(seconds))
            failpoints.here("run.after_handler")
        return done, unfinished

    def _count_inline(self, handler: Handler, entity_type: str, seconds: list[float], filtered: int) -> None:
        if filtered:
            self._metrics.handled(entity_type, handler.name, "filtered", filtered)
        if seconds:
            self._metrics.duration_of(handler.name).observe_each(seconds)
            self._metrics.handled(entity_type, handler.name, "processed", len(seconds))
            if self._troubled:
                self.breakers.succeeded(handler.name)

    async def resume(self, handler: Handler, unfinished: PendingCall) -> Outcome | None:
        """The rest of an attempt that was begun. Raises only a cancellation. None: as in ``run``."""
        change, rest, started = unfinished
        failure: BaseException | None = None
        session = self.lost.session
        try:
            if handler.is_async:
                await self._calls.within_limit(handler, [change], rest, started)
            else:
                await rest
        except Failed as failed:
            failure = failed.errors.get(change.seq)
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                if handler.is_async:  # a call in a thread goes on
                    self.lost.call_ended([change], session)
                raise
            failure = error
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is that change's failure
            failure = error
        self.lost.call_ended([change], session)
        took_s = time.monotonic() - started
        self._metrics.duration_of(handler.name).observe(took_s)
        outcome: Outcome | None = _PROCESSED
        if failure is not None:
            outcome = self._error_policy.of_call(handler, [change], {change.seq: failure}, took_s).get(change)
        elif self._troubled:
            self.breakers.succeeded(handler.name)
        if outcome is _PROCESSED:
            self._metrics.handled(change.entity_type, handler.name, "processed")
        elif outcome is not None:
            self._count(handler, {change: outcome})
        failpoints.here("run.after_handler")
        return outcome

    def _count(self, handler: Handler, outcomes: Mapping[Change, Outcome]) -> None:
        if len(outcomes) == 1:  # most are
            [(change, outcome)] = outcomes.items()
            if type(outcome) is not Waiting or outcome.counted:
                self._metrics.handled(change.entity_type, handler.name, _LABELS[type(outcome)])
            return
        alike: dict[tuple[str, str], int] = {}
        for change, outcome in outcomes.items():
            if type(outcome) is not Waiting or outcome.counted:  # the others are counted with their call
                kind = change.entity_type, _LABELS[type(outcome)]
                alike[kind] = alike.get(kind, 0) + 1
        for (entity_type, label), changes in alike.items():
            self._metrics.handled(entity_type, handler.name, label, changes)

    async def _attempt(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change], latest: Latest | None = None
    ) -> dict[Change, Outcome] | None:
        """One call, and what it means. None: one of several changes failed, and it is unknown which."""
        started, session = time.monotonic(), self.lost.session
        try:
            ran = await self._calls.run(handler, changes, given, latest)
        except LostTransactionError as lost:
            return self._lost(handler, changes, lost)
        except AskTheTableError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
                if isinstance(error, CutOffError):
                    self.lost.call_ended(changes, session)
                raise
            if len(changes) > 1 and not isinstance(error, _ABOUT_ALL if handler.batch else EndedTransactionError):
                self._calls.rolled_back(handler)
                return None
            ran = Ran({change.seq: error for change in changes})
        self.lost.call_ended(changes, session)
        done: Outcome = Committed(ran.at) if ran.at else _PROCESSED
        if not ran.errors:
            return dict.fromkeys(changes, done)
        failed = self._error_policy.of_call(handler, changes, ran.errors, time.monotonic() - started, latest)
        return {change: done for change in changes if change.seq not in ran.errors} | failed

    def _lost(self, handler: Handler, changes: Sequence[Change], lost: LostTransactionError) -> dict[Change, Outcome]:
        """Raise ``lost`` again, unless it is an obstacle that does not end.

        A change that lost its connection too often is decided about when it is to run again: the session may be lost
        as well, and the outcome with it.
        """
        if not self.lost.transaction_lost(changes, blocked=isinstance(lost, BlockedError)):
            lost.pause_s = 0.0  # it pauses before it runs again
            raise lost
        self.lost.forget(changes)
        return {change: self._error_policy.on(handler, change, lost.cause) for change in changes}

    async def _one_by_one(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]
    ) -> dict[Change, Outcome]:
        failpoints.here("run.before_one_by_one")
        outcomes: dict[Change, Outcome] = {}
        held: set[Key] = set()
        session = self.lost.session
        for change, one in zip(changes, given, strict=True):
            if session != self.lost.session:
                break  # a call in a thread could not be cut off; the next must not start
            if change.key not in held:
                outcomes |= await self._attempt(handler, [change], [one]) or {}
                outcome = outcomes.get(change)
                if outcome is None or _is_away(outcome):
                    break  # the others need the same dependency, and each call might take long to find it unavailable
                # The settle marks what a transactional handler leaves to it, and its successor would not wait for that.
                if outcome.blocks_key or (handler.transactional and not isinstance(outcome, Committed)):
                    held.add(change.key)
        return outcomes


def _is_away(outcome: Outcome) -> bool:
    return type(outcome) is Waiting and not outcome.counted


async def _raise(error: BaseException) -> object:
    raise error
