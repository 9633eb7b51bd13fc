"""A dashboard as one SVG: panels in Grafana's grid. Readable on a light page and on a dark one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, inf, log10
from typing import NamedTuple

_COLUMN, _ROW, _GAP = 54, 26, 8
_COLUMNS = 24
_PAD, _HEAD, _AXIS = 10, 36, 54
_STYLE = """\
<style>
text { font: 11px system-ui, sans-serif; fill: #57606a }
.title { font-weight: 600; font-size: 12px; fill: #24292f } .row { font-weight: 600; font-size: 15px; fill: #24292f }
.value { font-weight: 600; font-size: 26px; fill: #1a7f37 }
.panel { fill: none; stroke: #d0d7de } .grid { stroke: #eaeef2 }
.line { fill: none; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #9da7b3 } .title, .row { fill: #e6edf3 } .value { fill: #3fb950 }
  .panel { stroke: #30363d } .grid { stroke: #21262d }
}
</style>"""
_COLOURS = ("#0969da", "#bf5700", "#1a7f37", "#8250df", "#cf222e", "#9a6700", "#0a7d91", "#bf3989")
_HEAT = "#bf5700"
_BYTES = ("B", "KiB", "MiB", "GiB")
_SIZES = frozenset({"bytes", "Bps"})
_SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class Series(NamedTuple):
    """``points``: (seconds since the start, value)."""

    name: str
    points: tuple[tuple[float, float], ...]


class Panel(NamedTuple):
    """``kind``, ``x``, ``y``, ``width``, ``height``, ``unit``: as in Grafana's JSON, in cells of its grid."""

    kind: str
    title: str
    x: int
    y: int
    width: int
    height: int
    unit: str
    series: tuple[Series, ...]


class _Box(NamedTuple):
    """Of a panel's chart, in pixels."""

    left: float
    top: float
    width: float
    height: float


def draw(panels: Sequence[Panel], title: str) -> str:
    """The picture of all of them. One that shows nothing says so."""
    width = _COLUMNS * _COLUMN
    height = max(panel.y + panel.height for panel in panels) * _ROW + _GAP
    end = max((at for panel in panels for each in panel.series for at, _ in each.points), default=1.0)
    parts = [part for panel in panels for part in _panel(panel, end)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title>\n{_STYLE}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def value(number: float, unit: str) -> str:
    """A number with its unit, short."""
    per_s = "/s" if unit in {"Bps", "ops"} else ""
    if unit in _SIZES:
        size = 0
        while abs(number) >= 1000 and size < len(_BYTES) - 1:  # not 1024: three digits are enough for each
            number, size = number / 1024, size + 1
        return f"{number:.3g} {_BYTES[size]}{per_s}"
    if unit == "percentunit":
        return f"{number * 100:.3g} %"
    if unit == "s":
        return f"{number * 1000:.3g} ms" if 0 < abs(number) < 1 else f"{number:.3g} s"
    bound, suffix = next(((bound, suffix) for bound, suffix in _SUFFIXES if abs(number) >= bound), (1, ""))
    return f"{number / bound:.3g}{suffix}{per_s}"


def _panel(panel: Panel, end: float) -> Iterator[str]:
    left, top = panel.x * _COLUMN, panel.y * _ROW
    if panel.kind == "row":
        yield _text(left + _PAD, top + _ROW - 7, panel.title, "row")
        return
    width, height = panel.width * _COLUMN - _GAP, panel.height * _ROW - _GAP
    yield f'<rect class="panel" x="{left + _GAP / 2}" y="{top}" width="{width}" height="{height}" rx="4"/>'
    yield _text(left + _PAD + 2, top + 17, panel.title, "title")
    # What is zero all the time comes last: there is no room for all names.
    shown = sorted((each for each in panel.series if each.points), key=lambda each: not any(y for _, y in each.points))
    if not shown:
        yield _text(left + width / 2, top + height / 2 + 8, "nothing", anchor="middle")
    elif panel.kind == "stat":
        last = shown[0].points[-1][1]
        text = shown[0].name if panel.title == "Version" else value(last, panel.unit)
        yield _text(left + width / 2, top + height / 2 + 16, text, "value", anchor="middle")
    else:
        chart = _heatmap if panel.kind == "heatmap" else _lines
        yield from chart(
            panel, shown, _Box(left + _AXIS + 6, top + _HEAD, width - _AXIS - 20, height - _HEAD - 42), end
        )


def _lines(panel: Panel, shown: Sequence[Series], box: _Box, end: float) -> Iterator[str]:
    most = max(number for each in shown for _, number in each.points)
    scale = 1024.0 ** max(0, int(log10(most) / log10(1024))) if panel.unit in _SIZES and most > 0 else 1.0
    highest = _round_up(most / scale) * scale
    for step in range(3):
        y = box.top + box.height * (1 - step / 2)
        yield _rule(box, y)
        yield _text(box.left - 6, y + 4, value(highest * step / 2, panel.unit), anchor="end")
    yield from _minutes(box, end)
    for number, each in enumerate(shown):
        path = " ".join(
            f"{box.left + at / end * box.width:.1f},{box.top + box.height * (1 - max(0.0, seen) / highest):.1f}"
            for at, seen in each.points
        )
        colour = _COLOURS[number % len(_COLOURS)]
        yield f'<polyline class="line" stroke="{colour}" points="{path}"/>'
    yield from _names(shown, box)


def _heatmap(panel: Panel, shown: Sequence[Series], box: _Box, end: float) -> Iterator[str]:
    """``shown``: cumulative counts, by the upper bound that is their name."""
    ordered = sorted(shown, key=lambda each: float(each.name))
    bounds = [float(each.name) for each in ordered]
    below: dict[float, float] = {}
    cells = list[tuple[float, int, float]]()
    for place, each in enumerate(ordered):
        for at, count in each.points:
            cells.append((at, place, count - below.get(at, 0.0)))
            below[at] = count
    most = max((count for *_, count in cells), default=0.0) or 1.0
    high, wide = box.height / len(ordered), box.width / max(1, len(ordered[0].points))
    for at, place, count in cells:
        if count > 0:
            x, y = box.left + at / end * (box.width - wide), box.top + box.height - (place + 1) * high
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{_HEAT}"'
                f' opacity="{max(0.08, (count / most) ** 0.5):.2f}"/>'
            )
    for place in range(0, len(bounds), ceil(len(bounds) / 4)):
        if bounds[place] < inf:
            yield _text(box.left - 6, box.top + box.height - place * high, value(bounds[place], "s"), anchor="end")
    yield from _minutes(box, end)


def _minutes(box: _Box, end: float) -> Iterator[str]:
    for minute in range(int(end // 60) + 1):
        yield _text(
            box.left + minute * 60 / end * box.width, box.top + box.height + 14, f"{minute} min", anchor="middle"
        )


def _names(shown: Sequence[Series], box: _Box) -> Iterator[str]:
    across, y = box.left - 34, box.top + box.height + 32
    for number, each in enumerate(shown):
        colour, name = _COLOURS[number % len(_COLOURS)], each.name[:24]
        width = 20 + 6.2 * len(name)
        if across + width > box.left + box.width + 8:
            return
        yield f'<rect x="{across:.1f}" y="{y - 8}" width="9" height="9" fill="{colour}"/>'
        yield _text(across + 13, y, name)
        across += width


def _round_up(number: float) -> float:
    if number <= 0:
        return 1.0
    scale = 10.0 ** floor(log10(number))
    return next(step * scale for step in (1, 2, 2.5, 4, 5, 8, 10) if step * scale >= number)


def _rule(box: _Box, y: float) -> str:
    return f'<line class="grid" x1="{box.left:.1f}" y1="{y:.1f}" x2="{box.left + box.width:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    classes = f' class="{kind}"' if kind else ""
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{classes}{anchored}>{escape(text)}</text>'
