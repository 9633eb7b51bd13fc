"""When a failed change runs again. Pure: the attempt, the policy and the random number are arguments.

Exponential backoff with full jitter: the delay is drawn evenly from zero to the ceiling of the attempt, which
spreads the retries of changes that failed together (a dependency was down) better than any smaller jitter does.
"""

from __future__ import annotations

from dataclasses import dataclass

_DOUBLINGS_MAX = 63  # beyond it the ceiling is the cap for any sane base; and 2.0**2000 overflows
WAIT_MAX_S = 10 * 366 * 86_400.0  # PostgreSQL refuses intervals far beyond it, and a settle must not fail

_SNOOZE_MIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Policy:
    """``max_attempts`` counts the first one. ``base_s``: ceiling after the first failure; ``cap_s``: the highest.

    By default all attempts together span two hours and a quarter on the average, and twice that at most.
    """

    max_attempts: int = 20
    base_s: float = 1.0
    cap_s: float = 1_800.0


def ceiling_s(policy: Policy, attempt: int) -> float:
    """The longest wait after ``attempt`` failed, in seconds."""
    return float(min(policy.cap_s, policy.base_s * 2.0 ** min(attempt - 1, _DOUBLINGS_MAX)))


def delay_s(policy: Policy, attempt: int, fraction: float, after_s: float | None = None) -> float | None:
    """Seconds until the next attempt, or None: ``attempt`` was the last one.

    ``fraction`` in [0, 1) is the random number. ``after_s`` is the handler's own delay and not jittered.
    """
    if attempt >= policy.max_attempts:
        return None
    # A float also if the handler gave an int: psycopg refuses an array of both, and with it a whole settle.
    return float(min(ceiling_s(policy, attempt) * fraction if after_s is None else after_s, WAIT_MAX_S))


def snooze_s(after_s: float) -> float:
    """Seconds until a snoozed change is due. Nothing counts its attempts: it must not keep the database busy."""
    return float(min(max(after_s, _SNOOZE_MIN_S), WAIT_MAX_S))
