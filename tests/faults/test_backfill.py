"""A backfill is killed at each of its points, and resumed: no row is left out, and none is written twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psycopg
import pytest

from cdc.postgres import tracking
from tests.eventually import eventually
from tests.faults.test_failpoints import POINTS
from tests.fix_consumer import ROOT
from tests.forked import Forked

pytestmark = pytest.mark.server
_MINE = [point for point in POINTS if point.startswith("backfill.")]
_TEN_PAGES = 2_000


@pytest.mark.promise("G1")
@pytest.mark.parametrize("nth", [1, 4, 10])
@pytest.mark.parametrize("point", _MINE)
def test_killed_at_any_point_and_resumed_it_has_read_each_row_once(
    outbox: str, outbox_db: psycopg.Connection, tmp_path: Path, point: str, nth: int
) -> None:
    outbox_db.execute("CREATE TABLE orders AS SELECT n AS id FROM generate_series(1, %s) AS n" % _TEN_PAGES)  # noqa: UP031
    outbox_db.execute("ALTER TABLE orders ADD PRIMARY KEY (id)")
    tracking.track(outbox_db, "public", "orders")
    log = tmp_path / "backfill.log"
    log.touch()

    def run(module: str, *arguments: str) -> int:
        environment = {**os.environ, "CDC_DSN": outbox}
        return Forked(module, arguments, cwd=ROOT, environment=environment, log=log).wait(60)

    killed = run("tests.faults.crashing", point, str(nth), "backfill", "orders", "--backlog", "10000")
    assert killed == -signal.SIGKILL, log.read_text()
    idle = "SELECT FROM pg_stat_activity WHERE application_name = 'cdc command line'"
    eventually(lambda: not outbox_db.execute(idle).fetchall(), what="the server has ended its session")
    assert run("cdc", "backfill", "resume", "orders") == 0, log.read_text()
    read = outbox_db.execute(
        "SELECT entity_id::int FROM entity_changes WHERE operation = 'READ' ORDER BY seq"
    ).fetchall()
    assert read == [(n,) for n in range(1, _TEN_PAGES + 1)]
    assert outbox_db.execute("SELECT state, examined, written FROM cdc_backfills").fetchall() == [
        ("done", _TEN_PAGES, _TEN_PAGES)
    ]


def test_there_are_points_to_be_killed_at() -> None:
    assert len(_MINE) == 3
