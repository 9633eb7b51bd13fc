"""The life of a consumer: it connects, works until a connection breaks, and connects again, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import psycopg

from cdc.core.errors import CdcError, SchemaError, SubscriptionDroppedError
from cdc.engine.hooks import where
from cdc.observability.metrics import ConsumerMetrics
from cdc.postgres.connect import STANDBY
from cdc.runtime.deadline import wait_within

log = logging.getLogger("cdc.consumer")

_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 10.0
_SCHEMA_EVERY_S = 1.0
_INTERRUPTIONS = (CdcError, psycopg.Error, OSError)  # TimeoutError is an OSError


class Lifecycle:
    """Written on the event loop; ``in_service`` and the times, by ``time.monotonic()``, are read by any thread."""

    def __init__(self, metrics: ConsumerMetrics) -> None:
        self._metrics = metrics
        self.stopping = asyncio.Event()
        self.connected = asyncio.Event()
        """Set at the first connection and never unset: from then on lost connections are waited out."""
        self.in_service = False
        """There are connections, and a schema."""
        self.last_iteration: dict[str, float] = {}
        """By the name of a loop."""
        self.answered_at: float | None = None
        self.leaves: Callable[[], bool] = lambda: False
        """Asked when its subscription was dropped: whether it ends, rather than say so and wait to be stopped."""

    def iterated(self, loop: str, *, answered: bool = False) -> None:
        """A loop has begun an iteration. ``answered``: and the server has answered."""
        now = self.last_iteration[loop] = time.monotonic()
        if answered:
            self.answered_at = now

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Call ``work``, which connects, again and again until it is stopping, or its subscription was dropped.

        Raises the error when the very first connection is refused, and any error that neither an operator nor time can
        fix.
        """
        pause_s = _PAUSE_MIN_S
        while not self.stopping.is_set():
            began = time.monotonic()
            error = await _interruption(work)
            if error and not self.connected.is_set() and not self.stopping.is_set():
                raise error
            if error and self._is_over(error):
                return
            if error and not self.stopping.is_set():
                log.warning("interrupted: %s; trying again", _sentence(error))
                self._metrics.interruptions.labels(_kind(error)).inc()
                pause_s = next_pause_s(pause_s, time.monotonic() - began)
                await wait_within(self.stopping, pause_s)

    async def wait_for_schema(self, check: Callable[[], Awaitable[None]]) -> None:
        """Check until there is a schema, and log what is missing: a sidecar may start before the migrations.

        ``check`` raises SchemaError.
        """
        reported = ""
        while not self.stopping.is_set():
            try:
                await check()
            except SchemaError as error:
                if self._is_over(error):
                    raise
                if reported != str(error):
                    log.warning("waiting: %s", _sentence(error))
                reported = str(error)
                await wait_within(self.stopping, _SCHEMA_EVERY_S)
            else:
                return

    def _is_over(self, error: Exception) -> bool:
        return isinstance(error, SubscriptionDroppedError) and self.leaves()


def next_pause_s(before_s: float, worked_s: float) -> float:
    """Twice as long as before, up to a limit; short again after work that lasted longer than that."""
    return _PAUSE_MIN_S if worked_s > _PAUSE_MAX_S else min(2 * before_s, _PAUSE_MAX_S)


async def _interruption(work: Callable[[], Awaitable[None]]) -> Exception | None:
    """The error that ended the work, if an operator or time can fix it; any other is raised: a bug."""
    try:
        await work()
    except ExceptionGroup as group:
        expected, bugs = group.split(_INTERRUPTIONS)
        if bugs or not expected:
            log.critical("stopped by a bug: %s", where(_first(bugs or group)))
            raise
        return _first(expected)
    except _INTERRUPTIONS as error:
        return error
    return None


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _sentence(error: Exception) -> str:
    """What happened, without row content: a server's DETAIL may quote it, its primary message does not."""
    if isinstance(error, CdcError):
        return f"{error} ({error.hint})" if error.hint else str(error)
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return f"{error.diag.message_primary} [{error.sqlstate}] ({STANDBY})"
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return f"{error.diag.message_primary} [{error.sqlstate}]"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _kind(error: Exception) -> str:
    """One of INTERRUPTIONS. An error of libpq itself has no SQLSTATE: it is about the connection."""
    sqlstate = (error.sqlstate if isinstance(error, psycopg.Error) else None) or "08"
    return "connection" if sqlstate[:2] == "08" or sqlstate[:3] == "57P" else "statement"
