"""What a pause holds for the handlers of one consumer."""

from __future__ import annotations

import pytest

from cdc.core.admission import Admission
from cdc.core.pauses import Held, Pause, Pauses
from cdc.core.router import Router
from cdc.core.scheduler import KeyScheduler
from cdc.core.shard_ownership import Acquired
from tests.changes import EPOCH, change, row


@pytest.fixture
def router() -> Router:
    """``order`` has two handlers, ``letter`` shares one with ``parcel``, the rest is for ``others``."""
    router = Router()

    def handles(name: str, *rules: tuple[str, ...]) -> None:
        async def handler(change: object) -> None: ...

        handler.__qualname__ = name
        for rule in rules:
            router.on(*rule)(handler)

    handles("welcome", ("order", "INSERT"))
    handles("invoice", ("order", "UPDATE"))
    handles("post", ("letter",), ("parcel", "INSERT"))
    handles("others", ("*",))
    return router


@pytest.mark.parametrize(
    ("pause", "held"),
    [
        (Pause(1), "order letter parcel unnamed"),
        (Pause(1, entity_type="order"), "order"),
        (Pause(1, entity_type="unnamed"), "unnamed"),
        (Pause(1, handler="welcome"), "order"),
        (Pause(1, handler="post"), "letter parcel"),
        (Pause(1, handler="others"), "order parcel unnamed"),
        (Pause(1, handler="others", entity_type="parcel"), "parcel"),
        (Pause(1, handler="others", entity_type="unnamed"), "unnamed"),
        (Pause(1, handler="post", entity_type="order"), ""),
        (Pause(1, handler="nobody"), ""),
        (Pause(1, entity_type="order", entity_id="1"), ""),
    ],
)
def test_a_pause_holds_whole_types(router: Router, pause: Pause, held: str) -> None:
    pauses = Pauses([pause], router)
    names = ["order", "letter", "parcel", "unnamed"]
    assert [name for name in names if pauses.holds(name)] == held.split()
    if not pauses.everything:
        assert [name for name in names if not pauses.going.has(name)] == held.split()


def test_pauses_add_up(router: Router) -> None:
    pauses = Pauses([Pause(1, handler="others"), Pause(2, entity_type="letter"), Pause(3, handler="post")], router)
    assert all(map(pauses.holds, ("order", "letter", "parcel", "unnamed")))
    assert not pauses.everything


def test_a_key_is_held_alone() -> None:
    pauses = Pauses([Pause(1, entity_type="order", entity_id="1")])
    assert pauses.hold(("order", "1"))
    assert not pauses.hold(("order", "2"))
    assert not pauses.hold(("letter", "1"))


@pytest.mark.parametrize("due", [True, False])
def test_a_held_type_is_rejected_and_a_held_key_put_aside(due: bool) -> None:
    held = Held()
    assert held.admission(change(1), due=due) is None
    held.become(Pauses([Pause(1, entity_type="t")]))
    assert held.admission(change(1), due=due) is Admission.REJECT
    held.become(Pauses([Pause(1, entity_type="t", entity_id="k")]))
    assert held.admission(change(1), due=due) is (Admission.RUNS_LATER if due else Admission.DEFER_BLOCKED)
    assert held.due == ({1} if due else set())
    assert list(held.become(Pauses())) == [("t", "k")]
    assert not held.due


@pytest.fixture
def scheduler() -> KeyScheduler:
    scheduler = KeyScheduler(100)
    scheduler.ownership.acquire(Acquired([0], [], [], EPOCH))
    return scheduler


def test_what_is_queued_of_a_held_type_leaves_the_window_and_what_runs_stays(scheduler: KeyScheduler) -> None:
    scheduler.admit([row(1, "a"), row(2, "a"), row(3, "b")])
    run = scheduler.start()
    scheduler.hold(Pauses([Pause(1, entity_type="t")]))
    assert (scheduler.running, scheduler.queued) == (len(run.changes), 0)
    assert not scheduler.start().changes
    assert scheduler.room_for("t").free == 0
    assert scheduler.admit([row(4, "c")]).rejected == {"t": {0: 4}}
    scheduler.hold(Pauses())
    assert scheduler.admit([row(4, "c")]).taken == 1


@pytest.mark.parametrize("paused", [Pause(1, entity_type="t", entity_id="a"), Pause(1, entity_type="t")])
def test_what_leaves_the_window_by_a_pause_is_not_overtaken_by_what_its_key_is_marked_from(paused: Pause) -> None:
    scheduler = KeyScheduler(100, 1)
    scheduler.ownership.acquire(Acquired([0], [], [], EPOCH))
    scheduler.admit([row(1, "a"), row(2, "a")])
    scheduler.hold(Pauses([paused]))
    scheduler.hold(Pauses())
    assert [read.seq for read in scheduler.key_reads(10)] in ([], [1])
    scheduler.admit([row(2, "a")])
    assert not scheduler.start().changes


def test_what_leaves_the_window_by_a_pause_is_not_overtaken_by_what_a_read_brings_that_was_under_way(
    scheduler: KeyScheduler,
) -> None:
    scheduler.admit([row(1, "a")])
    with scheduler.reading:
        scheduler.hold(Pauses([Pause(1, entity_type="t", entity_id="a")]))
        scheduler.hold(Pauses())
        scheduler.admit([row(2, "a")])
    assert not scheduler.start().changes
    [read] = scheduler.key_reads(10)
    assert read.seq == 1


def test_a_held_key_is_read_on_when_it_is_resumed_and_not_before(scheduler: KeyScheduler) -> None:
    scheduler.hold(Pauses([Pause(1, entity_type="t", entity_id="a")]))
    assert scheduler.admit([row(1, "a"), row(2, "b"), row(3, "a")]).taken == 1
    assert not scheduler.key_reads(10)
    scheduler.hold(Pauses([Pause(1, entity_type="t", entity_id="a"), Pause(2, entity_type="t")]))
    assert not scheduler.key_reads(10)
    scheduler.hold(Pauses([Pause(2, entity_type="t")]))
    assert not scheduler.key_reads(10)
    scheduler.hold(Pauses())
    [read] = scheduler.key_reads(10)
    assert (read.key, read.seq) == (("t", "a"), 1)
    scheduler.admit_key_read(read, [row(1, "a"), row(3, "a")], complete=True)
    assert scheduler.queued == 2, "of b nothing is left, as its type was held"


def test_what_was_cut_off_of_a_held_key_waits_for_it(scheduler: KeyScheduler) -> None:
    scheduler.admit([row(1, "a"), row(2, "a")])
    [started] = scheduler.start().changes
    scheduler.hold(Pauses([Pause(1, entity_type="t", entity_id="a")]))
    scheduler.interrupted(started)
    assert not scheduler.key_reads(10)
    scheduler.hold(Pauses())
    [read] = scheduler.key_reads(10)
    assert read.seq == 1
