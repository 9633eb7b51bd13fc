"""How many instructions a consumer takes for a change: ``python -m tests.bench.instructions [HANDLER ...]``

Callgrind counts them in all threads of a ``cdc run`` that drains an outbox, from a tenth of the changes on to the last
twentieth: neither the start nor the end. So two versions can be compared where times are too noisy. Two runs on an idle
machine differ by about one in a hundred, as the clock decides where reads and groups end; on a busy one they count
more, as what is done each second is done more often for a change. Waits do not count, nor does the server.
Of ``lone`` each change is committed when the one before has been marked.

``--tree``: a checkout whose ``cdc`` is counted, with its own ``.venv``; this one by default. ``--functions N``: of the
interpreter and its libraries, those that took most. It needs valgrind.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import handlers
from tests.bench.database import ROWS, drained, fresh_database, preload, rest, streaming
from tests.eventually import eventually

_ROOT = Path(__file__).parents[2]
_CHANGES = {"lone": 400, "noop": 20_000, "noop_sync": 6_000, "batches": 20_000, "inserts": 6_000, "inserts_sync": 6_000}
"""By router of ``handlers``. A minute or two each."""
_KEYS = 1_000
_GROUP = "SELECT count(*) / nullif(count(DISTINCT xmin::text), 0)::float8 FROM bench_effects"
_FILES = "instructions"
_FUNCTION = re.compile(r"c?fn=(\(\d+\))(?: (.*))?$")
_COST = re.compile(r"[+*-]?\d* (\d+)$")
_CAPTURE = "CREATE TRIGGER c AFTER INSERT ON bench_rows FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
_WRITE = "INSERT INTO bench_rows (id, note) VALUES (%s, 'a row to be captured')"
_REST_S = 0.1
"""After a mark: what follows belongs to the change."""
_WITHIN_S = 600.0
_STOP_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.instructions", description="Instructions a change.")
    parser.add_argument("handlers", nargs="*", metavar="HANDLER", help=f"of {', '.join(_CHANGES)}; all by default")
    parser.add_argument("--tree", action="append", type=Path, help="a checkout, repeatable; this one by default")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="list the N that took most")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        parser.error("valgrind is not installed")
    with TempServer() as server:
        for handler in options.handlers or _CHANGES:
            for tree in options.tree or [_ROOT]:
                by_function, group = count(server, tree.resolve(), handler)
                total = sum(by_function.values())
                print(f"{handler:13} {total:9,} instructions a change{group}  {tree}", flush=True)
                for function, instructions in by_function.most_common(options.functions):
                    print(f"  {instructions:9,}  {function}")


def count(server: TempServer, tree: Path, handler: str) -> tuple[Counter[str], str]:
    """The tree's consumer drains an outbox of its own.

    Returns the instructions for a change, by function, and how many changes shared a transaction.
    """
    changes = _CHANGES[handler]
    first, last = changes // 10, changes - changes // 20
    with fresh_database(server) as connection, tempfile.TemporaryDirectory(prefix="cdcbench") as name:
        folder = Path(name)
        run = _Run(tree, folder, {"BENCH_COUNTED": f"{first}:{last}"})
        run.to_end("db", "install", "--dsn", connection.info.dsn)
        connection.execute(handlers.EFFECTS)
        if handler == "lone":
            connection.execute(ROWS)
            connection.execute(_CAPTURE)
        else:
            preload(connection, changes=changes, keys=_KEYS)
        rest(connection)
        with run.consumer(connection, handler) as until:
            if handler == "lone":
                until(lambda: streaming(connection), "the slot to be read")
                for number in range(changes):
                    connection.execute(_WRITE, [number])
                    until(lambda: drained(connection), "the mark")
                    Event().wait(_REST_S)
            else:
                until(lambda: drained(connection), "the outbox to be drained")
        row = connection.execute(_GROUP).fetchone()
        group = f" in transactions of {row[0]:.1f}" if row and row[0] else ""
        return _by_function(folder, last - first), group


class _Run:
    """The commands of a tree's ``cdc``, in a folder that also has the handlers, whatever the tree has."""

    def __init__(self, tree: Path, folder: Path, settings: dict[str, str]) -> None:
        own = tree / ".venv/bin/python"
        self._cdc = [str(own if own.exists() else sys.executable), "-m", "cdc"]
        shutil.copy(handlers.__file__, folder)
        self._folder = folder
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG", "PYTHON"))}
        self._environment = inherited | settings | {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}

    def to_end(self, *words: str) -> None:
        subprocess.run([*self._cdc, *words], cwd=self._folder, env=self._environment, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip

    @contextmanager
    def consumer(
        self, connection: psycopg.Connection, handler: str
    ) -> Iterator[Callable[[Callable[[], bool], str], None]]:
        """One that runs. Gives what waits for a condition.

        That raises RuntimeError, with what the consumer said last, if it ends before.
        """
        said = self._folder / "stderr"
        callgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no",
                     f"--callgrind-out-file={self._folder}/{_FILES}.%p"]  # fmt: skip
        words = ["run", "--dsn", connection.info.dsn, "--handlers", f"handlers:{handler}", "--http-port", "0"]
        with said.open("wb") as file:
            consumer = subprocess.Popen([*callgrind, *self._cdc, *words], cwd=self._folder, env=self._environment,
                                        stdin=subprocess.DEVNULL, stdout=file, stderr=file)  # fmt: skip

        def until(condition: Callable[[], bool], what: str) -> None:
            def holds() -> bool:
                if consumer.poll() is not None:
                    last = said.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the consumer ended; it said last:\n{last}")
                return condition()

            eventually(holds, within_s=_WITHIN_S, what=what)

        try:
            yield until
        finally:
            consumer.send_signal(signal.SIGTERM)
            consumer.wait(_STOP_S)


def _by_function(folder: Path, changes: int) -> Counter[str]:
    """Of callgrind's files: each function's own instructions, divided by the changes."""
    found: Counter[str] = Counter()
    for path in folder.glob(f"{_FILES}.*"):
        names: dict[str, str] = {}
        function, of_callee = "", False
        for line in path.read_text().splitlines():
            if named := _FUNCTION.match(line):
                number, name = named.groups()
                name = names.setdefault(number, name)  # told at its first mention only
                function = function if line.startswith("c") else name
            elif line.startswith("calls="):
                of_callee = True  # the next line is what the callee took, which is counted there
            elif own := _COST.match(line):
                found[function] += 0 if of_callee else int(own[1])
                of_callee = False
    return Counter({function: round(instructions / changes) for function, instructions in found.items()})


if __name__ == "__main__":
    main()
