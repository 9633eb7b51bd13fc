"""The life of one handler call: resolve, validate, run under its time limit, classify.

    change ──> handler? ──no──> Skipped
                 │ yes
               model? ──does not fit──> Dead
                 │
               call ── returns ───────────────> Processed
                    ├─ raises Discard ────────> Discarded
                    ├─ raises Retry, fails ───> Waiting, or Dead after the last attempt
                    └─ cut off by a stop ─────> CancelledError: no outcome, no attempt counted

A handler in a thread cannot be stopped. When it overruns its limit that is reported at once, and the change stays
running, its key shut, until the thread returns; then what it did decides: a return is a return, however late.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cdc import probe
from cdc.errors import Discard, Retry
from cdc.hooks import Hooks, where
from cdc.metrics import NO_HANDLER, Metrics
from cdc.model import Change, Dead, Discarded, Outcome, Processed, Skipped, Waiting
from cdc.retry import Policy, delay_s
from cdc.routing import Handler, Router
from cdc.threads import Threads

log = logging.getLogger("cdc.handlers")

_ERROR_LENGTH_MAX = 2_000
"""Of last_error: an error text may quote payload, and must not outgrow the row it is about."""


class Runner:
    """``policy`` and ``timeout_s`` hold where a handler names none of its own; ``dice`` draws the jitter."""

    def __init__(
        self,
        router: Router,
        *,
        policy: Policy,
        timeout_s: float | None,
        threads: Threads,
        hooks: Hooks,
        metrics: Metrics,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._router = router
        self._policy = policy
        self._timeout_s = timeout_s
        self._threads = threads
        self._hooks = hooks
        self._metrics = metrics
        self._dice = dice
        handlers = set(router.handlers.values())
        self._durations = {h.name: metrics.handler_duration.labels(h.name) for h in handlers}
        self._adapters = {h.name: TypeAdapter(h.model) for h in handlers if h.model is not None}
        self._policies = {h.name: replace(policy, max_attempts=h.max_attempts) for h in handlers if h.max_attempts}

    def in_thread(self, change: Change) -> bool:
        """Whether the change's handler, once started, can be cut off no more."""
        handler = self._router.match(change.entity_type, change.operation)
        return handler is not None and not handler.is_async

    def interrupted(self, change: Change) -> None:
        """The call was cut off."""
        if handler := self._router.match(change.entity_type, change.operation):
            self._metrics.handled(change.entity_type, handler.name, "interrupted")

    async def run(self, change: Change) -> Outcome:
        """One attempt. Only a cancellation leaves as an exception."""
        handler = self._router.match(change.entity_type, change.operation)
        if handler is None:
            self._metrics.handled(change.entity_type, NO_HANDLER, "skipped")
            return Skipped()
        probe.here("run.before_handler")
        started = asyncio.get_running_loop().time()
        outcome = await self._attempt(handler, change)
        self._durations[handler.name].observe(asyncio.get_running_loop().time() - started)
        self._metrics.handled(change.entity_type, handler.name, _label(outcome))
        probe.here("run.after_handler")
        return outcome

    async def _attempt(self, handler: Handler, change: Change) -> Outcome:
        given = change
        if adapter := self._adapters.get(handler.name):
            try:
                given = _validated(adapter, change)
            except ValidationError as error:
                self._count_error(handler, "validation")
                return self._dead(handler, change, error, _validation_text(handler, error))
        try:
            await self._call(handler, given)
        except Discard as discard:
            return Discarded(_cut(str(discard)))
        except asyncio.CancelledError as cancelled:
            if _being_cancelled():
                raise
            return self._failed(handler, change, cancelled)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever a handler raises is that change's failure
            return self._failed(handler, change, error)
        return Processed()

    async def _call(self, handler: Handler, change: Change) -> None:
        limit_s = handler.timeout_s or self._timeout_s
        if not handler.is_async:
            await self._call_in_thread(handler, change, limit_s)
        elif limit_s is None:
            await handler.function(change)
        else:
            try:
                async with asyncio.timeout(limit_s) as limit:
                    await handler.function(change)
            except TimeoutError as error:
                if not limit.expired():
                    raise  # the handler's own
                raise _OverrunError(f"took longer than {limit_s:g} s") from error

    async def _call_in_thread(self, handler: Handler, change: Change, limit_s: float | None) -> None:
        job = self._threads.submit(functools.partial(handler.function, change))
        try:
            if not await job.returns_within(limit_s):
                self._count_error(handler, "timeout")
                log.error(
                    "handler %s is still running after %g s on change %s of %s; a thread cannot be stopped, so its key"
                    " is held until it returns",
                    handler.name, limit_s, change.id, change.entity_type,
                )  # fmt: skip
            await job.future
        except asyncio.CancelledError:
            job.future.cancel()  # nobody will ask for the answer
            raise

    def _count_error(self, handler: Handler, kind: str) -> None:
        self._metrics.handler_errors.labels(handler.name, kind).inc()

    def _failed(self, handler: Handler, change: Change, error: BaseException) -> Outcome:
        deliberate = isinstance(error, Retry)
        if not deliberate:
            self._count_error(handler, "timeout" if isinstance(error, _OverrunError) else "exception")
        text = str(error) if isinstance(error, Retry | _OverrunError) else f"{type(error).__name__}: {error}"
        after_s = error.after if isinstance(error, Retry) else None
        policy = self._policies.get(handler.name, self._policy)
        wait_s = delay_s(policy, change.attempt, self._dice(), after_s)
        if wait_s is None:
            return self._dead(handler, change, error, text)
        log.log(
            logging.INFO if deliberate else logging.WARNING,
            "handler %s: %s on change %s of %s, attempt %d of %d; again in %.1f s",
            handler.name, _told(error), change.id, change.entity_type, change.attempt, policy.max_attempts, wait_s,
        )  # fmt: skip
        self._hooks.failed(change, error)
        return Waiting(wait_s, _cut(text))

    def _dead(self, handler: Handler, change: Change, error: BaseException, text: str) -> Outcome:
        log.error(
            "handler %s: %s on change %s of %s, attempt %d: now a dead letter; its last_error says more",
            handler.name, _told(error), change.id, change.entity_type, change.attempt,
        )  # fmt: skip
        self._hooks.failed(change, error)
        return Dead(_cut(text))


class _OverrunError(Exception):
    """The handler's time limit passed."""


def _told(error: BaseException) -> str:
    """What a log line may say of it."""
    match error:
        case _OverrunError():
            return str(error)
        case ValidationError():
            return "the row does not fit the model"
        case Retry():
            return "asked for another try"
    return where(error)


def _validated(adapter: TypeAdapter[Any], change: Change) -> Change:
    new = None if change.new is None else adapter.validate_python(change.new)
    old = None if change.old is None else adapter.validate_python(change.old)
    return replace(change, new=new, old=old)


def _validation_text(handler: Handler, error: ValidationError) -> str:
    """Where and why, without the values: they are the row's content, and stand in it."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    told = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}" for fault in faults)
    return f"does not fit {getattr(handler.model, '__name__', handler.model)}: {told}"


def _label(outcome: Outcome) -> str:
    match outcome:
        case Processed():
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


def _cut(text: str) -> str:
    # PostgreSQL's text has no NUL; an error text with one would make the settle fail, and with it the whole batch.
    clean = text.replace("\0", "\\0").encode("utf-8", "replace").decode()
    return clean if len(clean) <= _ERROR_LENGTH_MAX else f"{clean[: _ERROR_LENGTH_MAX - 1]}…"
