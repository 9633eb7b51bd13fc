"""What a handler's error means for its change: again later, dead, or nothing to do. Counted, logged, told to hooks."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import UUID

from pydantic import ValidationError

from cdc.calls import EscapedError
from cdc.errors import Discard, Reject, Retry, ToldError
from cdc.frames import Trace, class_name, trace
from cdc.hooks import Hooks
from cdc.logs import in_message
from cdc.metrics import Metrics
from cdc.model import Change, Dead, Discarded, Outcome, UnreadableDocumentError, Waiting
from cdc.retry import Policy, delay_s
from cdc.routing import Handler
from cdc.transactions import EndedTransactionError, LostTransactionError

log = logging.getLogger("cdc.handlers")

_ERROR_LENGTH_MAX = 2_000
"""Of last_error, without the frames: an error text may quote payload, and must not outgrow the row it is about."""


class CrashedError(ToldError):
    """The process ended while the handler ran, which the handler's own process cannot tell any more."""

    kind = "crash"

    def __init__(self, handler: Handler, times: int) -> None:
        super().__init__(
            f"the consumer's process ended while the handler {handler.name} ran for this change, {times} times:"
            " os._exit, a crash in C code, memory that ran out, kill -9"
        )


class LostTooOftenError(ToldError):
    """The change's transaction, or the consumer's session, was lost again and again while its handler ran."""

    kind = "lost"

    def __init__(self, handler: Handler, times: int, lost: LostTransactionError) -> None:
        super().__init__(
            f"{lost} {times} times in a row",
            f"{lost} while the handler {handler.name} ran for this change, {times} times in a row: it closes or ends"
            " its connection, crashes the server's process, or overruns a time limit of the server; the last time:"
            f" {type(lost.cause).__name__}",
        )


class TooDeepError(ToldError):
    """The change has more causes than a consumer follows: it is not handled at all."""

    kind = "depth"

    def __init__(self, change: Change) -> None:
        told = f"a chain of {change.depth + 1} changes, deeper than max_chain_depth allows"
        super().__init__(told, f"{told}; does a handler write what it listens to? {change.chain}")


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that failed, as the log tells it: ``told`` is class and place, and nothing of the row.

    ``at`` in seconds of the epoch. ``again_in_s`` is None where the change is now a dead letter.
    """

    at: float
    handler: str
    told: str
    entity_type: str
    id: UUID
    attempt: int
    again_in_s: float | None


class Verdict:
    """``policy`` holds where a handler names no attempts of its own; ``dice`` draws the jitter.

    ``failed`` hears of each failure.
    """

    def __init__(
        self,
        handlers: Iterable[Handler],
        policy: Policy,
        *,
        hooks: Hooks,
        metrics: Metrics,
        failed: Callable[[Failure], None] | None = None,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._policies = {h.name: replace(policy, max_attempts=h.max_attempts) for h in handlers if h.max_attempts}
        self._hooks = hooks
        self._metrics = metrics
        self._failed = failed
        self._dice = dice

    def on(self, handler: Handler, change: Change, error: BaseException, took_s: float | None = None) -> Outcome:
        """The outcome of an attempt that raised ``error`` after so long; None: it was not called."""
        if isinstance(error, EscapedError):
            error = error.error
        read = _read(handler, error)
        if read.discards:
            return Discarded(read.text)
        if read.kind:
            self.count(handler, read.kind)
        self._hooks.failed(change, error)
        policy = self._policies.get(handler.name, self._policy)
        wait_s = None if read.final else delay_s(policy, change.attempt, self._dice(), read.after_s)
        if read.kind and self._failed:
            self._failed(
                Failure(time.time(), handler.name, read.told, change.entity_type, change.id, change.attempt, wait_s)
            )
        fields = _fields(handler, change, change.attempt, "dead" if wait_s is None else "retried", read.trace)
        fields |= {"duration_s": took_s if took_s is None else round(took_s, 6), "again_in_s": wait_s}
        if wait_s is None:
            log.error(
                "handler %s: %s on change %s of %s, attempt %d: now a dead letter; its last_error says more",
                handler.name, read.told, change.id, change.entity_type, change.attempt, extra=in_message(fields),
            )  # fmt: skip
            return Dead(read.text, handler.pauses)
        log.log(
            logging.WARNING if read.kind else logging.INFO,
            "handler %s: %s on change %s of %s, attempt %d of %d; again in %.1f s",
            handler.name, read.told, change.id, change.entity_type, change.attempt, policy.max_attempts, wait_s,
            extra=in_message(fields),
        )  # fmt: skip
        return Waiting(wait_s, read.text)

    def after_crash(self, handler: Handler, change: Change) -> Outcome | None:
        """The process of the attempt before has ended. None: there are attempts left."""
        policy = self._policies.get(handler.name, self._policy)
        if change.attempt > policy.max_attempts:
            return self.on(handler, change, CrashedError(handler, policy.max_attempts))
        self.count(handler, "crash")
        log.info(
            "handler %s: the process ended while change %s of %s was running; attempt %d of %d is made alone",
            handler.name, change.id, change.entity_type, change.attempt, policy.max_attempts,
            extra=in_message(_fields(handler, change, change.attempt - 1, "retried", Trace(CrashedError.__name__))),
        )  # fmt: skip
        return None

    def count(self, handler: Handler, kind: str) -> None:
        """One of metrics.ERROR_KINDS."""
        self._metrics.handler_errors.labels(handler.name, kind).inc()


class _Read(NamedTuple):
    """What is to be known of an error.

    ``kind``: for the metric; None: a deliberate Retry is not an error. ``told``: for a log. ``text``: for last_error.
    ``trace``: where it came from.
    ``final``: no other attempt can succeed. ``after_s``: what the handler asks for.
    """

    kind: str | None
    told: str
    text: str
    trace: Trace
    final: bool = False
    after_s: float | None = None
    discards: bool = False


_FINAL = (
    Reject, ValidationError, UnreadableDocumentError, EndedTransactionError, TooDeepError, LostTooOftenError
)  # fmt: skip
"""What does not fit, cannot be read, or is too deep, will be so the next time; what was committed without its mark
would be done twice; and of what was lost the attempts are used up."""


_DELIBERATE = (Reject, Retry, ToldError, EndedTransactionError)
"""What says itself what it is about: last_error has it without the frames."""


def _read(handler: Handler, error: BaseException) -> _Read:
    """Looks at the error once: its class is the handler's, and any of its methods may raise."""
    found = trace(error, handler.function)
    try:
        if isinstance(error, Discard):
            return _Read(None, "", _cut(str(error)), found, discards=True)
        after_s = _seconds(error.after) if isinstance(error, Retry) else None
        text = _cut(_text(handler, error))
        if not isinstance(error, _DELIBERATE) and (found.own or not isinstance(error, ValidationError)):
            text += _lines(found)
        return _Read(_kind(error), _told(error, found), text, found, isinstance(error, _FINAL), after_s)
    except BaseException as unreadable:  # noqa: BLE001 - what a method of the error raises must not take its outcome away
        text = f"{found.error}, and its text cannot be read: {class_name(unreadable)}"
        return _Read("exception", str(found), _cut(text) + _lines(found), found)


