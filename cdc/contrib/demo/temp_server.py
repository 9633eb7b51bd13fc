"""A temporary PostgreSQL server: for the demo, the tests and the benchmark.

It never touches an existing server: it has its own data folder, its own Unix socket, and no TCP port unless asked for.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from cdc.contrib.demo.pg_binaries import Installation, find_installation
from cdc.core.errors import CdcError, NotFoundError, RefusedError

_DURABLE: Mapping[str, str] = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_connections": "200",
    "wal_sender_timeout": "10s",
    "log_min_messages": "warning",
    "timezone": "UTC",
}
# synchronous_commit stays on: otherwise a commit is flushed up to 200 ms later, and the slot delivers it only then.
_FAST: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}
_DISK, _MEMORY = Path("/tmp"), Path("/dev/shm")  # noqa: S108 - the folder in it is made by mkdtemp
_PLENTY_BYTES = 8 << 30
_LINES = 5
"""Of a program that failed: what it said last says why."""
_LOCALE = "C" if sys.platform == "darwin" else "C.UTF-8"  # macOS has no C.UTF-8


def _plenty_of_memory() -> bool:
    """Checked for each server: earlier servers may have used the memory."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        room = shutil.disk_usage(_MEMORY).free
    except OSError:
        return False
    found = (line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    available = int(next(found, 0)) * 1024
    return min(room, available) > _PLENTY_BYTES


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TempServer:
    """One cluster in a temporary folder. ``with TempServer() as server: connect(server.dsn())``.

    ``durable=False`` turns fsync off, and keeps the files in memory where there is plenty of it: for tests, which
    create a database each, whose 300 files take a third of a second on some disks. ``tcp=True`` also listens on a free
    port of 127.0.0.1. ``settings`` are written to postgresql.conf. ``binaries`` are the programs to run, by default the
    best found. Raises NotFoundError where there are none.
    """

    def __init__(
        self,
        *,
        durable: bool = True,
        tcp: bool = False,
        settings: Mapping[str, str] | None = None,
        binaries: Installation | None = None,
    ) -> None:
        self.installation = binaries or find_installation()
        self.bindir = self.installation.bindir
        self.wal2json = self.installation.wal2json
        self.port = free_port() if tcp else 5432
        self.tcp = tcp
        in_memory = not durable and _plenty_of_memory()
        self.folder = Path(tempfile.mkdtemp(prefix="cdc", dir=_MEMORY if in_memory else _DISK))
        self.data = self.folder / "data"
        self._settings = {**_DURABLE, **({} if durable else _FAST), **(settings or {})}
        # initdb and postgres refuse to run as root.
        self._user = _unprivileged_user() if os.geteuid() == 0 else None

    def __enter__(self) -> TempServer:
        try:
            self._create()
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("immediate")
        self._remove()

    def dsn(self, dbname: str = "postgres", *, user: str = "postgres", tcp: bool = False) -> str:
        host = "127.0.0.1" if tcp else str(self.folder)
        return f"host={host} port={self.port} dbname={dbname} user={user}"

    def start(self) -> None:
        log = self.folder / "server.log"
        try:
            self._run("pg_ctl", "-D", str(self.data), "-l", str(log), "-w", "-t", "60", "start")
        except CdcError as failed:
            raise CdcError(str(failed), hint=_end_of(log.read_text())) from None

    def stop(self, mode: str = "fast") -> None:
        """End the server; ``immediate`` is a crash. Does nothing where it does not run."""
        with contextlib.suppress(CdcError):
            self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-m", mode, "stop")

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def configure(self, **settings: str) -> None:
        """Append to postgresql.conf; takes effect at the next start, or on a reload."""
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _create(self) -> None:
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
            self._bring_within_reach(self._user)
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8",
                  "--locale", _LOCALE)  # fmt: skip
        settings = {
            **self._settings,
            "port": str(self.port),
            "listen_addresses": "127.0.0.1" if self.tcp else "",
            "unix_socket_directories": str(self.folder),
        }
        if self._knows("output_plugin_libraries"):
            # Minor versions before August 2026 do not know it and would not start; later ones need it.
            settings["output_plugin_libraries"] = "pgoutput, test_decoding, wal2json"
        self.configure(**settings)

    def _bring_within_reach(self, user: pwd.struct_passwd) -> None:
        """Copy the wheel's programs where ``user`` cannot read an environment that root has made."""
        try:
            self._run("postgres", "--version")
        except PermissionError:
            if not self.installation.wheel:
                raise RefusedError(
                    f"the server would run as {user.pw_name}, who may not use the programs in {self.bindir}",
                    hint="let others read that folder and those above it, or run this as an ordinary user",
                ) from None
            self.bindir = _copy_of_wheel(self.bindir, self.folder / "programs")
            for path in (self.folder / "programs", *(self.folder / "programs").rglob("*")):
                os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)

    def _knows(self, setting: str) -> bool:
        described = self._run("postgres", "--describe-config").stdout
        return any(line.startswith(setting) for line in described.splitlines())

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Raises CdcError with what the program said, where it fails: the folder is gone when somebody could look."""
        command = [str(self.bindir / program), *arguments]
        as_user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
        ended: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]  # noqa: S603 - a fixed program
            command, check=False, text=True, cwd=self.folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **as_user,
        )  # fmt: skip
        if ended.returncode:
            raise CdcError(f"{command[0]} failed with status {ended.returncode}", hint=_end_of(ended.stdout))
        return ended

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _end_of(said: str) -> str:
    """The last lines of what a server's program has written, as one."""
    return "; ".join(line.strip() for line in said.splitlines()[-_LINES:] if line.strip())


def _copy_of_wheel(bindir: Path, target: Path) -> Path:
    """The programs' folder in the copy: they find their libraries beside the package, by a relative path."""
    package = bindir.parent.parent
    shutil.copytree(bindir.parent, target / package.name / bindir.parent.name, ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, target / libraries.name)
    return target / package.name / bindir.parent.name / bindir.name


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise NotFoundError("PostgreSQL does not run as root, and there is no user postgres or nobody")
