"""The rules of the lanes, one by one; that they hold together under any schedule is what the simulation shows."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cdc.core.deferred_keys import KeyRead
from cdc.core.model import Change, Dead, Outcome, Processed, Unmarkable, Waiting
from cdc.core.read_reconciler import Settlement
from cdc.core.ready_queues import ReadyQueues, Requirements
from cdc.core.router import Handler
from cdc.core.shard_ownership import Acquired
from tests.changes import row
from tests.settling import SettlingScheduler


@pytest.fixture
def scheduler() -> SettlingScheduler:
    made = SettlingScheduler(10, key_capacity=3)
    made.ownership.acquire(Acquired(range(4)))
    return made


def _start_all(scheduler: SettlingScheduler) -> list[Change]:
    started = list[Change]()
    while run := scheduler.start().changes:
        started += run
    return started


def _seqs(changes: Iterable[Change]) -> list[int]:
    return [change.seq for change in changes]


def _end(scheduler: SettlingScheduler, change: Change, outcome: Outcome = Processed()) -> None:  # noqa: B008 - a frozen value
    scheduler.finished([Settlement(change, outcome)])
    scheduler.settled(scheduler.take_finished(100))


def test_one_change_of_a_key_runs_at_a_time_and_other_keys_run_at_the_same_time(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1, "a"), row(2, "a"), row(3, "b")])
    assert _seqs(_start_all(scheduler)) == [1, 3]


def test_a_key_that_an_earlier_change_has_made_ready_again_runs_one_change_at_a_time(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(2)])
    scheduler.admit([row(1)])  # of a key coarser than its rows
    [first] = _start_all(scheduler)
    assert first.seq == 1
    _end(scheduler, first)
    assert _seqs(_start_all(scheduler)) == [2]


def test_the_successor_may_start_when_a_change_has_finished_before_it_is_settled(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1), row(2)])
    [first] = _start_all(scheduler)
    scheduler.finished([Settlement(first, Processed())])
    assert _seqs(_start_all(scheduler)) == [2]
    assert scheduler.settling == 1


def test_a_batch_takes_successive_changes_of_its_keys_and_then_of_others_up_to_its_limit(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(1, "a"), row(2, "a"), row(3, "b"), row(4, "c"), row(5, "c")])
    [first] = scheduler.start().changes
    batch = [first]
    scheduler.start_with(batch, 4, lambda change: change.entity_id != "b")
    assert _seqs(batch) == [1, 2, 4, 5]
    assert _seqs(_start_all(scheduler)) == [3]
    for change in batch:
        scheduler.finished([Settlement(change, Processed())])
    assert _seqs(finished.change for finished in scheduler.take_finished(10)) == [1, 2, 4, 5]


def test_keys_that_find_no_place_in_a_batch_keep_their_turn(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1, "z"), row(2, "a"), row(3, "a"), row(4, "a"), row(5, "b"), row(6, "c"), row(7, "d")])
    _, [first] = scheduler.start()
    batch = [first]
    scheduler.start_with(batch, 4, lambda change: True)
    assert _seqs(batch) == [1, 2, 3, 4]
    assert _seqs(_start_all(scheduler)) == [5, 6, 7]


def test_a_batch_of_a_key_that_fails_twice_keeps_it_shut_until_both_are_settled(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1), row(2)])
    [first] = scheduler.start().changes
    batch = [first]
    scheduler.start_with(batch, 2, lambda change: True)
    for change in batch:
        scheduler.finished([Settlement(change, Waiting(1.0, "no"))])
    scheduler.settled(scheduler.take_finished(1))
    scheduler.admit([row(1)], due=True)
    assert _start_all(scheduler) == []
    scheduler.settled(scheduler.take_finished(1))
    scheduler.admit([row(1)], due=True)
    assert _seqs(_start_all(scheduler)) == [1]


def test_a_fenced_change_starts_when_all_before_it_have_settled() -> None:
    scheduler = SettlingScheduler(10, needs=lambda change: Requirements("t", after_settled=change.seq == 2))
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1), row(2)])
    [first] = _start_all(scheduler)
    scheduler.finished([Settlement(first, Processed())])
    assert _start_all(scheduler) == []
    scheduler.settled(scheduler.take_finished(1))
    assert _seqs(_start_all(scheduler)) == [2]


@pytest.mark.parametrize("comes_later", [False, True])
def test_that_a_fenced_change_waits_is_told_when_it_could_start_otherwise(comes_later: bool) -> None:
    scheduler, told = SettlingScheduler(10, needs=lambda change: Requirements("t", after_settled=change.seq == 2)), []
    scheduler.fenced = lambda: told.append(scheduler.settling)
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1)] if comes_later else [row(1), row(2)])
    [first] = _start_all(scheduler)
    assert told == []
    scheduler.finished([Settlement(first, Processed())])
    scheduler.admit([row(2)] if comes_later else [])
    assert _start_all(scheduler) == []
    assert told == [1]


def test_a_dead_letter_that_pauses_its_key_shuts_its_lane(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1), row(2)])
    [first] = _start_all(scheduler)
    _end(scheduler, first, Dead("no", pauses=True))
    assert _start_all(scheduler) == []
    assert len(scheduler.deferred) == 1


def test_a_key_goes_on_when_the_outcome_that_held_it_is_written_as_a_dead_letter(
    scheduler: SettlingScheduler,
) -> None:
    """The table may refuse a mark: then what is written is another one."""
    scheduler.admit([row(1), row(2)])
    [first] = _start_all(scheduler)
    scheduler.finished([Settlement(first, Waiting(1.0, "no"))])
    assert scheduler.take_finished(1)
    scheduler.to_settle.becomes(Settlement(first, Unmarkable("refused")))
    assert _start_all(scheduler) == []
    scheduler.settled(scheduler.take_finished(1))
    [read] = scheduler.key_reads(1)
    scheduler.admit_key_read(read, [row(2)], complete=True)
    assert _seqs(_start_all(scheduler)) == [2]


def test_a_dead_letter_lets_its_key_go_on(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1), row(2)])
    [first] = _start_all(scheduler)
    scheduler.finished([Settlement(first, Dead("no"))])
    assert _seqs(_start_all(scheduler)) == [2]


def test_a_key_of_which_nothing_fitted_into_a_page_is_read_on_from_where_it_was(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(seq) for seq in range(1, 7)])
    for _ in range(3):
        _end(scheduler, _start_all(scheduler)[0])
    [resume] = scheduler.key_reads(10)
    scheduler.admit_key_read(resume, [], complete=False)
    assert scheduler.key_reads(10) == [resume]


def test_a_waiting_change_shuts_its_lane_and_what_is_behind_it_is_read_again_when_it_has_settled(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(1), row(2), row(3)])
    [first] = _start_all(scheduler)
    _end(scheduler, first, Waiting(1.0, "no"))
    assert _start_all(scheduler) == []
    assert scheduler.window.free == 10, "the table holds the key back; memory need not"
    scheduler.admit([row(4, blocked=True)])
    assert _start_all(scheduler) == []
    scheduler.admit([row(1)], due=True)  # its time has come
    [again] = _start_all(scheduler)
    _end(scheduler, again)
    [resume] = scheduler.key_reads(10)
    assert resume == KeyRead(("t", "k"), 0, 2)
    scheduler.admit_key_read(resume, [row(2), row(3), row(4)], complete=True)
    assert _seqs(_start_all(scheduler)) == [2]
    assert len(scheduler.deferred) == 0


def test_nothing_of_a_key_passes_what_was_seen_and_not_admitted(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1), row(2), row(3), row(4)])  # a lane queues three
    [first] = _start_all(scheduler)
    _end(scheduler, first)
    assert scheduler.admit([row(5)]).taken == 0
    assert len(scheduler.deferred) == 1


def test_a_key_with_more_than_its_lane_holds_is_read_on_when_the_lane_is_empty(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(seq) for seq in range(1, 7)])
    for _ in range(3):
        _end(scheduler, _start_all(scheduler)[0])
    [resume] = scheduler.key_reads(10)
    assert resume.seq == 4
    scheduler.admit_key_read(resume, [row(4), row(5)], complete=False)
    for seq in (4, 5):
        [running] = _start_all(scheduler)
        assert running.seq == seq
        scheduler.finished([Settlement(running, Processed())])
    assert scheduler.key_reads(10) == [KeyRead(("t", "k"), 0, 6)]


def test_the_window_is_bounded_and_what_does_not_fit_is_refused_from_its_first_change_on(
    scheduler: SettlingScheduler,
) -> None:
    admitted = scheduler.admit([row(seq, f"key{seq}") for seq in range(1, 14)])
    assert admitted.taken == 10
    assert admitted.rejected == {"t": {0: 11}}
    assert scheduler.window.free == 0


def test_where_no_memory_is_left_for_a_mark_the_change_is_refused_and_so_are_its_successors() -> None:
    scheduler = SettlingScheduler(10, key_capacity=1, deferred_max=1)
    scheduler.ownership.acquire(Acquired([0, 1]))
    admitted = scheduler.admit([row(1, "a"), row(2, "a"), row(3, "b", shard=1), row(4, "b", shard=1)])
    assert (admitted.taken, admitted.rejected) == (2, {"t": {1: 4}})


def test_what_settles_while_a_read_is_under_way_is_not_taken_from_its_answer(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1)])
    [first] = _start_all(scheduler)
    with scheduler.reading:
        _end(scheduler, first)
        assert scheduler.admit([row(1)]).taken == 0


def test_the_successor_of_a_change_that_failed_while_a_read_was_under_way_stays_behind_it(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(1)])
    [first] = _start_all(scheduler)
    with scheduler.reading:
        _end(scheduler, first, Waiting(1.0, "no"))
        scheduler.admit([row(2)])  # its snapshot is older than the failure
    assert _start_all(scheduler) == []


def test_a_key_that_a_stale_read_shows_held_is_read_again_at_once(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1)])
    [first] = _start_all(scheduler)
    with scheduler.reading:
        _end(scheduler, first)
        scheduler.admit([row(2, blocked=True)])  # as if 1 still waited
    assert scheduler.key_reads(10) == [KeyRead(("t", "k"), 0, 2)]


def test_a_shard_is_released_only_when_what_is_in_flight_on_it_has_settled(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1, "a"), row(2, "a"), row(3, "b", shard=1)])
    running = _start_all(scheduler)
    scheduler.ownership.revoke([0, 2])
    assert scheduler.ownership.idle() == {2}
    scheduler.ownership.released({2})
    scheduler.finished([Settlement(running[0], Processed())])
    assert _start_all(scheduler) == [], "what was queued is let go"
    assert scheduler.ownership.idle() == set()
    scheduler.settled(scheduler.take_finished(100))
    assert scheduler.ownership.idle() == {0}
    scheduler.ownership.released({0})
    assert scheduler.ownership.idle() == set()
    assert scheduler.ownership.owned == {1, 3}


def test_after_a_lost_session_a_key_stays_shut_until_its_running_handler_returns(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1, "a"), row(2, "b")])
    first, second = _start_all(scheduler)
    scheduler.finished([Settlement(second, Processed())])
    assert scheduler.ownership.lose() == 4
    scheduler.ownership.acquire(Acquired(range(4)))
    scheduler.admit([row(1, "a"), row(2, "b")])
    assert _seqs(_start_all(scheduler)) == [2], "unsettled, so it runs again"
    scheduler.finished([Settlement(first, Processed())])
    assert scheduler.take_finished(100) == [], "an outcome from before is not settled"
    assert scheduler.key_reads(10) == [KeyRead(("t", "a"), 0, 1)]


def test_a_change_that_was_cut_off_is_left_as_it_was(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1), row(2)])
    [first] = _start_all(scheduler)
    scheduler.interrupted(first)
    assert not scheduler.ownership.in_flight
    assert scheduler.take_finished(100) == []
    assert scheduler.admit([row(2)]).taken == 0, "its successor may not pass it"


def test_finishing_what_does_not_run_is_a_bug_and_said_so(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1)])
    [first] = _start_all(scheduler)
    scheduler.finished([Settlement(first, Processed())])
    with pytest.raises(AssertionError, match="is not running"):
        scheduler.finished([Settlement(first, Processed())])


def test_behind_a_waiting_change_that_was_cut_off_what_is_queued_is_not_forgotten(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1, requeued=True)], due=True)
    [first] = _start_all(scheduler)
    scheduler.admit([row(2)])  # the answer to the COMMIT of 1 is still on its way, or lost
    scheduler.interrupted(first)
    assert scheduler.key_reads(10) == [KeyRead(("t", "k"), 0, 2)]
    assert scheduler.admit([row(3)]).taken == 0


def test_a_key_whose_call_was_cut_off_is_read_on_from_an_earlier_change_that_has_become_visible_meanwhile(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(5)])
    [cut_off] = _start_all(scheduler)
    scheduler.admit([row(3)])
    scheduler.interrupted(cut_off)
    assert scheduler.key_reads(10) == [KeyRead(("t", "k"), 0, 3)]


def test_a_waiting_change_that_was_let_go_behind_one_that_failed_runs_when_it_is_due(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(2)])
    [second] = _start_all(scheduler)
    scheduler.admit([row(1, requeued=True)], due=True)  # an operator gave the dead letter another try
    _end(scheduler, second, Waiting(1.0, "no"))
    scheduler.admit([row(1, requeued=True)], due=True)
    for resume in scheduler.key_reads(10):
        scheduler.admit_key_read(resume, [], complete=True)
    scheduler.admit([row(1, requeued=True)], due=True)
    assert _seqs(_start_all(scheduler)) == [1]


def test_what_was_read_before_a_shard_left_and_came_back_is_not_taken(scheduler: SettlingScheduler) -> None:
    with scheduler.reading:
        scheduler.ownership.revoke([0])
        assert scheduler.ownership.idle() == {0}
        scheduler.ownership.acquire(Acquired([0]))  # in between another consumer has handled all of it
        assert scheduler.admit([row(1)]).taken == 0


def test_a_key_that_a_stale_read_shows_held_by_one_that_was_cut_off_is_read_again(scheduler: SettlingScheduler) -> None:
    scheduler.admit([row(1, requeued=True)], due=True)
    [first] = _start_all(scheduler)
    with scheduler.reading:
        scheduler.interrupted(first)  # somebody else has it, and is done with it before the table is asked again
        scheduler.admit([row(2, blocked=True)])
    assert scheduler.key_reads(10) == [KeyRead(("t", "k"), 0, 2)]


def test_an_earlier_change_that_comes_in_late_does_not_join_the_batch_of_a_later_one(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(2), row(3)])
    [first] = scheduler.start().changes
    batch = [first]
    scheduler.admit([row(1, requeued=True)], due=True)
    scheduler.start_with(batch, 3, lambda change: True)
    assert _seqs(batch) == [2]


@pytest.fixture
def shared() -> SettlingScheduler:
    """Room for nine changes of several types."""
    made = SettlingScheduler(9, sole=False)
    made.ownership.acquire(Acquired(range(4)))
    return made


def test_one_type_does_not_fill_the_window_and_what_it_was_refused_is_returned_by_type_and_shard(
    shared: SettlingScheduler,
) -> None:
    admitted = shared.admit([row(seq, str(seq), entity_type="a", shard=seq % 2) for seq in range(1, 10)])
    assert admitted == (7, {"a": {0: 8, 1: 9}}, False)
    assert (shared.window.free, shared.room_for("a"), shared.room_for("b").free) == (2, (0, 2), 1)
    assert shared.admit([row(10, entity_type="b")]).taken == 1


def test_a_type_that_is_read_apart_is_passed_over(shared: SettlingScheduler) -> None:
    admitted = shared.admit([row(1, entity_type="a"), row(2, entity_type="b")], throttled={"a"})
    assert admitted == (1, {}, False)
    assert not shared.knows(1)


def test_a_type_has_room_again_when_its_changes_are_settled(shared: SettlingScheduler) -> None:
    shared.admit([row(seq, str(seq), entity_type="a") for seq in range(1, 10)])
    for change in _start_all(shared)[:3]:
        _end(shared, change)
    assert shared.room_for("a") == (3, 2)
    assert shared.types == {"a"}


def test_a_key_of_a_type_without_room_is_read_on_when_there_is_some(shared: SettlingScheduler) -> None:
    shared.admit([row(seq, entity_type="a") for seq in range(1, 3)])
    [first] = _start_all(shared)
    _end(shared, first, Waiting(1.0, "no"))
    shared.admit([row(1, entity_type="a", requeued=True)], due=True)
    [again] = _start_all(shared)
    shared.admit([row(seq, str(seq), entity_type="a") for seq in range(10, 20)])
    _end(shared, again)
    assert shared.key_reads(10), "one place is free again"
    shared.admit([row(20, "20", entity_type="a")])
    assert shared.key_reads(10) == []


def test_in_a_batch_only_the_first_change_takes_a_slot() -> None:
    scheduler = SettlingScheduler(20, ready_queues=ReadyQueues(2))
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(seq, str(seq)) for seq in range(1, 9)])
    for _ in range(2):
        [first] = scheduler.start().changes
        scheduler.start_with([first], 3, lambda change: True)
    assert not scheduler.start().changes
    assert scheduler.ready_queues.ready == 0
    scheduler.finished([Settlement(first, Processed())])
    assert scheduler.start().changes


def test_a_change_that_is_set_aside_or_joins_a_batch_gives_its_slot_back() -> None:
    scheduler = SettlingScheduler(20, ready_queues=ReadyQueues(1))
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(seq, str(seq)) for seq in range(1, 5)])
    [first] = scheduler.start().changes
    scheduler.free_places(first)
    [first] = scheduler.start().changes
    scheduler.free_places(first)
    [joining] = scheduler.start().changes
    scheduler.start_with([first, joining], 2, lambda change: True)
    assert scheduler.ready_queues.ready == 1


def test_a_handler_that_outlives_its_session_keeps_its_slot_until_it_returns() -> None:
    scheduler = SettlingScheduler(10, ready_queues=ReadyQueues(1))
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1, "a"), row(2, "b")])
    [running] = _start_all(scheduler)
    scheduler.ownership.lose()
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(2, "b")])
    assert not scheduler.start().changes
    scheduler.interrupted(running)
    assert _seqs(_start_all(scheduler)) == [2]


def test_a_key_whose_next_change_needs_something_else_than_before_waits_for_that() -> None:
    first, other = (Handler(name, print, is_async=True) for name in ("first", "other"))
    needs = {1: Requirements("t", first, ("pool",)), 2: Requirements("t", other)}
    scheduler = SettlingScheduler(10, needs=lambda change: needs[change.seq],
                  ready_queues=ReadyQueues(5, {"pool": 0}))  # fmt: skip
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(2)])
    scheduler.admit([row(1)])  # of a key coarser than its rows
    assert not scheduler.start().changes


def test_a_key_goes_on_whose_requeued_change_was_settled_by_another_before_it_had_room() -> None:
    scheduler = SettlingScheduler(10, 2)
    scheduler.ownership.acquire(Acquired(range(4)))
    scheduler.admit([row(5, "a"), row(6, "a")])
    scheduler.admit([row(1, "a", requeued=True)], due=True)
    assert scheduler.queued == 0, "what comes later was dropped, to be read behind it"
    scheduler.forget_deferred([0])
    scheduler.admit([row(5, "a"), row(6, "a")])
    assert _seqs(_start_all(scheduler)) == [5]


def test_a_change_between_two_that_have_begun_to_wait_during_its_read_is_held_back_by_the_first(
    scheduler: SettlingScheduler,
) -> None:
    scheduler.admit([row(4), row(8)])
    batch = [scheduler.start().changes[0]]
    scheduler.start_with(batch, 2, lambda _: True)
    with scheduler.reading:
        scheduler.finished([Settlement(batch[0], Waiting(1.0, "no")), Settlement(batch[1], Dead("no", True))])
        scheduler.settled(scheduler.take_finished(100))
        assert scheduler.admit([row(5)]).taken == 0


# --- handlers with latest ------------------------------------------------------------------------------------------


def _latest(capacity: int = 10, key_capacity: int = 3, deferred: int = 100) -> SettlingScheduler:
    handler = Handler("latest", print, is_async=True, latest=True)
    made = SettlingScheduler(
        capacity, key_capacity, deferred, coalesces=True,
        needs=lambda change: Requirements(change.entity_type, handler, after_settled=True),
    )  # fmt: skip
    made.ownership.acquire(Acquired(range(4)))
    return made


def test_of_a_key_that_is_coalesced_one_change_is_in_the_window() -> None:
    scheduler = _latest()
    scheduler.admit([row(seq, "a") for seq in (1, 2, 3)])
    assert (scheduler.queued, len(scheduler.deferred)) == (1, 1)
    [first] = _start_all(scheduler)
    scheduler.admit([row(4, "a")])
    assert (scheduler.running, scheduler.queued) == (1, 0)
    assert scheduler.key_reads(10) == [], "what waits behind it is in its call, or is read afterwards"
    scheduler.deferred.handled(first.key, 1, 4)
    _end(scheduler, first)
    assert scheduler.key_reads(10) == []
    assert len(scheduler.deferred) == 0


def test_a_key_is_read_on_behind_the_last_that_the_call_stood_for() -> None:
    scheduler = _latest()
    scheduler.admit([row(seq, "a") for seq in (1, 2, 3)])
    [first] = _start_all(scheduler)
    scheduler.deferred.handled(first.key, 1, 2)
    _end(scheduler, first)
    assert scheduler.key_reads(10) == [KeyRead(("t", "a"), 0, 3)]


def test_a_key_is_read_on_when_the_call_is_settled_and_not_before() -> None:
    """A read in between would show what the call stood for as fresh, and ask for a call that has been made."""
    scheduler = _latest()
    scheduler.admit([row(1, "a"), row(2, "a")])
    [first] = _start_all(scheduler)
    scheduler.deferred.handled(first.key, 1, 2)
    scheduler.admit([row(3, "a")])
    scheduler.finished([Settlement(first, Processed())])
    scheduler.admit([row(4, "a")])
    assert (scheduler.queued, scheduler.key_reads(10)) == (0, [])
    scheduler.settled(scheduler.take_finished(100))
    assert scheduler.key_reads(10) == [KeyRead(("t", "a"), 0, 3)]


def test_a_key_is_read_on_from_a_change_before_the_call_that_has_become_visible_after_it() -> None:
    """A replay locks no row: one that is made meanwhile has the higher number, and may be visible before."""
    scheduler = _latest()
    scheduler.admit([row(5, "a"), row(6, "a")])
    [first] = _start_all(scheduler)
    scheduler.admit([row(3, "a")])
    scheduler.deferred.handled(first.key, 5, 6)
    _end(scheduler, first)
    assert scheduler.key_reads(10) == [KeyRead(("t", "a"), 0, 3)]


def test_a_key_that_is_read_on_while_its_call_runs_is_not_read_again_and_again() -> None:
    scheduler = _latest()
    scheduler.admit([row(1, "a"), row(2, "a")])
    [first] = _start_all(scheduler)
    scheduler.deferred.request_read(first.key)
    [read] = scheduler.key_reads(10)
    scheduler.admit_key_read(read, [row(2, "a")], complete=True)
    assert scheduler.key_reads(10) == []
    assert len(scheduler.deferred) == 1


def test_without_room_for_a_mark_more_of_a_key_is_in_the_window() -> None:
    scheduler = _latest(deferred=1)
    scheduler.admit([row(1, "a"), row(2, "a"), row(3, "b"), row(4, "b"), row(5, "b")])
    assert (scheduler.queued, len(scheduler.deferred)) == (4, 1)


def test_a_change_that_is_put_off_leaves_the_window_until_its_time() -> None:
    scheduler = _latest()
    scheduler.admit([row(1, "a"), row(2, "a")])
    [first] = _start_all(scheduler)
    assert scheduler.put_off(first, 5.0)
    assert (scheduler.running, scheduler.queued, scheduler.ownership.in_flight) == (0, 0, 0)
    scheduler.admit([row(3, "a")])
    assert scheduler.key_reads(10) == []
    scheduler.deferred.read_held(5.0)
    [read] = scheduler.key_reads(10)
    assert read.seq == 1
    scheduler.admit_key_read(read, [row(seq, "a") for seq in (1, 2, 3)], complete=True)
    assert _seqs(_start_all(scheduler)) == [1]


def test_a_change_is_not_put_off_where_no_mark_would_stand_for_it() -> None:
    scheduler = _latest(deferred=1)
    scheduler.admit([row(1, "a"), row(2, "b")])
    first, second = _start_all(scheduler)
    assert scheduler.put_off(first, 5.0)
    assert not scheduler.put_off(second, 5.0)
    scheduler.ownership.revoke([0])
    assert scheduler.running == 1
