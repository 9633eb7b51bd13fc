"""Sockets that stay with an event loop for as long as they are open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from functools import partial

import pytest

from cdc.runtime.sockets import SelectorPoll, Sockets, sockets_of

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=["the system's", "selectors"])
async def sockets(request: pytest.FixtureRequest) -> Sockets:
    loop = asyncio.get_running_loop()
    return sockets_of(loop) if request.param == "the system's" else Sockets(loop, SelectorPoll)


async def _iterations() -> None:
    loop = asyncio.get_running_loop()
    for _ in range(5):
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned


async def test_it_is_called_for_as_long_as_there_is_something_to_read(sockets: Sockets, pair: Pair) -> None:
    ours, theirs = pair
    read: asyncio.Queue[bytes] = asyncio.Queue()
    sockets.watch(ours.fileno(), lambda: read.put_nowait(ours.recv(1)))
    theirs.send(b"ab")
    assert [await read.get(), await read.get()] == [b"a", b"b"]
    await _iterations()
    assert read.empty()


async def test_it_may_be_watched_from_another_thread(sockets: Sockets, pair: Pair) -> None:
    ours, theirs = pair
    read: asyncio.Queue[bytes] = asyncio.Queue()
    await asyncio.to_thread(sockets.watch, ours.fileno(), lambda: read.put_nowait(ours.recv(1)))
    await asyncio.to_thread(theirs.send, b"a")
    assert await read.get() == b"a"


async def test_what_is_not_watched_any_more_is_not_called(sockets: Sockets, pair: Pair) -> None:
    ours, theirs = pair
    called = list[int]()
    readable = partial(called.append, 1)
    sockets.watch(ours.fileno(), readable)
    sockets.unwatch(ours.fileno(), readable)
    sockets.unwatch(ours.fileno(), readable)
    theirs.send(b"a")
    await _iterations()
    assert not called


async def test_a_socket_that_was_closed_is_not_called_whatever_came_before(sockets: Sockets, pair: Pair) -> None:
    ours, theirs = pair
    called = list[int]()
    sockets.watch(ours.fileno(), partial(called.append, 1))
    theirs.send(b"a")
    ours.close()
    await _iterations()
    assert not called


async def test_the_number_of_a_closed_socket_is_the_next_ones(sockets: Sockets, pair: Pair) -> None:
    ours, _ = pair
    before, read = list[int](), asyncio.Event()
    readable_before = partial(before.append, 1)
    sockets.watch(ours.fileno(), readable_before)
    number = ours.fileno()
    ours.close()
    a, b = socket.socketpair()
    with a, b:
        if a.fileno() != number:
            os.dup2(a.fileno(), number)

        def readable() -> None:
            os.read(number, 1)
            read.set()

        sockets.watch(number, readable)
        sockets.unwatch(number, readable_before)
        b.send(b"a")
        async with asyncio.timeout(20):
            await read.wait()
        if a.fileno() != number:
            os.close(number)
    assert not before
