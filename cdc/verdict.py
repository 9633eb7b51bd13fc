"""What a handler's error means for its change: again later, dead, or nothing to do. Counted, logged, told to hooks."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from pydantic import ValidationError

from cdc.errors import Discard, Retry
from cdc.hooks import Hooks, where
from cdc.metrics import Metrics
from cdc.model import Change, Dead, Discarded, Outcome, Waiting
from cdc.retry import Policy, delay_s
from cdc.routing import Handler
from cdc.transactions import EndedTransactionError

log = logging.getLogger("cdc.handlers")

_ERROR_LENGTH_MAX = 2_000
"""Of last_error: an error text may quote payload, and must not outgrow the row it is about."""


class OverrunError(Exception):
    """The handler's time limit passed."""


class Verdict:
    """``policy`` holds where a handler names no attempts of its own; ``dice`` draws the jitter."""

    def __init__(
        self,
        handlers: Iterable[Handler],
        policy: Policy,
        *,
        hooks: Hooks,
        metrics: Metrics,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._policies = {h.name: replace(policy, max_attempts=h.max_attempts) for h in handlers if h.max_attempts}
        self._hooks = hooks
        self._metrics = metrics
        self._dice = dice

    def on(self, handler: Handler, change: Change, error: BaseException) -> Outcome:
        """The outcome of an attempt that raised ``error``."""
        if isinstance(error, Discard):
            return Discarded(_cut(str(error)))
        if kind := _kind(error):
            self.count(handler, kind)
        self._hooks.failed(change, error)
        policy = self._policies.get(handler.name, self._policy)
        wait_s = delay_s(policy, change.attempt, self._dice(), error.after if isinstance(error, Retry) else None)
        # What does not fit will not fit the next time; what was committed without its mark would be done twice.
        if wait_s is None or isinstance(error, ValidationError | EndedTransactionError):
            log.error(
                "handler %s: %s on change %s of %s, attempt %d: now a dead letter; its last_error says more",
                handler.name, _told(error), change.id, change.entity_type, change.attempt,
            )  # fmt: skip
            return Dead(_cut(_text(handler, error)), handler.pauses)
        log.log(
            logging.WARNING if kind else logging.INFO,
            "handler %s: %s on change %s of %s, attempt %d of %d; again in %.1f s",
            handler.name, _told(error), change.id, change.entity_type, change.attempt, policy.max_attempts, wait_s,
        )  # fmt: skip
        return Waiting(wait_s, _cut(_text(handler, error)))

    def count(self, handler: Handler, kind: str) -> None:
        """One of metrics.ERROR_KINDS."""
        self._metrics.handler_errors.labels(handler.name, kind).inc()


def _kind(error: BaseException) -> str | None:
    """For the metric; None: a deliberate Retry is not an error."""
    match error:
        case Retry():
            return None
        case OverrunError():
            return "timeout"
        case ValidationError():
            return "validation"
    return "exception"


def _told(error: BaseException) -> str:
    """What a log line may say of it."""
    match error:
        case OverrunError() | EndedTransactionError():
            return str(error)
        case ValidationError():
            return "the row does not fit the model"
        case Retry():
            return "asked for another try"
    return where(error)


def _text(handler: Handler, error: BaseException) -> str:
    """For last_error. A misfit tells where and why, without the values: they are the row's content, and stand in it."""
    match error:
        case Retry() | OverrunError() | EndedTransactionError():
            return str(error)
        case ValidationError():
            faults = error.errors(include_input=False, include_url=False, include_context=False)
            told = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}" for fault in faults)
            return f"does not fit {getattr(handler.model, '__name__', handler.model)}: {told}"
    return f"{type(error).__name__}: {error}"


def _cut(text: str) -> str:
    # PostgreSQL's text has no NUL; an error text with one would make the settle fail, and with it the whole batch.
    clean = text.replace("\0", "\\0").encode("utf-8", "replace").decode()
    return clean if len(clean) <= _ERROR_LENGTH_MAX else f"{clean[: _ERROR_LENGTH_MAX - 1]}…"
