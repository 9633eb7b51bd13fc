"""Nothing is lost and order holds, whatever happens to the process or the server. Real processes, real signals."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres import migrations
from tests.eventually import eventually
from tests.fix_consumer import Process, settled, states

_CALLS = """
CREATE TABLE calls (
  seq bigint, key text, attempt int, pid int, started timestamptz DEFAULT clock_timestamp(), ended timestamptz
)
"""


def _publish(
    db: psycopg.Connection, count: int, keys: int, *, takes_s: float = 0.0, entity_type: str = "counted"
) -> None:
    db.execute(
        "SELECT publish_change(%s, 'k' || n %% %s, 'INSERT', jsonb_build_object('takes_s', %s::float8))"
        " FROM generate_series(1, %s) AS n",
        [entity_type, keys, takes_s, count],
    )


def _calls(db: psycopg.Connection) -> int:
    [(count,)] = db.execute("SELECT count(*) FROM calls").fetchall()
    return int(count)


def _has_calls(db: psycopg.Connection, more_than: int) -> bool:
    return _calls(db) > more_than


def _assert_order(db: psycopg.Connection, *, doubled_at_most: int = 0) -> None:
    """First calls of a key rise in seq; a second call of a change is allowed only as often as a crash allows."""
    first_calls: dict[str, list[int]] = defaultdict(list)
    doubled = 0
    for key, seq in db.execute("SELECT key, seq FROM calls ORDER BY started").fetchall():
        if seq in first_calls[key]:
            doubled += 1
        else:
            first_calls[key].append(seq)
    assert doubled <= doubled_at_most
    for key, seqs in first_calls.items():
        assert seqs == sorted(seqs), f"key {key}"


@pytest.fixture
def calls(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute(_CALLS)
    return outbox_db


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[TempServer]:
    """A durable server of the test's own, to be stopped and crashed."""
    with TempServer(durable=True) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            migrations.install(connection, "public")
            connection.execute(_CALLS)
        yield server


@pytest.mark.promise("G1")
def test_sigterm_in_the_middle_of_work_loses_nothing_and_counts_nothing_as_an_error(
    outbox: str, calls: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    _publish(calls, 300, 30, takes_s=0.05)
    processes.append(Process(outbox, tmp_path / "first.log"))
    eventually(lambda: _calls(calls) > 50)
    assert processes[-1].terminate() == 0, processes[-1].log
    assert 0 < states(calls)["fresh"] < 300
    assert "Traceback" not in processes[-1].log
    processes.append(Process(outbox, tmp_path / "second.log"))
    eventually(lambda: settled(calls))
    assert states(calls) == {"processed": 300}
    assert calls.execute("SELECT max(error_count) FROM entity_changes").fetchone() == (0,)
    _assert_order(calls)


@pytest.mark.promise("G1")
def test_sigterm_with_a_handler_that_never_returns_ends_after_the_drain_time(
    outbox: str, calls: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    _publish(calls, 3, 3, takes_s=600)
    processes.append(Process(outbox, tmp_path / "log", drain_time=0.5))
    eventually(lambda: _calls(calls) == 3)
    assert processes[-1].terminate() == 0
    assert "3 handlers were cut off" in processes[-1].log
    assert states(calls) == {"fresh": 3}


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
def test_after_kill_9_every_key_goes_on_at_its_first_unsettled_change(
    outbox: str, calls: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    _publish(calls, 400, 20, takes_s=0.02)
    kills = 0
    for round_ in range(3):
        processes.append(Process(outbox, tmp_path / f"{round_}.log"))
        enough = _calls(calls) + 60
        eventually(partial(_has_calls, calls, enough))
        processes[-1].kill()
        kills += 1
    processes.append(Process(outbox, tmp_path / "last.log"))
    eventually(lambda: settled(calls))
    assert states(calls) == {"processed": 400}
    # What ran or was not settled yet runs again: of 20 keys at most a few each.
    assert calls.execute("SELECT count(DISTINCT seq) FROM calls").fetchone() == (400,)
    _assert_order(calls, doubled_at_most=100 * kills)


@pytest.mark.promise("G1")
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_restart_under_load_loses_nothing_and_the_consumer_recovers_by_itself(
    mode: str, own_server: TempServer, processes: list[Process], tmp_path: Path
) -> None:
    dsn = own_server.dsn()
    stop, written = threading.Event(), []

    def write() -> None:
        """As applications do: what a commit confirmed must arrive, what was cut off may or may not."""
        number = 0
        while not stop.is_set():
            try:
                with psycopg.connect(dsn, autocommit=True) as connection:
                    while not stop.is_set():
                        number += 1
                        key = f"k{number % 10}"
                        connection.execute("SELECT publish_change('counted', %s, 'INSERT', '{}')", [key])
                        written.append(number)
            except psycopg.OperationalError:
                stop.wait(0.05)

    processes.append(Process(dsn, tmp_path / "log"))
    processes[-1].wait_for("streaming the slot")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        eventually(lambda: len(written) > 100)
        own_server.restart(mode)
        before = len(written)
        eventually(lambda: len(written) > before + 100)
    finally:
        stop.set()
        writer.join()
    with psycopg.connect(dsn, autocommit=True) as db:
        eventually(lambda: settled(db))
        [(captured,)] = db.execute("SELECT count(*) FROM entity_changes WHERE processed").fetchall()
        assert captured >= len(written)
        # A handler's own connection died too: such a call failed and was tried again.
        assert states(db).get("dead", 0) == 0
        [(handled,)] = db.execute("SELECT count(DISTINCT seq) FROM calls").fetchall()
        assert handled == captured
        eventually(lambda: processes[-1].log.count("streaming the slot") == 2)
    assert processes[-1].terminate() == 0
    assert "Traceback" not in processes[-1].log


@pytest.mark.promise("G6")
def test_three_hundred_thousand_pending_changes_at_the_start_do_not_cost_memory(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    processes.append(Process(outbox, tmp_path / "idle.log"))
    processes[-1].wait_for("streaming the slot")
    _publish(outbox_db, 200, 200, entity_type="nothing")
    eventually(lambda: settled(outbox_db))
    idle = processes[-1].memory_bytes("VmHWM")
    assert processes[-1].terminate() == 0
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, entity_type, entity_id, operation, new_data)"
        " SELECT 't', 'nothing', 'k' || n % 1000, 'INSERT', jsonb_build_object('text', repeat('x', 200))"
        " FROM generate_series(1, 300000) AS n"
    )
    outbox_db.execute("ANALYZE entity_changes")
    processes.append(Process(outbox, tmp_path / "loaded.log"))
    eventually(lambda: settled(outbox_db), within_s=240)
    assert states(outbox_db) == {"processed": 300_200}
    assert processes[-1].memory_bytes("VmHWM") - idle < 40 * 1024 * 1024


@pytest.mark.promise("G9")
def test_with_wal_level_replica_the_consumer_works_by_sweeping_and_says_so(
    processes: list[Process], tmp_path: Path
) -> None:
    with (
        TempServer(durable=False, settings={"wal_level": "replica"}) as server,
        psycopg.connect(server.dsn(), autocommit=True) as db,
    ):
        migrations.install(db, "public")
        db.execute(_CALLS)
        processes.append(Process(server.dsn(), tmp_path / "log"))
        processes[-1].wait_for("not streaming (wal_level)")
        assert "ALTER SYSTEM SET wal_level" in processes[-1].log
        _publish(db, 20, 5)
        eventually(lambda: settled(db))
        assert states(db) == {"processed": 20}
        assert processes[-1].terminate() == 0
