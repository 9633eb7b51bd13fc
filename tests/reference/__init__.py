"""The pages of docs/reference that are written from the code by ``make reference``; a test compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.reference import cli, metrics, python_api, settings

FOLDER = Path(__file__).resolve().parents[2] / "docs/reference"
PAGES: Mapping[str, Callable[[], str]] = {
    "cli.md": cli.page,
    "metrics.md": metrics.page,
    "python-api.md": python_api.page,
    "settings.md": settings.page,
}
"""Name in FOLDER to what writes its text."""


def is_stale(name: str) -> bool:
    path = FOLDER / name
    return not path.exists() or path.read_text("utf-8") != PAGES[name]()
