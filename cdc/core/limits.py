"""How often and how many at once a handler may be called, over all consumers. Pure.

Theory
------
A limit of ``rate`` and ``burst`` is ``burst`` *permits*. A call takes one, and the permit rests for ``burst / rate``
seconds from the call on. So in any span of that length there are at most ``burst`` calls, and in any span of T seconds
at most ``burst + rate * T``. No clock has to agree with another one, as only the rest of one permit is measured, where
it is used.
``at_once`` is so many *slots*; a call holds one until it ends.

Permits and slots are leased, all for some seconds, not one for each call. A lease says how many of them a consumer has;
the sum of what is leased is never more than there is, which the row that has all the leases of a limit makes sure of. A
consumer uses a lease until ``LEASE_S`` after it asked for it, by its own monotonic clock. The server, which got that
later, gives permits of a silent consumer to others ``LEASE_S`` and their rest after its last request: one that
was killed may have used them at the last moment. Only permits that rest no more are given back.

How much each asks for is a fair share (``shares``) of what all said that they want, as each reads in the row.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from cdc.core.errors import UsageError
from cdc.core.model import Change

LEASE_S = 4.0
"""What a lease is good for. Consumers renew theirs each second."""
PERMITS_MAX = 10_000
_REST_MAX_S = 86_400.0
_SPARE = 1.01
"""A permit rests a little longer: from the moment at which it is taken until the call, some time passes."""
_TURN_S = 30.0
"""Where there are fewer permits than consumers, others have them after so long. A permit rests for a second then."""
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0}
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?/ ?([0-9]{0,6}) ?(s|min|m|h|d)")
_KEY_BYTES = 200

By = Callable[[Change], object]


@dataclass(frozen=True, slots=True)
class Limit:
    """How often a handler may be called, over all consumers: ``cdc.Limit(rate="14/s", burst=20, at_once=50)``.

    ``rate``: calls for a time, ``"14/s"``, ``"100/m"``, ``"1000/h"``. ``burst``: how many of them may come together; by
    default as many as the rate names, so that in no second, minute or hour there are more. ``at_once``: how many may
    run at a time. ``by``: limits each key by itself: a function of the change, or a path such as ``"new.tenant"``.
    """

    rate: str | None = None
    burst: int | None = None
    at_once: int | None = None
    by: By | str | None = None

    def __post_init__(self) -> None:
        if self.rate is None and self.at_once is None:
            raise UsageError("a limit names a rate, at_once, or both", hint='cdc.Limit(rate="14/s", at_once=50)')
        if self.burst is not None and self.rate is None:
            raise UsageError("a limit with a burst has a rate, too", hint='cdc.Limit(rate="14/s", burst=20)')
        for name, value in (("burst", self.burst), ("at_once", self.at_once)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= PERMITS_MAX
            ):
                raise UsageError(f"{name}={value!r} of a limit", hint=f"a whole number from 1 to {PERMITS_MAX:,}")
        if self.by is not None and not (callable(self.by) or (isinstance(self.by, str) and self.by)):
            raise UsageError(
                f"by={self.by!r} of a limit: neither a function of a change nor a path", hint='by="new.tenant"'
            )
        if self.rate is not None and (self.permits > PERMITS_MAX or self.rest_s > _REST_MAX_S):
            raise UsageError(
                f"the limit {self}: more than {PERMITS_MAX:,} calls may come together, or one in more than a day",
                hint="name the rate for a shorter time, or a smaller burst",
            )

    @property
    def per_s(self) -> float:
        """inf: any rate."""
        return inf if self.rate is None else _count(self.rate) / _span_s(self.rate)

    @property
    def permits(self) -> int:
        """0: there are none, as any rate will do."""
        return 0 if self.rate is None else self.burst or max(1, ceil(_count(self.rate)))

    @property
    def rest_s(self) -> float:
        return self.permits / self.per_s * _SPARE if self.permits else 0.0

    @property
    def slots(self) -> int:
        return self.at_once or 0

    @property
    def ahead(self) -> int:
        """Keys that wait in memory to be started; the others wait in the table."""
        return min(500, max(16, 2 * max(self.permits, self.slots)))

    def key(self, change: Change) -> str:
        """What of the change is limited by itself; "" where all is one. A key that cannot be computed is "?"."""
        if self.by is None:
            return ""
        try:
            found = along(change, self.by) if isinstance(self.by, str) else self.by(change)
            text = str(found)
        except Exception:  # noqa: BLE001 - whatever a function of the application raises; its change waits with its like
            return "?"
        return text.replace("\0", "").encode("ascii", "backslashreplace").decode()[:_KEY_BYTES]

    def __str__(self) -> str:
        parts = [
            self.rate or "",
            f"burst {self.burst}" if self.burst else "",
            f"{self.at_once} at once" if self.at_once else "",
        ]
        by = f"for each {self.by}" if isinstance(self.by, str) else "for each key" if self.by else ""
        return ", ".join(part for part in (*parts, by) if part)


def along(change: Change, path: str) -> object:
    """The value at a path, such as ``new.address.country``. None where there is none."""
    first, *names = path.split(".")
    found: Any = getattr(change, first, None) if first in _ROOTS else None
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


_ROOTS = {"new", "old", "metadata", "entity_id", "entity_type", "table_schema", "table"}


def check_path(path: str) -> str:
    """Raises UsageError for what is no path into a change."""
    if path.split(".", maxsplit=1)[0] not in _ROOTS or "" in path.split("."):
        raise UsageError(f"{path!r} is no path into a change", hint=f"begin with one of {', '.join(sorted(_ROOTS))}")
    return path


def check_handler(name: str) -> str:
    """Raises UsageError for what names no handler."""
    if not name.strip() or "\0" in name or name == "*":
        raise UsageError("which handler?", hint="its name, as in metrics and logs")
    return name


def _count(rate: str) -> float:
    return float(_parsed(rate)[1])


def _span_s(rate: str) -> float:
    found = _parsed(rate)
    return (int(found[2]) if found[2] else 1) * _UNITS[found[3]]


def _parsed(rate: object) -> re.Match[str]:
    found = _RATE.fullmatch(rate.strip()) if isinstance(rate, str) else None
    if found is None or not float(found[1]) > 0 or found[2] == "0":
        raise UsageError(f"rate={rate!r} of a limit", hint='calls for a time: "14/s", "100/m", "1000/h", "5/10s"')
    return found


class Lease:
    """What one consumer has of one limit, or of one key of it. Times by a monotonic clock."""

    __slots__ = ("_rest", "_share", "_taken", "permits", "running", "slots", "until", "used_at", "waits_since")

    def __init__(self) -> None:
        self.permits, self.slots, self.until = 0, 0, -inf
        self._share = (0, 0)
        """Of permits and slots: what is more is not used, so that it can be given back."""
        self.running = 0
        self._taken = 0
        """Permits of calls that are about to begin."""
        self.used_at = -inf
        """When a call was made last, or wanted to be."""
        self.waits_since: float | None = None
        """Since when it has had work that it could not start."""
        self._rest = deque[float]()
        """When each of the permits that rest may be used again."""

    def room(self, limit: Limit, now: float) -> int:
        """How many calls may begin."""
        if now >= self.until:
            return 0
        room = PERMITS_MAX
        if limit.permits:
            room = min(self.permits, self._share[0]) - self.resting(now)
        if limit.slots:
            room = min(room, min(self.slots, self._share[1]) - self.running)
        return max(0, room)

    def resting(self, now: float) -> int:
        """How many permits are in use: those of calls that are about to begin, and those that rest."""
        while self._rest and self._rest[0] <= now:
            self._rest.popleft()
        return len(self._rest) + self._taken

    def take(self, calls: int, now: float) -> None:
        """These calls are about to begin."""
        self.running += calls
        self._taken += calls
        self.used_at, self.waits_since = now, None

    def begins(self, limit: Limit, now: float) -> float:
        """A call for which a permit was taken begins. Returns when the permit may be used again."""
        self._taken -= 1
        if not limit.permits:
            return now
        # In order, also where another limit has become one of a shorter rest.
        free_at = max(now + limit.rest_s, self._rest[-1] if self._rest else -inf)
        self._rest.append(free_at)
        return free_at

    def ended(self, *, begun: bool) -> None:
        """A call has ended, or will not be made."""
        self.running -= 1
        self._taken -= not begun

    def rests_until(self, now: float) -> float:
        """When the last permit that rests may be used again; ``now``: none rests."""
        return self._rest[-1] if self.resting(now) and self._rest else now

    def asks(self, permits: int, slots: int, now: float) -> tuple[int, int]:
        """What to ask for where this is the fair share: what is in use is kept."""
        self._share = permits, slots
        return max(permits, self.resting(now)), max(slots, self.running)

    def leased(self, permits: int, slots: int, until: float) -> None:
        self.permits, self.slots, self.until = permits, slots, until


def shares(total: int, wants: Mapping[str, int], turn: int) -> dict[str, int]:
    """A fair share of ``total`` for each: nobody more than they want while others want more, and what is left for all.

    The same for whoever computes it. ``turn``: who comes first where it does not go round.
    """
    names = sorted(wants)
    first = turn % len(names) if names else 0
    names = names[first:] + names[:first]
    got, left = dict.fromkeys(names, 0), total
    unmet = [name for name in names if wants[name] > 0]
    while left and unmet:
        each = max(1, left // len(unmet))
        for name in unmet[: left if each == 1 else None]:
            given = min(each, wants[name] - got[name], left)
            got[name] += given
            left -= given
        unmet = [name for name in unmet if got[name] < wants[name]]
    for place, name in enumerate(names):
        got[name] += left // len(names) + (place < left % len(names))
    return got


def turn_of(at: float) -> int:
    """``at``: the server's time in seconds, the same for all who read a row."""
    return int(at // _TURN_S)


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a consumer asks for of a limit, or of one key of it. ``for_s``: after the lease it may be in use so long."""

    handler: str
    key: str
    permits: int
    slots: int
    wants: int
    for_s: float
    total: int
    slots_total: int


@dataclass(frozen=True, slots=True)
class Leased:
    """What the server says: what each live consumer has, and wants. ``at``: when it said so, by its clock."""

    handler: str
    key: str
    at: float
    permits: Mapping[str, int]
    slots: Mapping[str, int]
    wants: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LimitSetting:
    """A limit that an operator has set: it takes the place of the one in the code. ``subscription``: None: in all."""

    id: int
    handler: str
    limit: Limit
    subscription: str | None = None
    because: str = ""
    set_by: str = ""


def in_force(settings: Sequence[LimitSetting]) -> dict[str, Limit]:
    """By handler. Of one for all subscriptions and one for this, the latter."""
    return {
        each.handler: each.limit for each in sorted(settings, key=lambda each: (each.subscription is not None, each.id))
    }
