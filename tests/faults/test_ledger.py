"""Three consumers, three writers, every kind of fault once in a fixed order; then the ledger is judged.

``make chaos`` plays the same faults at random and for as long as one likes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.faults import chaos
from tests.faults.chaos import Draw, Fault
from tests.faults.ledger import Call, Captured, Effect, Evidence, ReplayRound, Span, Write, judge
from tests.faults.records import coalesced_into, read_sessions
from tests.faults.stage import Stage
from tests.fix_consumer import ROOT
from tests.handlers_ledger import MAX_ATTEMPTS, TRUNCATED

_SCHEDULE: list[tuple[Fault, Draw]] = [
    (chaos.kill, Draw(0, "", False, 0.0)),
    *((chaos.terminate, Draw(1, connection, True, 0.0)) for connection in chaos.CONNECTIONS),
    (chaos.freeze_and_lose, Draw(2, "", False, 0.5)),
    (chaos.cut, Draw(0, "", False, 0.0)),
    (chaos.end_operator, Draw(0, "", False, 0.0)),
    (chaos.crash, Draw(0, "", False, 0.0)),
    (chaos.cut_writers, Draw(0, "", False, 0.0)),
    (chaos.hold_and_lose, Draw(1, "", False, 0.4)),
    (chaos.kill, Draw(1, "", False, 0.6)),
    (chaos.drop_slot, Draw(0, "", False, 0.0)),
    (chaos.slow, Draw(0, "", False, 0.5)),
    (chaos.lose_commits, Draw(1, "", False, 0.5)),
    (chaos.lose_answers, Draw(2, "", False, 0.2)),
    (chaos.lose_writers_commits, Draw(0, "", False, 0.0)),
    (chaos.restart, Draw(0, "", False, 0.0)),
    (chaos.freeze, Draw(1, "", False, 0.7)),
    (chaos.freeze_beyond_every_limit, Draw(0, "", False, 0.0)),
    (chaos.replace, Draw(2, "", False, 0.0)),
    (chaos.hold, Draw(2, "", False, 0.2)),
    (chaos.write_odd, Draw(0, "", False, 0.0)),
    (chaos.lock_row, Draw(0, "", False, 0.5)),
    (chaos.lock_table, Draw(0, "", False, 0.5)),
    (chaos.refuse, Draw(0, "", False, 0.2)),
    (chaos.refuse, Draw(0, "", True, 0.5)),
    (chaos.fill_disk, Draw(0, "", False, 0.5)),
    (chaos.cancel, Draw(0, "", False, 0.3)),
    (chaos.deadlock, Draw(0, "", False, 0.0)),
    (chaos.crowd, Draw(1, "", False, 0.5)),
]
_DELAYS = (
    chaos.write_odd, chaos.lock_row, chaos.lock_table, chaos.refuse, chaos.fill_disk, chaos.cancel, chaos.deadlock,
    chaos.write_odd,
)  # fmt: skip
_BETWEEN = 60
"""Changes processed between two faults: the consumers have got over the one before, or are about to."""
_NOT_IN_A_LEDGER = {"cdc: retention", "cdc: doctor", "cdc: observer", "cdc: drain", "cdc: subscription", "cdc: look"}
"""They have tests of their own, are not a consumer's, or are gone when it begins."""


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
@pytest.mark.promise("G8")
def test_nothing_is_lost_and_order_holds_whatever_happens_to_three_consumers(tmp_path: Path) -> None:
    before = "the start"
    with Stage(tmp_path, seed=1) as stage:
        for fault, draw in _SCHEDULE:
            _work_on(stage, f"after {before}")
            fault(stage, draw)
            before = fault.__name__
        found = chaos.verdict(stage)
    assert found.violations == [], str(found)
    assert found.figures["committed"] > len(_SCHEDULE) * _BETWEEN
    # Else the schedule proves nothing.
    assert found.figures["repeated"] > 0
    assert found.figures["unknown"] > 0
    assert found.figures["that shared a transaction"] > 0
    assert found.figures["in batches"] > 0
    assert found.figures["snoozed"] > 0
    for figure in ("coalesced", "truncates", "read", "replayed"):
        assert found.figures[figure] > 0, figure


