"""Peers emptying a queue of as many no-op jobs, in the database beside: what they settle in a second, at their best.

They are run by an environment of their own (``make peers``). A peer that is not there is left out, with the reason. Of
a queue nothing is asked that we promise, least of all order within a key.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cdc.contrib.demo.temp_server import TempServer
from tests.bench.database import fresh_database, preload_documented, rest
from tests.bench.latency import numbers
from tests.bench.processes import child, finish
from tests.bench.report import Figure, LeftOutError
from tests.bench.size import Size

_ROOT = Path(__file__).parents[2]
_PROGRAMS = Path(__file__).with_name("peers")
_PEERS = _ROOT / ".venv-bench"
_WITHIN_S = 120.0

_OBAN = _PEERS / "oban"
"""An environment with a Python that Oban supports, which may be newer than ours."""
_PGQUEUER_BATCHES = (1_000, 5_000)
_AWA_WORKERS = ((200, 200), (1_000, 500))
"""Jobs at a time, and how many of them one statement claims."""
_OBAN_LIMITS = (20, 100, 500)
_PROCRASTINATE_CONCURRENCY = (5, 20)


class Told(NamedTuple):
    """``thirds``: seconds from the first handled job until each third of all was settled."""

    version: str
    settled: int
    thirds: Sequence[float]

    @property
    def rate(self) -> float:
        return self.settled / self.thirds[-1]


def measure_pgqueuer(server: TempServer, size: Size) -> list[Figure]:
    rates = {}
    for batch in _PGQUEUER_BATCHES:
        with fresh_database(server) as connection:
            rates[f"batch {batch:,}"] = pgqueuer(connection.info.dsn, size.queued, batch=batch).rate
    return _with_best(rates)


def measure_awa(server: TempServer, size: Size) -> list[Figure]:
    rates = {}
    for workers, claimed in _AWA_WORKERS:
        with fresh_database(server) as connection:
            program = _python("queue_awa.py", connection.info.dsn, size.queued, workers, claimed)
            rates[f"{workers:,} workers"] = _told(program).rate
    return _with_best(rates)


def measure_oban(server: TempServer, size: Size) -> list[Figure]:
    if not (_OBAN / ".ready").exists():
        raise LeftOutError("Oban is not installed: that takes Python 3.12 or later, and make peers")
    rates = {}
    for limit in _OBAN_LIMITS:
        with fresh_database(server) as connection:
            command = [str(_OBAN / "bin" / "python"), str(_PROGRAMS / "queue_oban.py"), connection.info.dsn]
            rates[f"limit {limit}"] = _told([*command, str(10 * size.queued_slow), str(limit)]).rate
    return _with_best(rates)


def measure_procrastinate(server: TempServer, size: Size) -> list[Figure]:
    rates = {}
    for concurrency in _PROCRASTINATE_CONCURRENCY:
        with fresh_database(server) as connection:
            program = _python("queue_procrastinate.py", connection.info.dsn, size.queued_slow, concurrency)
            rates[f"concurrency {concurrency}"] = _told(program).rate
    return _with_best(rates)


def measure_graphile(server: TempServer, size: Size) -> list[Figure]:
    node, folder = shutil.which("node"), _PEERS / "node"
    if not node or not (folder / "node_modules" / "graphile-worker").is_dir():
        raise LeftOutError("graphile-worker is not installed: that takes node and npm, and make peers")
    with fresh_database(server) as connection:
        link = connection.info
        where = [link.host, str(link.port), link.user, link.dbname]
        told = _told([node, str(_PROGRAMS / "queue_graphile.mjs"), str(folder), str(size.queued), *where])
    return _with_best({"local queue of 500": told.rate})


def measure_documented(server: TempServer, size: Size) -> list[Figure]:
    """The documented processor as it is written, on as many rows as a slow peer gets jobs, times ten."""
    rows = 10 * size.queued_slow
    with tempfile.TemporaryDirectory(prefix="cdcbench") as name, fresh_database(server) as connection:
        preload_documented(connection, rows)
        rest(connection)
        path = Path(name, "handled")
        with child("documented", connection.info.dsn, str(rows), str(path)) as processor:
            finish(processor, within_s=_WITHIN_S)
        moments = numbers(path)[1::2]
    return [Figure("settled", len(moments) / (moments[-1] - moments[0]) * 1e9, "changes/s")]


def pgqueuer(dsn: str, jobs: int, *, batch: int = _PGQUEUER_BATCHES[0], seconds: float = 0.0) -> Told:
    """``seconds``: after which it stops, done or not; 0: when it is done."""
    return _told(_python("queue_pgqueuer.py", dsn, jobs, batch, seconds))


def versions() -> dict[str, object]:
    """Of the peers that are installed."""
    found: dict[str, object] = {}
    if (_PEERS / ".ready").exists():
        found |= _versions(_PEERS, "pgqueuer", "procrastinate", "awa-pg")
    if (_OBAN / ".ready").exists():
        found |= _versions(_OBAN, "oban")
    manifest = _PEERS / "node" / "node_modules" / "graphile-worker" / "package.json"
    if manifest.exists():
        found["graphile-worker"] = json.loads(manifest.read_text())["version"]
    return found


def _versions(environment: Path, *packages: str) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    command = [str(environment / "bin" / "python"), "-c", code, *packages]
    output = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return dict(zip(packages, output.split(), strict=True))


def _python(program: str, *arguments: object) -> list[str]:
    if not (_PEERS / ".ready").exists():
        raise LeftOutError("the environment of the peers is not there: make peers")
    return [str(_PEERS / "bin" / "python"), str(_PROGRAMS / program), *map(str, arguments)]


def _told(command: Sequence[str]) -> Told:
    output = subprocess.run(
        command, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_WITHIN_S, check=False
    )
    if output.returncode:
        last_words = (output.stderr.splitlines() or ["nothing"])[-1]
        raise LeftOutError(f"{Path(command[1]).name} ended with {output.returncode}; it said last: {last_words}")
    return Told(**json.loads(output.stdout.splitlines()[-1]))


def _with_best(rates: dict[str, float]) -> list[Figure]:
    return [Figure(name, rate, "jobs/s") for name, rate in {**rates, "best": max(rates.values())}.items()]
