"""What a handler's error means for its change: again later, dead, or nothing to do. Counts, logs, calls the hooks."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from pydantic import ValidationError

from cdc.core.attempts import CRASHED, FailedAttempt
from cdc.core.backoff import WAIT_MAX_S, Policy, ceiling_s, delay_s, snooze_s
from cdc.core.errors import Discard, Reject, Retry, SafeError, Snooze, Unavailable
from cdc.core.frames import Trace, class_name, trace
from cdc.core.latest import Latest
from cdc.core.lost_transactions import Losses
from cdc.core.model import SNOOZED, Change, Dead, Discarded, Outcome, Snoozed, UnreadableDocumentError, Waiting
from cdc.core.router import Handler
from cdc.engine.calls import EscapedError
from cdc.engine.circuit_breakers import CircuitBreakers
from cdc.engine.hooks import Hooks
from cdc.engine.transactions import EndedTransactionError, Errors, LostTransactionError
from cdc.observability.failures import Failure
from cdc.observability.logs import in_message
from cdc.observability.metrics import HandlerMetrics

log = logging.getLogger("cdc.handlers")

_ERROR_LENGTH_MAX = 2_000
"""Length of last_error, without the frames: an error text may quote payload, and must not outgrow its row."""


_SUMMARY_LENGTH_MAX = 300
"""Length of error_summary, in characters: the name of a class may be long."""

_CRASHES_MAX = 3
_AWAY = "unavailable"
_AWAY_CAP_S = 30.0
"""The longest wait of a change whose handler finds a dependency unavailable while its breaker is closed."""


class CrashedError(SafeError):
    """The process ended while the handler ran. That process cannot report it any more."""

    kind = CRASHED

    def __init__(self, handler: Handler, times: int) -> None:
        super().__init__(
            f"the consumer's process ended while the handler {handler.name} ran for this change, {times} times:"
            " os._exit, a crash in C code, memory that ran out, kill -9"
        )


class LostTooOftenError(SafeError):
    """The change's transaction, or the consumer's session, was lost again and again while its handler ran."""

    kind = "lost"

    def __init__(self, handler: Handler, times: int, lost: LostTransactionError) -> None:
        super().__init__(
            f"{lost} {times} times in a row",
            f"{lost} while the handler {handler.name} ran for this change, {times} times in a row: it closes or ends"
            " its connection, crashes the server's process, or overruns a time limit of the server; the last time:"
            f" {type(lost.cause).__name__}",
        )


class TooDeepError(SafeError):
    """The change has more causes than a consumer follows: it is not handled at all."""

    kind = "depth"

    def __init__(self, change: Change) -> None:
        summary = f"a chain of {change.depth + 1} changes, deeper than max_chain_depth allows"
        super().__init__(summary, f"{summary}; does a handler write what it listens to? {change.chain}")


class ErrorPolicy:
    """``policy`` holds for handlers that name no attempts of their own; ``dice`` draws the jitter.

    ``failed`` is called for each failure; ``breakers`` get the result of each call.
    """

    def __init__(
        self,
        handlers: Iterable[Handler],
        policy: Policy,
        *,
        hooks: Hooks,
        metrics: HandlerMetrics,
        breakers: CircuitBreakers,
        failed: Callable[[Failure], None] | None = None,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._policies = {h.name: replace(policy, max_attempts=h.max_attempts) for h in handlers if h.max_attempts}
        self._hooks = hooks
        self._metrics = metrics
        self.breakers = breakers
        self._away = Losses()
        self._failed = failed
        self._dice = dice

    def on(
        self,
        handler: Handler,
        change: Change,
        error: BaseException,
        took_s: float | None = None,
        latest: Latest | None = None,
    ) -> Outcome:
        """The outcome of an attempt that raised ``error`` after ``took_s`` seconds; None: it was not called.

        ``latest``: what it was called with, if not with the change itself.
        """
        if isinstance(error, EscapedError):
            error = error.error
        read = _read(handler, error)
        if read.answers:
            self.breakers.succeeded(handler.name)
        else:
            self.breakers.failed(handler.name)
        if read.discards:
            return Discarded(read.last_error)
        if read.snoozes:
            return self._snoozed(handler, change, read)
        if read.kind:
            self.count(handler, read.kind)
        self._hooks.failed(latest.change if latest else change, error)
        policy = self._policies.get(handler.name, self._policy)
        wait_s = None if read.final else delay_s(policy, change.attempt, self._dice(), read.after_s)
        if read.kind and self._failed:
            self._failed(
                Failure(time.time(), handler.name, read.summary, change.entity_type, change.id, change.attempt, wait_s)
            )
        if latest and wait_s is None:
            change = latest.change  # whose row becomes the dead letter
        fields = _fields(handler, change, change.attempt, "dead" if wait_s is None else "retried", read.trace)
        fields |= {"duration_s": took_s if took_s is None else round(took_s, 6), "again_in_s": wait_s}
        if wait_s is None:
            log.error(
                "handler %s: %s on change %s of %s, attempt %d: now a dead letter; its last_error says more",
                handler.name, read.summary, change.id, change.entity_type, change.attempt, extra=in_message(fields),
            )  # fmt: skip
            return Dead(read.last_error, handler.pauses, read.summary, _attempt(handler, error, read, took_s))
        log.log(
            logging.WARNING if read.kind else logging.INFO,
            "handler %s: %s on change %s of %s, attempt %d of %d; again in %.1f s",
            handler.name, read.summary, change.id, change.entity_type, change.attempt, policy.max_attempts, wait_s,
            extra=in_message(fields),
        )  # fmt: skip
        return Waiting(wait_s, read.last_error, summary=read.summary, attempt=_attempt(handler, error, read, took_s))

    def of_call(
        self,
        handler: Handler,
        changes: Sequence[Change],
        errors: Errors,
        took_s: float | None,
        latest: Latest | None = None,
    ) -> dict[Change, Outcome]:
        """The outcomes of the changes of a failed call, by their errors. A change without one stays as it was."""
        outcomes: dict[Change, Outcome] = {}
        away: dict[int, tuple[Unavailable, list[Change]]] = {}
        for change in changes:
            error = errors.get(change.seq)
            if error is not None and issubclass(type(error), Unavailable):
                away.setdefault(id(error), (cast("Unavailable", error), []))[1].append(change)
            elif error is not None:
                outcomes[change] = self.on(handler, change, error, took_s, latest)
        for unavailable, these in away.values():
            outcomes |= self._unavailable(handler, these, unavailable, took_s)
        return outcomes

    def _unavailable(
        self, handler: Handler, changes: Sequence[Change], error: Unavailable, took_s: float | None
    ) -> dict[Change, Outcome]:
        """The outcomes of a call that found a dependency unavailable. A change without one stays as it was."""
        read = _read(handler, error)
        certain = error.certain is True
        rests = self.breakers.unavailable(
            handler.name, changes[0].key, read.summary, certain=certain, after_s=read.after_s or 0.0
        )
        outcomes: dict[Change, Outcome] = {}
        for change in changes:
            self._metrics.handled(change.entity_type, handler.name, "unavailable")
            if read.after_s is None and rests:
                continue
            wait_s = self._away_s(handler, change, read.after_s)
            attempt = _attempt(handler, error, read, took_s)
            outcomes[change] = Waiting(wait_s, read.last_error, counted=False, summary=read.summary, attempt=attempt)
        if outcomes:
            change = next(iter(outcomes))
            fields = _fields(handler, change, change.attempt, "unavailable", read.trace)
            log.info(
                "handler %s: %s; change %s of %s and %d more wait, and no attempt is counted",
                handler.name, read.summary, change.id, change.entity_type, len(outcomes) - 1, extra=in_message(fields),
            )  # fmt: skip
        return outcomes

    @staticmethod
    def _snoozed(handler: Handler, change: Change, read: _ErrorReport) -> Snoozed:
        """No failed attempt: neither are hooks called, nor is it an error."""
        wait_s = snooze_s(read.after_s or 0.0)
        fields = _fields(handler, change, change.attempt, "snoozed", read.trace) | {"again_in_s": wait_s}
        log.info(
            "handler %s: snoozed change %s of %s; again in %.1f s, and no attempt is counted",
            handler.name, change.id, change.entity_type, wait_s, extra=in_message(fields),
        )  # fmt: skip
        return Snoozed(wait_s, read.last_error, summary=read.summary)

    def _away_s(self, handler: Handler, change: Change, after_s: float | None) -> float:
        if after_s is not None:
            return min(after_s, WAIT_MAX_S)
        policy = self._policies.get(handler.name, self._policy)
        ceiling = ceiling_s(replace(policy, cap_s=min(policy.cap_s, _AWAY_CAP_S)), self._away.add([change]))
        return ceiling * self._dice()

    def after_crash(self, handler: Handler, change: Change, *, again: bool = False) -> Outcome | None:
        """The process of the attempt before has ended. None: there are attempts left.

        ``again``: that attempt was made alone, so the change is to blame. It then has a few attempts only, whatever
        the policy grants others, because each ends the work of all.
        """
        policy = self._policies.get(handler.name, self._policy)
        limit = min(policy.max_attempts, _CRASHES_MAX) if again else policy.max_attempts
        if change.attempt > limit:
            return self.on(handler, change, CrashedError(handler, limit))
        self.count(handler, "crash")
        log.info(
            "handler %s: the process ended while change %s of %s was running; attempt %d of %d is made alone",
            handler.name, change.id, change.entity_type, change.attempt, policy.max_attempts,
            extra=in_message(_fields(handler, change, change.attempt - 1, "retried", Trace(CrashedError.__name__))),
        )  # fmt: skip
        return None

    def count(self, handler: Handler, kind: str) -> None:
        """``kind``: one of metrics.ERROR_KINDS."""
        self._metrics.failed(handler.name, kind)


class _ErrorReport(NamedTuple):
    """What an error says.

    ``kind``: for the metric; None: a deliberate Retry or Snooze is not an error. ``summary``: for a log and for
    error_summary. ``text`` and ``frames``: for last_error. ``trace``: where it came from. ``final``: no other attempt
    can succeed.
    ``after_s``: the delay that the handler requests. ``answers``: what the handler needs was there, for it has decided.
    """

    kind: str | None
    summary: str
    text: str
    trace: Trace
    frames: tuple[str, ...] = ()
    final: bool = False
    after_s: float | None = None
    discards: bool = False
    snoozes: bool = False
    answers: bool = False

    @property
    def last_error(self) -> str:
        """The frames are below class and text, a line each. They have no line breaks."""
        return self.text + "".join(f"\n  {frame}" for frame in self.frames)


_FINAL = (
    Reject, ValidationError, UnreadableDocumentError, EndedTransactionError, TooDeepError, LostTooOftenError,
    CrashedError,
)  # fmt: skip
"""What does not fit, cannot be read, or is too deep, will be so the next time. What was committed without its mark
would be done twice. For losses and crashes the attempts are used up."""


_DELIBERATE = (Reject, Retry, Snooze, Unavailable, SafeError, EndedTransactionError)
"""Errors that explain themselves: last_error has them without the frames."""


def _read(handler: Handler, error: BaseException) -> _ErrorReport:
    """Reads the error once: its class is the handler's, and any of its methods may raise."""
    found = trace(error, handler.function)
    try:
        if isinstance(error, Discard):
            return _ErrorReport(None, "", _cut(str(error)), found, discards=True, answers=True)
        after_s = _seconds(_asked(error))
        text = _cut(_text(handler, error))
        shows = not isinstance(error, _DELIBERATE) and (found.own or not isinstance(error, ValidationError))
        frames = found.frames if shows else ()
        final, answers = isinstance(error, _FINAL), isinstance(error, Retry | Reject | Snooze)
        snoozes = isinstance(error, Snooze)
        summary = _cut(_summary(handler, error, found), _SUMMARY_LENGTH_MAX)
        return _ErrorReport(
            _kind(error), summary, text, found, frames, final, after_s, snoozes=snoozes, answers=answers
        )
    except BaseException as unreadable:  # noqa: BLE001 - what a method of the error raises must not take its outcome away
        text = f"{found.error}, and its text cannot be read: {class_name(unreadable)}"
        return _ErrorReport("exception", _cut(str(found), _SUMMARY_LENGTH_MAX), _cut(text), found, found.frames)


