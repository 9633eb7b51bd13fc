"""What the crash guard requires after a takeover, and when that ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from cdc.core.admission import Row
from cdc.core.model import Change, Processed
from cdc.core.read_reconciler import Settlement
from cdc.core.router import Router
from cdc.core.shard_ownership import Acquired
from cdc.engine.coalescing import Coalescing
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.dispatcher import Dispatcher
from cdc.postgres.outbox import Store
from tests.changes import EPOCH, change
from tests.eventually import eventually_async
from tests.settling import SettlingScheduler

_TAKEOVER = EPOCH + timedelta(seconds=1)
_SINCE = _TAKEOVER + timedelta(seconds=1)


def _guard(*orphaned: int) -> CrashGuard:
    guard = CrashGuard(Store("public"), 10)
    guard.acquired(Acquired(range(4), orphaned=orphaned, at=_TAKEOVER))
    return guard


def test_starts_of_what_was_captured_before_a_takeover_are_recorded() -> None:
    guard = _guard(0)
    assert guard.watched
    assert guard.must_record_start(change(1))
    assert not guard.must_record_start(change(2, shard=1)), "its owner has left in order"
    assert not guard.must_record_start(replace(change(3), changed_at=_SINCE))


async def test_nothing_is_recorded_any_more_when_the_orphaned_shards_are_released() -> None:
    guard = _guard(0, 1)
    guard.revoked([0])
    assert guard.must_record_start(change(1)), "what has started of it may yet run"
    await guard.release([0])
    assert not guard.must_record_start(change(1))
    assert guard.watched
    await guard.release([1, 2])
    assert not guard.watched


async def test_a_stop_that_clears_the_records_leaves_what_is_recorded_as_it_is() -> None:
    guard = _guard(0)
    await guard.clear()
    assert guard.watched


class _Inline:
    """An executor that calls whatever it may call inline, and else nothing."""

    def lost(self, change: Change) -> bool:
        return False

    def run_inline(self, handler: None, changes: Sequence[Change], task: object) -> tuple[list[Settlement], None]:
        done = [Settlement(each, Processed()) for each in changes]
        changes.clear()  # type: ignore[attr-defined]
        return done, None


@pytest.mark.parametrize("shard", [0, 1])
async def test_changes_since_a_takeover_are_called_inline_at_once(shard: int) -> None:
    """A quiet shard has fewer changes from before than are recorded: it would be watched for ever."""
    guard, scheduler, done = _guard(0), SettlingScheduler(10), list[Settlement]()
    scheduler.ownership.acquire(Acquired([0, 1]))
    dispatcher = Dispatcher(
        scheduler, _Inline(), 1, connections=1, crash_guard=guard, finished=done.extend, reread=lambda: None,  # type: ignore[arg-type]
        coalescing=Coalescing(Router(), Store("public")), put_off=lambda: None,
    )  # fmt: skip
    scheduler.admit([Row(replace(change(seq, str(seq), shard=shard), changed_at=_SINCE)) for seq in (1, 2)])
    dispatcher.dispatch()

    async def both() -> bool:
        return len(done) == 2

    await eventually_async(both)
