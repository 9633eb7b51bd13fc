from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdc.app.config import load
from cdc.app.file_ownership import others_hand
from cdc.core.errors import UsageError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    monkeypatch.chdir(folder)
    path = folder / "cdc.toml"
    path.write_text("threads = 7\n")
    path.chmod(0o644)
    return path


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int, gid: int | None = None) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    if gid is not None:
        monkeypatch.setattr(os, "getegid", lambda: gid)


def test_a_file_of_the_user_or_of_root_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert others_hand(file) is None
    assert load(environ={}).settings.threads == 7
    file.chmod(0o664)  # a group of one's own, as where umask is 002
    assert others_hand(file) is None


@pytest.mark.parametrize(("mode", "folder_mode", "reason"), [
    (0o646, 0o755, "others may write it"), (0o644, 0o757, "others may write its folder"),
    (0o644, 0o1777, None), (0o600, 0o700, None),
])  # fmt: skip
def test_what_others_may_write_does_not_count_unless_it_is_named(
    file: Path, mode: int, folder_mode: int, reason: str | None
) -> None:
    file.chmod(mode)
    file.parent.chmod(folder_mode)
    assert others_hand(file) == reason
    if reason is None:
        assert load(environ={}).settings.threads == 7
        return
    with pytest.raises(UsageError, match=reason) as refused:
        load(environ={})
    assert "--config cdc.toml" in refused.value.hint
    for named in (load(environ={"CDC_CONFIG": "cdc.toml"}), load(file=Path("cdc.toml"), environ={})):
        assert named.settings.threads == 7
        assert reason in named.warnings[0]


def test_a_file_of_another_user_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = file.stat().st_uid
    as_user(monkeypatch, owner + 1_000)
    if owner != 0:
        with pytest.raises(UsageError, match=f"belongs to the user {owner}"):
            load(environ={})
    seen = Path.stat(file)
    foreign = SimpleNamespace(st_uid=4_711, st_gid=4_711, st_mode=seen.st_mode)
    monkeypatch.setattr(Path, "lstat", lambda path: foreign)
    with pytest.raises(UsageError, match="belongs to the user 4711"):
        load(environ={})


def test_a_group_that_is_not_the_users_own_may_not_write_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.chmod(0o664)
    as_user(monkeypatch, file.stat().st_uid, file.stat().st_gid + 1)
    assert others_hand(file) == "others may write it"
