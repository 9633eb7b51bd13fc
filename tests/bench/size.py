"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """``rate`` in rows a second; ``seconds`` of each steady load, after ``warm_up_s`` that do not count."""

    changes: int = 100_000
    pending: int = 300_000
    keys: int = 1_000
    rate: int = 500
    seconds: int = 10
    warm_up_s: int = 1
    clients: int = 16


FULL = Size()
QUICK = Size(changes=10_000, pending=30_000, seconds=2)
"""To see that it runs; its figures are mostly start-up."""
