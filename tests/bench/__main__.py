"""The benchmark: ``python -m tests.bench [NAME ...] [--runs N] [--quick] [--json FILE] [--write-docs]``

Everything is measured on one throw-away server that keeps what it has committed (fsync and synchronous_commit on).
Scenarios take turns, round after round, so that a machine that gets slower meanwhile is unfair to none of them; what
is shown is the median of the rounds, the least and the greatest value. What takes long is measured in the first round
only.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import machine, publish, queues, report, targets
from tests.bench.report import Figure, LeftOutError, Round, Summary
from tests.bench.scenarios import GROUPS, SCENARIOS, Turn
from tests.bench.size import FULL, QUICK, Size

_FAILED = "it failed with"

Result = dict[str, Any]
"""What --json writes."""


def main() -> None:
    options = _options()
    # Unwinding is what ends the server and the consumers.
    signal.signal(signal.SIGTERM, _leave)
    if options.results:
        results = [json.loads(path.read_text()) for path in options.results]
    else:
        results = [_measured(options.chosen, options.runs, quick=options.quick)]
    for result in results:
        print(_shown(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results[0], indent=1) + "\n")
    if options.write_docs:
        for result in results:
            publish.write(result)
    if any(why.startswith(_FAILED) for result in results for why in result["left out"].values()):
        sys.exit(1)


def _measured(chosen: Sequence[str], runs: int, *, quick: bool) -> Result:
    began, size = time.monotonic(), QUICK if quick else FULL
    with TempServer() as server:
        about = {
            "machine": machine.machine(),
            "versions": machine.versions(server) | queues.versions(),
            "settings": machine.settings(server),
            "sizes": asdict(size),
        }
        rounds, left_out = _rounds(server, size, chosen, runs)
    summaries = report.summarise(rounds)
    about["machine"]["load after"] = machine.load()
    return {
        "schema": 2,
        **about,
        "run": {"rounds": runs, "quick": quick, "seconds": round(time.monotonic() - began), "scenarios": list(chosen)},
        "figures": [summary.as_json() for summary in summaries],
        "targets": [verdict.as_json() for verdict in targets.judge(summaries)],
        "left out": left_out,
    }


def _rounds(server: TempServer, size: Size, chosen: Sequence[str], runs: int) -> tuple[list[Round], dict[str, str]]:
    """What was measured, and why what was not was not."""
    began = time.monotonic()
    rounds: list[Round] = []
    left_out: dict[str, str] = {}
    for number in range(1, runs + 1):
        figures: dict[str, list[Figure]] = {}
        for name in chosen:
            if name in left_out or (number > 1 and SCENARIOS[name].turn is not Turn.EACH_ROUND):
                continue
            print(f"{time.monotonic() - began:5.0f} s  round {number} of {runs}: {name}", file=sys.stderr, flush=True)
            try:
                figures[name] = SCENARIOS[name].measure(server, size)
            except LeftOutError as reason:
                left_out[name] = str(reason)
            except Exception as error:  # what the others have shown by now took minutes
                traceback.print_exc()
                left_out[name] = _failed(error)
        rounds.append(report.with_ratios(figures))
    print(f"{time.monotonic() - began:5.0f} s  done", file=sys.stderr, flush=True)
    return rounds, left_out


def _failed(error: Exception) -> str:
    return f"{_FAILED} {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _shown(result: Result) -> str:
    summaries: list[Summary] = [report.from_json(figure) for figure in result["figures"]]
    run = result["run"]
    parts = [report.facts(title, result[title]) for title in publish.ABOUT if title in result]
    parts.append(report.table(summaries))
    whole = set(GROUPS["all"]) <= set(run["scenarios"])
    if verdicts := [verdict for verdict in targets.judge(summaries) if whole or verdict.found]:
        parts.append(targets.table(verdicts))
    if result["left out"]:
        parts.append(report.facts("left out", result["left out"]))
    quick = ", one tenth of the work: no figures to go by" if run["quick"] else ""
    parts.append(f"medians of {run['rounds']} rounds, {run['seconds']} s in all{quick}")
    return "\n\n".join(parts)


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    names = [f"  {name:<20}{scenario.purpose} ({scenario.turn.value})" for name, scenario in SCENARIOS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the consumer, and its peers beside it, on a throw-away server.",
        epilog="\n".join(["scenarios:", *names, "  growth              all of growth-*"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios; none named: all that need no naming")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds (default 3, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value of every round there, too")
    parser.add_argument(
        "--from", dest="results", type=Path, nargs="+", metavar="FILE", help="do not measure: show what --json wrote"
    )
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write the figures, and plots of them, into docs/explanation/performance.md",
    )
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in {*SCENARIOS, *GROUPS}]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join([*SCENARIOS, *GROUPS])}")
    if options.runs is None:
        options.runs = 1 if options.quick else 3
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    named = [name for word in options.names or ["all"] for name in GROUPS.get(word, [word])]
    options.chosen = list(dict.fromkeys(named))
    if options.write_docs and not options.results and not publish.is_whole(options.chosen):
        parser.error("--write-docs takes a whole run: of no NAME, or of growth")
    return options


if __name__ == "__main__":
    main()
