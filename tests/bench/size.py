"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """``rate`` in rows a second; ``seconds`` of each steady load, after ``warm_up_s`` that do not count.

    Counts of changes: ``changes`` are drained; ``inserting`` those whose handler writes; ``awaiting`` those whose
    handler waits for 10 ms, a quarter of that for 20 ms; ``transaction`` in one transaction; ``pending`` at a start;
    ``passing`` while an old snapshot is held, by others for at most ``snapshot_s``; ``beside`` so many ``blocked`` ones
    others are drained; ``history``: processed ones in the large table; ``notified``: messages read from a slot.
    ``away_s``: so long a broker is away.
    ``queued``, ``queued_slow``: jobs for a quick peer and a slow one. ``grown``: the most in a figure of growth.
    """

    changes: int = 100_000
    inserting: int = 20_000
    awaiting: int = 30_000
    transaction: int = 1_000_000
    pending: int = 3_000_000
    passing: int = 300_000
    snapshot_s: float = 10.0
    beside: int = 50_000
    blocked: int = 100_000
    history: int = 10_000_000
    notified: int = 400_000
    queued: int = 30_000
    queued_slow: int = 500
    grown: int = 1_000_000
    keys: int = 1_000
    many_keys: int = 10_000
    rate: int = 500
    seconds: int = 6
    warm_up_s: int = 1
    clients: int = 16
    away_s: int = 60


FULL = Size()
QUICK = Size(
    changes=10_000, inserting=3_000, awaiting=5_000, transaction=100_000, pending=200_000, passing=30_000,
    snapshot_s=4.0, beside=5_000, blocked=10_000, history=1_000_000, notified=40_000, queued=5_000, queued_slow=200,
    grown=100_000, seconds=2, away_s=5,
)  # fmt: skip
"""To see that it runs; its figures are mostly start-up."""