@pytest.mark.promise("G2")
@pytest.mark.promise("G4")
def test_what_delays_a_mark_or_refuses_it_repeats_no_call_of_an_innocent_change(tmp_path: Path) -> None:
    """Longer than a statement waits for a lock, so that what is known has to be kept meanwhile."""
    with Stage(tmp_path, seed=2) as stage:
        for number, fault in enumerate(_DELAYS):
            _work_on(stage, f"before {fault.__name__}")
            fault(stage, Draw(0, "", False, 0.97 + number / 1000))
        found = chaos.verdict(stage)
    assert found.violations == [], str(found)
    assert found.figures["returned again"] == 0, str(found)
    assert found.figures["captured"] > len(_DELAYS) * _BETWEEN


def _work_on(stage: Stage, when: str) -> None:
    so_far = stage.processed()

    def goes_on() -> bool:
        stage.watch()
        return stage.processed() >= so_far + _BETWEEN

    eventually(goes_on, within_s=60, what=f"work goes on {when}")


def test_the_schedule_of_the_tests_has_every_fault() -> None:
    assert {fault for fault, _ in _SCHEDULE} == set(chaos.WEIGHTS)


def test_every_kind_of_connection_is_among_those_that_are_ended() -> None:
    named = {
        name for path in (ROOT / "cdc").rglob("*.py") for name in re.findall(r'"(cdc: [a-z ]+)"', path.read_text())
    }
    assert named - _NOT_IN_A_LEDGER == set(chaos.CONNECTIONS)


def test_a_seed_means_the_same_faults_in_the_same_order() -> None:
    first, second = (chaos.steps(7, 3, chaos.WEIGHTS) for _ in range(2))
    assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]


# --- the judge can find guilty -------------------------------------------------------------------------------------

_KEY = ("kept_async", "1")
_PAID = ("kept_transactional", "1")


def _fine() -> Evidence:
    """Two changes of a row, handled by one consumer each, the second after the first consumer had lost its session."""
    return Evidence(
        captured=[
            Captured(1, _KEY, "INSERT", None, "a", "processed", 15.0),
            Captured(2, _KEY, "UPDATE", "a", "b", "processed", 25.0),
            Captured(5, _PAID, "INSERT", None, "c", "processed", 32.0),
            Captured(6, _PAID, "UPDATE", "c", "d", "processed", 42.0),
        ],
        calls=[
            Call("one", _KEY, 1, 1, 10.0, 11.0, "returned"),
            Call("two", _KEY, 2, 1, 20.0, 21.0, "returned"),
            Call("two", _PAID, 5, 1, 30.0, 31.0, "returned"),
            Call("two", _PAID, 6, 1, 40.0, 41.0, "returned"),
        ],
        committed={Write("WRITE", token) for token in "abcd"},
        effects=[Effect(1, 5, _PAID, "7"), Effect(3, 6, _PAID, "8")],
        sessions={"one": [Span(0.0, 16.0)], "two": [Span(0.0, 90.0)]},
    )  # fmt: skip


def _lost_in_capture(evidence: Evidence) -> None:
    evidence.committed.add(Write("DELETE", "b"))


def _never_committed(evidence: Evidence) -> None:
    evidence.committed.remove(Write("WRITE", "b"))


def _captured_twice(evidence: Evidence) -> None:
    evidence.captured.append(Captured(3, _KEY, "UPDATE", "b", "b", "processed", 25.0))
    evidence.calls.append(Call("two", _KEY, 3, 1, 22.0, 23.0, "returned"))


def _captured_out_of_order(evidence: Evidence) -> None:
    evidence.captured[1] = evidence.captured[1]._replace(before="x")


def _never_settled(evidence: Evidence) -> None:
    evidence.captured[1] = evidence.captured[1]._replace(state="fresh", settled_at=None)


def _settled_and_never_called(evidence: Evidence) -> None:
    del evidence.calls[1]


def _settled_and_only_cut_off(evidence: Evidence) -> None:
    evidence.calls[1] = evidence.calls[1]._replace(how="cut off")


def _dead_without_reason(evidence: Evidence) -> None:
    evidence.captured[1] = evidence.captured[1]._replace(state="dead")


def _overtaking(evidence: Evidence) -> None:
    evidence.calls[0] = evidence.calls[0]._replace(start=30.0, end=31.0)


