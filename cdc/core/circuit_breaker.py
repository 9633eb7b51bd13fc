"""A circuit breaker: pauses a handler while what it needs is unavailable. Pure: time is an argument.

Theory
------
A handler reports that something it needs is unavailable (``cdc.Unavailable``). For one key, that key may be the cause.
For several keys, with no success in between, all keys are affected, and each further call is in vain: at best it takes
its time, at worst it hinders the recovery. So no call is made for a while, and after that one at a time, to find
out:

              several keys in a row, or one that knows
      CLOSED ──────────────────────────────────────────► OPEN ◄─────────────┐
        ▲                                                  │ the pause       │ unavailable: twice the pause
        │                                                  ▼ is over         │ failed: the same pause
        └──────────────────── success ───────────────── HALF_OPEN ───────────┘

* CLOSED: any number of calls. OPEN: none. HALF_OPEN: one at a time.
* The results of calls that began before it opened are old, and change nothing while it is open. While it is half open
  they count like that of the trial call.
* A call that fails otherwise says nothing about what was unavailable: it neither opens the breaker nor closes it.
* The pause doubles up to ``PAUSE_MAX_S``, which bounds how late the end of an outage is noticed. It starts again from
  the minimum if the breaker had been closed for ``STEADY_S``: a dependency that fails more often keeps its last pause.
* A dependency that says when to come back (``after_s``) is not called before, up to ``AFTER_MAX_S``: a wrong clock
  there must not stop a handler for a day.

The changes that the breaker holds back stay where they are: in the window, which is bounded, and in the table. The
breaker itself remembers only a few keys.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from math import inf

KEYS = 3
"""Number of keys in a row that open it."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 3.0
STEADY_S = 10.0
AFTER_MAX_S = 60.0


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Of one handler. Times in seconds, by any clock that does not go back.

    ``state``, ``why`` and ``since`` may be read from any thread.
    """

    __slots__ = (
        "_asks_at",
        "_closed_at",
        "_keys",
        "_pause_s",
        "_trials",
        "certain",
        "since",
        "state",
        "tripped",
        "why",
    )

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self.tripped = False
        """It is not closed."""
        self.why = ""
        """The reason that the last unavailable call gave; "" while it is closed."""
        self.since = -inf
        """When it was last closed."""
        self.certain = False
        """The last unavailable call knew that no single key is the cause."""
        self._keys: set[Hashable] = set()
        self._pause_s = PAUSE_MIN_S
        self._asks_at = -inf
        self._closed_at = -inf
        self._trials = 0

    @property
    def troubled(self) -> bool:
        """Whether a success would change its state."""
        return self.tripped or bool(self._keys)

    @property
    def room(self) -> int:
        """How many calls may begin now, unless it is closed."""
        return 1 if self.state is BreakerState.HALF_OPEN and not self._trials else 0

    def trial(self, calls: int) -> None:
        """A call began (1) or ended (-1), with any result, while it was not closed."""
        self._trials += calls

    def unavailable(self, key: Hashable, why: str, now: float, *, certain: bool = False, after_s: float = 0.0) -> bool:
        """A call found what it needs unavailable. Returns whether that has opened the breaker, which was closed.

        ``certain``: no single key is the cause.
        """
        opened = False
        if self.state is BreakerState.OPEN:
            return False
        if self.state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        else:
            self._keys.add(key)
            if not certain and len(self._keys) < KEYS:
                return False
            if now - self._closed_at > STEADY_S:
                self._pause_s = PAUSE_MIN_S
            self.since, opened = now, True
        self.why, self.certain = why, certain
        self._open(now, after_s)
        return opened

    def failed(self, now: float) -> None:
        """A call has failed in another way."""
        if self.state is BreakerState.HALF_OPEN:
            self._open(now)

    def succeeded(self, now: float) -> bool:
        """A call succeeded. Returns whether that has closed the breaker."""
        if self.state is BreakerState.OPEN and not self._trials:
            return False
        closed = self.tripped
        if closed:
            self._closed_at = now
        self.state, self.tripped = BreakerState.CLOSED, False
        self.why, self.certain = "", False
        self._keys.clear()
        return closed

    def try_half_open(self, now: float) -> bool:
        """Time has passed. Returns whether a trial call may be made."""
        if self.state is BreakerState.OPEN and now >= self._asks_at:
            self.state = BreakerState.HALF_OPEN
            return True
        return False

    def wait_s(self, now: float) -> float:
        """Seconds until ``try_half_open`` may return true; infinite unless it is open."""
        return max(0.0, self._asks_at - now) if self.state is BreakerState.OPEN else inf

    def _open(self, now: float, after_s: float = 0.0) -> None:
        self.state, self.tripped = BreakerState.OPEN, True
        self._keys.clear()
        self._asks_at = now + max(self._pause_s, min(after_s, AFTER_MAX_S))
