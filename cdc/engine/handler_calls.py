"""Calls of handlers: on the event loop, in a thread or in a transaction, and always under a time limit.

A handler in a thread cannot be stopped, nor can one that catches its cancellation and goes on. An overrun of its time
limit is reported, and its changes stay running until it returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

from cdc.core.fast_change import fast_make
from cdc.core.latest import Latest
from cdc.core.lost_transactions import LostCalls
from cdc.core.model import Change
from cdc.core.ready_queues import Run
from cdc.core.router import Handler
from cdc.core.transaction_batching import AdaptiveBatchSize
from cdc.engine.calls import Contexts, call_handler, call_handler_here, call_in
from cdc.engine.thread_pool import Job, Threads
from cdc.engine.timeouts import TimeLimit
from cdc.engine.transactions import MixedCausesError, Ran, Transactions

_T = TypeVar("_T")
_RUN = fast_make(Run)

log = logging.getLogger("cdc.handlers")


class HandlerCalls:
    """``timeout_s`` holds for handlers that name none of their own. ``overran``: called with the handler of a call
    that goes on beyond its limit, as nothing can end it.
    """

    def __init__(
        self,
        handlers: Iterable[Handler],
        *,
        timeout_s: float | None,
        threads: Threads,
        transactions: Transactions,
        lost: LostCalls,
        overran: Callable[[Handler], None],
    ) -> None:
        handlers = set(handlers)
        self._timeout_s = timeout_s
        self._limits = {s: TimeLimit(s, self._goes_on) for s in (timeout_s, *(h.timeout_s for h in handlers))}
        self._threads = threads
        self._transactions = transactions
        self._lost = lost
        self._overran = overran
        self._groups = {h.name: AdaptiveBatchSize(h.group) for h in handlers if h.group > 1}
        self._jobs: dict[int, Job] = {}
        """Calls in threads, by the first of their changes."""

    @cached_property
    def contexts(self) -> Contexts:
        """As they are at the first call, for all."""
        return Contexts.current_for_many()

    def group_limit(self, handler: Handler) -> int:
        """How many changes may share the handler's next transaction."""
        group = self._groups.get(handler.name)
        return group.limit if group else 1

    def in_thread(self, change: Change) -> bool:
        """Whether its handler runs in a thread, where it cannot be cut off any more."""
        job = self._jobs.get(change.seq)
        return job is not None and job.started_at is not None

    def within_limit(
        self, handler: Handler, changes: Sequence[Change], call: Awaitable[_T], started: float
    ) -> Coroutine[Any, Any, _T]:
        """Awaits a call that began at ``started``. Raises OverrunError."""
        limit = self._limits[handler.timeout_s or self._timeout_s]
        return limit.call(call, started=started, of=_RUN((handler, changes)))

    def run(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change], latest: Latest | None = None
    ) -> Coroutine[Any, Any, Ran]:
        """Call it with ``given``, which are ``changes`` as it gets them. Raises what it or its transaction raises.

        ``latest``: what the call for the only change stands for.
        """
        if group := self._groups.get(handler.name):
            return self._run_group(handler, changes, given, group)
        run = self._run if handler.is_async else self._run_in_thread
        return run(handler, changes, given, causes=False, latest=latest)

    async def _run_group(
        self, handler: Handler, changes: Sequence[Change], given: Sequence[Change], group: AdaptiveBatchSize
    ) -> Ran:
        """Calls that may share a transaction."""
        run = self._run if handler.is_async else self._run_in_thread
        try:
            ran = await run(handler, changes, given, causes=group.captured)
        except MixedCausesError:
            group.captured = True
            ran = await run(handler, changes, given, causes=True)
        group.committed(len(changes), ran.calls_s, captured=ran.captured)
        return ran

    def rolled_back(self, handler: Handler) -> None:
        """One of several changes that shared a transaction failed."""
        if group := self._groups.get(handler.name):
            group.rolled_back()

    async def _run(
        self,
        handler: Handler,
        changes: Sequence[Change],
        given: Sequence[Change],
        *,
        causes: bool,
        latest: Latest | None = None,
    ) -> Ran:
        started, task = time.monotonic(), asyncio.current_task()
        if handler.transactional:
            calls = [partial(call_handler, handler, self.contexts, part, task=task) for part in _calls(handler, given)]
            running = self._transactions.run(changes, calls, causes=causes, latest=latest)
            return await self.within_limit(handler, changes, running, started)
        call = call_handler(handler, self.contexts, given, task=task)
        return Ran(await self.within_limit(handler, changes, call, started))

    async def _run_in_thread(
        self,
        handler: Handler,
        changes: Sequence[Change],
        given: Sequence[Change],
        *,
        causes: bool,
        latest: Latest | None = None,
    ) -> Ran:
        call: Callable[[], Any] = partial(call_handler_here, handler, self.contexts, given)
        if handler.transactional:
            session = self._lost.session
            call = partial(
                self._transactions.run_in_thread, changes,
                [partial(call_handler_here, handler, self.contexts, part) for part in _calls(handler, given)],
                causes=causes, latest=latest, owned=lambda: session == self._lost.session,
            )  # fmt: skip
        ran = await self._submitted(handler, changes, call)
        return ran if handler.transactional else Ran(ran)

    def begin_in_thread(self, handler: Handler, change: Change, given: Change) -> Coroutine[Any, Any, Any]:
        """Begin the call of a handler that takes one change and nothing else. Returns the rest of it, to be awaited."""
        return self._submitted(handler, [change], partial(call_in, self.contexts, handler.function, given))

    def _submitted(
        self, handler: Handler, changes: Sequence[Change], call: Callable[[], Any]
    ) -> Coroutine[Any, Any, Any]:
        overran = partial(self._goes_on_in_thread, handler, changes)
        number = changes[0].seq
        job = self._jobs[number] = self._threads.submit(call, handler.timeout_s or self._timeout_s, overran)
        return self._rest(job, number)

    async def _rest(self, job: Job, number: int) -> Any:
        try:
            return await job.outcome()
        finally:
            del self._jobs[number]

    def _goes_on_in_thread(self, handler: Handler, changes: Sequence[Change]) -> None:
        self._overran(handler)
        log.error(
            "handler %s is still running after %g s on change %s of %s; a thread cannot be stopped, so its key"
            " is held until it returns",
            handler.name, handler.timeout_s or self._timeout_s, changes[0].id, changes[0].entity_type,
        )  # fmt: skip

    def _goes_on(self, run: Run) -> None:
        handler, changes = run
        assert handler is not None
        self._overran(handler)
        log.error(
            "handler %s goes on though its limit of %g s has passed, on change %s of %s: it caught its"
            " cancellation, so its key is held until it returns",
            handler.name, handler.timeout_s or self._timeout_s, changes[0].id, changes[0].entity_type,
        )  # fmt: skip


def _calls(handler: Handler, given: Sequence[Change]) -> list[Sequence[Change]]:
    """What each call of the handler gets: a batch all at once."""
    return [given] if handler.batch else [[change] for change in given]
