"""What each program that empties a peer's queue prints: one JSON line about the rows that it settled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version


def tell(package: str, began: float, moments: Sequence[float]) -> None:
    """``moments``: when each row was settled, ascending; ``began``: when the first was handled. Unix seconds.

    ``thirds``: the seconds from then to the end of each third of all.
    """
    count = len(moments)
    ends = [moments[max(0, count * third // 3 - 1)] - began for third in (1, 2, 3)] if count else []
    print(json.dumps({"version": version(package), "settled": count, "thirds": ends}))
