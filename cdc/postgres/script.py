"""One code for both kinds of connections: the async ones of an event loop, and those that block their thread.

psycopg gives both the same methods. A script is a generator that yields what such a method returned, and is resumed
with the result: a coroutine is awaited, any other value is the result itself.

    def one(connection: psycopg.Connection | psycopg.AsyncConnection) -> Script[int]:
        cursor = yield connection.execute("SELECT 1")
        return (yield cursor.fetchone())[0]

    run(one(connection))
    await run_async(one(async_connection))
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar, cast

_T = TypeVar("_T")

Script: TypeAlias = Generator[Any, Any, _T]


def run(script: Script[_T]) -> _T:
    """Run on a blocking connection: a yielded value is the result itself. Returns what the script returns."""
    try:
        answer = script.send(None)
        while True:
            answer = script.send(answer)
    except StopIteration as returned:
        return cast("_T", returned.value)


async def run_async(script: Script[_T]) -> _T:
    """``run`` on an async connection: a yielded value is awaited; an error or cancellation is raised at the yield."""
    try:
        asked = script.send(None)
        while True:
            try:
                answer = await asked
            except BaseException as error:  # noqa: BLE001 - the script handles it
                asked = script.throw(error)
            else:
                asked = script.send(answer)
    except StopIteration as returned:
        return cast("_T", returned.value)
