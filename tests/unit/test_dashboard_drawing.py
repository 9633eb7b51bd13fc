"""The picture of the dashboard."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.pictures.dashboard_drawing import Panel, Series, draw, value


@pytest.mark.parametrize(
    ("number", "unit", "shown"),
    [
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (1023, "bytes", "0.999 KiB"),
        (1e15, "bytes", "9.31e+05 GiB"),
        (-2048, "bytes", "-2 KiB"),
        (3 * 1024**2, "bytes", "3 MiB"),
        (2048, "Bps", "2 KiB/s"),
        (0.0174, "s", "17.4 ms"),
        (42, "s", "42 s"),
        (0, "s", "0 s"),
        (4000, "none", "4k"),
        (12, "ops", "12/s"),
        (2_000, "ops", "2k/s"),
    ],
)
def test_a_value_is_shown_short_and_with_its_unit(number: float, unit: str, shown: str) -> None:
    assert value(number, unit) == shown


def test_a_picture_is_xml_whatever_the_names_are_and_says_where_there_is_nothing() -> None:
    odd = Series('<&">', ((0.0, 1.0), (60.0, 0.0)))
    panels = [
        Panel("row", "A & B", 0, 0, 24, 1, "none", ()),
        Panel("stat", "one", 0, 1, 3, 4, "bytes", (odd,)),
        Panel("timeseries", "two", 3, 1, 8, 6, "ops", (odd, Series("flat", ((0.0, 0.0),)))),
        Panel("heatmap", "three", 11, 1, 8, 6, "s", (Series("0.5", ((0.0, 1.0),)), Series("+Inf", ((0.0, 3.0),)))),
        Panel("timeseries", "four", 19, 1, 5, 6, "s", ()),
    ]
    texts = [
        each.text for each in ElementTree.fromstring(draw(panels, "a board")).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"A & B", "one", "two", "three", "four", "nothing", '<&">', "flat"} <= set(texts)
