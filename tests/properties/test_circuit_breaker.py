"""Outages that begin and end as they like: no more than one trial, and what is there again is found soon."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cdc.core.circuit_breaker import PAUSE_MAX_S, BreakerState, CircuitBreaker
from tests.properties.machine import MACHINE


class Outages(RuleBasedStateMachine):
    """Calls begin as the breaker lets them, and end in any order; what they need comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.now, self.there = CircuitBreaker(), 0.0, True
        self.running: list[tuple[int, bool]] = []
        """Of each call its key, and whether it was let through by a breaker that is shut."""
        self.began_tripped = 0

    @rule(there=st.booleans())
    def turn(self, there: bool) -> None:
        self.there = there

    @rule(seconds=st.floats(0.0, 5.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.breaker.try_half_open(self.now)

    @rule(key=st.integers(0, 9))
    def begin(self, key: int) -> None:
        tripped = self.breaker.tripped
        if tripped and not self.breaker.room:
            return
        if tripped:
            self.breaker.trial(1)
        self.running.append((key, tripped))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), certain=st.booleans(), fails=st.booleans())
    def end(self, data: st.DataObject, certain: bool, fails: bool) -> None:
        key, trial = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = self.breaker.state
        if not self.there:
            self.breaker.unavailable(key, "away", self.now, certain=certain)
            assert before is BreakerState.CLOSED or self.breaker.state is BreakerState.OPEN
        elif fails:
            self.breaker.failed(self.now)
            assert before is self.breaker.state or (before, self.breaker.state) == (
                BreakerState.HALF_OPEN,
                BreakerState.OPEN,
            )
        else:
            self.breaker.succeeded(self.now)
            assert before is BreakerState.OPEN or not self.breaker.troubled
        if trial:
            self.breaker.trial(-1)

    @invariant()
    def one_trial_at_a_time_and_the_end_is_found_soon(self) -> None:
        # Those of an outage before may still be under way when the next one has begun.
        assert self.breaker.room in (0, 1)
        if self.breaker.state is BreakerState.OPEN:
            assert self.breaker.wait_s(self.now) <= PAUSE_MAX_S
        assert bool(self.breaker.why) == self.breaker.tripped

    @precondition(lambda self: not self.running)
    @rule()
    def recover(self) -> None:
        """Whatever was before: what is there again is found within the longest pause, by one call."""
        self.there = True
        self.now += PAUSE_MAX_S
        self.breaker.try_half_open(self.now)
        if self.breaker.tripped:
            assert self.breaker.room == 1
            self.breaker.trial(1)
            assert self.breaker.succeeded(self.now)
            self.breaker.trial(-1)
        assert not self.breaker.tripped


Outages.TestCase.settings = MACHINE
TestOutages = Outages.TestCase
