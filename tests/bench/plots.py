"""Plots as small SVG: lines over a logarithmic axis, and bars. Readable on a light page and on a dark one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor, log10
from typing import NamedTuple

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 46, 44
_BAR = 26
# Colours that keep their distance from white and from black, and from each other without colour vision.
_STYLE = """\
<style>
text { font: 12px system-ui, sans-serif; fill: #57606a }
.title { font-weight: 600; font-size: 14px; fill: #24292f }
.grid { stroke: #d0d7de } .axis { stroke: #8c959f }
.s0 { stroke: #0969da; fill: #0969da } .s1 { stroke: #bf5700; fill: #bf5700 } .s2 { stroke: #1a7f37; fill: #1a7f37 }
polyline.line { fill: none; stroke-width: 2 } rect.bar, rect.legend { stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #9da7b3 } .title { fill: #e6edf3 } .grid { stroke: #30363d } .axis { stroke: #6e7681 }
  .s0 { stroke: #4c9aff; fill: #4c9aff } .s1 { stroke: #f0883e; fill: #f0883e } .s2 { stroke: #3fb950; fill: #3fb950 }
}
</style>"""

Points = Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """``ours`` stands out."""

    label: str
    value: float
    ours: bool


def lines(title: str, across: str, series: Mapping[str, Points]) -> str:
    """A line for each name: values on a linear axis from zero, their places on a logarithmic one."""
    places = sorted({x for points in series.values() for x, _ in points})
    top = _round_up(max(y for points in series.values() for _, y in points))
    low, high = log10(places[0]), log10(places[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        share = (log10(x) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 18, title, "title"), _text(_WIDTH / 2, _HEIGHT - 8, across, anchor="middle")]
    for step in range(5):
        _, y = at(places[0], top * step / 4)
        parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y, "grid" if step else "axis"))
        parts.append(_text(_LEFT - 8, y + 4, short(top * step / 4), anchor="end"))
    parts += [_text(at(x, 0)[0], _HEIGHT - _BOTTOM + 18, short(x), anchor="middle") for x in places]
    for number, (name, points) in enumerate(series.items()):
        parts += _line(f"s{number}", name, [(*at(*point), point[1]) for point in points])
    return _svg(_HEIGHT, title, [*parts, *_legend(series)])


def bars(title: str, found: Sequence[Bar]) -> str:
    """One below the other, each with its value at its end."""
    height = _TOP + _BAR * len(found) + 10
    label, top = 190, max(bar.value for bar in found)
    parts = [_text(10, 18, title, "title")]
    for number, bar in enumerate(found):
        y, width = _TOP - 10 + _BAR * number, bar.value / top * (_WIDTH - label - 90)
        parts.append(_text(label - 8, y + 14, bar.label, anchor="end"))
        parts.append(
            f'<rect class="bar s{0 if bar.ours else 1}" x="{label}" y="{y}" width="{width:.1f}" height="{_BAR - 8}"/>'
        )
        parts.append(_text(label + width + 6, y + 14, short(bar.value)))
    return _svg(height, title, parts)


def short(value: float) -> str:
    """1.2k, 30M, 0.4: as much as an axis has room for."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _line(kind: str, name: str, points: Sequence[tuple[float, float, float]]) -> list[str]:
    """Each with its value, which a pointer over it shows."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [f'<polyline class="line {kind}" points="{path}"/>']
    for x, y, value in points:
        shown = f"<title>{escape(name)}: {short(value)}</title>"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">{shown}</circle>')
    return parts


def _legend(names: Iterable[str]) -> list[str]:
    """Beneath the title; nothing for one line, which the title names."""
    parts, x = [], float(_LEFT)
    shown = list(names)
    for number, name in enumerate(shown if len(shown) > 1 else ()):
        parts.append(f'<rect class="legend s{number}" x="{x:.0f}" y="27" width="10" height="10"/>')
        parts.append(_text(x + 15, 36, name))
        x += 35 + 6.5 * len(name)
    return parts


def _round_up(value: float) -> float:
    """To a number whose quarters are short."""
    size: float = 10 ** floor(log10(value)) if value > 0 else 1
    return next(size * step for step in (1, 2, 4, 6, 8, 10) if size * step >= value)


def _text(x: float, y: float, words: str, kind: str = "", *, anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.0f}" y1="{y1:.1f}" x2="{x2:.0f}" y2="{y2:.1f}"/>'


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", _STYLE, *parts, "</svg>", ""])
