from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.model import SHARDS
from cdc.core.rebalance import NoShardReminder, balance, fair_share


@pytest.mark.parametrize(
    ("members", "expected"), [(0, (64, 64)), (1, (64, 64)), (2, (32, 32)), (3, (21, 22)), (64, (1, 1)), (100, (0, 1))]
)
def test_a_fair_share_is_the_shards_divided_by_the_members(members: int, expected: tuple[int, int]) -> None:
    assert fair_share(members) == expected


def test_the_only_member_takes_every_free_shard() -> None:
    assert balance(1, [], SHARDS).acquire == SHARDS


def test_a_newcomer_gets_its_share_from_those_who_have_more() -> None:
    assert len(balance(2, range(SHARDS), 0).release) == SHARDS // 2
    assert balance(2, [], SHARDS // 2).acquire == SHARDS // 2


@given(st.integers(1, 80), st.randoms(use_true_random=False), st.integers(10, 60))
def test_members_that_come_and_go_end_with_every_shard_owned_and_divided_evenly(
    members: int, dice: object, rounds: int
) -> None:
    """Each round one member looks, with the true figures, and moves; then everybody looks until nothing moves."""
    import random

    assert isinstance(dice, random.Random)
    owned: list[set[int]] = [set() for _ in range(members)]

    def look(member: int) -> bool:
        free = sorted(set(range(SHARDS)) - set().union(*owned))
        move = balance(len(owned), owned[member], len(free))
        owned[member] |= set(free[: move.acquire])
        owned[member] -= move.release
        return bool(move.acquire or move.release)

    for _ in range(rounds):
        if dice.random() < 0.1 and len(owned) > 1:
            owned.pop(dice.randrange(len(owned)))
        if dice.random() < 0.1:
            owned.append(set())
        look(dice.randrange(len(owned)))
    for _ in range(3):
        moved = [look(member) for member in range(len(owned))]
    assert not any(moved), "does not come to rest"
    assert set().union(*owned) == set(range(SHARDS))
    assert sum(map(len, owned)) == SHARDS
    assert max(map(len, owned)) <= fair_share(len(owned))[1]


def test_a_member_that_stays_without_a_shard_says_so_after_a_handing_over_and_every_minute() -> None:
    without = NoShardReminder()
    said = [now for now in range(150) if without.due(0, 2, float(now))]
    assert said == [10, 70, 130]
    assert not without.due(5, 2, 200.0)
    assert not without.due(0, 2, 201.0), "it counts anew"


def test_a_member_for_which_there_is_no_shard_says_nothing() -> None:
    without = NoShardReminder()
    assert not any(without.due(0, SHARDS + 1, float(now)) for now in range(150))
