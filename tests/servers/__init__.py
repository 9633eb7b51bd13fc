"""The PostgreSQL servers of every major version that the tests may run on.

The machine's own, those of a Python wheel in .venv, and in .venv-servers (`make servers`) those of npm packages and
the newest of Debian. Where the last are not there, tests go without their versions; CDC_REQUIRE_SERVERS makes that a
failure.

pytest --server 17 has the whole run use that version, instead of the machine's own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from cdc.contrib.demo.pg_binaries import Installation, find_installation, find_installations, look

MAJORS = (14, 15, 16, 17, 18)
_FOLDER = Path(__file__).parents[2] / ".venv-servers"
_PACKAGES = _FOLDER / "node_modules"
_LIST = "output_plugin_libraries"


def by_major() -> dict[int, Installation]:
    """The best installation of each major version at hand: the machine's, then npm's, then the wheel's."""
    packed = [look(folder) for folder in sorted(_PACKAGES.glob("postgresql-*/native/bin"))]
    ranked = sorted((*find_installations(), *(one for one in packed if one)), key=lambda one: one.wheel)
    return {one.major: one for one in reversed(ranked)}


def required(major: int) -> Installation:
    """Of that version. Skips the test, or fails it, where there is none."""
    return _within_reach(_demanded(by_major().get(major), f"PostgreSQL {major}"))


def required_with_list() -> Installation:
    """One that has wal2json, and a list of the output plugins that it allows. Skips or fails likewise."""
    unpacked = [look(folder) for folder in sorted(_FOLDER.glob("debian/*/usr/lib/postgresql/*/bin"))]
    found = (one for one in (*find_installations(), *unpacked) if one and one.wal2json and _has_list(one))
    return _within_reach(_demanded(next(found, None), f"PostgreSQL with wal2json and {_LIST}"))


def chosen(major: int) -> Installation:
    """What --server names. Raises pytest.UsageError."""
    if not (found := by_major().get(major)):
        raise pytest.UsageError(f"no PostgreSQL {major} here: make servers brings it")
    return _within_reach(found)


def lacks(names: Iterable[str]) -> str:
    """Which of these the server of this run is built without; "" where it has them all, or is not ours to look at."""
    wanted = list(names)  # most tests want nothing, and to look starts a program of each installation
    if not wanted or os.environ.get("CDC_TEST_DSN") or not (installed := find_installations()):
        return ""
    missing = [name for name in wanted if not _HAS[name](installed[0])]
    return f"{installed[0]} has no {', '.join(missing)}" if missing else ""


def preferred_plugin() -> str:
    """The output plugin that a consumer takes on the server of this run."""
    return "pgoutput" if lacks(["wal2json"]) else "wal2json"


def program(name: str) -> str:
    """The path of a client program: the server's own, or any. Skips the test where there is none."""
    found = find_installation().bindir / name
    path = str(found) if found.exists() else shutil.which(name)
    return path or pytest.skip(f"there is no {name} here")


_HAS: Mapping[str, Callable[[Installation], bool]] = {
    "wal2json": lambda one: one.wal2json,
    "pg_basebackup": lambda one: (one.bindir / "pg_basebackup").exists(),
}


def _demanded(found: Installation | None, what: str) -> Installation:
    if found is None:
        demanded = os.environ.get("CDC_REQUIRE_SERVERS")
        (pytest.fail if demanded else pytest.skip)(f"no {what} here: make servers brings it")
    return found


def _has_list(one: Installation) -> bool:
    told = subprocess.run([one.bindir / "postgres", "--describe-config"], capture_output=True, text=True, check=False)
    return any(line.startswith(_LIST) for line in told.stdout.splitlines())


@cache
def _within_reach(one: Installation) -> Installation:
    """The same, or a copy of what make servers brought, where root has closed the folder to whom servers run as."""
    root = next((folder for folder in one.bindir.parents if folder.name in ("native", "usr")), None)
    closed = any(not folder.stat().st_mode & stat.S_IXOTH for folder in one.bindir.parents)
    if root is None or not closed or os.geteuid() != 0:
        return one
    copy = Path(tempfile.mkdtemp(prefix="cdc", dir="/tmp"))
    atexit.register(shutil.rmtree, copy)
    copy.chmod(0o755)
    shutil.copytree(root, copy / root.name, symlinks=True)
    return replace(one, bindir=copy / one.bindir.relative_to(root.parent))


def link_libraries() -> None:
    """What the packages' own install script would do; none of theirs is run."""
    for listed in _PACKAGES.glob("postgresql-*/native/pg-symlinks.json"):
        package = listed.parents[1]
        for link in json.loads(listed.read_text()):
            source, target = package / link["source"], package / link["target"]
            with contextlib.suppress(FileExistsError):
                target.symlink_to(os.path.relpath(source, target.parent))
