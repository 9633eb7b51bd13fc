"""The guide for those who come from another tool shows the same event five times, as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cdc.core import cloudevents
from cdc.testing import change
from examples.payloads.handlers import SHAPES

_GUIDE = Path(__file__).parents[2] / "docs/guides/coming-from.md"
_OTHERS_OWN = {"id", "lsn", "commit_lsn", "idempotency_key", "ts_ms"}
"""What another tool takes from its own log. The event has these, unless it says so by other fields."""
_CHANGE = change(
    "order", "UPDATE", "4711", seq=42, table="orders", old={"id": 4711, "total": 12.5}, new={"id": 4711, "total": 15}
)


def _shown() -> dict[str, Any]:
    found = re.findall(r"^(\w+)[^\n]*:\n\n```json\n(.*?)```", _GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return {tool.lower(): json.loads(text) for tool, text in found}


def _without(own: set[str], document: Any) -> Any:
    if not isinstance(document, Mapping):
        return document
    return {name: _without(own, value) for name, value in document.items() if name not in own}


def _as_far_as(shown: Any, document: Any) -> Any:
    """Of the document, what is shown."""
    if not isinstance(shown, Mapping) or not isinstance(document, Mapping):
        return document
    return {name: _as_far_as(shown[name], value) for name, value in document.items() if name in shown}


def test_the_guide_shows_our_event_and_those_of_four_other_tools() -> None:
    assert [*_shown()] == ["here", *SHAPES]


def test_our_event_is_posted_as_the_guide_shows_it() -> None:
    [shown] = [event for tool, event in _shown().items() if tool == "here"]
    posted = json.loads(cloudevents.event(_CHANGE, None))
    assert _without({"id"}, _as_far_as(shown, posted)) == _without({"id"}, shown)


@pytest.mark.parametrize("tool", SHAPES)
def test_the_examples_function_makes_the_payload_that_the_guide_shows(tool: str) -> None:
    shown, made = _shown()[tool], SHAPES[tool](_CHANGE)
    assert _without(_OTHERS_OWN, _as_far_as(shown, made)) == _without(_OTHERS_OWN, shown)
