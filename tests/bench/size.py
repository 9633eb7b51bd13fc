"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """``rate`` in rows a second; ``seconds`` of each steady load, after ``warm_up_s`` that do not count.

    ``beside`` so many ``blocked`` changes others are drained. ``history``: processed ones in the large table.
    """

    changes: int = 100_000
    pending: int = 300_000
    beside: int = 50_000
    blocked: int = 100_000
    history: int = 10_000_000
    keys: int = 1_000
    rate: int = 500
    seconds: int = 10
    warm_up_s: int = 1
    clients: int = 16


FULL = Size()
QUICK = Size(changes=10_000, pending=30_000, beside=5_000, blocked=10_000, history=1_000_000, seconds=2)
"""To see that it runs; its figures are mostly start-up."""
