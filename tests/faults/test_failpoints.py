"""A consumer is killed at every named point of its source, in turn; a clean one finishes, and the ledger is judged."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.postgres import migrations
from tests.eventually import eventually
from tests.faults import records
from tests.faults.ledger import Evidence, judge
from tests.fix_consumer import ROOT, Process, settled
from tests.forked import Forked
from tests.handlers_ledger import KINDS

POINTS = sorted(
    {
        point
        for path in (ROOT / "cdc").rglob("*.py")
        for point in re.findall(r'failpoints\.here\("([^"]+)"\)', path.read_text("utf-8"))
    }
)
_ELSEWHERE = {
    "schema.between_steps": "no consumer passes it: a test of its own",
    **dict.fromkeys(
        ["backfill.after_write", "backfill.before_commit", "backfill.after_commit"], "the same: test_backfill"
    ),
    **dict.fromkeys(["deliver.before_send", "deliver.after_send"], "handlers send nothing: test_brokers"),
}
_RELEASES = {"shards.before_release", "shards.after_unregister", "shards.after_release"}
"""A consumer gives shards away only to another."""
_AFTER_A_DEATH = {"crash_guard.before_start", "crash_guard.after_start"}
"""Passed only where somebody has died before."""
_NTH = {
    **dict.fromkeys([*_RELEASES, *_AFTER_A_DEATH, "shards.after_join", "shards.after_lock"], 1),
    "shards.after_register": 1, "stream.before_confirm": 1, "stream.after_confirm": 1, "run.before_one_by_one": 1,
}  # fmt: skip
"""All other points are passed in the middle of work, at the third time."""
_CHANGES, _KEYS = 600, 40
_OPTIONS: dict[str, Any] = {
    "slot_name": "ledger",
    "backoff_base": 0.05,
    "backoff_cap": 0.5,
    "concurrency": 20,
    "http_port": 0,
}


def _write(db: psycopg.Connection, round_: int) -> None:
    """Each statement changes every row once."""
    for kind in KINDS:
        db.execute(
            sql.SQL(
                "INSERT INTO {} SELECT n, %s || '.' || n FROM generate_series(1, %s) AS n"
                " ON CONFLICT (id) DO UPDATE SET token = excluded.token"
            ).format(sql.Identifier(kind)),
            [f"{kind}{round_}", _KEYS],
        )


def _crashing(dsn: str, log: Path, point: str, *command: str) -> Forked:
    log.touch()
    environment = {**os.environ, "CDC_DSN": make_conninfo(dsn, user="crashing")}
    arguments = [point, str(_NTH.get(point, 3)), *command]
    return Forked("tests.faults.crashing", arguments, cwd=ROOT, environment=environment, log=log)


def _has_crashed(process: Forked, log: Path) -> bool:
    code = process.poll()
    assert code in (None, -signal.SIGKILL), f"ended with {code}: {log.read_text()}"
    return code is not None


@pytest.mark.promise("G1")
@pytest.mark.promise("G3")
@pytest.mark.parametrize("point", [point for point in POINTS if point not in _ELSEWHERE])
def test_a_crash_at_any_point_loses_nothing_and_keeps_order(
    point: str, outbox: str, kept: psycopg.Connection, processes: list[Process], ledgers: Path
) -> None:
    if point in _AFTER_A_DEATH:
        kept.execute(
            "INSERT INTO cdc_shards (shard, owner) SELECT n, gen_random_uuid() FROM generate_series(0, 63) AS n"
        )
        _write(kept, 0)
    log = ledgers / "crashing.log"
    options = [part for name, value in _OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    crashing = _crashing(outbox, log, point, "run", "--handlers", "tests.handlers_ledger:router", *options)
    written = 0
    try:
        clean = make_conninfo(outbox, user="clean")
        if point in _RELEASES:
            eventually(lambda: "owns 64 of 64" in log.read_text(), what="it owns the shards that it will give")
            processes.append(Process(clean, ledgers / "clean.log", handlers="tests.handlers_ledger:router", **_OPTIONS))

        def crashed() -> bool:
            nonlocal written
            if written * _KEYS * len(KINDS) < _CHANGES:
                written += 1
                _write(kept, written)
            return _has_crashed(crashing, log)

        eventually(crashed, what=f"it passes {point}; if handlers do, give tests/handlers_ledger.py one that passes it")
    finally:
        crashing.kill()
        crashing.wait()
    while written * _KEYS * len(KINDS) < _CHANGES:
        written += 1
        _write(kept, written)
    if not processes:
        processes.append(Process(clean, ledgers / "clean.log", handlers="tests.handlers_ledger:router", **_OPTIONS))
    processes[-1].wait_for("owns 64 of 64")  # one that has only just started knows nothing of signals yet
    eventually(lambda: settled(kept), what="the clean consumer finishes")
    assert processes[-1].terminate() == 0, processes[-1].log
    captured = records.read_captured(kept, KINDS)
    assert len(captured) == (written + (point in _AFTER_A_DEATH)) * _KEYS * len(KINDS)
    # When exactly it died is not known; before anybody could take over, at any rate.
    calls = records.read_calls(ledgers, {"crashing": 0.0})
    assert judge(Evidence(captured, calls, effects=records.read_effects(kept))).violations == []


@pytest.mark.promise("G2")
@pytest.mark.promise("G3")
@pytest.mark.parametrize("point", ["run.after_handler", "run.before_commit", "settle.before_commit"])
def test_the_rows_of_a_backfill_are_lost_doubled_and_reordered_by_no_crash(
    point: str, outbox: str, kept: psycopg.Connection, processes: list[Process], ledgers: Path
) -> None:
    """The consumer crashes, and so does one of the backfills, while the rows are written."""
    options = [part for name, value in _OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    log = ledgers / "crashing.log"
    _write(kept, 0)
    environment = {**os.environ, "CDC_DSN": outbox}
    reading = [
        Forked("cdc", ["backfill", kind], cwd=ROOT, environment=environment, log=ledgers / "reading.log")
        for kind in KINDS[1:]
    ]
    killed = _crashing(
        outbox, ledgers / "killed.log", "backfill.before_commit", "backfill", KINDS[0], "--backlog", "25"
    )
    crashing = _crashing(outbox, log, point, "run", "--handlers", "tests.handlers_ledger:router", *options)
    for round_ in range(1, 6):
        _write(kept, round_)
    try:
        eventually(lambda: _has_crashed(crashing, log), what=f"it passes {point}")
        assert killed.wait(30) == -signal.SIGKILL
        clean = make_conninfo(outbox, user="clean")
        processes.append(Process(clean, ledgers / "clean.log", handlers="tests.handlers_ledger:router", **_OPTIONS))
        processes[-1].wait_for("owns 64 of 64")
        _write(kept, 6)
        reading.append(
            Forked(
                "cdc", ["backfill", "resume", KINDS[0]], cwd=ROOT, environment=environment, log=ledgers / "reading.log"
            )
        )
        assert [process.wait(60) for process in reading] == [0] * len(KINDS)
    finally:
        for process in (crashing, killed, *reading):
            process.kill()
            process.wait()
    eventually(lambda: settled(kept), what="the clean consumer finishes")
    assert processes[-1].terminate() == 0, processes[-1].log
    captured = records.read_captured(kept, KINDS)
    assert sum(change.operation == "READ" for change in captured) == _KEYS * len(KINDS)
    calls = records.read_calls(ledgers, {"crashing": 0.0})
    assert judge(Evidence(captured, calls, effects=records.read_effects(kept))).violations == []


def test_a_crash_between_two_steps_of_the_installation_leaves_nothing_or_all(
    database: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    crashing = _crashing(make_conninfo(database), log, "schema.between_steps", "db", "install")
    assert crashing.wait() == -signal.SIGKILL, log.read_text()
    assert db.execute("SELECT to_regclass('entity_changes')").fetchone() == (None,)
    assert migrations.install(db, "public")


def test_no_point_is_left_out() -> None:
    assert len(POINTS) >= 24
    assert set(_ELSEWHERE) <= set(POINTS)
    assert set(_NTH) <= set(POINTS)
    assert set(POINTS) >= _RELEASES | _AFTER_A_DEATH
