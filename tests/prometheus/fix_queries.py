"""What Prometheus and Grafana are given, and which metrics and labels it asks for."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/prometheus/cdc.rules.yaml"
DASHBOARDS = {"operators": "cdc", "handlers": "cdc-handlers"}
"""For whom -> its uid, and the name of its file."""

_SETUP = "deploy/debian-setup --with-prometheus"
_SELECTOR = re.compile(r"\b((?:cdc|process|pg)_\w+)(?:\{([^}]*)\})?")
_GROUPING = re.compile(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)")
_VARIABLES = {"$__rate_interval": "1m", "$job": ".+", "$instance": ".+", "$slot": ".+", "$handler": ".+", "$type": ".+"}


def needed(program: str) -> str:
    """Its path; without it the test is skipped, or fails where CDC_REQUIRE_PROMETHEUS is set."""
    found = shutil.which(program)
    if found is None:
        assert not os.environ.get("CDC_REQUIRE_PROMETHEUS"), f"{program} is not installed: {_SETUP}"
        pytest.skip(f"{program} is not installed: {_SETUP}")
    return found


@cache
def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


@cache
def dashboard(reader: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((ROOT / f"deploy/grafana/dashboards/{DASHBOARDS[reader]}.json").read_text())
    return board


def panels(reader: str) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard(reader)["panels"] if panel["type"] != "row"]


def panel_queries(reader: str) -> Iterator[tuple[str, str]]:
    """(where it is, the query with something in place of Grafana's variables)."""
    for panel in panels(reader):
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", filled(target["expr"])
    for annotation in dashboard(reader)["annotations"]["list"]:
        yield annotation["name"], filled(annotation["expr"])


def filled(expression: str) -> str:
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def asked_for(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels it is selected by)."""
    for name, matchers in _SELECTOR.findall(re.sub(r"\$\{?\w+\}?", "x", expression)):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def grouped_by(expression: str) -> set[str]:
    return {label.strip() for group in _GROUPING.findall(expression) for label in group.split(",") if label.strip()}
