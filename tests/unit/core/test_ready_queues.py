"""Who runs next, and who would have to wait for something that others use up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import cdc
from cdc import testing
from cdc.core.handler_limits import HandlerLimits
from cdc.core.model import Change, Key
from cdc.core.ready_queues import ReadyQueues, Requirements
from cdc.core.router import Handler, Router
from tests.changes import change

_ON_LOOP, _SYNC = Handler("on loop", print, is_async=True), Handler("sync", print, is_async=False)
_A, _B = Requirements("a", _ON_LOOP), Requirements("b", _ON_LOOP)
_A_SYNC, _B_SYNC = Requirements("a", _SYNC, ("threads",)), Requirements("b", _SYNC, ("threads",))


async def _handle(change: Change) -> None: ...


def _put(ready_queues: ReadyQueues, needs: Requirements, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        ready_queues.put((needs.entity_type, str(number)), needs)


def _start_all(ready_queues: ReadyQueues) -> list[Key]:
    started = list[Key]()
    while turn := ready_queues.next():
        keys, needs = turn
        ready_queues.started([change(len(started) + place) for place in range(len(keys))], needs)
        started += keys
    return started


def test_types_take_turns_however_long_their_queues_are() -> None:
    ready_queues = ReadyQueues()
    _put(ready_queues, _A, 4)
    _put(ready_queues, _B, 2)
    assert [key[0] for key in _start_all(ready_queues)] == ["a", "b", "a", "b", "a", "a"]


def test_what_was_written_waits_for_few_rows_of_a_backfill_and_these_for_all_of_it_never() -> None:
    router = Router()
    router.on("order")(_handle)
    limits = HandlerLimits(router, concurrency=1_000, threads=1, transactions=1)
    read, written = (limits.needs(testing.change("order", kind)) for kind in ("READ", "UPDATE"))
    _put(limits.ready_queues, read, 30)
    _put(limits.ready_queues, written, 1, first=100)
    _put(limits.ready_queues, written, 200, first=200)
    order = [number for _, number in _start_all(limits.ready_queues)]
    assert order.index("100") == 10
    assert order.index("29") < order.index("399")


def test_the_keys_of_a_type_start_in_the_order_in_which_they_became_ready() -> None:
    ready_queues = ReadyQueues()
    _put(ready_queues, _A, 3)
    assert _start_all(ready_queues) == [("a", "0"), ("a", "1"), ("a", "2")]


def test_one_type_does_not_take_every_slot_and_what_comes_later_starts_at_once() -> None:
    ready_queues = ReadyQueues(10, sole=False)
    _put(ready_queues, _A, 100)
    assert len(_start_all(ready_queues)) == 6
    _put(ready_queues, _B, 1)
    assert ready_queues.ready == 1
    assert _start_all(ready_queues) == [("b", "0")]


def test_many_types_use_every_slot() -> None:
    ready_queues = ReadyQueues(10, sole=False)
    for number in range(100):
        _put(ready_queues, Requirements(str(number)), 2)
    assert len(_start_all(ready_queues)) == 10


def test_what_waits_for_a_thread_holds_no_slot_and_leaves_threads_to_others() -> None:
    ready_queues = ReadyQueues(100, {"threads": 5}, sole=False)
    _put(ready_queues, _A_SYNC, 50)
    _put(ready_queues, _A, 5)
    started = _start_all(ready_queues)
    assert len(started) == 3 + 5
    _put(ready_queues, _B_SYNC, 5)
    assert _start_all(ready_queues) == [("b", "0")]
    assert ready_queues.ready == 0
    assert ready_queues.waiting(_A_SYNC) == 47


def test_what_a_backfill_reads_shares_the_limit_of_what_was_written() -> None:
    """Else two handlers that hang, with both, would leave no place for a third."""
    ready_queues = ReadyQueues(10, sole=False)
    for needs in (_A, _A._replace(read=True, run=2), _B, _B._replace(read=True, run=2)):
        _put(ready_queues, needs, 100)
        _start_all(ready_queues)
    _put(ready_queues, Requirements("c"), 1)
    assert _start_all(ready_queues) == [("c", "0")]


def test_a_slot_and_its_threads_are_free_again_when_the_change_has_ended() -> None:
    ready_queues = ReadyQueues(3, {"threads": 1})
    _put(ready_queues, _A_SYNC, 2)
    first = change(1)
    assert ready_queues.next() == ([("a", "0")], _A_SYNC)
    ready_queues.started([first], _A_SYNC)
    assert ready_queues.next() is None
    ready_queues.ended([first])
    ready_queues.ended([first])  # it holds nothing any more
    assert ready_queues.ready == 1
    assert ready_queues.next() == ([("a", "1")], _A_SYNC)


def test_a_run_has_several_keys_of_one_queue_but_no_more_than_may_start() -> None:
    quick, other = _A._replace(run=3), _B
    ready_queues = ReadyQueues(7, sole=False)
    _put(ready_queues, quick, 5)
    _put(ready_queues, other, 1)
    assert ready_queues.next() == ([("a", "0"), ("a", "1"), ("a", "2")], quick)
    run = [change(number) for number in range(3)]
    ready_queues.started(run, quick)
    assert ready_queues.next() == ([("b", "0")], other)
    ready_queues.started([change(9)], other)
    assert ready_queues.next() == ([("a", "3")], quick)  # with both, one of seven slots would be left
    ready_queues.started([change(4)], quick)
    ready_queues.ended(run)
    assert ready_queues.next() == ([("a", "4")], quick)


def test_of_several_that_end_together_each_gives_back_its_own() -> None:
    ready_queues = ReadyQueues(10, {"threads": 3}, sole=False)
    changes = [change(number) for number in range(4)]
    for one, needs in zip(changes, (_A, _B_SYNC, _B_SYNC, _A), strict=True):
        ready_queues.started([one], needs)
    _put(ready_queues, _A_SYNC, 9)
    assert ready_queues.ready == 1
    ready_queues.ended(changes)
    assert ready_queues.ready == 2
    assert len(_start_all(ready_queues)) == 2
    ready_queues.ended(changes)  # they hold nothing any more
    assert ready_queues.ready == 0


def test_what_waits_alone_for_a_limit_is_asked_for_with_what_is_ready() -> None:
    """With nothing asked for, its consumer would be given no call of it."""
    router = Router()
    router.on("t", name="send", limit=cdc.Limit(rate="5/s"))(_handle)
    demand = HandlerLimits(router, concurrency=10, threads=1, transactions=1)
    ready_queues = demand.ready_queues
    first, second = change(1, "a"), change(2, "b")
    ready_queues.alone[first] = "send", ""
    assert ready_queues.over_limit() == {("send", ""): 1}
    ready_queues.put(second.key, demand.needs(second))
    assert ready_queues.over_limit() == {("send", ""): 2}


def test_the_keys_of_one_handler_are_offered_whatever_their_type_and_the_rest_stays_in_its_place() -> None:
    ready_queues = ReadyQueues(pools={"threads": 1})
    _put(ready_queues, _A, 3)
    _put(ready_queues, _B, 1)
    _put(ready_queues, _A_SYNC, 1)
    assert ready_queues.take(_ON_LOOP, 2) == [("a", "0"), ("a", "1")]
    ready_queues.put(("a", "0"), _A)
    ready_queues.put_back(("a", "1"), _A)
    assert ready_queues.take(_ON_LOOP, 10) == [("a", "1"), ("a", "2"), ("a", "0"), ("b", "0")]
    assert ready_queues.take(_ON_LOOP, 10) == []
    ready_queues.put_back(("b", "0"), _B)
    assert _start_all(ready_queues) == [("a", "0"), ("b", "0")]
    assert ready_queues.next() is None


@given(
    slots=st.integers(1, 12),
    threads=st.integers(1, 12),
    sole=st.booleans(),
    counts=st.lists(st.integers(0, 8), min_size=4, max_size=4),
    run=st.integers(1, 5),
)
def test_ready_is_zero_if_and_only_if_nothing_can_start(
    slots: int, threads: int, sole: bool, counts: list[int], run: int
) -> None:
    ready_queues = ReadyQueues(slots, {"threads": threads}, sole=sole)
    for needs, count in zip((_A._replace(run=run), _B, _A_SYNC, _B_SYNC), counts, strict=True):
        _put(ready_queues, needs, count)
    running = 0
    while ready_queues.ready:
        turn = ready_queues.next()
        assert turn is not None
        keys, needs = turn
        ready_queues.started([change(running + place) for place in range(len(keys))], needs)
        running += len(keys)
    assert ready_queues.next() is None
    assert running <= slots
