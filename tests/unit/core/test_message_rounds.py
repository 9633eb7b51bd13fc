"""What is sent to a broker together, and whom a lost connection is blamed on."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cdc.core.deliveries import AwayError, DeliveryError, LostError, UnreachedError
from cdc.core.message_rounds import MessageRounds
from cdc.core.model import Change
from tests.changes import change

Results = Sequence[Exception | None]


def _deliver(policy: MessageRounds, changes: Sequence[Change], poison: Change) -> tuple[list[int], Results]:
    """Numbers of changes in each part that is sent, and the last results. The poison loses all it is sent with."""
    sizes: list[int] = []
    results: Results = []
    for each_once in policy.rounds(changes):
        due = each_once
        while due:
            count = policy.together(due)
            part, due = due[:count], due[count:]
            sizes.append(count)
            results = policy.ended(part, [LostError("lost") if poison in part else None] * count)
            if poison in part:
                return sizes, results
    return sizes, results


def test_all_is_sent_together_until_something_is_lost_and_then_one_first() -> None:
    policy, changes = MessageRounds(), [change(n, f"k{n}") for n in range(5)]
    assert policy.together(changes) == 5
    policy.ended(changes, [LostError("lost")] * 5)
    assert policy.together(changes) == 1
    policy.ended(changes[:1], [UnreachedError("away")])
    assert policy.together(changes) == 1
    policy.ended(changes[:1], [None])
    assert policy.together(changes[1:]) == 4


def test_a_change_that_ends_its_connection_each_time_fails_in_the_end_and_the_others_go_through() -> None:
    policy, changes = MessageRounds(), [change(n, f"k{n}") for n in range(5)]
    poison = changes[2]
    attempts = []
    for _ in range(30):
        sizes, results = _deliver(policy, changes, poison)
        attempts.append(sizes)
        if isinstance(results[-1], DeliveryError):
            break
    assert attempts[:2] == [[5], [1, 4]]
    assert (sum(attempts[-1]), attempts[-1][-1]) == (5, 1), "it is alone, behind the others"
    assert len(attempts) <= 14


def test_an_outage_is_nobodys_fault() -> None:
    policy, changes = MessageRounds(), [change(n, f"k{n}") for n in range(3)]
    for _ in range(50):
        results = policy.ended(changes, [LostError("lost")] * 3)
        assert all(type(each) is LostError for each in results)
        policy.ended(changes[:1], [UnreachedError("away")])
    policy.ended(changes[:1], [None])
    assert policy.together(changes) == 3


def test_a_broker_that_takes_nothing_is_nobodys_fault_either() -> None:
    policy, changes = MessageRounds(), [change(n, f"k{n}") for n in range(3)]
    for _ in range(50):
        results = policy.ended(changes, [None, None, AwayError("full")])
    assert type(results[2]) is AwayError
    assert policy.together(changes) == 3


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_a_round_has_a_key_once_and_the_rounds_have_each_key_in_its_order(keys: list[str]) -> None:
    changes = [change(n, key) for n, key in enumerate(keys)]
    rounds = MessageRounds().rounds(changes)
    assert all(len({each.key for each in due}) == len(due) for due in rounds)
    for key in set(keys):
        found = [each.seq for due in rounds for each in due if each.entity_id == key]
        assert found == [each.seq for each in changes if each.entity_id == key]