def _attempt(handler: Handler, error: BaseException, read: _ErrorReport, took_s: float | None) -> FailedAttempt:
    """What is kept of it. ``kind``: that of the metric where it says more than the class does."""
    kind = _AWAY if issubclass(type(error), Unavailable) else read.kind
    if kind is None or kind == SafeError.kind:
        kind = read.trace.error
    return FailedAttempt(handler.name, kind, read.trace.error, read.text, time.monotonic(), took_s, read.frames)


def _fields(handler: Handler, change: Change, attempt: int, outcome: str, found: Trace) -> dict[str, object]:
    """The fields of an attempt in a JSON log, besides the message. The key is an identifier, and no more of the row."""
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


def _asked(error: BaseException) -> object:
    match error:
        case Retry() | Snooze():
            return error.after
        case Unavailable():
            return error.retry_after
    return None


def _seconds(after: object) -> float | None:
    """None if it is no number of seconds: the class checks it, and may be derived from."""
    return float(after) if isinstance(after, int | float) and 0 <= after < float("inf") else None


def _kind(error: BaseException) -> str | None:
    match error:
        case SafeError():
            return error.kind
        case Retry() | Snooze() | Unavailable():
            return None
        case Reject():
            return "rejected"
        case ValidationError() | UnreadableDocumentError():
            return "validation"
    return "exception"


