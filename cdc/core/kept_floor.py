"""Up to which number of the outbox no change is still to come, for the floors that outlive their consumer. Pure.

Theory
------
A number is drawn after its transaction got its id. So once every transaction has ended that had an id when the number
drawn last was looked up, whatever has that number or a lower one is visible, or will never be. The number drawn last,
then the first id that is not assigned, make a *candidate*. A later snapshot whose ``xmin`` has reached that id proves
it, and what is fresh in that snapshot is all that keeps the floor of a shard below it.

While a transaction stays open, the candidate stands: with a new one at each look, those that overlap one another would
put the proof off for ever.
"""

from __future__ import annotations

from cdc.core.shard_cursor import Snapshot


class KeptFloor:
    """``proved`` is proved; ``candidate`` will be, by a snapshot whose xmin has reached ``needs``.

    At each look ``drew`` and then ``looked`` is called: the number is read before the snapshot's ``next_xid``.
    """

    __slots__ = ("_last", "candidate", "needs", "proved")

    def __init__(self) -> None:
        self.proved = self.candidate = self.needs = self._last = 0

    @property
    def waits(self) -> bool:
        """A candidate is to be proved."""
        return self.candidate > self.proved

    def drew(self, last: int) -> None:
        """``last``: the number drawn last. One below what is known here is of a sequence that has started over."""
        if last < self.candidate:
            self.proved = self.candidate = self.needs = 0
        self._last = last

    def looked(self, snapshot: Snapshot) -> None:
        """The floors were moved by this snapshot: up to the candidate, where it proves that."""
        if snapshot.xmin >= self.needs:
            self.proved = self.candidate
            self.candidate, self.needs = self._last, snapshot.next_xid
