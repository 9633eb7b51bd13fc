"""Which changes outside the workers wait for which."""

from __future__ import annotations

import asyncio

from cdc.engine.dispatcher import OtherTasks
from cdc.engine.quarantine import Quarantine
from tests.changes import change


async def test_what_is_held_may_start_when_the_last_suspect_has_ended() -> None:
    quarantine = Quarantine(lambda seq: False)
    tasks = [quarantine.start(change(seq), asyncio.Event().wait(), suspect=True) for seq in (1, 2)]  # type: ignore[arg-type]
    quarantine.held.append((None, change(3)))
    for task in tasks:
        task.cancel()
    quarantine.ended(tasks[0])
    assert not quarantine.freed
    quarantine.ended(tasks[1])
    assert [each.seq for _, each in quarantine.freed] == [3]
    assert not quarantine.held


async def test_a_lost_change_holds_nothing() -> None:
    quarantine = Quarantine(lambda seq: False)

    async def work() -> None: ...

    lost = change(1)
    task = quarantine.start(lost, work())
    assert not quarantine.suspects
    await task
    assert quarantine.ended(task) is lost, "its turn has not come"


async def test_a_change_that_had_its_turn_is_not_read_again() -> None:
    quarantine = Quarantine(lambda seq: False)

    async def work() -> None:
        quarantine.attend()

    task = quarantine.start(change(1), work(), suspect=True)
    await task
    assert quarantine.ended(task) is None


async def test_a_turn_may_last_until_the_outcome_is_in_the_table() -> None:
    unsettled = {1}
    quarantine = Quarantine(unsettled.__contains__)
    waiting = asyncio.create_task(quarantine.until_settled(change(1)))
    await OtherTasks()
    quarantine.settled()
    await OtherTasks()
    assert not waiting.done(), "another one was settled"
    unsettled.clear()
    quarantine.settled()
    await waiting