def _started_before_the_end(evidence: Evidence) -> None:
    evidence.calls[1] = evidence.calls[1]._replace(start=10.9, end=12.0)


def _two_at_a_time(evidence: Evidence) -> None:
    evidence.calls.append(Call("two", _KEY, 1, 1, 10.5, 10.6, "returned"))


def _again_after_the_settle(evidence: Evidence) -> None:
    evidence.calls.append(Call("two", _KEY, 1, 1, 30.0, 31.0, "returned"))


def _twice_at_a_time_in_one(evidence: Evidence) -> None:
    evidence.calls.append(Call("two", _KEY, 2, 1, 20.5, 20.6, "returned"))


def _long_after_the_session(evidence: Evidence) -> None:
    evidence.calls.append(Call("one", _KEY, 2, 1, 23.0, 24.0, "returned"))


def _unknown_change(evidence: Evidence) -> None:
    evidence.calls.append(Call("two", _KEY, 9, 1, 30.0, 31.0, "returned"))


def _batch_that_overtakes_itself(evidence: Evidence) -> None:
    evidence.calls[:2] = [call._replace(consumer="two", start=10.0, batch=1) for call in reversed(evidence.calls[:2])]


def _batch_that_overtakes_another(evidence: Evidence) -> None:
    evidence.calls[0] = evidence.calls[0]._replace(batch=1)
    evidence.calls[1] = evidence.calls[1]._replace(start=10.5, batch=2)


def _dead_and_not_all_attempts_spent(evidence: Evidence) -> None:
    evidence.kills = 1
    evidence.calls[1] = evidence.calls[1]._replace(how="failed")
    evidence.captured[1] = evidence.captured[1]._replace(state="dead")


def _given_back_by_its_batch_and_never_called_again(evidence: Evidence) -> None:
    evidence.calls[1] = evidence.calls[1]._replace(how="given back")


def _doubled_effect(evidence: Evidence) -> None:
    evidence.effects.append(Effect(4, 6, _PAID, "9"))


def _no_effect(evidence: Evidence) -> None:
    evidence.effects.pop()


def _effects_out_of_order(evidence: Evidence) -> None:
    evidence.effects[:] = [Effect(3, 5, _PAID, "7"), Effect(1, 6, _PAID, "8")]


_SEARCHED = ("kept_latest", "1")
_EMPTIED, _TRUNCATE = (TRUNCATED, "1"), (TRUNCATED, "")


def _with_operators() -> Evidence:
    """The same; and a key of which one call stood for two changes, a TRUNCATE, a READ, replays, and a due event."""
    evidence = _fine()
    evidence.captured += [
        Captured(11, _SEARCHED, "INSERT", None, "e", "processed", 52.0, into=12),
        Captured(12, _SEARCHED, "UPDATE", "e", "f", "processed", 52.0),
        Captured(21, _EMPTIED, "INSERT", None, "g", "processed", 61.0),
        Captured(22, _TRUNCATE, "TRUNCATE", None, None, "processed", 63.0),
        Captured(23, _EMPTIED, "INSERT", None, "h", "processed", 65.0),
        Captured(31, _KEY, "READ", None, "b", "processed", 72.0, backfill=1),
        Captured(41, _KEY, "INSERT", None, "a", "processed", 82.0, replays=1),
        Captured(42, _KEY, "UPDATE", "a", "b", "processed", 85.0, replays=2),
        Captured(51, ("kept_async", "due"), "INSERT", None, "i@50.5", "processed", 58.0),
    ]
    evidence.calls += [
        Call("two", _SEARCHED, 12, 1, 50.0, 51.0, "returned", stood_for=2, old=None, new="f"),
        Call("two", _EMPTIED, 21, 1, 60.0, 60.5, "returned"),
        Call("two", _TRUNCATE, 22, 1, 62.0, 62.5, "returned"),
        Call("two", _EMPTIED, 23, 1, 64.0, 64.5, "returned"),
        Call("two", _KEY, 31, 1, 70.0, 71.0, "returned"),
        Call("two", _KEY, 41, 1, 80.0, 81.0, "returned"),
        Call("two", _KEY, 42, 1, 83.0, 84.0, "returned"),
        Call("two", ("kept_async", "due"), 51, 1, 56.0, 57.0, "returned"),
    ]
    evidence.effects += [Effect(4, 21, _EMPTIED, "9"), Effect(5, 22, _TRUNCATE, "10"), Effect(6, 23, _EMPTIED, "11")]
    evidence.committed |= {Write("WRITE", token) for token in ["e", "f", "g", "h", "i@50.5"]} | {
        Write("TRUNCATE", "22")
    }
    evidence.replays_from = [31]
    evidence.replay_rounds = [ReplayRound(39, 42, frozenset({31}))]
    return evidence


