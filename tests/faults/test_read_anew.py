"""A change whose fate only the table knows is read anew, whatever happens meanwhile: its key never stays shut."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cdc.careful import Careful
from cdc.journal import Finished
from cdc.lanes import Lanes
from cdc.model import Change, Waiting
from cdc.outbox.store import Store
from cdc.transactions import AskTheTableError
from cdc.workers import Workers
from tests.unit.changes import row


def test_a_waiting_change_that_is_interrupted_is_due_again() -> None:
    """It has later changes behind it: the mark that holds those must not hold the change itself."""
    lanes = Lanes(10)
    lanes.own([0])
    lanes.admit([row(1), row(2)])
    [first] = lanes.start()
    lanes.finished([Finished(first, Waiting(0.1, "no"))])
    lanes.settled(lanes.take_finished(10))
    lanes.admit([row(1)])  # due
    [again] = lanes.start()
    lanes.interrupted(again)
    for resume in lanes.resumes(10):
        lanes.resumed(resume, [row(2, held=True)], complete=True)
    assert lanes.admit([row(1)]).taken == 1, "it is due, and nobody else will run it"


def test_what_is_queued_behind_a_waiting_change_that_is_interrupted_is_not_forgotten() -> None:
    """A half-dead consumer commits the waiting one while it is asked for here: those behind it are held no longer."""
    lanes = Lanes(10)
    lanes.own([0])
    lanes.admit([row(1, requeued=True)], due=True)
    [started] = lanes.start()
    lanes.admit([row(2)])
    lanes.interrupted(started)
    for resume in lanes.resumes(10):
        lanes.resumed(resume, [row(2)], complete=True)
    lanes.admit([row(3)])
    [following] = lanes.start()
    assert following.seq == 2, "and nothing overtakes it"


class _Unknown:
    """A runner that never learns what became of a change."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def handler(self, change: Change) -> None:
        return None

    def in_thread(self, change: Change) -> bool:
        return False

    def lost(self, change: Change) -> bool:
        return False

    def interrupted(self, change: Change) -> None:
        pass

    def session_lost(self) -> None:
        pass

    def at_once(self, handler: None, changes: Sequence[Change]) -> tuple[list[Finished], None]:
        return [], None

    async def run(self, handler: None, batch: Sequence[Change]) -> None:
        self.asked.set()
        raise AskTheTableError("the connection was lost")


async def test_a_session_lost_while_a_worker_waits_to_read_anew_leaves_the_key_open() -> None:
    """As at every restart of a server: the handler's connection ends first, the session a moment later."""
    lanes = Lanes(10)
    lanes.own([0])
    lanes.admit([row(1)])
    runner = _Unknown()
    workers = Workers(
        lanes, runner, 1, connections=1, careful=Careful(Store("public"), 1),  # type: ignore[arg-type]
        finished=lambda *_: None, read_anew=lambda: None,
    )  # fmt: skip
    workers.hand_out()
    await runner.asked.wait()
    lanes.reset()
    await workers.session_lost()
    lanes.own([0])
    lanes.admit([row(1)])
    assert lanes.start(), "nothing runs any more, and the key is still shut"
