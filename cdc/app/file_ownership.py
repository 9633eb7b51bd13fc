"""Whether another user may have written a file. A settings file names code that is run and where a password goes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_ROOT = 0


def others_hand(file: Path) -> str | None:
    """Why a user other than this one and root may have written the file or put it there; None: no other user may.

    A group of this user's own may write. Raises OSError if the file does not exist.
    """
    if not hasattr(os, "geteuid"):
        return None  # not POSIX: there are no such owners
    trusted = {os.geteuid(), _ROOT}
    # The file that is read, and the link that leads to it.
    for seen in (file.lstat(), file.stat()):
        if seen.st_uid not in trusted:
            return f"it belongs to the user {seen.st_uid}"
    if _writable_by_others(file.stat()):
        return "others may write it"
    folder = file.resolve().parent.stat()
    if folder.st_uid not in trusted:
        return f"its folder belongs to the user {folder.st_uid}"
    # In a folder like /tmp only the owner of a file may put another in its place.
    if _writable_by_others(folder) and not folder.st_mode & stat.S_ISVTX:
        return "others may write its folder"
    return None


def _writable_by_others(seen: os.stat_result) -> bool:
    of_a_group = bool(seen.st_mode & stat.S_IWGRP) and seen.st_gid != os.getegid()
    return bool(seen.st_mode & stat.S_IWOTH) or of_a_group