def _change(evidence: Evidence, number: int, **to: Any) -> None:
    place = next(place for place, row in enumerate(evidence.captured) if row.seq == number)
    evidence.captured[place] = evidence.captured[place]._replace(**to)


def _call(evidence: Evidence, seq: int, **to: Any) -> None:
    place = next(place for place, call in enumerate(evidence.calls) if call.seq == seq)
    evidence.calls[place] = evidence.calls[place]._replace(**to)


def _written_in_the_moment(evidence: Evidence, seq: int, *, start: float) -> None:
    """Beside the replays, visible after them; or before it, if its number says so."""
    evidence.captured.append(Captured(seq, _KEY, "UPDATE", "b", "c2", "processed", 99.0))
    evidence.calls.append(Call("two", _KEY, seq, 1, start, start + 1, "returned"))
    evidence.committed.add(Write("WRITE", "c2"))
    if seq <= evidence.replay_rounds[0].before:
        evidence.replay_rounds[0] = evidence.replay_rounds[0]._replace(there=frozenset({31, seq}))


def _written_after(evidence: Evidence, *, start: float) -> None:
    last = max(row for row in evidence.captured if row.key == _KEY and row.is_written)
    evidence.captured.append(Captured(61, _KEY, "UPDATE", last.after, "c3", "processed", 99.5))
    evidence.calls.append(Call("two", _KEY, 61, 1, start, start + 0.2, "returned"))
    evidence.committed.add(Write("WRITE", "c3"))


def _effect(evidence: Evidence, seq: int, number: int) -> None:
    place = next(place for place, effect in enumerate(evidence.effects) if effect.seq == seq)
    evidence.effects[place] = evidence.effects[place]._replace(number=number)


_OF_OPERATORS: list[tuple[Callable[[Evidence], None], str]] = [
    (lambda found: _call(found, 12, new="e"), "not what it stood for"),
    (lambda found: _call(found, 12, old="e"), "not what it stood for"),
    (lambda found: _call(found, 12, stood_for=3), "not what it stood for"),
    (lambda found: _call(found, 12, stood_for=1, old="e"), "lost: 11"),
    (lambda found: _change(found, 11, into=10), "lost: 11"),
    (lambda found: _change(found, 11, into=13), "lost: 11"),
    (lambda found: _change(found, 12, into=11), "lost: 12"),
    (lambda found: _change(found, 12, state="dead"), "lost: 11"),
    (lambda found: found.calls.append(Call("two", _SEARCHED, 11, 1, 53.0, 54.0, "returned", old=None, new="e")),
     "called after it was settled"),
    (lambda found: _call(found, 22, start=60.9), "truncated too early"),
    (lambda found: _change(found, 21, settled_at=None), "truncated too early"),
    (lambda found: _call(found, 23, start=62.9), "truncated too late"),
    (lambda found: _effect(found, 22, 3), "truncated out of order"),
    (lambda found: _effect(found, 22, 7), "truncated out of order"),
    (lambda found: found.effects.append(Effect(9, 22, _TRUNCATE, "12")), "2 effects instead of 1"),
    (lambda found: _call(found, 22, how="cut off"), "lost: 22"),
    (lambda found: found.committed.add(Write("TRUNCATE", "29")), "lost in capture"),
    (lambda found: _change(found, 23, before="g"), "captured out of order"),
    (lambda found: _change(found, 31, after="a"), "captured out of order"),
    (lambda found: _call(found, 31, start=20.5, end=20.6), "out of order"),
    (lambda found: found.captured.append(Captured(32, _KEY, "READ", None, "b", "processed", 79.0, backfill=1)),
     "read 2 times by backfill 1"),
    (lambda found: _change(found, 42, replays=1, before=None, after="a", operation="INSERT"), "replayed twice"),
    (lambda found: _change(found, 42, after="x"), "replays something else"),
    (lambda found: _change(found, 42, replays=99), "replays something else"),
    (lambda found: _change(found, 42, seq=40), "replayed out of order"),
    (lambda found: _call(found, 42, start=79.0, end=79.5), "out of order: 42"),
    (lambda found: _call(found, 31, start=82.0, end=82.5), "out of order: 41"),
    (lambda found: _written_after(found, start=83.5), "out of order: 61"),
    (lambda found: _written_in_the_moment(found, 39, start=86.0), "out of order: 41"),
    (lambda found: found.effects.extend([Effect(7, 41, _KEY, "12"), Effect(8, 31, _KEY, "13")]),
     "effects out of order: 41"),
    (lambda found: _call(found, 51, start=50.0), "called before it was due"),
]  # fmt: skip


