"""A secret that a file holds, such as one that an orchestrator mounts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from cdc.core.errors import UsageError


class SecretFile(SecretStr):
    """A secret in a file, read again whenever that has changed: passwords are replaced while a consumer runs.

    While it cannot be read, is empty or is refused by ``check`` (ValueError), the value is what it was.
    """

    def __init__(self, path: str, variable: str) -> None:
        self.check: Callable[[str], object] = str
        self._path = Path(path)
        self._seen = _stamp(self._path)
        self._current = _secret_from(path, variable)
        super().__init__(self._current)

    def get_secret_value(self) -> str:
        seen = _stamp(self._path)
        if seen != self._seen:
            with contextlib.suppress(OSError, ValueError):
                text = self._path.read_text().removesuffix("\n")
                self.check(text)
                if text:
                    self._current, self._seen = text, seen
        return self._current


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes with the file, also if a mounted one is replaced by another through a link."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _secret_from(path: str, variable: str) -> str:
    try:
        return Path(path).read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        # A secret in place of its file's name is the likely mistake, and must not be quoted.
        what = "DSN" if variable.endswith("DSN_FILE") else "secret"
        looks_secret = set(path) & set("@=?") or "://" in path or path.startswith("whsec_")
        is_secret = looks_secret or (what == "secret" and "/" not in path)
        named = f"the file that {variable} names" if is_secret else f"{variable}={path}"
        hint = f"the {what} itself goes into {variable.removesuffix('_FILE')}"
        raise UsageError(f"{named} cannot be read: {reason}", hint=hint) from None
