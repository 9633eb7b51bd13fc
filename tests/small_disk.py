"""A disk that can be full: a file system in memory, which is made as small as what is on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import psycopg
from psycopg import sql

from cdc.contrib.demo.temp_server import TempServer

_ROOM = "8g"
"""What is not used takes no memory."""
_TRIES = 20


class SmallDisk:
    """``with SmallDisk(server) as disk``. Raises OSError where this process may not mount anything.

    ``server`` is stopped before the disk goes. Without one the disk is this process's.
    """

    def __init__(self, server: TempServer | None = None) -> None:
        self._server = server
        self.folder = Path(tempfile.mkdtemp(prefix="cdcdisk"))

    def __enter__(self) -> SmallDisk:
        try:
            self._mount()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _mount(self) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "none", str(self.folder)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            raise PermissionError(mounted.stderr.strip())
        self._give_to_server(self.folder)

    def _give_to_server(self, folder: Path) -> None:
        if self._server is not None:
            owner = self._server.data.stat()
            os.chown(folder, owner.st_uid, owner.st_gid)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def move_outbox(self, connection: psycopg.Connection) -> None:
        """The table and its indexes, onto this disk."""
        data = self.folder / "data"
        data.mkdir()
        self._give_to_server(data)
        connection.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(data))))
        connection.execute("ALTER TABLE entity_changes SET TABLESPACE small")
        found = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'entity_changes'").fetchall()
        for (index,) in found:
            connection.execute(sql.SQL("ALTER INDEX {} SET TABLESPACE small").format(sql.Identifier(index)))

    def fill(self) -> None:
        """Leave no room beyond what is taken."""
        for _ in range(_TRIES):
            now = os.statvfs(self.folder)
            if self._resize(f"{(now.f_blocks - now.f_bfree) * now.f_frsize}"):
                return
        raise AssertionError(f"{self.folder} grows faster than it can be made full")

    def free(self) -> None:
        if not self._resize(_ROOM):
            raise AssertionError(f"{self.folder} cannot be made larger")

    def _resize(self, size: str) -> bool:
        """False: there is more on it than that."""
        command = ["mount", "-o", f"remount,size={size}", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
