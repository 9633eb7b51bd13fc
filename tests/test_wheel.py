"""What is released holds all it needs, and works away from the source."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

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
        path.relative_to(ROOT).as_posix() for path in (ROOT / "cdc").rglob("*") if path.suffix in {".py", ".sql"}
    }
    expected |= {f"cdc/sql/{path.name}" for path in (ROOT / "sql").iterdir()}
    expected |= {"cdc/py.typed", f"cdc-{cdc.__version__}.dist-info/licenses/LICENSE"}
    assert expected - set(names) == set()
    assert {name.split("/")[0] for name in names} == {"cdc", f"cdc-{cdc.__version__}.dist-info"}


def test_the_sdist_can_be_built_tested_and_read(released: Path) -> None:
    [sdist] = released.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "requirements-dev.txt", "tests/conftest.py",
            "deploy/debian-setup"} <= names  # fmt: skip
    assert {f"sql/{path.name}" for path in (ROOT / "sql").iterdir()} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "build"))]


def test_the_installed_command_runs_from_an_unrelated_folder(installed: Path, tmp_path: Path) -> None:
    version = _run(installed / "bin" / "cdc", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert version.split() == ["cdc", cdc.__version__]
    where = _run(sys.executable, "-c", "import cdc; print(cdc.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed), "not the source"


def test_the_installed_command_carries_its_migrations(installed: Path, tmp_path: Path) -> None:
    script = _run(installed / "bin" / "cdc", "db", "print", cwd=tmp_path, PYTHONPATH=str(installed))
    for path in sorted((ROOT / "sql").glob("[0-9]*.sql")):
        assert path.stem[5:] in script
    assert "CREATE OR REPLACE FUNCTION" in script
