"""Writes a result into docs/explanation/performance.md, and plots of it beside: what is published is what was measured.

The document is prose with blocks between ``<!-- NAME -->`` and ``<!-- /NAME -->``; a block is written anew by a result
that has something for it, and left alone by any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import plots, report, targets
from tests.bench.plots import Bar
from tests.bench.report import Summary
from tests.bench.scenarios import GROUPS

_DOCS = Path(__file__).parents[2] / "docs"
_DOCUMENT = _DOCS / "explanation/performance.md"
_PLOTS = _DOCS / "plots"

ABOUT = ("machine", "versions", "settings", "sizes")
"""What a result says of itself."""

_GROWTH: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "growth-backlog": ("changes pending at the start", {"rate": ("settled",), "memory": ("peak memory",)}),
    "growth-payload": ("bytes of new_data", {"rate": ("settled",), "bytes": ("payload",), "memory": ("peak memory",)}),
    "growth-keys": ("keys, 50,000 changes in all", {"rate": ("settled",)}),
    "growth-consumers": ("consumers, whose handler awaits 20 ms", {"rate": ("settled",)}),
    "growth-history": (
        "processed changes in the table",
        {"rate": ("settled",), "latency": ("commit to handler, p50", "commit to handler, p99")},
    ),
}
"""Scenario to its axis and its plots: what is drawn in each."""
_DRAINED = (
    ("SQL floor", "floor", "settled"),
    ("cdc, batches of 200", "drain-batch", "settled"),
    ("cdc, async", "drain", "settled"),
    ("cdc, threads", "drain-sync", "settled"),
    ("graphile-worker", "graphile", "best"),
    ("pgqueuer", "pgqueuer", "best"),
    ("documented processor", "documented", "settled"),
    ("awa", "awa", "best"),
    ("Oban", "oban", "best"),
    ("procrastinate", "procrastinate", "best"),
)


def is_whole(scenarios: Collection[str]) -> bool:
    """Whether a run of these has all that the figures, or the plots of growth, are made of."""
    return any(set(GROUPS[group]) <= set(scenarios) for group in ("all", "growth"))


def write(result: Mapping[str, Any]) -> None:
    """Raises ValueError for a part of a run, OSError where the document is missing."""
    if not is_whole(result["run"]["scenarios"]):
        raise ValueError("a part of a run is not published")
    summaries = [report.from_json(figure) for figure in result["figures"]]
    _PLOTS.mkdir(exist_ok=True)
    blocks: dict[str, str] = {}
    verdicts = targets.judge(summaries)
    if any(verdict.found for verdict in verdicts):
        blocks["machine"] = _about(result)
        blocks["targets"] = _markdown(targets.HEAD, targets.rows(verdicts))
        blocks["figures"] = _markdown(report.HEAD, report.rows(summaries))
        blocks["left-out"] = _left_out(result["left out"])
    if bars := _bars(summaries):
        _draw("drain", plots.bars("No-op changes or jobs settled in a second", bars))
        blocks["drain"] = _image("drain", "No-op changes or jobs settled in a second, by system")
    grown = {scenario: _grown(scenario, summaries) for scenario in _GROWTH}
    blocks |= {scenario: block for scenario, block in grown.items() if block}
    if any(grown.values()):
        blocks["growth-machine"] = _about(result)
    _keep(result, growth=any(grown.values()))
    text = _DOCUMENT.read_text("utf-8")
    for name, block in blocks.items():
        text = with_block(text, name, block)
    _DOCUMENT.write_text(text, "utf-8")


def with_block(text: str, name: str, block: str) -> str:
    """Raises ValueError where the document has no such block."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{_DOCUMENT.name} has no block {name}")
    return pattern.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text)


def _about(result: Mapping[str, Any]) -> str:
    run = result["run"]
    how = f"medians of {run['rounds']} rounds" if run["rounds"] > 1 else "one round"
    quick = ", **one tenth of the work, no figures to go by**" if run["quick"] else ""
    parts = [
        f"{title.capitalize()}: {'; '.join(f'{name} {value}' for name, value in result[title].items())}."
        for title in ABOUT
        if title in result
    ]
    return "\n\n".join([*parts, f"Measured in {run['seconds']} s, {how}{quick}."])


def _left_out(reasons: Mapping[str, str]) -> str:
    return (
        "\n".join(f"- Left out: {name}, since {reason}." for name, reason in reasons.items()) or "Nothing was left out."
    )


def _bars(summaries: Sequence[Summary]) -> list[Bar]:
    medians = {(summary.scenario, summary.name): summary.median for summary in summaries}
    found = [
        Bar(label, medians[scenario, figure], label.startswith("cdc"))
        for label, scenario, figure in _DRAINED
        if (scenario, figure) in medians
    ]
    return sorted(found, key=lambda bar: -bar.value) if any(bar.ours for bar in found) else []


def _grown(scenario: str, summaries: Sequence[Summary]) -> str:
    across, drawn = _GROWTH[scenario]
    images = []
    for name, figures in drawn.items():
        series = {figure: _points(scenario, figure, summaries) for figure in figures}
        if not all(series.values()):
            continue
        unit = next(s.unit for s in summaries if s.scenario == scenario and s.name.startswith(figures[0]))
        title = f"{figures[0].partition(', p')[0]}, {unit}"
        _draw(f"{scenario}-{name}", plots.lines(title, across, series))
        images.append(_image(f"{scenario}-{name}", f"{title}, by {across}"))
    return "\n".join(images)


def _points(scenario: str, figure: str, summaries: Sequence[Summary]) -> list[tuple[float, float]]:
    return [
        (summary.at, summary.median)
        for summary in summaries
        if summary.at is not None and summary.scenario == scenario and summary.name.startswith(f"{figure}, ")
    ]


def _draw(name: str, svg: str) -> None:
    (_PLOTS / f"{name}.svg").write_text(svg, "utf-8")


def _keep(result: Mapping[str, Any], *, growth: bool) -> None:
    """The result itself, so that the document can be written anew without measuring."""
    (_PLOTS / f"{'growth' if growth else 'figures'}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _image(name: str, title: str) -> str:
    return f"![{title}](../plots/{name}.svg)"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
