"""What a look has shown counts while looks go on, and no longer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import psycopg
import pytest

from cdc.core.shard_cursor import Snapshot
from cdc.engine import looking as module
from cdc.engine.looking import Looking
from cdc.postgres.shared_look import RECENT_S, Seen, SharedLook
from tests.eventually import eventually_async

_SEEN = Seen(at=0.0, snapshot=Snapshot(5, 5), drawn=10, final=True, shares={}, due_s={})


class _Server:
    """``age_s``: how old what it answers is; None: it fails."""

    def __init__(self) -> None:
        self.age_s: float | None = 0.0
        self.looks = 0

    async def look(self, _connection: object, _subscriptions: object) -> Seen:
        self.looks += 1
        if self.age_s is None:
            raise psycopg.OperationalError
        return replace(_SEEN, at=time.monotonic() - self.age_s)

    async def connect(self, *_: object, **__: object) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> _Server:
    made = _Server()
    monkeypatch.setattr(SharedLook, "look", made.look)
    monkeypatch.setattr(module, "connect_async", made.connect)
    monkeypatch.setattr(module, "_EVERY_S", 0.0)
    return made


@pytest.fixture
async def looking(server: _Server) -> AsyncIterator[Looking]:
    made = Looking("", "public")
    tasks = [asyncio.create_task(each) for each in (made.run(), made.for_one(1))]
    await _until(lambda: made.seen is not None, "it has looked")
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _until(condition: Callable[[], object], what: str) -> None:
    async def check() -> object:
        return condition()

    await eventually_async(check, what=what)


async def test_a_look_that_fails_leaves_nothing_of_the_one_before(looking: Looking, server: _Server) -> None:
    server.age_s = None
    before = server.looks
    await _until(lambda: server.looks > before, "it has failed")
    assert looking.seen is None


async def test_a_look_that_is_not_recent_says_nothing_about_now(looking: Looking, server: _Server) -> None:
    server.age_s = RECENT_S - 1.0
    before = server.looks
    await _until(lambda: server.looks > before + 1, "it has looked again")
    assert looking.seen is not None
    server.age_s = RECENT_S
    before = server.looks
    await _until(lambda: server.looks > before + 1, "it has looked again")
    assert looking.seen is None