def _lines(found: Trace) -> str:
    """The frames as last_error has them, below class and text. Frames have no line breaks."""
    return "".join(f"\n  {frame}" for frame in found.frames)


def _fields(handler: Handler, change: Change, attempt: int, outcome: str, found: Trace) -> dict[str, object]:
    """What a log in JSON has of an attempt beside the message. The key is an identifier, and no more of the row."""
    return {
        "event": "attempt",
        "change_id": str(change.id),
        "seq": change.seq,
        "entity_type": change.entity_type,
        "entity_id": change.entity_id,
        "handler": handler.name,
        "attempt": attempt,
        "outcome": outcome,
        "error": found.error,
        "place": found.place,
        "frames": found.frames,
    }


def _seconds(after: object) -> float | None:
    """None where it is none: the class checks it, and may be derived from."""
    return float(after) if isinstance(after, int | float) and 0 <= after < float("inf") else None


def _kind(error: BaseException) -> str | None:
    match error:
        case ToldError():
            return error.kind
        case Retry():
            return None
        case Reject():
            return "rejected"
        case ValidationError() | UnreadableDocumentError():
            return "validation"
    return "exception"


def _told(error: BaseException, found: Trace) -> str:
    """What a log line may say of it."""
    match error:
        case ToldError():
            return error.told
        case EndedTransactionError() | UnreadableDocumentError():
            return str(error)
        case Reject():
            return "rejected it"
        case ValidationError():
            return "the row does not fit the model"
        case Retry():
            return "asked for another try"
    return str(found)


def _text(handler: Handler, error: BaseException) -> str:
    """For last_error. A misfit tells where and why, without the values: they are the row's content, and stand in it."""
    match error:
        case Reject():
            return f"rejected: {error}"
        case ToldError() | Retry() | EndedTransactionError() | UnreadableDocumentError():
            return str(error)
        case ValidationError():
            faults = error.errors(include_input=False, include_url=False, include_context=False)
            told = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}" for fault in faults)
            return f"does not fit {getattr(handler.model, '__name__', handler.model)}: {told}"
    return f"{class_name(error)}: {error}"


def _cut(text: str) -> str:
    # PostgreSQL's text has no NUL; an error text with one would make the settle fail, and with it the whole batch.
    clean = text.replace("\0", "\\0").encode("utf-8", "replace").decode()
    return clean if len(clean) <= _ERROR_LENGTH_MAX else f"{clean[: _ERROR_LENGTH_MAX - 1]}…"