@pytest.mark.parametrize(("crime", "named"), _OF_OPERATORS)
def test_the_judge_finds_what_truncates_the_latest_and_operators_do_wrong(
    crime: Callable[[Evidence], None], named: str
) -> None:
    evidence = _with_operators()
    assert judge(evidence).violations == []
    crime(evidence)
    assert any(named in violation for violation in judge(evidence).violations), judge(evidence)


def test_the_judge_acquits_what_the_latest_and_replays_may_do() -> None:
    # All attempts were those of the first, and the last of them stood for both.
    dead = _with_operators()
    _change(dead, 12, state="dead")
    dead.calls[4:5] = [
        Call("two", _SEARCHED, 11, 1, 46.0, 47.0, "failed", old=None, new="e"),
        Call("two", _SEARCHED, 11, 2, 48.0, 49.0, "failed", old=None, new="e"),
        Call("two", _SEARCHED, 12, 3, 50.0, 51.0, "failed", stood_for=2, old=None, new="f"),
    ]
    assert judge(dead).violations == []
    # A replay comes behind what is there, not behind a change that is written in the same moment.
    replay = _with_operators()
    _written_in_the_moment(replay, 40, start=86.0)
    assert judge(replay).violations == []
    # Nor does what comes after that moment come behind it, then: it may have been read by what was written beside it.
    _written_after(replay, start=88.0)
    _call(replay, 42, start=90.0, end=91.0)
    assert judge(replay).violations == []
    # Whether a round was committed before anything else was written is not known, where nobody heard of it.
    unheard = _with_operators()
    unheard.replay_rounds = [ReplayRound(39, None, frozenset({31}))]
    _written_after(unheard, start=82.0)
    assert judge(unheard).violations == []


def test_the_judge_acquits_what_is_allowed() -> None:
    assert judge(_fine()).violations == []
    # What was on its way may have been committed or not.
    undecided = _fine()
    undecided.committed.remove(Write("WRITE", "b"))
    undecided.unknown |= {Write("WRITE", "b"), Write("WRITE", "x")}
    assert judge(undecided).violations == []
    # One that lost its session, at 16, may still be at work on what another has taken over.
    late = _fine()
    late.calls[0] = late.calls[0]._replace(start=15.5, end=18.5, how="cut off")
    late.calls.append(Call("two", _KEY, 1, 1, 17.0, 18.0, "returned"))
    late.captured[0] = late.captured[0]._replace(settled_at=19.0)
    assert judge(late).violations == []
    # A batch is one call of several changes; one that it says has failed may come again after the others.
    batch = _fine()
    batch.calls[:2] = [call._replace(consumer="two", start=10.0, end=11.0, batch=1) for call in batch.calls[:2]]
    assert judge(batch).violations == []
    batch.calls[0] = batch.calls[0]._replace(how="failed")
    batch.calls.append(Call("two", _KEY, 1, 2, 20.0, 21.0, "returned"))
    batch.captured[0] = batch.captured[0]._replace(settled_at=25.0)
    assert judge(batch).violations == []
    # A change that ends each process that touches it.
    poison = _fine()
    poison.captured[0] = poison.captured[0]._replace(state="dead")
    poison.calls[:1] = [Call("one", _KEY, 1, attempt, 9.0 + attempt, 9.5 + attempt, "killed") for attempt in (1, 2, 3)]
    assert judge(poison).violations == []
    # Written down as started, and killed before its handler had begun.
    del poison.calls[2]
    poison.kills = 1
    assert judge(poison).violations == []
    # A call that returned, of which the transaction took longer than it may: nothing is committed.
    undone = _fine()
    undone.captured[3] = undone.captured[3]._replace(state="dead", settled_at=60.0)
    undone.calls[3] = undone.calls[3]._replace(how="failed")
    undone.calls += [
        Call("two", _PAID, 6, attempt, 38.0 + 4 * attempt, 39.0 + 4 * attempt, how)
        for attempt, how in ((2, "returned"), (3, "failed"))
    ]
    del undone.effects[1]
    assert judge(undone).violations == []
    del undone.calls[-1]
    assert any("lost: 6" in violation for violation in judge(undone).violations)
    # And one that was stopped meanwhile does not know it yet.
    stopped = replace(late, paused={"one": [Span(16.0, 40.0)]})
    stopped.calls.append(Call("one", _KEY, 2, 1, 41.0, 42.0, "cut off"))
    assert judge(stopped).violations == []


