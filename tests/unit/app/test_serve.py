"""The process around the consumers: what it asks of the interpreter."""

from __future__ import annotations

import gc

import pytest

from cdc.app.serve import spare_the_garbage_collector


@pytest.mark.parametrize(
    ("changes", "objects"), [(0, 10_000), (500, 10_000), (2_000, 20_000), (3 * 2_000, 60_000), (1_000_000, 100_000)]
)
def test_the_collector_begins_where_there_is_more_than_full_windows_hold(
    monkeypatch: pytest.MonkeyPatch, changes: int, objects: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "set_threshold", lambda young, *_: asked.append(young))
    spare_the_garbage_collector(changes)
    assert asked == [objects]