def _summary(handler: Handler, error: BaseException, found: Trace) -> str:
    """The text about it for a log line."""
    match error:
        case SafeError():
            return error.summary
        case EndedTransactionError() | UnreadableDocumentError():
            return str(error)
        case Unavailable():
            return f"what it needs is away ({found})"
    own_words = {
        Reject: "rejected it",
        ValidationError: f"the row does not fit the model {_model(handler) if handler.model else ''}".rstrip(),
        Retry: "asked for another try",
        Snooze: SNOOZED,
    }
    return next((words for kind, words in own_words.items() if isinstance(error, kind)), str(found))


def _text(handler: Handler, error: BaseException) -> str:
    """For last_error. A validation error says where and why, without the values, which are the row's content."""
    match error:
        case Reject():
            return f"rejected: {error}"
        case SafeError() | Retry() | EndedTransactionError() | UnreadableDocumentError():
            return str(error)
        case Unavailable():
            return f"unavailable: {error}"
        case Snooze():
            return f"{SNOOZED}: {error}" if str(error) else SNOOZED
        case ValidationError():
            faults = error.errors(include_input=False, include_url=False, include_context=False)
            summary = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}" for fault in faults)
            return f"does not fit {_model(handler)}: {summary}"
    return f"{class_name(error)}: {error}"


def _model(handler: Handler) -> object:
    return getattr(handler.model, "__name__", handler.model)


def _cut(text: str, length_max: int = _ERROR_LENGTH_MAX) -> str:
    # PostgreSQL's text has no NUL; an error text with one would make the settle fail, and with it the whole batch.
    clean = text.replace("\0", "\\0").encode("utf-8", "replace").decode()
    return clean if len(clean) <= length_max else f"{clean[: length_max - 1]}…"