@pytest.mark.parametrize(
    ("crime", "named"),
    [
        (_lost_in_capture, "lost in capture"),
        (_never_committed, "captured and not committed"),
        (_captured_twice, "captured twice"),
        (_captured_out_of_order, "captured out of order"),
        (_never_settled, "lost: 2"),
        (_settled_and_never_called, "lost: 2"),
        (_settled_and_only_cut_off, "lost: 2"),
        (_dead_without_reason, "lost: 2"),
        (_overtaking, "out of order"),
        (_started_before_the_end, "out of order"),
        (_two_at_a_time, "twice at a time"),
        (_twice_at_a_time_in_one, "twice at a time in one consumer"),
        (_again_after_the_settle, "called after it was settled"),
        (_long_after_the_session, "after the session had ended"),
        (_batch_that_overtakes_itself, "out of order within a batch"),
        (_batch_that_overtakes_another, "out of order: 2"),
        (_dead_and_not_all_attempts_spent, "lost: 2"),
        (_given_back_by_its_batch_and_never_called_again, "lost: 2"),
        (_doubled_effect, "2 effects instead of 1"),
        (_no_effect, "0 effects instead of 1"),
        (_effects_out_of_order, "effects out of order"),
        (_unknown_change, "called for a change that is not there"),
    ],
)
def test_the_judge_finds(crime: Callable[[Evidence], None], named: str) -> None:
    evidence = _fine()
    crime(evidence)
    assert any(named in violation for violation in judge(evidence).violations)


@pytest.mark.parametrize(
    ("entity_type", "effects", "into"),
    [
        ("kept_latest_transactional", set[int](), {1: 3, 2: 3}),
        ("kept_latest_transactional", {2}, {}),
        ("kept_latest", set[int](), {2: 3}),
    ],
)
def test_a_call_in_a_transaction_that_returned_stands_for_others_only_if_it_was_committed(
    entity_type: str, effects: set[int], into: dict[int, int]
) -> None:
    key = entity_type, "8"
    states = {1: "processed", 2: "processed", 3: "dead"}
    rows = [Captured(seq, key, "UPDATE", None, None, state, 60.0) for seq, state in states.items()]
    calls = [
        Call("c", key, 2, 1, 50.0, 51.0, "returned", stood_for=2),
        Call("c", key, 3, MAX_ATTEMPTS, 52.0, 53.0, "failed", stood_for=3),
    ]
    assert coalesced_into(rows, calls, effects) == into


def test_sessions_are_read_from_the_servers_log() -> None:
    log = (
        "10.500 71 LOG:  connection authorized: user=one database=postgres application_name=cdc: shards\n"
        "10.600 72 LOG:  connection authorized: user=one database=postgres application_name=cdc: reader\n"
        "11.000 73 LOG:  connection authorized: user=two database=postgres application_name=cdc: shards\n"
        "12.000 71 LOG:  disconnection: session time: 0:00:01.500 user=one database=postgres host=[local]\n"
    )
    assert read_sessions(log, [9.0, 13.0]) == {"one": [Span(10.5, 12.0)], "two": [Span(11.0, 13.0)]}
