"""The PostgreSQL servers of every major version that the tests may run on.

The machine's own, those of a Python wheel in .venv, and those of npm packages in .venv-servers (`make servers`). Where
the last are not there, tests go without their versions; CDC_REQUIRE_SERVERS makes that a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cdc.installations import Installation, find_installations, look

MAJORS = (14, 15, 16, 17, 18)
_FOLDER = Path(__file__).parents[2] / ".venv-servers" / "node_modules"


def by_major() -> dict[int, Installation]:
    """The best installation of each major version at hand."""
    packed = [look(folder) for folder in sorted(_FOLDER.glob("postgresql-*/native/bin"))]
    found = [*find_installations(), *(replace(one, wheel=True) for one in packed if one)]
    return {one.major: one for one in reversed(found)}  # of two of a kind the better, which comes first


def required(major: int) -> Installation:
    """Of that version. Skips the test, or fails it, where there is none."""
    found = by_major()
    if major not in found:
        demanded = os.environ.get("CDC_REQUIRE_SERVERS")
        (pytest.fail if demanded else pytest.skip)(f"no PostgreSQL {major} here: make servers brings it")
    return found[major]


def link_libraries() -> None:
    """What the packages' own install script would do; none of theirs is run."""
    for listed in _FOLDER.glob("postgresql-*/native/pg-symlinks.json"):
        package = listed.parents[1]
        for link in json.loads(listed.read_text()):
            source, target = package / link["source"], package / link["target"]
            with contextlib.suppress(FileExistsError):
                target.symlink_to(os.path.relpath(source, target.parent))
