"""Consumers of a subscription are killed, and others take over: what it has done is kept, and no other is touched."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.eventually import eventually
from tests.fix_consumer import Process, settled
from tests.subscriptions import is_done, kept, states_of, subscribe

pytestmark = pytest.mark.server

_CALLS = """
CREATE TABLE calls (seq bigint, key text, attempt int, pid int, started timestamptz DEFAULT clock_timestamp(),
  ended timestamptz)
"""
_WRITE = """
SELECT count(publish_change('counted', (n %% 40)::text, 'INSERT', jsonb_build_object('takes_s', 0.01)))
FROM generate_series(1, %s) AS n
"""
_OUT_OF_ORDER = """
SELECT count(*) FROM calls AS one JOIN calls AS later ON one.key = later.key AND one.pid = later.pid
WHERE one.seq < later.seq AND one.started > later.started AND one.attempt = 1
"""


@pytest.mark.promise("G1")
def test_killed_consumers_of_a_subscription_lose_nothing_and_touch_no_other(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    outbox_db.execute(_CALLS)
    number, other = subscribe(outbox_db, "search"), subscribe(outbox_db, "idle")
    outbox_db.execute(_WRITE, [2_000])

    def start(name: str) -> Process:
        process = Process(outbox, tmp_path / f"{name}.log", subscription="search", slot_name="cdc_search")
        processes.append(process)
        return process

    def called() -> int:
        [(count,)] = outbox_db.execute("SELECT count(DISTINCT seq) FROM calls").fetchall()
        return int(count)

    running = [start("one"), start("two")]
    for round_, victim in enumerate((0, 1, 0)):
        before = called()
        eventually(lambda: called() > before + 150, what="it is in the middle of its work")  # noqa: B023
        running[victim].kill()
        outbox_db.execute(_WRITE, [100])
        running[victim] = start(f"again {round_}")
    eventually(lambda: is_done(outbox_db, number), within_s=90, what="all of it is done")
    assert set(states_of(outbox_db, number).values()) == {"done"}
    assert called() == 2_300
    assert outbox_db.execute(_OUT_OF_ORDER).fetchall() == [(0,)]
    # Rows of what had started when they died are gone with the others.
    eventually(lambda: kept(outbox_db, number) == 0, within_s=30)
    assert set(states_of(outbox_db, other).values()) == {"fresh"}
    assert not settled(outbox_db)
    # What ran at a kill ran again, and nothing else.
    [(twice,)] = outbox_db.execute(
        "SELECT count(*) FROM (SELECT seq FROM calls GROUP BY seq HAVING count(*) > 1) AS t"
    ).fetchall()
    assert twice < 3 * 200
    assert [running[0].terminate(), running[1].terminate()] == [0, 0]
