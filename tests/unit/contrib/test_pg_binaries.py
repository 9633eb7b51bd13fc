"""Which PostgreSQL is taken, out of folders that look like installations."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc.contrib.demo import pg_binaries
from cdc.contrib.demo.pg_binaries import find_installation, find_installations
from cdc.core.errors import NotFoundError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without PostgreSQL: its /usr/lib/postgresql, its PATH and its wheels are empty folders."""
    monkeypatch.delenv("PG_BINDIR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(pg_binaries, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(pg_binaries, "WHEEL", "no-such-wheel")
    return tmp_path


def install(bindir: Path, version: str, *, wal2json: bool = False) -> Path:
    bindir.mkdir(parents=True)
    for program in pg_binaries.PROGRAMS:
        (bindir / program).write_text(f"#!/bin/sh\necho '{program} (PostgreSQL) {version}'\n")
        (bindir / program).chmod(0o755)
    if wal2json:
        (bindir.parent / "lib").mkdir()
        (bindir.parent / "lib" / "wal2json.so").touch()
    return bindir


def carry(machine: Path, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """A wheel with a folder for each version."""
    for folder, version in versions.items():
        install(machine / "site" / "the_wheel" / folder / "bin", version)
    (machine / "site" / "the_wheel" / "__init__.py").write_text("raise RuntimeError('nobody needs to import it')")
    monkeypatch.syspath_prepend(machine / "site")
    monkeypatch.setattr(pg_binaries, "WHEEL", "the-wheel")


def test_with_wal2json_goes_before_without_the_machines_before_the_wheels_and_newer_before_older(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine / "debian" / "15" / "bin", "15.18 (Debian 15.18-0+deb12u1)", wal2json=True)
    install(machine / "debian" / "17" / "bin", "17.2")
    install(machine / "debian" / "19" / "bin", "19devel")
    carry(machine, monkeypatch, pginstall="16.14", pginstall18="18.4")
    found = find_installations()
    assert [one.version for one in found] == ["15.18", "19devel", "17.2", "18.4", "16.14"]
    assert [one.wheel for one in found] == [False, False, False, True, True]
    assert find_installation(18).bindir == machine / "site" / "the_wheel" / "pginstall18" / "bin"


def test_a_link_on_the_path_is_no_second_installation(machine: Path) -> None:
    bindir = install(machine / "debian" / "15" / "bin", "15.18")
    (machine / "path").mkdir()
    (machine / "path" / "initdb").symlink_to(bindir / "initdb")
    assert [one.bindir for one in find_installations()] == [bindir]


@pytest.mark.parametrize("program", ["initdb", "pg_config"])
def test_what_the_path_leads_to_is_found(machine: Path, program: str) -> None:
    bindir = install(machine / "elsewhere" / "bin", "16.1")
    (bindir / "pg_config").write_text(f"#!/bin/sh\necho {bindir}\n")
    (bindir / "pg_config").chmod(0o755)
    (machine / "path").mkdir()
    (machine / "path" / program).symlink_to(bindir / program)
    assert [one.bindir for one in find_installations()] == [bindir]


def test_what_is_named_goes_before_everything_and_the_rest_is_still_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine / "debian" / "15" / "bin", "15.18", wal2json=True)
    named = install(machine / "mine" / "bin", "14.1")
    monkeypatch.setenv("PG_BINDIR", str(named))
    assert find_installation().bindir == named
    assert find_installation(15).version == "15.18"


def test_a_named_folder_without_the_programs_is_an_error_and_not_passed_over(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine / "debian" / "15" / "bin", "15.18")
    monkeypatch.setenv("PG_BINDIR", str(machine))
    with pytest.raises(NotFoundError, match="PG_BINDIR is"):
        find_installation()


def test_too_old_ones_halves_and_what_does_not_run_here_are_passed_over(machine: Path) -> None:
    install(machine / "debian" / "13" / "bin", "13.9", wal2json=True)
    (install(machine / "debian" / "16" / "bin", "16.1") / "initdb").unlink()
    (install(machine / "debian" / "17" / "bin", "17.1") / "postgres").write_bytes(b"\x7fELF for another machine")
    assert find_installations() == []


def test_where_there_is_none_the_remedy_needs_no_root(machine: Path) -> None:
    with pytest.raises(NotFoundError) as missing:
        find_installation()
    assert "pip install 'cdc-consumer[demo]'" in missing.value.hint
    with pytest.raises(NotFoundError, match="PostgreSQL 17"):
        find_installation(17)
