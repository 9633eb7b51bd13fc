"""Figures, what becomes of those of several rounds, and how they are shown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured value. ``name`` is unique within its scenario. ``at``: where on the axis of a plot it stands."""

    name: str
    value: float
    unit: str
    at: float | None = None


class LeftOutError(Exception):
    """A scenario cannot be measured here; says why."""


Round = Mapping[str, Sequence[Figure]]
"""Scenario to its figures, measured one after the other."""


class Summary(NamedTuple):
    """A figure over all rounds."""

    scenario: str
    name: str
    unit: str
    at: float | None
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "figure": self.name,
            "unit": self.unit,
            **({} if self.at is None else {"at": self.at}),
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


def from_json(found: Mapping[str, Any]) -> Summary:
    return Summary(found["scenario"], found["figure"], found["unit"], found.get("at"), tuple(found["values"]))


RATIOS = (
    ("drain to floor", ("drain", "settled"), ("floor", "settled")),
    ("drain to pgqueuer", ("drain", "settled"), ("pgqueuer", "best")),
    ("drain to graphile-worker", ("drain", "settled"), ("graphile", "best")),
    ("drain to awa-pg", ("drain", "settled"), ("awa", "best")),
    ("drain to Oban", ("drain", "settled"), ("oban", "best")),
    ("drain to procrastinate", ("drain", "settled"), ("procrastinate", "best")),
    ("drain to documented", ("drain", "settled"), ("documented", "settled")),
    ("drain-sync to floor", ("drain-sync", "settled"), ("floor", "settled")),
    ("drain-batch to floor", ("drain-batch", "settled"), ("floor", "settled")),
    ("drain-inserts to floor-inserts", ("drain-inserts", "settled"), ("floor-inserts", "settled")),
)
"""(name, numerator, denominator), each a scenario and a figure."""


def with_ratios(figures: Round) -> Round:
    """The round with a scenario ``ratio``: taken within a round, so that what slows the machine slows both sides."""
    values = {(scenario, figure.name): figure.value for scenario, named in figures.items() for figure in named}
    ratios = [
        Figure(name, values[above] / values[below], "")
        for name, above, below in RATIOS
        if above in values and below in values
    ]
    return {**figures, "ratio": ratios} if ratios else figures


def summarise(rounds: Iterable[Round]) -> list[Summary]:
    """Each figure with its values of all rounds, in the order in which they were measured; ratios last."""
    values: dict[tuple[str, str, str, float | None], list[float]] = {}
    for figures in rounds:
        for scenario, named in figures.items():
            for figure in named:
                values.setdefault((scenario, figure.name, figure.unit, figure.at), []).append(figure.value)
    found = [Summary(*key, tuple(found)) for key, found in values.items()]
    return sorted(found, key=lambda summary: summary.scenario == "ratio")


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that at least ``share`` of all do not exceed; no interpolation, so it is one that occurred."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


HEAD = ("scenario", "figure", "median", "min", "max", "unit")


def rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Beneath HEAD."""
    return [
        (s.scenario, s.name, number(s.median), number(min(s.values)), number(max(s.values)), s.unit) for s in summaries
    ]


def table(summaries: Sequence[Summary]) -> str:
    return aligned([HEAD, *rows(summaries)], right=range(2, 5))


def facts(title: str, values: Mapping[str, object]) -> str:
    width = max(map(len, values))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in values.items())])


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns; those of ``right`` are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in to_the_right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def number(value: float) -> str:
    """Three digits that mean something; large ones whole, with separators."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"
