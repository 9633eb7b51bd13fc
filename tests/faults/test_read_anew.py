"""A change whose fate only the table knows is read again, whatever happens meanwhile: its key never stays shut."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cdc.core.lost_transactions import LostCalls
from cdc.core.model import Change, Waiting
from cdc.core.read_reconciler import Settlement
from cdc.core.router import Router
from cdc.core.shard_ownership import Acquired
from cdc.engine.coalescing import Coalescing
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.dispatcher import Dispatcher
from cdc.engine.transactions import AskTheTableError
from cdc.postgres.outbox import Store
from tests.changes import row
from tests.settling import SettlingScheduler


def test_a_waiting_change_that_is_interrupted_is_due_again() -> None:
    """It has later changes behind it: the mark that holds those must not hold the change itself."""
    scheduler = SettlingScheduler(10)
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1), row(2)])
    [first] = scheduler.start().changes
    scheduler.finished([Settlement(first, Waiting(0.1, "no"))])
    scheduler.settled(scheduler.take_finished(10))
    scheduler.admit([row(1)])  # due
    [again] = scheduler.start().changes
    scheduler.interrupted(again)
    for resume in scheduler.key_reads(10):
        scheduler.admit_key_read(resume, [row(2, blocked=True)], complete=True)
    assert scheduler.admit([row(1)]).taken == 1, "it is due, and nobody else will run it"


def test_what_is_queued_behind_a_waiting_change_that_is_interrupted_is_not_forgotten() -> None:
    """A half-dead consumer commits the waiting one while it is asked for here: those behind it are held no longer."""
    scheduler = SettlingScheduler(10)
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1, requeued=True)], due=True)
    [started] = scheduler.start().changes
    scheduler.admit([row(2)])
    scheduler.interrupted(started)
    for resume in scheduler.key_reads(10):
        scheduler.admit_key_read(resume, [row(2)], complete=True)
    scheduler.admit([row(3)])
    [following] = scheduler.start().changes
    assert following.seq == 2, "and nothing overtakes it"


class _Unknown:
    """A runner that never learns what became of a change."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.lost = LostCalls()

    def handler(self, change: Change) -> None:
        return None

    def in_thread(self, change: Change) -> bool:
        return False

    def interrupted(self, change: Change) -> None:
        pass

    def run_inline(self, handler: None, changes: Sequence[Change], task: object) -> tuple[list[Settlement], None]:
        return [], None

    async def run(self, handler: None, batch: Sequence[Change], latest: None = None) -> None:
        self.asked.set()
        raise AskTheTableError("the connection was lost")


async def test_a_session_lost_while_a_worker_waits_to_read_again_leaves_the_key_open() -> None:
    """As at every restart of a server: the handler's connection ends first, the session a moment later."""
    scheduler = SettlingScheduler(10)
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1)])
    executor = _Unknown()
    dispatcher = Dispatcher(
        scheduler, executor, 1, connections=1, crash_guard=CrashGuard(Store("public"), 1),  # type: ignore[arg-type]
        coalescing=Coalescing(Router(), Store("public")), finished=lambda *_: None, reread=lambda: None,
        put_off=lambda: None,
    )  # fmt: skip
    dispatcher.dispatch()
    await executor.asked.wait()
    scheduler.ownership.lose()
    await dispatcher.session_lost()
    scheduler.ownership.acquire(Acquired([0]))
    scheduler.admit([row(1)])
    assert scheduler.start().changes, "nothing runs any more, and the key is still shut"
