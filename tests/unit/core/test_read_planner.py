"""What is read next, and when a wake-up may be trusted to keep order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import pytest

from cdc.core import read_planner
from cdc.core.model import WakeUp
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.shard_cursor import REPASS_MAX_S, Scanned, Snapshot
from cdc.core.shard_ownership import Acquired
from cdc.core.type_filter import TypeFilter

_ROOM, _SWEEP_ROOM = 100, 10


@dataclass
class _Room:
    """What could be taken in of the type a."""

    of_a: int = 1_000

    def __call__(self, entity_type: str) -> tuple[int, int]:
        return (self.of_a if entity_type == "a" else 1_000, 1)


@pytest.fixture
def room() -> _Room:
    return _Room()


@pytest.fixture
def planner(room: _Room) -> ReadPlanner:
    """Streaming, one shard that is live, and nothing to read."""
    made = ReadPlanner(sweep_interval_s=5.0, queue_capacity=4, room_for=room)
    made.acquired(Acquired([0]))
    made.streaming(connected=True)
    _pass(made, 0.0, Snapshot(10, 10))
    _pass(made, 0.1, Snapshot(10, 10))
    assert made.live_shards == 1
    assert _ask(made, 0.15) is None
    return made


def _ask(planner: ReadPlanner, now: float) -> Fetch | Sweep | None:
    return planner.next(now, _ROOM, _SWEEP_ROOM)


def _pass(planner: ReadPlanner, now: float, snapshot: Snapshot, *seqs: int) -> Sweep:
    sweep = _ask(planner, now)
    assert isinstance(sweep, Sweep), sweep
    planner.swept(sweep, [WakeUp(seq, 0) for seq in seqs], {}, snapshot, now)
    return sweep


def test_a_shard_taken_over_is_swept_from_its_first_change_on() -> None:
    planner = ReadPlanner(sweep_interval_s=5.0)
    planner.acquired(Acquired([3]))
    sweep = _ask(planner, 0.0)
    assert isinstance(sweep, Sweep)
    assert sweep.positions[3][:2] == (0, 0)


def test_a_live_shard_is_read_by_number(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    assert _ask(planner, 0.2) == Fetch((WakeUp(7, 0),))
    assert _ask(planner, 0.2) is None


def test_a_wake_up_for_somebody_elses_shard_is_ignored(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 1)])
    assert planner.queue_length == 0


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(lambda planner: planner.acquired(Acquired([1])), id="another shard is taken over"),
        pytest.param(lambda planner: planner.wakeups_lost(), id="wake-ups were lost"),
        pytest.param(lambda planner: planner.streaming(connected=False), id="the stream ends"),
        pytest.param(lambda planner: planner.restart(), id="somebody has it all read again"),
        pytest.param(lambda planner: planner.notified([WakeUp(7, 0)], relayed=True), id="a relayed wake-up"),
        pytest.param(
            lambda planner: planner.notified([WakeUp(n, 0) for n in range(9)]), id="more wake-ups than are kept"
        ),
        pytest.param(lambda planner: planner.throttle({"hog": {0: 3}}, 0.15), id="a type has no room"),
    ],
)
def test_where_nothing_was_to_be_read_there_is_something_at_once(
    planner: ReadPlanner, happens: Callable[[ReadPlanner], object]
) -> None:
    happens(planner)
    assert planner.wait_s(0.15) <= REPASS_MAX_S
    assert any(isinstance(_ask(planner, 0.15 + REPASS_MAX_S), Sweep) for _ in range(2))


def test_a_number_that_is_not_visible_is_looked_for_again_within_milliseconds_and_in_every_fetch(
    planner: ReadPlanner,
) -> None:
    planner.notified([WakeUp(7, 0)])
    fetch = _ask(planner, 1.0)
    assert isinstance(fetch, Fetch)
    planner.fetched(fetch, set(), Snapshot(20, 21), 1.0)
    assert planner.wait_s(1.0) == pytest.approx(0.001)
    assert _ask(planner, 1.0) is None
    planner.notified([WakeUp(8, 0)])
    assert _ask(planner, 1.0005) == Fetch((WakeUp(7, 0), WakeUp(8, 0)))


def test_what_did_not_fit_into_a_page_is_fetched_before_what_rang_later(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0), WakeUp(8, 0)])
    fetch = _ask(planner, 1.0)
    assert isinstance(fetch, Fetch)
    planner.notified([WakeUp(9, 0)])
    planner.fetched(fetch, {7}, Snapshot(20, 21), 1.0, [WakeUp(8, 0)])
    assert planner.next(1.0, 1, 1) == Fetch((WakeUp(8, 0),))


def test_what_was_not_visible_and_then_did_not_fit_is_fetched_once_more(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    for cut in ([], [WakeUp(7, 0)]):
        fetch = _ask(planner, 1.1)
        assert fetch == Fetch((WakeUp(7, 0),))
        planner.fetched(fetch, set(), Snapshot(20, 25), 1.0, cut)
    assert _ask(planner, 1.1) == Fetch((WakeUp(7, 0),))
    assert _ask(planner, 1.2) is None


def test_what_did_not_fit_is_left_to_passes_where_the_stream_has_ended_meanwhile(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    fetch = _ask(planner, 1.0)
    assert isinstance(fetch, Fetch)
    planner.streaming(connected=False)
    planner.fetched(fetch, set(), Snapshot(20, 21), 1.0, [WakeUp(7, 0)])
    assert planner.queue_length == 0
    assert isinstance(_ask(planner, 1.0), Sweep)


def test_shards_that_a_full_page_did_not_reach_are_the_first_of_the_next() -> None:
    planner = ReadPlanner(sweep_interval_s=5.0)
    planner.acquired(Acquired([1, 2, 3]))
    sweep = _ask(planner, 0.0)
    assert isinstance(sweep, Sweep)
    ends = {1: Scanned(10, more=False), 2: Scanned(11, more=True), 3: Scanned(0, more=True)}
    planner.swept(sweep, [WakeUp(10, 1), WakeUp(11, 2)], {}, Snapshot(20, 21), 0.0, scanned=ends)
    sweep = _ask(planner, 0.0)
    assert isinstance(sweep, Sweep)
    assert [(shard, position.cursor) for shard, position in sweep.positions.items()] == [(3, 0), (2, 11)]


def test_the_looks_for_a_hanging_commit_come_at_most_a_twentieth_of_a_second_apart(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    now, looks = 1.0, 0
    while now < 2.0:
        fetch = _ask(planner, now)
        assert isinstance(fetch, Fetch)
        planner.fetched(fetch, set(), Snapshot(20, 21), now)
        assert planner.wait_s(now) <= 0.05 + 1e-9
        now += planner.wait_s(now)
        looks += 1
    assert 20 <= looks <= 40


def test_a_number_whose_transaction_has_ended_unseen_was_settled_before_and_is_forgotten(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    fetch = _ask(planner, 1.0)
    assert isinstance(fetch, Fetch)
    planner.fetched(fetch, set(), Snapshot(20, 21), 1.0)
    fetch = _ask(planner, 1.1)
    assert isinstance(fetch, Fetch)
    planner.fetched(fetch, set(), Snapshot(21, 22), 1.1)
    assert _ask(planner, 1.2) is None


def test_a_number_that_stays_invisible_for_a_minute_is_left_to_passes_through_its_shard(planner: ReadPlanner) -> None:
    """Else its successor, which is written once it is visible, would be fetched before it."""
    planner.notified([WakeUp(7, 0)])
    for now, given_up in ((1.0, 0), (60.9, 0), (61.1, 1)):
        assert planner.live_shards == 1
        while isinstance(fetch := _ask(planner, now), Sweep):  # a periodic one
            planner.swept(fetch, [], {}, Snapshot(20, 21), now)
        assert fetch == Fetch((WakeUp(7, 0),))
        assert planner.fetched(fetch, set(), Snapshot(20, 21), now).given_up == given_up
    assert (planner.live_shards, planner.uncommitted) == (0, 0)
    planner.notified([WakeUp(8, 0)])
    _pass(planner, 61.1, Snapshot(22, 22), 7, 8)


def test_more_invisible_numbers_than_are_remembered_are_left_to_passes_through_their_shard(
    planner: ReadPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_planner, "_UNSEEN_MAX", 1)
    planner.notified([WakeUp(7, 0), WakeUp(8, 0)])
    fetch = _ask(planner, 1.0)
    assert isinstance(fetch, Fetch)
    assert planner.fetched(fetch, set(), Snapshot(20, 21), 1.0).given_up == 1
    assert planner.live_shards == 0
    _pass(planner, 1.0, Snapshot(22, 22), 7, 8)


def test_dropped_wake_ups_are_counted_and_their_shard_is_swept_until_the_loss_is_proved_harmless(
    planner: ReadPlanner,
) -> None:
    assert planner.notified([WakeUp(seq, 0) for seq in range(1, 8)]) == 3
    _pass(planner, 1.0, Snapshot(30, 40), 1, 2, 3)
    assert planner.live_shards == 0, "transactions up to 39 may have notified and be invisible still"
    _pass(planner, 1.1, Snapshot(39, 50))
    assert planner.live_shards == 0
    _pass(planner, 1.2, Snapshot(40, 50))
    assert planner.live_shards == 1


def test_a_sweep_that_was_under_way_when_wake_ups_were_lost_proves_nothing(planner: ReadPlanner) -> None:
    planner.wakeups_lost()
    sweep = _ask(planner, 1.0)
    assert isinstance(sweep, Sweep)
    planner.wakeups_lost()
    planner.swept(sweep, [], {}, Snapshot(30, 30), 1.0)
    _pass(planner, 1.1, Snapshot(30, 31))
    assert planner.live_shards == 0
    _pass(planner, 1.2, Snapshot(31, 31))
    assert planner.live_shards == 1


def test_the_floor_rises_only_when_no_open_transaction_can_bring_a_lower_number(planner: ReadPlanner) -> None:
    planner.wakeups_lost()
    _pass(planner, 1.0, Snapshot(30, 40), 5, 9)
    assert _pass(planner, 1.1, Snapshot(39, 41)).positions[0] == (0, 9, 30)
    assert _pass(planner, 1.2, Snapshot(40, 42)).positions[0] == (0, 9, 39)
    planner.wakeups_lost()
    assert _pass(planner, 1.3, Snapshot(42, 42)).positions[0] == (9, 9, 40)


def test_a_full_page_is_followed_by_the_next_from_where_it_ended() -> None:
    planner = ReadPlanner(sweep_interval_s=5.0)
    planner.acquired(Acquired([0]))
    first = planner.next(0.0, 2, 1)
    assert isinstance(first, Sweep)
    planner.swept(first, [WakeUp(4, 0), WakeUp(6, 0)], {}, Snapshot(10, 10), 0.0)
    second = planner.next(0.0, 2, 1)
    assert isinstance(second, Sweep)
    assert second.positions[0].cursor == 6


def test_what_could_not_be_taken_in_is_read_again_from_there_and_apart_from_the_other_types(
    planner: ReadPlanner,
) -> None:
    planner.wakeups_lost()
    sweep = _ask(planner, 1.0)
    assert isinstance(sweep, Sweep)
    planner.swept(sweep, [WakeUp(5, 0), WakeUp(9, 0)], {"a": {0: 9}}, Snapshot(30, 30), 1.0)
    throttled, others = _ask(planner, 1.6), _ask(planner, 1.6)
    assert isinstance(throttled, Sweep)
    assert isinstance(others, Sweep)
    assert (throttled.only, throttled.scope, throttled.positions[0]) == (
        "a",
        TypeFilter(("a",), include=True),
        (0, 8, 30),
    )
    assert (others.only, others.scope, others.positions[0]) == (None, TypeFilter(("a",)), (0, 9, 30))


def test_a_sweep_waits_for_room_half_a_second_and_a_fetch_does_not_wait(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    planner.wakeups_lost()
    assert isinstance(planner.next(1.0, 100, 10), Sweep)
    assert planner.next(1.4, 9, 10) is None
    assert planner.wait_s(1.4) <= 0.5
    assert isinstance(planner.next(1.4, 10, 10), Sweep)
    assert isinstance(planner.next(2.0, 1, 10), Sweep)


def test_relayed_wake_ups_make_a_shard_be_swept_at_once_and_never_read_by_number(planner: ReadPlanner) -> None:
    planner.streaming(connected=False)
    _pass(planner, 1.0, Snapshot(30, 30))
    _pass(planner, 1.0 + planner.wait_s(1.0), Snapshot(30, 30))
    assert planner.live_shards == 0
    planner.notified([WakeUp(7, 0)])
    assert planner.queue_length == 0
    _pass(planner, 1.5, Snapshot(30, 30), 7)


@pytest.fixture
def relayed_to(planner: ReadPlanner) -> ReadPlanner:
    """The same without a stream, after so many looks without anything new that only the periodic sweep is left."""
    planner.streaming(connected=False)
    now = 1.0
    while (wait_s := planner.wait_s(now)) < 2.0:
        now += wait_s
        _pass(planner, now, Snapshot(30, 30))
    assert now < 3.0
    return planner


def test_lost_wake_ups_have_a_shard_swept_at_once_of_which_only_the_periodic_sweep_was_left(
    relayed_to: ReadPlanner,
) -> None:
    assert _ask(relayed_to, 3.0) is None
    relayed_to.wakeups_lost()
    assert relayed_to.wait_s(3.0) <= REPASS_MAX_S
    _pass(relayed_to, 3.0, Snapshot(30, 30), 7)


def test_a_relayed_wake_up_whose_change_a_pass_shows_is_done_with(relayed_to: ReadPlanner) -> None:
    relayed_to.notified([WakeUp(7, 0), WakeUp(8, 0)])
    _pass(relayed_to, 3.0, Snapshot(30, 30), 7, 8)
    assert relayed_to.wait_s(3.0) > 1.0


def test_a_relayed_wake_up_that_came_too_early_is_looked_for_again_within_milliseconds(relayed_to: ReadPlanner) -> None:
    relayed_to.notified([WakeUp(7, 0), WakeUp(8, 0)])
    _pass(relayed_to, 3.0, Snapshot(30, 30), 8)
    assert relayed_to.wait_s(3.0) < 0.01
    _pass(relayed_to, 3.0 + relayed_to.wait_s(3.0), Snapshot(30, 30), 7)
    assert relayed_to.wait_s(3.1) > 1.0


def test_a_relayed_wake_up_whose_change_a_pass_has_shown_before_says_nothing_new(relayed_to: ReadPlanner) -> None:
    relayed_to.notified([WakeUp(7, 0)])
    _pass(relayed_to, 3.0, Snapshot(30, 30), 7, 8)
    relayed_to.notified([WakeUp(8, 0)])
    assert _ask(relayed_to, 3.1) is None


def test_of_what_passes_have_shown_before_its_wake_up_the_newest_is_remembered(relayed_to: ReadPlanner) -> None:
    relayed_to.notified([WakeUp(1, 0)])
    for page in range(1, 3000, 50):
        _pass(relayed_to, 3.0, Snapshot(30, 30), *range(page, page + 50))
        relayed_to.notified([WakeUp(page + 50, 0)])
    _pass(relayed_to, 3.0, Snapshot(30, 30), 3001)
    relayed_to.notified([WakeUp(seq, 0) for seq in (2990, 2010)])
    assert _ask(relayed_to, 3.1) is None
    relayed_to.notified([WakeUp(1970, 0)])  # one in fifty was shown after its wake-up, and is not remembered
    _pass(relayed_to, 3.1, Snapshot(30, 30))


def test_more_relayed_wake_ups_than_are_remembered_make_the_passes_go_on_for_a_while(relayed_to: ReadPlanner) -> None:
    relayed_to.notified([WakeUp(seq, 0) for seq in range(7, 1000)])
    _pass(relayed_to, 3.0, Snapshot(30, 30), *range(7, 57))
    assert relayed_to.wait_s(3.0) < 0.01


def test_the_periodic_sweep_comes_round_and_now_and_then_begins_at_zero(planner: ReadPlanner) -> None:
    now, fulls = 0.0, 0
    for _ in range(30):
        now += 5.0
        if planner.full_pass_due(now):
            fulls += 1
            assert list(planner.restart()) == [0]
        _pass(planner, now, Snapshot(50, 50))
    assert fulls == 2


def test_a_shard_given_away_during_a_fetch_leaves_nothing_to_look_for(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)])
    fetch = _ask(planner, 1.0)
    assert isinstance(fetch, Fetch)
    planner.revoked([0])
    planner.fetched(fetch, set(), Snapshot(20, 21), 1.0)
    assert _ask(planner, 1.1) is None
    assert planner.wait_s(1.1) > 0


def test_a_relayed_wake_up_is_swept_for_also_by_who_believes_to_stream(planner: ReadPlanner) -> None:
    planner.notified([WakeUp(7, 0)], relayed=True)
    assert planner.queue_length == 0
    assert isinstance(_ask(planner, 1.0), Sweep)


def test_a_page_of_an_earlier_stay_of_the_shard_does_not_count() -> None:
    planner = ReadPlanner(sweep_interval_s=5.0)
    planner.acquired(Acquired([0]))
    sweep = _ask(planner, 0.0)
    assert isinstance(sweep, Sweep)
    planner.revoked([0])
    planner.acquired(Acquired([0]))
    planner.swept(sweep, [WakeUp(7, 0)], {}, Snapshot(10, 10), 0.0)
    again = _ask(planner, 0.0)
    assert isinstance(again, Sweep)
    assert again.positions[0].cursor == 0


def _sweep(planner: ReadPlanner, now: float, only: str | None) -> Sweep:
    """The next sweep of that kind; whatever else is asked for before is answered with nothing new."""
    for _ in range(4):
        request = _ask(planner, now)
        assert request is not None
        if isinstance(request, Sweep) and request.only == only:
            return request
        if isinstance(request, Sweep):
            planner.swept(request, [], {}, Snapshot(100, 100), now)
    raise AssertionError(f"no sweep of {only}")


def test_a_type_that_has_no_room_is_read_on_when_it_has_some_and_its_shard_stays_live(
    planner: ReadPlanner, room: _Room
) -> None:
    room.of_a = 0
    planner.throttle({"a": {0: 7}}, 1.0)
    assert (list(planner.throttled), planner.live_shards) == (["a"], 1)
    assert _ask(planner, 1.0) is None
    planner.notified([WakeUp(8, 0)])
    assert isinstance(_ask(planner, 1.0), Fetch)
    room.of_a = 50
    throttled = _sweep(planner, 1.0, "a")
    assert (throttled.per_shard, throttled.positions[0].cursor) == (50, 0)


def test_a_type_that_was_refused_though_it_had_room_is_not_read_sooner_whatever_wake_ups_come(
    planner: ReadPlanner,
) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    planner.notified([WakeUp(8, 0)])
    fetch = _ask(planner, 1.1)
    assert isinstance(fetch, Fetch)
    planner.fetched(fetch, {8}, Snapshot(90, 95), 1.1)
    planner.skipped("a", 0)
    assert _ask(planner, 1.4) is None
    assert planner.wait_s(1.4) == pytest.approx(REPASS_MAX_S - 0.4)
    assert _sweep(planner, 1.0 + REPASS_MAX_S, "a").positions[0].cursor == 0


def test_a_type_that_has_caught_up_is_no_longer_read_apart(planner: ReadPlanner) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    planner.swept(_sweep(planner, 2.0, "a"), [WakeUp(7, 0)], {}, Snapshot(90, 95), 2.0)
    assert list(planner.throttled) == []
    assert _ask(planner, 2.0) is None


def test_where_a_type_is_joined_again_the_passes_go_on_at_the_lower_of_the_two_positions(
    planner: ReadPlanner, room: _Room
) -> None:
    planner.acquired(Acquired([1]))
    planner.throttle({"a": {0: 7}}, 1.0)
    sweep = _sweep(planner, 2.0, "a")
    room.of_a = 0
    planner.swept(sweep, [WakeUp(7, 0)], {"a": {1: 9}}, Snapshot(80, 90), 2.0)
    planner.wakeups_lost()
    planner.swept(_sweep(planner, 2.0, None), [WakeUp(20, 0), WakeUp(21, 1)], {}, Snapshot(95, 96), 2.0)
    room.of_a = 50
    sweep = _sweep(planner, 2.0005, "a")
    assert set(sweep.positions) == {1}
    planner.swept(sweep, [WakeUp(9, 1)], {}, Snapshot(97, 98), 2.0005)
    assert list(planner.throttled) == []
    joined = _sweep(planner, 3.0, None).positions
    assert (joined[0].since, joined[1].since) == (80, 95)


def test_a_type_whose_page_was_full_or_that_was_refused_again_has_not_caught_up(planner: ReadPlanner) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    sweep = _sweep(planner, 2.0, "a")
    rows = [WakeUp(seq, 0) for seq in range(1, sweep.per_shard + 1)]
    planner.swept(sweep, rows, {}, Snapshot(90, 95), 2.0)
    assert _sweep(planner, 2.0, "a").positions[0].cursor == sweep.per_shard
    again = _sweep(planner, 2.0, "a")
    planner.swept(again, [WakeUp(200, 0)], {"a": {0: 200}}, Snapshot(91, 95), 2.0)
    assert list(planner.throttled) == ["a"]
    assert _sweep(planner, 3.0, "a").positions[0].cursor == 199


def test_what_a_fetch_shows_of_a_type_that_is_read_apart_is_read_again_before_it_is_joined(
    planner: ReadPlanner,
) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    sweep = _sweep(planner, 2.0, "a")
    planner.skipped("a", 0)
    planner.acquired(Acquired([1]))  # nothing of it is known yet: the type has not caught up there
    planner.swept(sweep, [], {}, Snapshot(90, 95), 2.0)
    assert list(planner.throttled) == ["a"]


def test_the_proof_that_a_shard_is_live_has_what_is_read_apart_read_once_more(
    planner: ReadPlanner, room: _Room
) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    planner.acquired(Acquired([1]))
    throttled = _sweep(planner, 2.0, "a")
    room.of_a = 0
    planner.swept(throttled, [], {"a": {1: 9}}, Snapshot(90, 95), 2.0)
    planner.throttled["a"][0].repass_at = inf  # as after hours without a wake-up
    planner.wakeups_lost()
    for now, xid in ((3.0, 96), (3.1, 98)):
        planner.swept(_sweep(planner, now, None), [], {}, Snapshot(xid, xid + 1), now)
    assert planner.live_shards == 2
    room.of_a = 50
    assert set(_sweep(planner, 3.3, "a").positions) == {0, 1}, "not only what was refused"


def test_a_page_that_stopped_at_its_bound_of_rows_looked_at_is_followed_by_the_next_from_there(
    planner: ReadPlanner,
) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    sweep = _sweep(planner, 2.0, "a")
    planner.swept(sweep, [], {}, Snapshot(90, 95), 2.0, scanned={0: Scanned(500, more=True)})
    further = _sweep(planner, 2.0, "a")
    assert further.positions[0].cursor == 500
    planner.swept(further, [], {}, Snapshot(90, 95), 2.0, scanned={0: Scanned(800, more=False)})
    assert list(planner.throttled) == []


def test_types_that_are_read_apart_take_turns(planner: ReadPlanner) -> None:
    planner.throttle({"a": {0: 7}, "b": {0: 8}}, 1.0)
    asked = [_ask(planner, 2.0 + n) for n in range(6)]
    assert {"a", "b", None} <= {sweep.only for sweep in asked if isinstance(sweep, Sweep)}


def test_a_lost_session_ends_what_is_read_apart(planner: ReadPlanner) -> None:
    planner.throttle({"a": {0: 7}}, 1.0)
    sweep = _sweep(planner, 2.0, "a")
    planner.revoked([0])
    assert list(planner.throttled) == []
    planner.acquired(Acquired([0]))
    assert planner.swept(sweep, [WakeUp(7, 0)], {}, Snapshot(90, 95), 2.0) == 0


def test_a_long_pass_from_zero_is_not_soon_followed_by_another(planner: ReadPlanner) -> None:
    now, begun = 0.0, list[float]()
    for _ in range(80):
        now += 5.0
        if planner.full_pass_due(now):
            begun.append(now)
            planner.restart()
        sweep = _ask(planner, now)
        now += 10.0 if begun and begun[-1] == now else 0.0
        assert isinstance(sweep, Sweep)
        planner.swept(sweep, [], {}, Snapshot(50, 50), now)
    assert len(begun) == 2
    assert begun[1] - begun[0] >= 200.0
