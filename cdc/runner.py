"""The life of one handler call: resolve, validate, run under its time limit, judge.

    change(s) ──> handler? ──no──> Skipped
                    │ yes
                  model? ──does not fit──> Dead
                    │
                  call ── returns ───────────────> Processed; Committed by a transactional handler
                       ├─ raises Discard ────────> Discarded
                       ├─ raises Retry, fails ───> Waiting, or Dead after the last attempt
                       ├─ fate not known here ───> AskTheTableError: no outcome, the key is read anew
                       └─ cut off by a stop ─────> CancelledError: no outcome, no attempt counted

A batch goes the same way as one call. Of what it raises, ``Failed`` names the changes it is about; ``Retry``,
``Discard`` and the time limit are about all of them. Any other error is the fault of one of them, and nobody knows of
which: so they are called one by one, at once, and a key ends where one of its changes failed.

A handler in a thread cannot be stopped. When it overruns its limit that is reported at once, and the change stays
running, its key shut, until the thread returns; then what it did decides: a return is a return, however late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from cdc import probe
from cdc.errors import Discard, Failed, Retry
from cdc.metrics import NO_HANDLER, Metrics
from cdc.model import Change, Committed, Dead, Discarded, Key, Outcome, Processed, Skipped, Waiting, holds_its_key
from cdc.routing import Handler, Router
from cdc.threads import Threads
from cdc.transactions import AskTheTableError, EndedTransactionError, Errors, Transactions
from cdc.verdict import OverrunError, Verdict

log = logging.getLogger("cdc.handlers")

_NONE: Errors = {}
_ABOUT_ALL = (Retry, Discard, OverrunError, EndedTransactionError)
"""What a batch raises that is not the fault of one of its changes."""


_PROCESSED = Processed()
_LABELS: dict[type[Outcome], str] = {
    Processed: "processed",
    Committed: "processed",
    Skipped: "skipped",
    Discarded: "discarded",
    Waiting: "retried",
    Dead: "dead",
}


class Runner:
    """``timeout_s`` holds where a handler names none of its own."""

    def __init__(
        self,
        router: Router,
        *,
        verdict: Verdict,
        timeout_s: float | None,
        threads: Threads,
        transactions: Transactions,
        metrics: Metrics,
    ) -> None:
        self._router = router
        self._verdict = verdict
        self._timeout_s = timeout_s
        self._threads = threads
        self._transactions = transactions
        self._metrics = metrics
        handlers = set(router.handlers.values())
        self._durations = {h.name: metrics.handler_duration.labels(h.name) for h in handlers}
        self._adapters = {h.name: TypeAdapter(h.model) for h in handlers if h.model is not None}

    def handler(self, change: Change) -> Handler | None:
        return self._router.match(change.entity_type, change.operation)

    def fenced(self, change: Change) -> bool:
        """Whether the change is marked by its handler's own transaction; ``Lanes`` then waits for those before it."""
        handler = self.handler(change)
        return handler is not None and handler.transactional

    def in_thread(self, change: Change) -> bool:
        """Whether the change's handler, once started, can be cut off no more."""
        handler = self.handler(change)
        return handler is not None and not handler.is_async

    def interrupted(self, change: Change) -> None:
        """The call was cut off."""
        if handler := self.handler(change):
            self._metrics.handled(change.entity_type, handler.name, "interrupted")

    async def run(self, handler: Handler | None, changes: Sequence[Change]) -> dict[Change, Outcome]:
        """One attempt at the handler's changes: one, or a batch. A change may have no outcome: not tried.

        Only a cancellation and AskTheTableError leave as exceptions: there is no outcome at all then.
        """
        if handler is None:
            for change in changes:
                self._metrics.handled(change.entity_type, NO_HANDLER, "skipped")
            return dict.fromkeys(changes, Skipped())
        probe.here("run.before_handler")
        outcomes: dict[Change, Outcome] = {}
        given = changes
        if adapter := self._adapters.get(handler.name):
            changes, given = self._validate(handler, adapter, changes, outcomes)
        if changes:
            clock = asyncio.get_running_loop().time
            started = clock()
            outcomes |= await self._attempt(handler, changes, given)
            self._durations[handler.name].observe(clock() - started)
        for change, outcome in outcomes.items():
            self._metrics.handled(change.entity_type, handler.name, _LABELS[type(outcome)])
        probe.here("run.after_handler")
        return outcomes

    def _validate(
        self, handler: Handler, adapter: TypeAdapter[Any], changes: Sequence[Change], outcomes: dict[Change, Outcome]
    ) -> tuple[list[Change], list[Change]]:
        """The changes that fit, as they are and as the handler gets them; of the others the outcome."""
        fitting: list[Change] = []
        given: list[Change] = []
        for change in changes:
            try:
                given.append(_with_model(adapter, change))
                fitting.append(change)
            except ValidationError as error:
                outcomes[change] = self._verdict.on(handler, change, error)
        return fitting, given

    async def _attempt(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]
    ) -> dict[Change, Outcome]:
        marked_at: datetime | None = None
        try:
            marked_at, errors = await self._call(handler, changes, given)
        except AskTheTableError:
            raise
        except asyncio.CancelledError as cancelled:
            if _being_cancelled():
                raise
            errors = {change.seq: cancelled for change in changes}
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever a handler raises is that change's failure
            if len(changes) > 1 and not isinstance(error, _ABOUT_ALL):
                return await self._one_by_one(handler, changes, given)
            errors = {change.seq: error for change in changes}
        done: Outcome = Committed(marked_at) if marked_at else _PROCESSED
        if not errors:
            return dict.fromkeys(changes, done)
        return {
            change: self._verdict.on(handler, change, errors[change.seq]) if change.seq in errors else done
            for change in changes
        }

    async def _one_by_one(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]
    ) -> dict[Change, Outcome]:
        outcomes: dict[Change, Outcome] = {}
        held: set[Key] = set()
        for change, one in zip(changes, given, strict=True):
            if change.key not in held:
                outcomes |= await self._attempt(handler, [change], [one])
                if holds_its_key(outcomes[change]):
                    held.add(change.key)
        return outcomes

    async def _call(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change]
    ) -> tuple[datetime | None, Errors]:
        """When a transactional handler's changes were marked, and which ones of a batch failed by themselves."""
        limit_s = handler.timeout_s or self._timeout_s
        if not handler.is_async:
            return await self._call_in_thread(handler, changes, given, limit_s)
        try:
            async with asyncio.timeout(limit_s) as limit:
                if handler.transactional:
                    return await self._transactions.run(changes, lambda c: _on_loop(handler, given, connection=c))
                return None, await _on_loop(handler, given)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the handler's own
            raise OverrunError(f"took longer than {limit_s:g} s") from error

    async def _call_in_thread(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change], limit_s: float | None
    ) -> tuple[datetime | None, Errors]:
        def call() -> tuple[datetime | None, Errors]:
            if handler.transactional:
                return self._transactions.run_in_thread(changes, lambda c: _in_thread(handler, given, connection=c))
            return None, _in_thread(handler, given)

        job = self._threads.submit(call)
        try:
            if not await job.returns_within(limit_s):
                self._verdict.count(handler, "timeout")
                log.error(
                    "handler %s is still running after %g s on change %s of %s; a thread cannot be stopped, so its key"
                    " is held until it returns",
                    handler.name, limit_s, changes[0].id, changes[0].entity_type,
                )  # fmt: skip
            return cast("tuple[datetime | None, Errors]", await job.future)
        except asyncio.CancelledError:
            job.future.cancel()  # nobody will ask for the answer
            raise


async def _on_loop(handler: Handler, given: Sequence[Change], **connection: Any) -> Errors:
    try:
        await handler.call(given, **connection)
    except Failed as failed:
        return failed.errors
    return _NONE


def _in_thread(handler: Handler, given: Sequence[Change], **connection: Any) -> Errors:
    try:
        handler.call(given, **connection)
    except Failed as failed:
        return failed.errors
    return _NONE


def _with_model(adapter: TypeAdapter[Any], change: Change) -> Change:
    new = None if change.new is None else adapter.validate_python(change.new)
    old = None if change.old is None else adapter.validate_python(change.old)
    return replace(change, new=new, old=old)


def _being_cancelled() -> bool:
    """Whether somebody cancels this task, as against a handler that raised CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
