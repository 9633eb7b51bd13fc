"""A physical standby of a throw-away server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer


class Standby(TempServer):
    """A physical standby of ``primary``."""

    def __init__(self, primary: TempServer) -> None:
        super().__init__(durable=False)
        self._primary = primary

    def _create(self) -> None:
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        self._run("pg_basebackup", "-D", str(self.data), "-d", self._primary.dsn(), "-R", "-X", "stream", "-c", "fast")
        self.configure(unix_socket_directories=str(self.folder))

    def promote(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "promote")


@contextmanager
def standing_by(primary: TempServer) -> Iterator[tuple[Standby, str]]:
    """A standby, and the DSN that leads to whichever of the two takes writes."""
    standby = Standby(primary)
    with standby:
        hosts: dict[str, Any] = {"host": f"{primary.folder},{standby.folder}", "port": "5432,5432"}
        yield standby, make_conninfo(primary.dsn(), target_session_attrs="read-write", **hosts)
