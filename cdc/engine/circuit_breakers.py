"""The circuit breakers of all handlers: logged, counted, and half-opened when their pause is over.

See ``core.circuit_breaker``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from cdc.core.circuit_breaker import BreakerState, CircuitBreaker
from cdc.core.model import Key
from cdc.observability.snapshots import BreakerStatus

log = logging.getLogger("cdc.handlers")


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


class CircuitBreakers:
    """For the event loop; ``status`` from any thread. ``handlers``: their names.

    ``changed`` is called when one has opened, lets a call through, or has closed.
    """

    def __init__(self, handlers: Iterable[str], *, clock: Callable[[], float] = _loop_time) -> None:
        self.of: Mapping[str, CircuitBreaker] = {name: CircuitBreaker() for name in handlers}
        self._clock = clock
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._troubled: set[str] = set()
        self.troubled: Collection[str] = self._troubled
        """Handlers whose breaker a success would change. Mostly none: a call that succeeds only checks that."""
        self.changed: Callable[[], None] = lambda: None

    @property
    def status(self) -> Mapping[str, BreakerStatus]:
        """By handler."""
        return {name: BreakerStatus(breaker.state, breaker.why) for name, breaker in self.of.items()}

    def rests(self, handler: str) -> bool:
        """Whether no call of it may begin yet."""
        return self.of[handler].state is BreakerState.OPEN

    def unavailable(self, handler: str, key: Key, why: str, *, certain: bool, after_s: float) -> bool:
        """A call found a dependency unavailable. Returns whether the breaker tripped. ``why``: nothing of the row."""
        breaker = self.of[handler]
        opened = breaker.unavailable(key, why, self._clock(), certain=certain, after_s=after_s)
        self._troubled.add(handler)
        if opened:
            log.warning(
                "handler %s rests: %s; its changes wait as they are, no attempt is counted, and one call at a time"
                " finds out whether that is over",
                handler, why, extra={"event": "breaker", "handler": handler, "state": BreakerState.OPEN.value},
            )  # fmt: skip
        self._schedule_trial(handler)
        if opened:
            self.changed()
        return breaker.tripped

    def failed(self, handler: str) -> None:
        """A call has failed in another way."""
        if handler in self._troubled:
            self.of[handler].failed(self._clock())
            self._schedule_trial(handler)

    def succeeded(self, handler: str) -> None:
        """What a call needs was there: it returned, or the handler decided about its change."""
        if handler not in self._troubled:
            return
        breaker, now = self.of[handler], self._clock()
        closed = breaker.succeeded(now)
        if not breaker.troubled:
            self._troubled.discard(handler)
        if closed:
            log.info(
                "handler %s works again, after %.1f s", handler, now - breaker.since,
                extra={"event": "breaker", "handler": handler, "state": breaker.state.value},
            )  # fmt: skip
            self.changed()

    def _schedule_trial(self, handler: str) -> None:
        """The breaker may have opened: check again when its pause is over."""
        breaker = self.of[handler]
        if breaker.state is not BreakerState.OPEN:
            return
        if timer := self._timers.pop(handler, None):
            timer.cancel()
        wait_s = breaker.wait_s(self._clock())
        self._timers[handler] = asyncio.get_running_loop().call_later(wait_s, self._pause_over, handler)

    def _pause_over(self, handler: str) -> None:
        del self._timers[handler]
        breaker = self.of[handler]
        if breaker.try_half_open(self._clock()):
            self.changed()
        else:
            self._schedule_trial(handler)  # the timer was a little early
