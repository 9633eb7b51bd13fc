"""Outcomes as the statements that record them take them. Values in, values out."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cdc.core.encodings import fitting
from cdc.core.fast_change import fast_make
from cdc.core.model import (
    Change,
    Coalesced,
    Committed,
    Dead,
    Discarded,
    Filtered,
    Outcome,
    Processed,
    Skipped,
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
)  # fmt: skip


def settle_values(others: Iterable[Settlement], encoding: str, maybe_written: Container[int]) -> Mapping[str, Any]:
    """The parameters of the statement ``settle_others``. ``maybe_written``: numbers of what may be recorded already."""
    rows = [_row(finished, encoding, maybe_written) for finished in others]
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
