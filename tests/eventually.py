"""The one place in the tests that lets time pass: waiting for a condition, never for a duration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
_EVERY_S = 0.01
# The limit unless said otherwise, 30 s, is half the time between two passes from the first change on: what is found by
# such a pass only, because a wake-up or a sweep has failed, comes too late.


def eventually(condition: Callable[[], T], *, within_s: float = 30.0, what: str = "") -> T:
    """The first true value of ``condition()``; an AssertionError naming ``what`` when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or condition}; last value {value!r}")
        time.sleep(_EVERY_S)
    return value


async def eventually_async(condition: Callable[[], Awaitable[T]], *, within_s: float = 30.0, what: str = "") -> T:
    deadline = time.monotonic() + within_s
    while not (value := await condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or condition}; last value {value!r}")
        await asyncio.sleep(_EVERY_S)
    return value
