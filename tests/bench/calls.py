"""How many calls into ``cdc`` one lone change makes, from the wake-up to the mark: ``python -m tests.bench.calls [-v]``

Counted with ``sys.setprofile`` in every thread of a consumer that is live; each step of a coroutine is a call. Of some
changes the median, as a timer may come round during one of them. ``-v``: by function, for one change of each handler.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

import psycopg

import cdc
from cdc.app import config
from cdc.app.application import App
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.router import Router
from tests.bench.database import ROWS, fresh_outbox, streaming
from tests.eventually import eventually_async

_PACKAGE = str(Path(cdc.__file__).parent)
_CHANGES = 11
_WARM_UP = 5
_REST_S = 0.05
"""After a mark: the round that finds nothing more to do belongs to the change."""
_WRITE = "INSERT INTO bench_rows (id, note) VALUES (%s, 'a row to be captured')"
_MARKED = "SELECT count(*) FROM entity_changes WHERE processed"
HANDLERS = ("async", "thread", "transactional")

Calls = Counter[CodeType]


class Profiler:
    """``with Profiler() as calls:`` before any thread starts; counts what is called while ``counting``."""

    def __init__(self) -> None:
        self.counting = False
        self.calls: Calls = Counter()
        self._ours: dict[CodeType, bool] = {}

    def __enter__(self) -> Profiler:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @contextmanager
    def count(self) -> Iterator[Calls]:
        self.calls = Counter()
        self.counting = True
        try:
            yield self.calls
        finally:
            self.counting = False

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and self.counting:
            code = frame.f_code
            ours = self._ours.get(code)
            if ours is None:
                ours = self._ours[code] = code.co_filename.startswith(_PACKAGE)
            if ours:
                self.calls[code] += 1


def router(handler: str) -> Router:
    """One handler for everything, which does nothing."""
    routes = Router()
    if handler == "async":

        @routes.on("*")
        async def nothing(_change: cdc.Change) -> None: ...

    elif handler == "thread":

        @routes.on("*")
        def nothing_in_a_thread(_change: cdc.Change) -> None: ...

    else:

        @routes.on("*")
        async def nothing_in_a_transaction(_change: cdc.Change, connection: psycopg.AsyncConnection) -> None: ...

    return routes


async def count(connection: psycopg.Connection, handler: str) -> list[Calls]:
    """The calls of each of some changes that come one after the other. The database has ``ROWS``, captured."""
    with Profiler() as profiler:
        async with _consuming(connection, handler):
            counted = [await _one(connection, profiler, number) for number in range(_WARM_UP + _CHANGES)]
    return counted[_WARM_UP:]


@asynccontextmanager
async def _consuming(connection: psycopg.Connection, handler: str) -> AsyncIterator[None]:
    timers = {"sweep_interval": 600.0, "poll_interval": 60.0}
    named = {"dsn": connection.info.dsn, "http_port": 0, "slot_name": f"calls_{handler}", **timers}
    app = App(config.from_options(named), router(handler))
    work = asyncio.create_task(app.run())
    try:

        async def streams() -> bool:
            return streaming(connection)

        await eventually_async(streams, what="the slot to be read")
        yield
    finally:
        app.consumer.stop()
        await work


async def _one(connection: psycopg.Connection, profiler: Profiler, number: int) -> Calls:
    before = _marked(connection)
    with profiler.count() as calls:
        connection.execute(_WRITE, [number])

        async def marked() -> bool:
            return _marked(connection) > before

        await eventually_async(marked, what="the mark")
        with suppress(TimeoutError):
            async with asyncio.timeout(_REST_S):
                await asyncio.Event().wait()
    return calls


def _marked(connection: psycopg.Connection) -> int:
    row = connection.execute(_MARKED).fetchone()
    assert row is not None
    return int(row[0])


def _print(handler: str, counted: list[Calls], *, verbose: bool) -> None:
    middle = sorted(counted, key=Counter.total)[len(counted) // 2]
    modules = {code.co_filename for code in middle}
    print(f"{handler:15} {median(map(Counter.total, counted)):5.0f} calls of {len(middle)} functions in"
          f" {len(modules)} modules")  # fmt: skip
    for code, times in middle.most_common() if verbose else ():
        print(f"  {times:4}  {Path(code.co_filename).relative_to(_PACKAGE)} {code.co_qualname}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.calls", description="Calls into cdc for one lone change.")
    parser.add_argument("handlers", nargs="*", metavar="HANDLER", help=f"of {', '.join(HANDLERS)}; all by default")
    parser.add_argument("-v", "--verbose", action="store_true", help="by function")
    options = parser.parse_args()
    with TempServer() as server:
        for handler in options.handlers or HANDLERS:
            with fresh_outbox(server) as connection:
                connection.execute(ROWS)
                connection.execute(
                    "CREATE TRIGGER captured AFTER INSERT ON bench_rows"
                    " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
                )
                _print(handler, asyncio.run(count(connection, handler)), verbose=options.verbose)


if __name__ == "__main__":
    main()
