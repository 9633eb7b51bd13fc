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
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple, cast

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


class _Given(NamedTuple):
    """A change, and what the handler gets of it: with its model, if it has one."""

    change: Change
    given: Change


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

    async def run(self, changes: Sequence[Change]) -> dict[Change, Outcome]:
        """One attempt at the changes, all of one handler: one, or a batch. A change may have no outcome: not tried.

        Only a cancellation and AskTheTableError leave as exceptions: there is no outcome at all then.
        """
        handler = self.handler(changes[0])
        if handler is None:
            for change in changes:
                self._metrics.handled(change.entity_type, NO_HANDLER, "skipped")
            return dict.fromkeys(changes, Skipped())
        probe.here("run.before_handler")
        fitting, outcomes = self._validate(handler, changes)
        if fitting:
            started = asyncio.get_running_loop().time()
            outcomes |= await self._attempt(handler, fitting)
            self._durations[handler.name].observe(asyncio.get_running_loop().time() - started)
        for change, outcome in outcomes.items():
            self._metrics.handled(change.entity_type, handler.name, _label(outcome))
        probe.here("run.after_handler")
        return outcomes

    def _validate(self, handler: Handler, changes: Sequence[Change]) -> tuple[list[_Given], dict[Change, Outcome]]:
        adapter = self._adapters.get(handler.name)
        if adapter is None:
            return [_Given(change, change) for change in changes], {}
        fitting: list[_Given] = []
        outcomes: dict[Change, Outcome] = {}
        for change in changes:
            try:
                fitting.append(_Given(change, _with_model(adapter, change)))
            except ValidationError as error:
                outcomes[change] = self._verdict.on(handler, change, error)
        return fitting, outcomes

    async def _attempt(self, handler: Handler, batch: Sequence[_Given]) -> dict[Change, Outcome]:
        marked_at: datetime | None = None
        try:
            marked_at, errors = await self._call(handler, batch)
        except AskTheTableError:
            raise
        except asyncio.CancelledError as cancelled:
            if _being_cancelled():
                raise
            errors = {change.seq: cancelled for change, _ in batch}
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever a handler raises is that change's failure
            if len(batch) > 1 and not isinstance(error, _ABOUT_ALL):
                return await self._one_by_one(handler, batch)
            errors = {change.seq: error for change, _ in batch}
        done: Outcome = Committed(marked_at) if marked_at else Processed()
        return {
            change: self._verdict.on(handler, change, errors[change.seq]) if change.seq in errors else done
            for change, _ in batch
        }

    async def _one_by_one(self, handler: Handler, batch: Iterable[_Given]) -> dict[Change, Outcome]:
        outcomes: dict[Change, Outcome] = {}
        held: set[Key] = set()
        for one in batch:
            if one.change.key not in held:
                outcomes |= await self._attempt(handler, [one])
                if holds_its_key(outcomes[one.change]):
                    held.add(one.change.key)
        return outcomes

    async def _call(self, handler: Handler, batch: Sequence[_Given]) -> tuple[datetime | None, Errors]:
        """When a transactional handler's changes were marked, and which ones of a batch failed by themselves."""
        limit_s = handler.timeout_s or self._timeout_s
        if not handler.is_async:
            return await self._call_in_thread(handler, batch, limit_s)
        if limit_s is None:
            return await self._call_on_loop(handler, batch)
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await self._call_on_loop(handler, batch)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the handler's own
            raise OverrunError(f"took longer than {limit_s:g} s") from error

    async def _call_on_loop(self, handler: Handler, batch: Sequence[_Given]) -> tuple[datetime | None, Errors]:
        given = [one.given for one in batch]

        async def call(**connection: Any) -> Errors:
            try:
                await handler.call(given, **connection)
            except Failed as failed:
                return failed.errors
            return _NONE

        if handler.transactional:
            return await self._transactions.run([one.change for one in batch], lambda c: call(connection=c))
        return None, await call()

    async def _call_in_thread(
        self, handler: Handler, batch: Sequence[_Given], limit_s: float | None
    ) -> tuple[datetime | None, Errors]:
        job = self._threads.submit(self._thread_call(handler, batch))
        try:
            if not await job.returns_within(limit_s):
                self._verdict.count(handler, "timeout")
                first = batch[0].change
                log.error(
                    "handler %s is still running after %g s on change %s of %s; a thread cannot be stopped, so its key"
                    " is held until it returns",
                    handler.name, limit_s, first.id, first.entity_type,
                )  # fmt: skip
            return cast("tuple[datetime | None, Errors]", await job.future)
        except asyncio.CancelledError:
            job.future.cancel()  # nobody will ask for the answer
            raise

    def _thread_call(self, handler: Handler, batch: Sequence[_Given]) -> Callable[[], tuple[datetime | None, Errors]]:
        given = [one.given for one in batch]

        def call(**connection: Any) -> Errors:
            try:
                handler.call(given, **connection)
            except Failed as failed:
                return failed.errors
            return _NONE

        if handler.transactional:
            changes = [one.change for one in batch]
            return functools.partial(self._transactions.run_in_thread, changes, lambda c: call(connection=c))
        return lambda: (None, call())


def _with_model(adapter: TypeAdapter[Any], change: Change) -> Change:
    new = None if change.new is None else adapter.validate_python(change.new)
    old = None if change.old is None else adapter.validate_python(change.old)
    return replace(change, new=new, old=old)


def _label(outcome: Outcome) -> str:
    match outcome:
        case Processed() | Committed():
            return "processed"
        case Skipped():
            return "skipped"
        case Discarded():
            return "discarded"
        case Waiting():
            return "retried"
        case Dead():
            return "dead"


def _being_cancelled() -> bool:
    """Whether somebody cancels this task, as against a handler that raised CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
