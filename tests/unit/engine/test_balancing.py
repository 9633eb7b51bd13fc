"""When the shards are polled though a look at all consumers of the process may have shown that nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from cdc.core.model import SHARDS
from cdc.core.router import Router
from cdc.core.shard_ownership import Acquired, ShardOwnership
from cdc.engine.balancing import Balancing
from cdc.engine.crash_guard import CrashGuard
from cdc.observability.metrics import Metrics
from cdc.postgres.outbox import Store
from cdc.postgres.shard_locks import POLL_MAX_S, Polled
from tests.changes import change

_AS_BEFORE = "as at the poll before"


class _Session:
    """``members``: how many consumers the next poll finds."""

    def __init__(self) -> None:
        self.unregistered: list[int] = []
        self.has_server_message = False
        self.may_see_controls = True
        self.connection = SimpleNamespace(closed=False)
        self.members = 1
        self.obstacle: psycopg.Error | None = None

    async def poll(self) -> Polled:
        if self.obstacle:
            raise self.obstacle
        return Polled(self.members, 0, None)

    async def acquire(self, _limit: int) -> Acquired:
        shards, self.unregistered = self.unregistered, []
        return Acquired(shards)

    async def release(self, _shards: object) -> None: ...

    async def others(self, _shards: object) -> list[int]:
        return []


def _settler() -> Any:
    return SimpleNamespace(parked=[], drop=lambda shards: None)


class _Stage:
    """A consumer that owns all shards, and has polled when it was shown ``_AS_BEFORE``."""

    def __init__(self) -> None:
        self.session: Any = _Session()
        self.ownership = ShardOwnership()
        self.settler = _settler()
        unused: Any = None  # no poll brings pauses or limits
        self.balancing = Balancing(
            self.ownership, self.settler, CrashGuard(Store("public"), 10), Metrics("cdc", Router()).consumer,
            acquired=lambda: None, pausing=unused, limiting=unused,
        )  # fmt: skip
        self.ownership.acquire(Acquired(range(SHARDS)))

    async def asked(self, now: float = 1.0, shares: str | None = _AS_BEFORE) -> bool:
        """Whether it polled at this time, when it was shown this: then it knows how many members there are by now."""
        self.session.members += 1
        assert await self.balancing.poll_if_changed(self.session, now, shares)
        return bool(self.balancing.members == self.session.members)

    def revoke_what_is_in_flight(self) -> None:
        self.ownership.started(change(1, shard=3))
        self.ownership.revoke([3])


@pytest.fixture
async def stage() -> _Stage:
    made = _Stage()
    assert await made.balancing.poll_if_changed(made.session, 0.0, _AS_BEFORE)
    assert made.balancing.members == 1
    return made


async def test_nobody_is_asked_while_a_look_shows_the_same_and_nothing_is_pending(stage: _Stage) -> None:
    assert not await stage.asked()
    assert not await stage.asked(POLL_MAX_S - 0.1)


async def test_the_shards_are_polled_when_a_look_shows_something_else(stage: _Stage) -> None:
    assert await stage.asked(shares="another consumer has come")
    assert not await stage.asked(shares="another consumer has come")


async def test_the_shards_are_polled_each_time_while_no_look_shows_anything(stage: _Stage) -> None:
    assert await stage.asked(shares=None)
    assert await stage.asked(shares=None)


async def test_the_shards_are_polled_before_the_server_ends_a_session_that_is_silent(stage: _Stage) -> None:
    assert await stage.asked(POLL_MAX_S)


_PENDING: dict[str, Callable[[_Stage], object]] = {
    "it owns nothing": lambda stage: stage.ownership.lose(),
    "a shard is to be given away": _Stage.revoke_what_is_in_flight,
    "a shard was locked and not registered": lambda stage: stage.session.unregistered.append(3),
    "an outcome waits for its shard": lambda stage: stage.settler.parked.append(3),
    "the session has ended": lambda stage: setattr(stage.session, "has_server_message", True),
}


@pytest.mark.parametrize("happens", _PENDING.values(), ids=_PENDING)
async def test_the_shards_are_polled_when_something_is_pending_though_a_look_shows_the_same(
    stage: _Stage, happens: Callable[[_Stage], object]
) -> None:
    happens(stage)
    assert await stage.asked()


async def test_a_poll_that_an_obstacle_stopped_is_made_again_though_a_look_shows_the_same(stage: _Stage) -> None:
    stage.session.obstacle = psycopg.errors.LockNotAvailable()
    assert not await stage.balancing.poll_if_changed(stage.session, POLL_MAX_S, _AS_BEFORE)
    stage.session.obstacle = None
    assert await stage.asked(POLL_MAX_S)
