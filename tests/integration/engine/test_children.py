"""What a handler forks, and what the environment says of a neighbour, is not ours to share."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from cdc.runtime import forks
from tests.eventually import eventually
from tests.fix_consumer import Process, slot_name

_OWNERS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'cdc: shards'
"""


def test_a_killed_consumer_gives_up_its_shards_and_its_port_though_a_forked_child_lives(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"handlers": "tests.handlers_forking:router", "http_port": port, "slot_name": slot_name()}
    first = Process(outbox, tmp_path / "first", **settings)
    processes.append(first)
    first.wait_for("owns 64 of 64 shards")
    first.wait_for("streaming")
    outbox_db.execute("SELECT publish_change('fork', '1')")
    first.wait_for("forked")
    [child] = map(int, re.findall(r"forked (\d+)\.", first.log))
    try:
        first.kill()
        os.kill(child, 0)  # it is there
        second = Process(outbox, tmp_path / "second", **settings)
        processes.append(second)
        second.wait_for("owns 64 of 64 shards")
        second.wait_for("metrics on")
        eventually(lambda: outbox_db.execute(_OWNERS).fetchone() == (1,))
    finally:
        os.kill(child, signal.SIGTERM)


def test_a_child_writes_nothing_into_a_session_of_its_parent(database: str) -> None:
    with psycopg.connect(database) as connection:
        forks.not_for_children(connection)
        child = os.fork()
        if child == 0:
            connection.pgconn.finish()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("there", [True, False])
def test_metrics_are_not_written_into_the_folder_of_a_neighbour(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    if there:
        folder.mkdir()
    program = (
        "import cdc; from cdc.observability.metrics import Metrics; from prometheus_client import generate_latest;"
        " metrics = Metrics('slot', cdc.Router()); metrics.process.task_ended('relay');"
        " print(generate_latest(metrics.registry).decode())"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert 'cdc_task_ends_total{task="relay"} 1.0' in done.stdout
    assert list(tmp_path.rglob("*.db")) == []
