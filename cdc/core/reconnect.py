"""State kept from one session to the next: how long to wait, and how long to tolerate silence. Pure.

Silence. A server that decodes a huge transaction of other tables sends nothing for a while. It is not dead, but the
client cannot tell. After the *stall limit* the connection is closed; if the next session ends in silence too and has
brought nothing, the limit doubles, else the same transaction would be decoded for ever.

Dead ends. Something in the WAL may break its decoding: a row that is too large, a fault in the plugin, at worst one
that takes the whole server down. Sessions that were broken off one after another, each no further than those before,
have met it: the slot must be recreated behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdc.core.backoff import Policy, ceiling_s

STALL_LIMIT_MAX_S = 600.0
PERMANENT_PAUSE_S = 60.0
"""Between two tries after a refusal that an operator must fix."""
STANDBY_PAUSE_MAX_S = 5.0
"""Between two tries at a slot that another consumer reads: how long no wake-ups come when that one dies."""
DEAD_ENDS_MAX = 5
"""Sessions that came no further, before the slot is recreated: with the pauses between them a few seconds."""
_RECONNECT = Policy(base_s=0.1, cap_s=30.0)


@dataclass(frozen=True, slots=True)
class ReconnectState:
    """What earlier sessions mean for the next one."""

    stall_limit_base_s: float
    failures: int = 0
    silences: int = 0
    dead_ends: int = 0

    @property
    def stuck(self) -> bool:
        return self.dead_ends >= DEAD_ENDS_MAX

    @property
    def stall_limit_s(self) -> float:
        return float(min(STALL_LIMIT_MAX_S, self.stall_limit_base_s * 2 ** min(self.silences, 16)))

    def after(self, *, stalled: bool, advanced: bool, talked_s: float, broken_off: bool = False) -> ReconnectState:
        """The state after a session ended or was refused. ``broken_off``: it started, and the other side broke it off.

        ``advanced``: it brought a position no session had reached. ``talked_s``: from its start to its last byte; a
        session longer than the stall limit was not cut off in one transaction. Either resets the state. A single byte
        does not: the first keepalive comes before the transaction that hangs or breaks it.
        """
        # At any talked_s: decoding up to the place that breaks it may take minutes, each time.
        dead_ends = 0 if advanced else self.dead_ends + int(broken_off)
        if advanced or talked_s > self.stall_limit_s:
            return ReconnectState(self.stall_limit_base_s, failures=1, silences=int(stalled), dead_ends=dead_ends)
        return ReconnectState(self.stall_limit_base_s, self.failures + 1, self.silences + int(stalled), dead_ends)

    def pause_s(self, fraction: float, *, permanent: bool, standby: bool) -> float:
        """Seconds until the next attempt; ``fraction`` in [0, 1) is a random number.

        Never less than half the ceiling: consumers that lost one server together reconnect spread out, not at once.
        """
        longest = PERMANENT_PAUSE_S if permanent else ceiling_s(_RECONNECT, max(1, self.failures))
        if standby:
            longest = min(longest, STANDBY_PAUSE_MAX_S)
        return longest * (0.5 + fraction / 2)
