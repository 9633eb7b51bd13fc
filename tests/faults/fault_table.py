"""``python -m tests.faults.fault_table``: measure every fault, and write the tables of docs/operations/slot.md.

The consumer is ``cdc run`` as shipped: what an operator must fix is looked at again every 30 to 60 s, so a run takes
half an hour. With words it measures only what they name: ``... fault_table faults``, ``... fault_table wal``.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import PLUGINS
from cdc.core.units import format_bytes as bytes_text
from tests.faults.slot_faults import FAULTS, Fault, Outcome, failing_over, suffer
from tests.faults.slot_stage import AS_SHIPPED, SERVER, Stage, prepare
from tests.faults.wal_held import FULL, SETTINGS, Holding, Size, handlers_blocked, large_transaction, nothing_tracked
from tests.fix_consumer import ROOT

GUIDE = ROOT / "docs/operations/slot.md"
_SCENARIOS: dict[str, Callable[[Stage, Size], Holding]] = {
    f"all handlers blocked for {FULL.seconds:.0f} s, under load": handlers_blocked,
    f"{FULL.megabytes >> 10} GB written to a table that is not tracked": nothing_tracked,
    f"one transaction of {FULL.rows:,} changes": large_transaction,
}


def block(name: str, text: str) -> str:
    """What stands between the two markers of that name."""
    return _between(name).findall(text)[0]


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- /{name} -->)", re.DOTALL)


def write(name: str, lines: list[str]) -> None:
    """Put them between the markers."""
    text = GUIDE.read_text("utf-8")
    GUIDE.write_text(_between(name).sub(lambda _: "\n".join([*lines, ""]), text), "utf-8")


def outcomes() -> Iterator[Outcome]:
    with TempServer(durable=False, settings=SERVER) as server:
        prepare(server.dsn())
        for fault in FAULTS:
            for plugin in fault.plugins:
                yield _suffered(server, fault, plugin)
    for plugin in PLUGINS:
        with failing_over() as (primary, dsn, fault):
            yield _suffered(primary, fault, plugin, dsn)


def _suffered(server: TempServer, fault: Fault, plugin: str, dsn: str | None = None) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        options = {"plugin": plugin, "pace": AS_SHIPPED, "dsn": dsn, **fault.settings}
        with Stage(server, Path(folder), **options) as stage:
            outcome = suffer(stage, fault)
    print(outcome, file=sys.stderr, flush=True)
    return outcome


def fault_lines(found: list[Outcome]) -> list[str]:
    """One row for a fault, with the figures of its plugins side by side."""
    lines = [
        "| what happens | plugin | the slot | full service after, s | sweeping only, s | changes written | lost |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for name, group in groupby(found, key=lambda outcome: outcome.fault):
        each = list(group)
        columns = (
            name,
            _side_by_side(outcome.plugin for outcome in each),
            _side_by_side(outcome.slot for outcome in each),
            _side_by_side(f"{outcome.restored_s:.1f}" for outcome in each),
            _side_by_side(f"{outcome.swept_s:.1f}" for outcome in each),
            _side_by_side(f"{outcome.captured:,}" for outcome in each),
            str(sum(outcome.lost for outcome in each)),
        )
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def wal_lines() -> list[str]:
    lines = [
        "| | plugin | WAL written | held, at most | its age, s | unconfirmed, s | in the end | by an unread slot |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, scenario in _SCENARIOS.items():
        found = {plugin: _held(scenario, plugin) for plugin in PLUGINS}
        each = found.values()
        columns = (
            name,
            _side_by_side(found),
            _side_by_side(bytes_text(holding.written) for holding in each),
            _side_by_side(bytes_text(holding.held) for holding in each),
            _side_by_side(f"{holding.held_s:.1f}" for holding in each),
            _side_by_side(f"{holding.unconfirmed_s:.1f}" for holding in each),
            _side_by_side(bytes_text(holding.held_at_the_end) for holding in each),
            _side_by_side(bytes_text(holding.unread) for holding in each),
        )
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _held(scenario: Callable[[Stage, Size], Holding], plugin: str) -> Holding:
    with TempServer(durable=False, settings=SERVER) as server, tempfile.TemporaryDirectory() as folder:
        prepare(server.dsn())
        with Stage(server, Path(folder), plugin, pace=AS_SHIPPED, **SETTINGS) as stage:
            holding = scenario(stage, FULL)
    print(scenario.__name__, plugin, holding, file=sys.stderr, flush=True)
    return holding


def _side_by_side(texts: Iterable[str]) -> str:
    """One text where all are the same."""
    return " / ".join(dict.fromkeys(texts))


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["faults", "wal"]
    if "faults" in wanted:
        write("faults", fault_lines(list(outcomes())))
    if "wal" in wanted:
        write("wal", wal_lines())
