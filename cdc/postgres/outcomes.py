"""Outcomes as the statements that record them take them. Values in, values out."""

from __future__ import annotations

from collections.abc import Iterable

from cdc.core.encodings import fitting
from cdc.core.model import Change, Committed, Dead, Discarded, Filtered, Outcome, Processed, Skipped, Waiting
from cdc.core.read_reconciler import Settlement

_PROCESSED = (Processed, Skipped, Filtered)


def divide(batch: Iterable[Settlement]) -> tuple[list[Change], list[Settlement]]:
    """The fresh changes that were processed, which the statement ``settle_processed`` is for; and all others."""
    plain: list[Change] = []
    others: list[Settlement] = []
    for finished in batch:
        change, outcome = finished
        if not change.requeued and isinstance(outcome, _PROCESSED):
            plain.append(change)
        else:
            others.append(finished)
    return plain, others


def settle_values(
    outcome: Outcome, encoding: str
) -> tuple[bool, bool, bool, bool, float | None, str | None, str | None]:
    """(processed, dead, pauses, failed, delay_s, error, summary) of the statement ``settle_others``."""
    match outcome:
        case Processed() | Skipped() | Filtered():
            return True, False, False, False, None, None, None
        case Discarded(reason):
            return True, False, False, False, None, fitting(f"discarded: {reason}", encoding), None
        case Waiting(delay_s, error, counted, summary):
            return False, False, False, counted, delay_s, fitting(error, encoding), fitting(summary, encoding) or None
        case Dead(error, pauses, summary):
            return False, True, pauses, True, None, fitting(error, encoding), fitting(summary, encoding) or None
        case Committed():
            raise AssertionError("marked by its own transaction, so there is nothing to settle")
