"""The limits of a consumer's handlers, and what it has leased of them. Pure: the clock is given. See ``limits``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from math import inf

from cdc.core.limits import LEASE_S, Lease, Leased, LeaseRequest, Limit, LimitSetting, in_force, shares, turn_of
from cdc.core.model import Change, Key
from cdc.core.router import Router

_KEYS_MAX = 10_000
"""Keys of limits that are remembered. What is beyond waits."""
_ASKS_MAX = 500
"""Leases that one statement asks for."""
_IDLE_S = 30.0
"""After so long without work a lease is given back. Until then, the next call does not wait for one."""
PUT_OFF_MAX = 2_000
"""Keys of a type that are over a limit, and in memory as numbers; what is beyond stays where it is, unread."""


class HandlerPermits:
    """Of one handler.

    ``used`` is called with the time at which what was taken is free again, ``wanted`` when a lease is wanted for the
    first time.
    """

    __slots__ = ("_begun", "_clock", "_used", "_wanted", "leases", "limit", "name", "put_off")

    def __init__(
        self,
        name: str,
        limit: Limit,
        clock: Callable[[], float],
        used: Callable[[float], None],
        wanted: Callable[[], None],
    ) -> None:
        self.name = name
        self.limit = limit
        self._clock = clock
        self._used = used
        self._wanted = wanted
        self._begun = set[Change]()
        """Of the calls that are under way, those that have begun."""
        self.leases: dict[str, Lease] = {}
        self.put_off: dict[str, dict[Key, None]] = {}
        """By key of the limit: the keys that wait in the table for their turn, in that order."""

    def key(self, change: Change) -> str:
        return self.limit.key(change)

    def room(self, by: str) -> int:
        """How many calls may begin."""
        lease = self.leases.get(by)
        if lease is None:
            if len(self.leases) < _KEYS_MAX:
                lease = self.leases[by] = Lease()
                lease.waits_since = self._clock()
                self._wanted()
            return 0
        now = self._clock()
        room = lease.room(self.limit, now)
        if not room and lease.waits_since is None:
            lease.waits_since = now
        return room

    def take(self, by: str, calls: int) -> None:
        """These calls are about to begin: there was room."""
        self.leases[by].take(calls, self._clock())

    def begins(self, by: str, change: Change) -> None:
        """The call for this change, which was taken, begins now."""
        if change not in self._begun and (lease := self.leases.get(by)):
            self._begun.add(change)
            self._used(lease.begins(self.limit, self._clock()))

    def ended(self, by: str, change: Change) -> None:
        """It has ended, or will not be made: then it counts for nothing."""
        begun = change in self._begun
        self._begun.discard(change)
        if lease := self.leases.get(by):
            lease.ended(begun=begun)

    def go_on(self, before: HandlerPermits) -> None:
        """In place of this one, with what it has leased: what rests does so on."""
        self.leases, self.put_off, self._begun = before.leases, before.put_off, before._begun

    def waits_s(self, now: float) -> float:
        """For how long some work has waited without a call of its kind."""
        return max(
            (now - each.waits_since for each in list(self.leases.values()) if each.waits_since is not None), default=0.0
        )


class Limits:
    """All limits of a consumer: those that its handlers declare, and those that an operator has set in their place."""

    def __init__(self, router: Router, *, clock: Callable[[], float]) -> None:
        self._declared = {handler.name: handler.limit for handler in router.handlers.values() if handler.limit}
        self._names = {handler.name for handler in router.handlers.values()}
        self._clock = clock
        self._free_at: list[float] = []
        self._answers: dict[tuple[str, str], Leased] = {}
        self.used: Callable[[], None] = lambda: None
        """Called when the time at which something may start again has changed."""
        self.wanted: Callable[[], None] = lambda: None
        """Called when a lease is wanted for the first time."""
        self.of: dict[str, HandlerPermits] = {}
        """By the handler's name, of those that have a limit."""
        self.become(())

    def __bool__(self) -> bool:
        return bool(self.of)

    def become(self, settings: Sequence[LimitSetting]) -> bool:
        """These are set by now. Returns whether another limit is in force than before."""
        limits = {**self._declared, **{k: v for k, v in in_force(settings).items() if k in self._names}}
        before = {name: permits.limit for name, permits in self.of.items()}
        for name, limit in limits.items():
            if (permits := self.of.get(name)) is None or permits.limit != limit:
                made = HandlerPermits(name, limit, self._clock, self._took, self._wants)
                if permits is not None and permits.limit.by == limit.by:
                    made.go_on(permits)
                self.of[name] = made
        for name in self.of.keys() - limits.keys():
            del self.of[name]
        return before != limits

    def _wants(self) -> None:
        self.wanted()

    def _took(self, free_at: float) -> None:
        heappush(self._free_at, free_at)
        self.used()

    def next_at(self) -> float:
        """When something that rests may be used again; inf: nothing rests."""
        now = self._clock()
        while self._free_at and self._free_at[0] <= now:
            heappop(self._free_at)
        return self._free_at[0] if self._free_at else inf

    # --- leases ----------------------------------------------------------------------------------------------------

    def asks(self, me: str, waiting: Mapping[tuple[str, str], int]) -> list[LeaseRequest]:
        """What to ask for now. ``waiting``: by handler and key, how many changes could be started at once."""
        now, asks = self._clock(), list[LeaseRequest]()
        for name, permits in self.of.items():
            for by, lease in list(permits.leases.items()):
                count = waiting.get((name, by), 0) + len(permits.put_off.get(by, ()))
                if not count:
                    lease.waits_since = None
                asks.append(self._ask(me, permits, by, waiting=count, now=now))
        asks.sort(key=lambda ask: (not ask.wants, -self.of[ask.handler].leases[ask.key].used_at))
        return asks[:_ASKS_MAX]

    def _ask(self, me: str, permits: HandlerPermits, by: str, *, waiting: int, now: float) -> LeaseRequest:
        limit, lease = permits.limit, permits.leases[by]
        wants = waiting + lease.resting(now) + lease.running
        if wants:
            lease.used_at = max(lease.used_at, now)
        idle = not wants and now - lease.used_at > _IDLE_S
        answer = self._answers.get((permits.name, by))
        others = {name: count for name, count in answer.wants.items() if name != me} if answer else {}
        turn = turn_of(answer.at) if answer else 0

        def share(total: int) -> int:
            return 0 if idle else shares(total, {**others, me: min(wants, total)}, turn)[me]

        asked = lease.asks(share(limit.permits), share(limit.slots), now)
        return LeaseRequest(permits.name, by, *asked, wants, limit.rest_s, limit.permits, limit.slots)

    def leased(self, me: str, rows: Iterable[Leased], asked_at: float) -> None:
        """What the server said to what was asked at that time."""
        for row in rows:
            permits = self.of.get(row.handler)
            lease = permits.leases.get(row.key) if permits else None
            if permits is None or lease is None:
                continue
            self._answers[row.handler, row.key] = row
            lease.leased(row.permits.get(me, 0), row.slots.get(me, 0), asked_at + LEASE_S)
            if not (lease.permits or lease.slots or lease.running or lease.resting(asked_at)) and not row.wants.get(me):
                del permits.leases[row.key], self._answers[row.handler, row.key]
                permits.put_off.pop(row.key, None)

    def gives_back(self) -> list[LeaseRequest]:
        """At a stop: what does not rest, and does not run."""
        now = self._clock()
        return [
            LeaseRequest(name, by, lease.resting(now) if permits.limit.permits else 0, lease.running, 0,
                lease.rests_until(now) - now, permits.limit.permits, permits.limit.slots)
            for name, permits in self.of.items() for by, lease in permits.leases.items()
        ][:_ASKS_MAX]  # fmt: skip
