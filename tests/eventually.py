"""The one place in the tests that lets time pass: waiting for a condition, never for a duration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
_EVERY_S = 0.02
_REST = 4
"""A question that takes long is asked less often: what is waited for needs the processors, too."""
# The limit unless said otherwise, 30 s, is half the time between two passes from the first change on: what is found by
# such a pass only, because a wake-up or a sweep has failed, comes too late.


def eventually(condition: Callable[[], T], *, within_s: float = 30.0, what: str = "") -> T:
    """The first true value of ``condition()``; an AssertionError naming ``what`` when there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        asked_at = time.monotonic()
        if value := condition():
            return value
        time.sleep(_pause_s(asked_at, deadline, within_s, what or condition, value))


async def eventually_async(condition: Callable[[], Awaitable[T]], *, within_s: float = 30.0, what: str = "") -> T:
    deadline = time.monotonic() + within_s
    while True:
        asked_at = time.monotonic()
        if value := await condition():
            return value
        await asyncio.sleep(_pause_s(asked_at, deadline, within_s, what or condition, value))


def _pause_s(asked_at: float, deadline: float, within_s: float, what: object, value: object) -> float:
    now = time.monotonic()
    if now > deadline:
        raise AssertionError(f"not within {within_s} s: {what}; last value {value!r}")
    return max(_EVERY_S, _REST * (now - asked_at))
