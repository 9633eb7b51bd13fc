"""A change that fails again and again, while its policy and the handler's wishes are what they are."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cdc.core.backoff import Policy, ceiling_s, delay_s
from tests.properties.machine import MACHINE

_LONGEST_S = 10 * 366 * 86_400.0
_FRACTION = st.floats(0, 1, exclude_max=True)


class FailingChange(RuleBasedStateMachine):
    """``waited``: the delays of the attempts so far; the model of the ceiling doubles step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.attempt = 1
        self.dead = False

    @initialize(max_attempts=st.integers(1, 60), base_s=st.floats(0.001, 3_600), cap_s=st.floats(0.001, 1e12))
    def begin(self, max_attempts: int, base_s: float, cap_s: float) -> None:
        self.policy = Policy(max_attempts, base_s, cap_s)
        self.ceiling = min(base_s, cap_s)

    @precondition(lambda self: not self.dead)
    @rule(fraction=_FRACTION, wish=st.none() | st.floats(0, allow_nan=False) | st.integers(0, 10**30))
    def fail(self, fraction: float, wish: float | None) -> None:
        assert ceiling_s(self.policy, self.attempt) == self.ceiling
        delay = delay_s(self.policy, self.attempt, fraction, wish)
        assert (delay is None) == (self.attempt == self.policy.max_attempts)
        if delay is None:
            self.dead = True
            return
        assert isinstance(delay, float)
        assert 0 <= delay <= _LONGEST_S
        assert delay == min(self.ceiling * fraction if wish is None else wish, _LONGEST_S)
        self.attempt += 1
        self.ceiling = min(2 * self.ceiling, self.policy.cap_s)

    @precondition(lambda self: not self.dead)
    @rule(lower=_FRACTION, higher=_FRACTION)
    def throw_the_dice(self, lower: float, higher: float) -> None:
        """The dice decide about the delay evenly, and about nothing else."""
        lower, higher = sorted((lower, higher))
        delays = [delay_s(self.policy, self.attempt, fraction) for fraction in (0.0, lower, higher)]
        if delays[0] is None:
            assert delays == [None] * 3
        else:
            assert delays[0] == 0
            assert delays == sorted(delays, key=lambda delay: delay or 0)

    @precondition(lambda self: self.dead)
    @rule(fraction=_FRACTION, attempts=st.integers(1, 10**6))
    def operator_gives_it_another_try(self, fraction: float, attempts: int) -> None:
        """Attempts count anew; a policy that has become stricter meanwhile ends at once."""
        assert delay_s(self.policy, self.policy.max_attempts + attempts, fraction) is None
        self.attempt, self.dead = 1, False
        self.ceiling = min(self.policy.base_s, self.policy.cap_s)


FailingChange.TestCase.settings = MACHINE
TestFailingChange = FailingChange.TestCase
