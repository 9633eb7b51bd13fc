"""Outcomes as the statements that record them take them. Values in, values out."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cdc.core.attempts import FailedAttempt
from cdc.core.encodings import fitting
from cdc.core.fast_change import fast_make
from cdc.core.model import (
    SNOOZED,
    Change,
    Coalesced,
    Committed,
    Dead,
    Discarded,
    Filtered,
    Outcome,
    Processed,
    Skipped,
    Snoozed,
    Waiting,
)
from cdc.core.read_reconciler import Settlement

_PROCESSED = (Processed, Skipped, Filtered)


class Divided(NamedTuple):
    """``plain``: the fresh changes that were processed, which the statement ``settle_processed`` is for.

    ``others``: the rest, for ``settle_others``. ``groups``: those of which several changes shared a call; the last of
    each is among ``plain`` or ``others``, too.
    """

    plain: Sequence[Change]
    others: Sequence[Settlement]
    groups: Sequence[Settlement]


_DIVIDED = fast_make(Divided)


def divide(batch: Iterable[Settlement]) -> Divided:
    plain: list[Change] = []
    others: list[Settlement] = []
    groups: list[Settlement] = []
    for finished in batch:
        change, outcome = finished
        if not change.requeued and isinstance(outcome, _PROCESSED):
            plain.append(change)
        elif isinstance(outcome, Coalesced):
            groups.append(finished)
            if isinstance(outcome.outcome, _PROCESSED):
                plain.append(outcome.change)  # it was fresh, whatever the first one was
            else:
                others.append(finished)
        else:
            others.append(finished)
    return _DIVIDED((plain, others, groups))


_COLUMNS = (
    "ids", "requeued", "failures", "processed", "dead", "pauses", "failed", "delays", "errors", "summaries",
    "kinds", "attempts",
)  # fmt: skip


def settle_values(
    others: Iterable[Settlement], encoding: str, maybe_written: Container[int], now: float
) -> Mapping[str, Any]:
    """The parameters of the statement ``settle_others``. ``maybe_written``: numbers of what may be recorded already.

    ``now`` by time.monotonic().
    """
    rows = [(*_row(finished, encoding, maybe_written), *_failure(finished, encoding, now)) for finished in others]
    return dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))


def _row(finished: Settlement, encoding: str, maybe_written: Container[int]) -> tuple[object, ...]:
    change, outcome = finished
    failures = change.attempt - 1
    if isinstance(outcome, Coalesced):
        # The row of the last one is fresh. It gets the failed attempts, which were counted in the row of the first.
        processed, dead, pauses, failed, *rest = _values(outcome.outcome, encoding)
        failures_of_last = 0 if change.seq in maybe_written else None
        return (
            outcome.change.id, False, failures_of_last, processed, dead, pauses, failed and failures + failed, *rest,
        )  # fmt: skip
    known = failures if change.seq in maybe_written else None
    return change.id, change.requeued, known, *_values(outcome, encoding)


def _failure(finished: Settlement, encoding: str, now: float) -> tuple[str | None, str | None]:
    """(kind, attempt): what kind of failure it is, and what is kept of the attempt, as JSON; None: nothing."""
    change, outcome = finished
    if isinstance(outcome, Coalesced):
        outcome = outcome.outcome
    if isinstance(outcome, Snoozed):
        return SNOOZED, None
    if not isinstance(outcome, Waiting | Dead) or (attempt := outcome.attempt) is None:
        return None, None
    how = "dead" if isinstance(outcome, Dead) else "retried" if outcome.counted else "unavailable"
    return attempt.kind, _kept(attempt, change.attempt, how, encoding, now)


def _kept(attempt: FailedAttempt, number: int, how: str, encoding: str, now: float) -> str:
    """Times are how long ago: the server says when that was."""
    texts = {"handler": attempt.handler or "", "kind": attempt.kind, "error": attempt.error, "text": attempt.text}
    return json.dumps(
        {
            **{name: fitting(text, encoding) for name, text in texts.items()},
            "attempt": number,
            "outcome": how,
            "frames": [fitting(frame, encoding) for frame in attempt.frames],
            "ended_s_ago": max(0.0, now - attempt.ended),
            "took_s": attempt.took_s,
        }
    )


def _values(outcome: Outcome, encoding: str) -> tuple[bool, bool, bool, int, float | None, str | None, str | None]:
    """(processed, dead, pauses, failed, delay_s, error, summary); ``failed``: how many failed attempts to count."""
    match outcome:
        case Processed() | Skipped() | Filtered():
            return True, False, False, 0, None, None, None
        case Discarded(reason):
            return True, False, False, 0, None, fitting(f"discarded: {reason}", encoding), None
        case Waiting(delay_s, error, counted, summary):
            words = fitting(error, encoding), fitting(summary, encoding) or None
            return False, False, False, int(counted), delay_s, *words
        case Dead(error, pauses, summary):
            return False, True, pauses, 1, None, fitting(error, encoding), fitting(summary, encoding) or None
        case Committed() | Coalesced():
            raise AssertionError("marked by its own transaction, or divided before")
