"""``python -m tests.simulation 1234`` replays a seed and prints its steps; ``... 0 30000`` plays that many seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.simulation.schedule import Simulation


def broken(seeds: range) -> Iterator[tuple[int, Exception]]:
    """The seeds that break a promise, or the code, and how."""
    for seed in seeds:
        try:
            Simulation(seed).run()
        except Exception as error:
            yield seed, error


def main(arguments: list[str]) -> int:
    first, *beyond = map(int, arguments)
    if not beyond:
        Simulation(first, on_step=print).run()
        return 0
    failed = 0
    for seed, error in broken(range(first, beyond[0])):
        failed += 1
        print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
    print(f"{failed} of {beyond[0] - first} seeds broke a promise")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
