"""What is told of an attempt that failed: in the log, in the row, and to whoever asks for the change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from cdc.cli import cdc as command
from tests import handlers_failing
from tests.eventually import eventually
from tests.fix_consumer import Process, settled

pytestmark = pytest.mark.server

_READ = f"tests/handlers_failing.py:{handlers_failing.read.__code__.co_firstlineno + 2} in read"
_SECRET = "row-content"


def _ran(dsn: str, db: psycopg.Connection, log: Path, processes: list[Process], log_format: str) -> list[str]:
    """Two orders' lines of the log."""
    db.execute("SELECT publish_change('order', 'key-1', new_data => jsonb_build_object('text', %s::text))", [_SECRET])
    db.execute("SELECT publish_change('later', 'key-2')")
    process = Process(
        dsn,
        log,
        handlers="tests.handlers_failing:router",
        log_format=log_format,
        backoff_base=0.01,
    )
    processes.append(process)
    eventually(lambda: settled(db), what="every change dead")
    assert process.terminate() == 0, process.log
    return process.log.splitlines()


def test_a_failed_attempt_is_an_object_with_fields_and_so_is_what_a_handler_logs(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in _ran(outbox, outbox_db, tmp_path / "log", processes, "json")
    ]
    ids: dict[str, str] = dict(outbox_db.execute("SELECT entity_type, id::text FROM entity_changes").fetchall())
    first, last = [line for line in lines if line.get("event") == "attempt" and line["handler"] == "order"]
    expected = {"change_id": ids["order"], "seq": 1, "entity_type": "order", "entity_id": "key-1", "attempt": 1,
                "outcome": "retried", "error": "JSONDecodeError", "level": "warning"}  # fmt: skip
    assert first.items() >= expected.items()
    assert last.items() >= {**expected, "attempt": 2, "outcome": "dead", "again_in_s": None, "level": "error"}.items()
    assert first["place"].endswith(_READ)
    assert f"JSONDecodeError at {first['place']} on change" in first["message"]
    assert first["frames"][0].endswith(" in order")
    assert first["frames"][1] == first["place"]
    assert "json/decoder.py" in first["frames"][-1]
    assert 0 <= first["duration_s"] < 60
    assert 0 <= first["again_in_s"] <= 0.01
    [asked] = [line for line in lines if line.get("handler") == "later"]
    assert (asked["error"], asked["outcome"]) == ("Retry", "dead")
    assert asked["place"].endswith(" in later")
    said = next(line for line in lines if line["logger"] == "shop.orders")
    assert (said["message"], said["order_id"], said["lines"]) == ("reading", "key-1", [1, 2])
    assert _SECRET not in json.dumps(lines)


def test_a_failed_attempt_is_one_line_of_text_that_names_the_handlers_own_line(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    lines = _ran(outbox, outbox_db, tmp_path / "log", processes, "text")
    first, last = [line for line in lines if "handler order: " in line]
    assert f"{_READ} on change" in first
    assert "attempt 1 of 2; again in 0.0 s" in first
    assert last.endswith("now a dead letter; its last_error says more")
    assert [line for line in lines if line.endswith('reading order_id=key-1 lines="[1, 2]"')]
    assert "entity_id=" not in "".join(lines)


def test_last_error_has_class_and_text_first_and_the_frames_below(
    outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    _ran(outbox, outbox_db, tmp_path / "log", processes, "text")
    errors: dict[str, str] = dict(outbox_db.execute("SELECT entity_type, last_error FROM entity_changes").fetchall())
    head, *frames = errors["order"].split("\n")
    assert head == "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"
    assert frames[1].startswith("  ")
    assert frames[1].endswith(_READ)
    assert errors["later"] == "the handler asked for another try", "it says itself what it is about"
    shown = CliRunner().invoke(command, ["outbox", "show", "1", "--dsn", outbox])
    assert shown.exit_code == 0, shown.output
    lines = [line.strip() for line in shown.stdout.splitlines()]
    assert [line for line in lines if line.startswith("last_error") and line.endswith(head)]
    among = [line for line in lines if line in {frame.strip() for frame in frames}]
    assert among == 3 * [frame.strip() for frame in frames], "of last_error, and of both attempts"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_list_has_the_first_line_only(
    as_json: bool, outbox: str, outbox_db: psycopg.Connection, processes: list[Process], tmp_path: Path
) -> None:
    _ran(outbox, outbox_db, tmp_path / "log", processes, "text")
    listed = CliRunner().invoke(command, ["outbox", "list", "--dsn", outbox, *(["--json"] if as_json else [])])
    assert listed.exit_code == 0, listed.output
    assert ("handlers_failing.py" in listed.stdout) == as_json
