"""The benchmark: ``python -m tests.bench [NAME ...] [--runs N] [--quick] [--json FILE]``

Everything is measured on one throw-away server that keeps what it has committed (fsync and synchronous_commit on).
Scenarios take turns, round after round, so that a machine that gets slower meanwhile is unfair to none of them; what
is shown is the median of the rounds, the least and the greatest value.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cdc.throwaway import Server
from tests.bench import blocked, drain, floor, history, latency, machine, memory, writers
from tests.bench.report import Figure, Round, Summary, facts, summarise, table, with_ratios
from tests.bench.size import FULL, QUICK, Size

_SCENARIOS: dict[str, tuple[str, Callable[[Server, Size], list[Figure]]]] = {
    "floor": ("fetch and mark by key, batches of 500, one connection, no consumer", floor.measure),
    "drain": ("the consumer draining no-op changes, async handler", drain.measure),
    "drain-sync": ("the same, with a handler that runs in a thread", drain.measure_sync),
    "latency": ("commit to handler at a steady pace, and NOTIFY for comparison", latency.measure),
    "writers": ("pgbench: inserts untracked, tracked, with the documented trigger", writers.measure),
    "memory": ("resident memory of the consumer, idle and with a backlog", memory.measure),
    "blocked": ("draining beside changes that are held back, waiting, dead", blocked.measure),
    "history": ("views, commands, collector and consumer on ten million rows", history.measure),
}
_WHEN_NAMED = {"history"}
"""Filling its table takes minutes a round: --runs 1 will do."""


def main() -> None:
    options = _options()
    # Unwinding is what ends the server and the consumers.
    signal.signal(signal.SIGTERM, _leave)
    size = QUICK if options.quick else FULL
    chosen = options.names or [name for name in _SCENARIOS if name not in _WHEN_NAMED]
    with Server() as server:
        about = {
            "machine": machine.machine(),
            "versions": machine.versions(server),
            "settings": machine.settings(server),
        }
        for title, values in about.items():
            print(facts(title, values), end="\n\n", flush=True)
        summaries = summarise(_rounds(server, size, chosen, options.runs))
    print(table(summaries))
    print(f"\nmedian of {options.runs} rounds; load now {machine.load()}")
    if options.json:
        options.json.write_text(json.dumps({"schema": 1, **about, "figures": _as_json(summaries)}, indent=2) + "\n")


def _rounds(server: Server, size: Size, chosen: Sequence[str], runs: int) -> list[Round]:
    rounds: list[Round] = []
    for number in range(1, runs + 1):
        figures: dict[str, list[Figure]] = {}
        for name in chosen:
            print(f"round {number} of {runs}: {name} ...", file=sys.stderr, flush=True)
            _, measure = _SCENARIOS[name]
            figures[name] = measure(server, size)
        rounds.append(with_ratios(figures))
    return rounds


def _as_json(summaries: Sequence[Summary]) -> list[dict[str, object]]:
    return [summary.as_json() for summary in summaries]


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the consumer on a throw-away server.",
        epilog="\n".join(f"  {name:<12}{purpose}" for name, (purpose, _) in _SCENARIOS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="scenarios, in this order; none named: all but history"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="one tenth of the work: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value of every round there, too")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in _SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(_SCENARIOS)}")
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


if __name__ == "__main__":
    main()
