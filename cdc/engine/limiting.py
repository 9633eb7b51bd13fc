"""Leases what limited handlers may use, once a second, and wakes the dispatcher when something is free again.

On the event loop. See ``core.limits``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from math import inf

import psycopg
from psycopg import errors

from cdc.core.handler_limits import HandlerLimits
from cdc.core.handler_permits import HandlerPermits
from cdc.core.limits import LimitSetting
from cdc.core.over_limit import OverLimit
from cdc.core.scheduler import KeyScheduler
from cdc.observability.snapshots import LimitStatus
from cdc.postgres.limits import Leases
from cdc.postgres.shard_locks import ShardSession

log = logging.getLogger("cdc.consumer")

_EVERY_S = 0.95
"""Leases are renewed with the poll of the shards, which is made each second, or sooner."""


class Limiting:
    """``free``: something may start again. ``soon``: a lease is wanted. ``me``: identifies this process."""

    def __init__(
        self,
        scheduler: KeyScheduler,
        demand: HandlerLimits,
        leases: Leases,
        me: str,
        *,
        free: Callable[[], None],
        soon: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._demand = demand
        self._limits = demand.limits
        self._leases = leases
        self._me = me
        self._free = free
        self._asked_at = -inf
        self._timer: asyncio.TimerHandle | None = None
        self._warned = False
        self._limits.used, self._limits.wanted = self._wait, soon
        self._apply()

    def became(self, settings: Sequence[LimitSetting]) -> None:
        """These are set by now."""
        if self._limits.become(settings):
            for name, permits in self._limits.of.items():
                log.info("the limit of %s is %s", name, permits.limit, extra={"event": "limit", "handler": name})
            self._apply()
            self._free()

    async def renew(self, session: ShardSession) -> None:
        """LeaseRequest for what is needed, if it is time. Raises what the statement raises."""
        now = time.monotonic()
        if not self._limits or now - self._asked_at < _EVERY_S:
            return
        if asks := self._limits.asks(self._me, self._scheduler.ready_queues.over_limit()):
            self._asked_at = now
            try:
                leased = await self._leases.lease(session.connection, session.writing, asks)
            except (errors.UndefinedTable, errors.InsufficientPrivilege) as refused:
                self._refused(refused)
                return
            self._limits.leased(self._me, leased, now)
            self._warned = False
            if self._scheduler.held.due:
                self._scheduler.held.due.clear()
            self._free()

    async def give_back(self, session: ShardSession) -> None:
        """At a stop: what others may use."""
        if self._limits and (asks := self._limits.gives_back()):
            await self._leases.lease(session.connection, session.writing, asks, 0.0)

    @property
    def status(self) -> dict[str, LimitStatus]:
        """By handler. From any thread."""
        now = time.monotonic()
        return {name: _status(permits, now) for name, permits in dict(self._limits.of).items()}

    def _apply(self) -> None:
        scheduler = self._scheduler
        self._demand.limits_changed()
        over = OverLimit(scheduler.deferred, scheduler.ready_queues, scheduler.held.due, time.monotonic)
        scheduler.limit(over if self._limits else None)

    def _wait(self) -> None:
        if self._timer is None and (at := self._limits.next_at()) < inf:
            delay_s = max(0.0, at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._over)

    def _over(self) -> None:
        self._timer = None
        self._free()
        self._wait()

    def _refused(self, refused: psycopg.Error) -> None:
        if not self._warned:
            log.error(
                "limits cannot be leased, so no limited handler is called: %s; run cdc db upgrade, or cdc db grant"
                " --consumer ROLE", refused.diag.message_primary,
            )  # fmt: skip
        self._warned = True


def _status(permits: HandlerPermits, now: float) -> LimitStatus:
    leases = list(permits.leases.values())
    return LimitStatus(
        sum(each.permits for each in leases),
        sum(each.slots for each in leases),
        sum(map(len, list(permits.put_off.values()))),
        permits.waits_s(now),
    )
