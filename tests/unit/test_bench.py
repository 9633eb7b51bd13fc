"""What the benchmark says about its figures, and how it publishes them. The measuring itself is only run."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.bench import plots, publish, targets
from tests.bench.plots import Bar
from tests.bench.report import RATIOS, Figure, Summary, from_json, summarise, with_ratios
from tests.bench.scenarios import SCENARIOS
from tests.bench.targets import TARGETS, Target, Verdict


def summary(*values: float) -> Summary:
    return Summary("s", "f", "ms", None, values)


@pytest.mark.parametrize(
    ("values", "at_most", "met"),
    [((0.8, 0.9, 0.9), False, True), ((0.79, 0.9, 0.9), False, False), ((0.7, 0.7, 0.8), True, True),
     ((0.7, 0.7, 0.81), True, False)],
)  # fmt: skip
def test_the_worst_round_decides_and_the_bound_will_do(values: tuple[float, ...], at_most: bool, met: bool) -> None:
    assert Verdict(Target("t", "s", "f", 0.8, at_most=at_most), summary(*values)).met is met


def test_a_target_that_was_not_measured_is_not_met_nor_missed() -> None:
    [first, *_] = targets.judge([])
    assert first.met is None
    assert first.said == "not measured"


def test_targets_and_ratios_name_scenarios_that_there_are() -> None:
    named = {target.scenario for target in TARGETS} - {"ratio"}
    named |= {scenario for _, *sides in RATIOS for scenario, _ in sides}
    assert named <= set(SCENARIOS)
    assert {target.figure for target in TARGETS if target.scenario == "ratio"} <= {name for name, *_ in RATIOS}


def test_ratios_are_taken_within_a_round_and_shown_last() -> None:
    rounds = [
        with_ratios({"floor": [Figure("settled", floor, "1/s")], "drain": [Figure("settled", drain, "1/s")]})
        for floor, drain in ((100.0, 80.0), (50.0, 45.0))
    ]
    *_, ratio = summarise([rounds[0], {"start": [Figure("s", 1.0, "s")]}, rounds[1]])
    assert (ratio.name, ratio.values) == ("drain to floor", (0.8, 0.9))
    assert from_json(ratio.as_json()) == ratio


def test_plots_are_svg_that_a_browser_reads() -> None:
    line = plots.lines("a < b", "x & y", {"one": [(10, 1.0), (1_000_000, 250.0)], "two": [(10, 3.0)]})
    bar = plots.bars("a < b", [Bar("ours", 30_000.0, ours=True), Bar("<theirs>", 10.0, ours=False)])
    for svg in (line, bar, plots.lines("one place", "x", {"only": [(10, 5.0)]})):
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_a_block_of_the_document_is_rewritten_and_a_missing_one_is_an_error() -> None:
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nafter"
    assert publish.with_block(text, "a", r"new \1") == "before\n<!-- a -->\nnew \\1\n<!-- /a -->\nafter"
    with pytest.raises(ValueError, match="no block b"):
        publish.with_block(text, "b", "")
