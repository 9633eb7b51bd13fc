"""Looks, each second, whether there is anything to ask for, for all consumers of a process: ``postgres.shared_look``.

What it has seen saves them statements and is never needed: while it fails they ask for themselves, as one that is alone
does.
"""

from __future__ import annotations

import asyncio
import logging

import psycopg

from cdc.core.errors import CdcError
from cdc.engine.failures_log import FailuresLog
from cdc.postgres.connect import Dsn, connect_async, explain
from cdc.postgres.shared_look import Seen, SharedLook

log = logging.getLogger("cdc.looking")

_EVERY_S = 1.0
_AGAIN_S = 10.0
"""After a failure."""
_ANSWER_LIMIT_S = 10.0
_SESSION = {"statement_timeout": "5s", "jit": "off"}


class Looking:
    """``await run()`` until it is cancelled; it begins when there is somebody to look for, retries what fails and never
    raises.

    Made on the event loop.
    """

    def __init__(self, dsn: Dsn, schema: str) -> None:
        self._dsn = dsn
        self._schema = schema
        self._failures = FailuresLog(
            log, "the consumers of this process look for themselves, which takes more statements"
        )
        self._subscriptions = set[int]()
        self._wanted = asyncio.Event()
        self._seen: Seen | None = None

    @property
    def seen(self) -> Seen | None:
        """What the last look has shown, if it was made lately. From any thread."""
        seen = self._seen
        return seen if seen is not None and seen.is_recent else None

    async def for_one(self, subscription: int) -> None:
        """Look for a consumer of the subscription with this number, until cancelled."""
        self._subscriptions.add(subscription)
        self._wanted.set()
        try:
            await asyncio.Event().wait()
        finally:
            self._subscriptions.discard(subscription)

    async def run(self) -> None:
        await self._wanted.wait()
        while True:
            try:
                await self._look()
            except (CdcError, psycopg.Error, OSError) as error:
                self._failures.failed(error, explain(error) or error)
            finally:
                self._seen = None
            await asyncio.sleep(_AGAIN_S)

    async def _look(self) -> None:
        look = SharedLook(self._schema)
        async with await connect_async(
            self._dsn, application_name="cdc: look", session=_SESSION, answer_limit_s=_ANSWER_LIMIT_S
        ) as connection:
            while True:
                self._seen = await look.look(connection, self._subscriptions)
                self._failures.succeeded()
                await asyncio.sleep(_EVERY_S)
