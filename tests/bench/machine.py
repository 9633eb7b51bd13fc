"""What a figure depends on: the machine, the versions, the settings. Printed with every result."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psycopg

import cdc
from cdc.app.config import Settings
from cdc.contrib.demo.temp_server import TempServer

_SERVER_SETTINGS = (
    "fsync", "synchronous_commit", "full_page_writes", "wal_level", "wal_sync_method", "shared_buffers",
    "max_wal_size", "autovacuum",
)  # fmt: skip


def machine() -> dict[str, object]:
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{int((_field(Path('/proc/meminfo'), 'MemTotal') or '0 kB').split()[0]) / 1024**2:.1f} GiB",
        "kernel": platform.release().partition("-")[0],
        "load before": load(),
    }


def load() -> str:
    """The load averages of 1, 5 and 15 minutes: what else the machine was doing."""
    return " ".join(f"{average:.2f}" for average in os.getloadavg())


def versions(server: TempServer) -> dict[str, object]:
    with psycopg.connect(server.dsn()) as connection:
        number = connection.info.server_version
    return {
        "cdc": cdc.__version__,
        "PostgreSQL": f"{number // 10000}.{number % 10000}",
        "wal2json": _wal2json(server, number // 10000),
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__}), libpq {psycopg.pq.version()}",
        "python": platform.python_version(),
        "uvloop": importlib.metadata.version("uvloop") if importlib.util.find_spec("uvloop") else "not there",
    }


def settings(server: TempServer) -> dict[str, object]:
    """The server's, where they matter here, and the consumer's defaults, which it runs with."""
    with psycopg.connect(server.dsn()) as connection:
        rows = connection.execute(
            "SELECT name, current_setting(name) FROM unnest(%s::text[]) AS name", [list(_SERVER_SETTINGS)]
        ).fetchall()
    consumer = Settings()
    return {
        **dict(rows),
        "consumer": f"concurrency {consumer.concurrency}, window {consumer.window}, threads {consumer.threads}",
    }


def _field(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _wal2json(server: TempServer, major: int) -> str:
    """The plug-in does not tell its version; the package that brought it does, where there is one."""
    if not server.wal2json:
        return "not there"
    if not shutil.which("dpkg-query"):
        return "there, of unknown version"
    asked = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Version}", f"postgresql-{major}-wal2json"],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    return asked.stdout.strip() or "there, of unknown version"
