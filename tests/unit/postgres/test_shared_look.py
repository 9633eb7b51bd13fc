"""What a store of a subscription need not ask: only what a look, and an answer before it, have shown."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cdc.core.read_planner import Sweep
from cdc.core.shard_cursor import Position, Snapshot
from cdc.core.type_filter import EVERYTHING, TypeFilter
from cdc.postgres.shared_look import KnownAnswers, Seen, SharedLook

_NUMBER = 7


class _Looks:
    """What is seen, and the answers that are known by it."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.known = KnownAnswers(_NUMBER, lambda: self.seen)

    def look(self, **changed: object) -> Seen:
        seen = Seen(
            at=time.monotonic(), snapshot=Snapshot(5, 5), drawn=10, final=True, shares={}, due_s={_NUMBER: None}
        )
        self.seen = replace(seen, **changed)  # type: ignore[arg-type]
        return self.seen

    def finds_nothing(self, sweep: Sweep) -> bool:
        seen = self.known.seen
        return seen is not None and self.known.finds_nothing(sweep, seen)


def _sweep(*shards: int, floor: int = 3, cursor: int = 9, since: int = 4, **changed: object) -> Sweep:
    positions = {shard: Position(floor, cursor, since) for shard in shards or (1, 2)}
    return replace(Sweep(positions, 100, 1), **changed)  # type: ignore[arg-type]


@pytest.fixture
def looks() -> _Looks:
    """A sweep has found nothing, and was looked since."""
    made = _Looks()
    made.known.found_nothing(_sweep(), made.look())
    made.look()
    return made


def test_the_same_sweep_finds_nothing_again_while_no_number_is_drawn(looks: _Looks) -> None:
    assert looks.finds_nothing(_sweep())
    assert looks.finds_nothing(_sweep(1))
    assert looks.finds_nothing(_sweep(floor=4, cursor=10, since=5))
    looks.look(drawn=11)
    assert not looks.finds_nothing(_sweep())


@pytest.mark.parametrize(
    "sweep",
    [
        _sweep(floor=2), _sweep(cursor=8), _sweep(since=3), _sweep(1, 2, 3), _sweep(only="x"),
        _sweep(scope=TypeFilter(("x",), include=True)),
    ],
)  # fmt: skip
def test_a_sweep_that_looks_at_more_is_made(looks: _Looks, sweep: Sweep) -> None:
    assert not looks.finds_nothing(sweep)


def test_a_sweep_of_a_type_says_nothing_about_others() -> None:
    looks = _Looks()
    some = TypeFilter(("x",), include=True)
    looks.known.found_nothing(_sweep(scope=some), looks.look())
    looks.look()
    assert looks.finds_nothing(_sweep(scope=some))
    assert not looks.finds_nothing(_sweep(scope=EVERYTHING))
    looks.known.found_nothing(_sweep(only="x"), looks.look())
    looks.look()
    assert not looks.finds_nothing(_sweep(only="x"))


def test_a_look_that_was_sent_before_the_sweep_was_answered_does_not_answer_the_next_one() -> None:
    looks = _Looks()
    before = looks.look()
    looks.known.found_nothing(_sweep(), before)
    assert not looks.finds_nothing(_sweep())


def test_nothing_is_known_by_a_sweep_while_a_transaction_may_still_bring_a_lower_number() -> None:
    looks = _Looks()
    looks.known.found_nothing(_sweep(), looks.look(final=False))
    looks.look()
    assert not looks.finds_nothing(_sweep())


def test_after_a_doubt_only_a_later_look_counts_and_no_answer(looks: _Looks) -> None:
    looks.known.at_end(looks.seen)
    assert looks.known.is_at_end
    assert looks.known.state() is not None
    looks.known.doubt()
    assert looks.known.seen is None
    assert looks.known.state() is None
    assert not looks.known.is_at_end
    looks.look()
    assert looks.known.seen
    assert not looks.finds_nothing(_sweep())
    assert not looks.known.is_at_end


def test_an_answer_is_not_taken_for_ever(looks: _Looks) -> None:
    looks.look(at=time.monotonic() + 49)
    assert looks.finds_nothing(_sweep())
    looks.look(at=time.monotonic() + 51)
    assert not looks.finds_nothing(_sweep())


@pytest.mark.parametrize(("due_s", "left"), [(None, None), (0.0, 0.0), (2.0, 2.0)])
def test_what_is_due_is_as_it_was_seen(looks: _Looks, due_s: float | None, left: float | None) -> None:
    seen = looks.look(due_s={_NUMBER: due_s})
    found = looks.known.next_due_s(seen)
    assert found is None if left is None else found is not None and left - 1 < found <= left
    assert (looks.known.state() is None) is (due_s is not None)
    assert looks.known.next_due_s(looks.look(due_s={})) is not None, "it was not looked for"


def test_positions_are_at_their_end_until_a_number_is_drawn(looks: _Looks) -> None:
    looks.known.at_end(looks.look())
    looks.look()
    assert looks.known.is_at_end
    looks.look(drawn=11)
    assert not looks.known.is_at_end
    looks.known.at_end(looks.look(final=False))
    looks.look()
    assert not looks.known.is_at_end


_FINAL = [
    # number drawn last, xmin, next id; whether nothing up to it is to come
    [(1, 5, 5, False), (1, 5, 5, True), (1, 9, 9, True), (2, 9, 9, False), (2, 9, 9, True)],
    # One that was open when the id was noted ends later; one that begins after it does not count.
    [(1, 5, 8, False), (1, 5, 8, False), (1, 7, 9, False), (1, 8, 12, True)],
    # After a restore ids begin lower.
    [(1, 90, 90, False), (1, 90, 95, False), (1, 5, 6, False), (1, 6, 6, True)],
]


@pytest.mark.parametrize("looks", _FINAL)
def test_all_numbers_are_to_be_seen_once_no_transaction_is_open_that_may_have_drawn_one(
    looks: list[tuple[int, int, int, bool]],
) -> None:
    shared = SharedLook("public")
    assert [shared._is_final(*look[:3]) for look in looks] == [look[3] for look in looks]  # noqa: SLF001 - its theory
