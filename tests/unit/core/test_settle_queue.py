"""Outcomes on their way to the table: each is written once, those of a key in order, whatever the table says."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from cdc.core.model import Processed, Unmarkable
from cdc.core.read_reconciler import Settlement
from cdc.core.settle_queue import SettleQueue
from tests.changes import change

_ANSWERS = ("written", "split", "again", "becomes", "put_back", "some_put_back", "lost")


def _seqs(batch: list[Settlement]) -> list[int]:
    return [finished.change.seq for finished in batch]


@given(
    keys=st.lists(st.sampled_from("abc"), min_size=1, max_size=30),
    answers=st.lists(st.tuples(st.sampled_from(_ANSWERS), st.integers(1, 8), st.booleans()), max_size=60),
)
# The half that is written next belongs to a key that is held, and due.
@example(
    ["a", "a"],
    [("again", 1, True), ("again", 1, True), ("put_back", 2, False), ("written", 1, False), ("split", 2, False),
     ("put_back", 1, False)],
)  # fmt: skip
def test_each_is_written_once_and_in_the_order_of_its_key(
    keys: list[str], answers: list[tuple[str, int, bool]]
) -> None:
    marks, written, now = SettleQueue(), list[Settlement](), 0.0
    coming = [Settlement(change(seq, key, shard=ord(key) % 2), Processed()) for seq, key in enumerate(keys, 1)]
    left = list(coming)

    def report(batch: list[Settlement]) -> None:
        assert marks.written(batch) == batch
        written.extend(batch)

    for answer, limit, more in answers:
        if more and left:
            marks.add(left.pop(0))
        now += 1
        batch = marks.take(limit, now)
        assert len(marks) == len(coming) - len(left) - len(written)
        match answer:
            case "split" if len(batch) > 1:
                marks.split(batch)
            case "again":
                marks.again(batch)
            case "becomes" if len(batch) == 1:
                marks.becomes(Settlement(batch[0].change, Unmarkable("no")))
            case "put_back":
                marks.put_back(batch, now + limit)
            case "some_put_back" if batch:
                key = batch[0].change.key
                marks.put_back([finished for finished in batch if finished.change.key == key], now + limit)
                report([finished for finished in batch if finished.change.key != key])
            case "lost":
                assert len(marks.park()) == len(marks)
                assert marks.maybe_written >= set(_seqs(batch))
                assert marks.take(9, now) == [], "they wait for their shards"
                marks.unpark([0, 1])
            case _:
                report(batch)
    for finished in left:
        marks.add(finished)
    while batch := marks.take(100):
        report(batch)
    assert len(marks) == 0
    assert not marks.holds
    assert not marks.maybe_written
    assert sorted(_seqs(written)) == _seqs(coming), "each once"
    for entity_id in set(keys):
        assert (seqs := _seqs([one for one in written if one.change.entity_id == entity_id])) == sorted(seqs)


def test_of_a_shard_that_had_another_owner_meanwhile_nothing_is_written() -> None:
    marks = SettleQueue()
    for seq, shard in ((1, 0), (2, 1)):
        marks.add(Settlement(change(seq, str(seq), shard=shard), Processed()))
    marks.take(1)
    marks.park()
    assert set(marks.parked) == {0, 1}
    assert _seqs(marks.drop([0])) == [1]
    marks.unpark([1])
    assert _seqs(marks.take(9)) == [2]
    assert marks.maybe_written == set()


def test_a_held_key_is_tried_again_in_its_time_and_keeps_no_other_back() -> None:
    marks = SettleQueue()
    for seq, key in ((1, "a"), (2, "b"), (3, "a")):
        marks.add(Settlement(change(seq, key), Processed()))
    batch = marks.take(9, 0.0)
    marks.put_back([batch[0], batch[2]], 10.0)
    assert marks.written(batch[1:2])
    marks.add(Settlement(change(4, "a"), Processed()))
    marks.add(Settlement(change(5, "b"), Processed()))
    batch = marks.take(9, 5.0)
    assert _seqs(batch) == [5]
    assert marks.written(batch[:1])
    assert marks.wait_s(5.0) == 5.0
    assert _seqs(marks.take(9, 10.0)) == [1, 3, 4]
