"""Publishes the events that are due later, when they are due.

The owner of shard 0 does it, so that the others need neither a connection nor a statement for it. It asks once a
second, and sleeps for shorter where the next one is due sooner: nothing tells it that one was written. Where a look for
all consumers of a process shows that none is due, it does not ask. Two that believe
they are the owner do no harm: the statement takes a lock, and its transaction moves a row from one table to the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import psycopg
from psycopg import errors

from cdc.core import failpoints
from cdc.core.errors import CdcError
from cdc.engine.failures_log import FailuresLog
from cdc.postgres.connect import SERVER_TCP, Dsn, connect_async, explain
from cdc.postgres.due import DueChanges

log = logging.getLogger("cdc.due")

SHARD = 0
"""Its owner publishes."""
_EVERY_S = 1.0
_LOOK_S = 0.2
"""While others ask, once a second, whether there is one."""
_LOOKS_MAX = 300
"""Its connection is used each minute at least."""
_REFUSED_S = 10.0
_ANSWER_LIMIT_S = 35.0
"""Longer than a statement may take on the server."""
_SESSION = {**SERVER_TCP, "statement_timeout": "30s", "lock_timeout": "5s", "jit": "off"}


class DuePublisher:
    """``await run()`` until it is cancelled; it retries what fails and never raises.

    ``owns(shard)``: whether this consumer owns the shard now. ``rests``: whether it is known that none is due.
    """

    def __init__(
        self, dsn: Dsn, schema: str, owns: Callable[[int], bool], rests: Callable[[], bool] = lambda: False
    ) -> None:
        self._dsn = dsn
        self._due = DueChanges(schema)
        self._owns = owns
        self._rests = rests
        self._failures = FailuresLog(log, "events that are due later are not published")

    async def run(self) -> None:
        while True:
            pause_s = _EVERY_S
            try:
                if self._owns(SHARD):
                    await self._while_owner()
            except (CdcError, psycopg.Error, OSError, UnicodeError) as error:
                self._failures.failed(error, _explained(error))
                # What an operator must set right is not asked for each second.
                pause_s = _REFUSED_S if isinstance(error, psycopg.ProgrammingError) else _EVERY_S
            await asyncio.sleep(pause_s)

    async def _while_owner(self) -> None:
        async with await connect_async(
            self._dsn, application_name="cdc: due", session=_SESSION, answer_limit_s=_ANSWER_LIMIT_S
        ) as connection:
            while self._owns(SHARD):
                failpoints.here("due.before_publish")
                next_s = await self._due.publish(connection)
                failpoints.here("due.after_publish")
                self._failures.succeeded()
                await asyncio.sleep(_EVERY_S if next_s is None else min(max(next_s, 0.0), _EVERY_S))
                await self._while_none()

    async def _while_none(self) -> None:
        for _ in range(_LOOKS_MAX):
            if not (self._rests() and self._owns(SHARD)):
                return
            await asyncio.sleep(_LOOK_S)


def _explained(error: Exception) -> Exception:
    if isinstance(error, errors.InsufficientPrivilege):
        return CdcError(f"the role may not: {error.diag.message_primary}", hint="cdc db grant --consumer ROLE")
    if isinstance(error, errors.UndefinedFunction):
        return CdcError("the outbox is of an earlier version", hint="cdc db upgrade")
    return explain(error) or error
