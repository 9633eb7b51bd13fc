"""Wake-ups on their way from the stream to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest

from cdc.core.errors import StreamError
from cdc.core.model import WakeUp
from cdc.core.router import Router
from cdc.engine.hooks import Hooks
from cdc.engine.stream_bridge import StreamBridge, Woken
from cdc.observability.metrics import Metrics


class _Notified:
    """In place of ``Notifications``: what it is told, in turn."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def notified(self, wakeups: Sequence[WakeUp]) -> Sequence[WakeUp]:
        self.told += [wakeup.seq for wakeup in wakeups]
        return ()

    def streaming(self, *, connected: bool) -> None:
        self.told.append(connected)


@pytest.fixture
async def notified() -> _Notified:
    return _Notified()


@pytest.fixture
async def bridge(notified: _Notified) -> StreamBridge:
    router = Router()
    metrics = Metrics("slot", router)
    unused = cast("Any", None)
    return StreamBridge(Woken(cast("Any", notified), Hooks(router), metrics), unused, changed=lambda: None)


async def _turn() -> None:
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    await turned.wait()


async def test_what_the_event_loop_reads_is_there_at_once(bridge: StreamBridge, notified: _Notified) -> None:
    bridge.streaming()
    bridge.notified([WakeUp(1, 1)], None)
    bridge.interrupted(StreamError("", reason="network"))
    assert notified.told == [True, 1, False]


async def test_it_does_not_overtake_what_the_thread_has_read(bridge: StreamBridge, notified: _Notified) -> None:
    thread = threading.Thread(target=_read_two, args=[bridge])
    thread.start()
    thread.join()
    bridge.notified([WakeUp(3, 1)], None)
    assert notified.told == []
    await _turn()
    assert notified.told == [1, 2, 3]


def _read_two(bridge: StreamBridge) -> None:
    bridge.notified([WakeUp(1, 1)], None)
    bridge.notified([WakeUp(2, 1)], None)
