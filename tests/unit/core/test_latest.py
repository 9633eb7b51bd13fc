"""What one call for several changes of a key gets, and what its outcome means for them."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from cdc.core.fast_change import Json, document
from cdc.core.latest import Latest, latest
from cdc.core.model import Change, Coalesced, Committed, Dead, Discarded, Filtered, Outcome, Processed, Snoozed, Waiting
from tests.changes import EPOCH, change


def _two() -> tuple[Change, Change]:
    first = replace(change(3, attempt=2, requeued=True), old=Json(b'{"n": 1}'), new=Json(b'{"n": 2}'))
    last = replace(
        change(9),
        old=Json(b'{"n": 8}'),
        new=Json(b'{"n": 9}'),
        metadata=Json(b'{"m": 9}'),  # type: ignore[arg-type]  # as it is read
        caused_by=UUID(int=1),
        depth=1,
    )
    return first, last


def test_the_old_row_is_the_firsts_and_the_attempt_and_all_else_is_the_lasts() -> None:
    first, last = _two()
    given = latest(first, last, "{5,9}").change
    assert (given.seq, given.id, given.old, given.new, given.metadata) == (9, last.id, {"n": 1}, {"n": 9}, {"m": 9})
    assert (given.attempt, given.requeued, given.coalesced) == (2, True, 3)
    assert (given.caused_by, given.depth, given.cause) == (UUID(int=1), 1, last.cause)
    assert given.changed == {"n"}


def test_no_document_is_parsed_for_it() -> None:
    given = latest(*_two(), "{9}").change
    assert {name: type(document(given, name)) for name in ("old", "new", "metadata")} == {
        "old": Json, "new": Json, "metadata": Json,
    }  # fmt: skip


@pytest.mark.parametrize("outcome", [Processed(), Filtered(), Discarded("why"), Dead("no", pauses=True)])
def test_what_is_decided_is_decided_for_all(outcome: Processed | Filtered | Discarded | Dead) -> None:
    of = latest(*_two(), "{5,9}")
    assert of.outcome(outcome) == Coalesced(of.change, "{5,9}", outcome)
    assert of.outcome(outcome).blocks_key == outcome.blocks_key


@pytest.mark.parametrize("outcome", [Waiting(1.0, "no"), Snoozed(1.0, "later")])
def test_what_waits_is_the_first_one(outcome: Outcome) -> None:
    assert latest(*_two(), "{9}").outcome(outcome) is outcome


def test_what_a_transaction_has_marked_needs_no_mark() -> None:
    of = latest(*_two(), "{9}")
    assert of.outcome(Committed(EPOCH)) == Committed(EPOCH, of.change)


def test_a_call_for_one_change_is_as_any_other() -> None:
    assert Latest(change(1)).outcome(Processed()) == Processed()
