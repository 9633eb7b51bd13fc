"""``cdc demo``, shortened: everything it prints comes from a run on its own server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import click
import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc
from cdc.cli.demo import demo
from cdc.contrib.demo import run
from tests.eventually import eventually

# For its skip: a machine without server programs has no demo.
pytestmark = pytest.mark.usefixtures("server")

_SHORT = """
import sys
from cdc.cli.output import paint
from cdc.contrib.demo.run import play
def say(text): print(text, flush=True)
sys.exit(not play(say=say, paint=paint, dsn={dsn!r}, keep={keep}, ticks={ticks}, burst_rows={burst}))
"""


def _start(
    path: Path, *, ticks: int, burst: int, keep: bool = False, dsn: str | None = None
) -> subprocess.Popen[bytes]:
    """A demo that writes to ``path``, off a terminal. Its time is not its own: no test waits for a duration."""
    code = _SHORT.format(dsn=dsn, keep=keep, ticks=ticks, burst=burst)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")}
    with path.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment | {"PYTHONUTF8": "1"},
        )  # fmt: skip


def test_every_written_change_is_shown_on_its_way_or_counted_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with _start(output, ticks=90, burst=300) as process:
        assert process.wait(90) == 0, output.read_text()
    text = output.read_text()
    assert re.search(r"whatsapp_message_reactions +INSERT +[\d.]+ +wal +[\d.]+ +react +[\d.]+ +[\d.]+ +✅", text)
    assert re.search(r"tasks +INSERT .* notify .* of a reaction", text), "the chain reaction"
    assert re.search(r"whatsapp_messages +INSERT .* answer +attempt 2 failed: MessengerError", text)
    assert re.search(r"whatsapp_messages +INSERT .* answer .* attempt 3", text)
    assert "burst: 300 messages in one transaction" in text
    captured, processed, retried, dead = (_count(text, word) for word in ("captured", "processed", "retried", "dead"))
    # 90 rows written one by one, 300 in the burst, and a task for each check mark.
    assert captured == processed == 390 + text.count("✅") + _quiet_check_marks(90)
    assert (retried, dead) == (1, 0)
    assert re.search(r"^  wake-ups +wal \d+, notify \d+, retry 2, sweep \d+$", text, re.MULTILINE)
    assert re.search(r"^  handler +[\d.]+ +[\d.]+ +-?[\d.]+ +[\d.]+$", text, re.MULTILINE), "p50 and p99, twice"
    # A question and a hopeless one, a task by hand, and a task for each check mark.
    assert f"  messages   {3 + text.count('✅') + _quiet_check_marks(90)} for the messenger" in text
    assert "\x1b[" not in text, "colours off a terminal"
    assert "Traceback" not in text


def _count(text: str, word: str) -> int:
    [number] = re.findall(rf"^  {word} +([\d,]+)$", text, re.MULTILINE)
    return int(number.replace(",", ""))


def _quiet_check_marks(ticks: int) -> int:
    quiet = ticks - len(range(0, ticks, 14))
    return quiet // 4


def test_kept_up_it_serves_metrics_shows_what_others_write_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    output = tmp_path / "output"

    def printed(pattern: str) -> Callable[[], str]:
        """What the pattern's group matched in the output; "" for nothing yet."""
        return lambda: next(iter(re.findall(pattern, output.read_text())), "")

    with _start(output, ticks=20, burst=10, keep=True) as process:
        try:
            dsn = eventually(printed(r'psql "(.*)"'), within_s=60, what="the line for psql")
            url = eventually(printed(r"(http://127.0.0.1:\d+/metrics)"))
            with urllib.request.urlopen(url, timeout=10) as response:
                assert "cdc_wakeups_total" in response.read().decode()
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute("INSERT INTO cdc_demo.whatsapp_messages VALUES ('mine', 'help!', 'me', 'my-chat')")
            eventually(printed(r"(whatsapp_messages +INSERT .* yours)"), what="a line for the visitor's row")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, output.read_text()
    folder = Path(dsn.split("host=")[1].split()[0])
    assert not folder.exists()


def _objects(db: psycopg.Connection) -> set[tuple[str, str]]:
    """All that a demo could leave on a server: the schemas with what is in them, publications, slots."""
    return set(
        db.execute(
            "SELECT n.nspname, coalesce(c.relname, '') FROM pg_namespace AS n"
            " LEFT JOIN pg_class AS c ON c.relnamespace = n.oid"
            " WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
            " UNION ALL SELECT 'publication', pubname FROM pg_publication"
            " UNION ALL SELECT 'slot', slot_name FROM pg_replication_slots WHERE slot_name = 'cdc_demo'"
        ).fetchall()
    )


def test_on_a_server_of_ones_own_it_leaves_everything_as_it_was(
    database: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    db.execute("CREATE TABLE whatsapp_messages (mine text)")
    db.execute("INSERT INTO whatsapp_messages VALUES ('mine')")
    before = _objects(db)
    with _start(tmp_path / "output", ticks=20, burst=10, dsn=database) as process:
        assert process.wait(90) == 0, (tmp_path / "output").read_text()
    text = (tmp_path / "output").read_text()
    assert "woken by the slot cdc_demo" in text
    assert f"wake-ups   wal {_count(text, 'captured')}, " in text
    assert "Removed the schema cdc_demo, its publication and its slot, and the schema cortex_projects." in text
    assert _objects(db) == before
    assert db.execute("TABLE whatsapp_messages").fetchall() == [("mine",)]


def test_an_interrupted_demo_leaves_everything_as_it_was_too(
    database: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    before = _objects(db)
    with _start(tmp_path / "output", ticks=10_000, burst=10, dsn=database) as process:
        eventually(lambda: ("cdc_demo", "entity_changes") in _objects(db), what="the outbox of the demo")
        eventually(lambda: "An application now writes" in (tmp_path / "output").read_text())
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert _objects(db) == before, (tmp_path / "output").read_text()


def test_what_has_its_names_already_is_not_touched(database: str, db: psycopg.Connection) -> None:
    db.execute("CREATE SCHEMA cdc_demo CREATE TABLE entity_changes (mine text)")
    refused = CliRunner().invoke(cdc, ["demo", "--dsn", database])
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert "there is a schema cdc_demo on this server already" in refused.stderr
    assert "DROP SCHEMA cdc_demo CASCADE" in refused.stderr, "what to do about one that was left behind"
    assert db.execute("TABLE cdc_demo.entity_changes").description[0].name == "mine"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("CREATE SCHEMA cortex_projects CREATE TABLE tasks (mine text)", "schema cortex_projects in this database"),
        ("CREATE PUBLICATION cdc_cdc_demo", "publication cdc_cdc_demo on this server"),
    ],
)
def test_what_it_would_make_and_is_there_is_not_touched_and_nothing_is_made(
    statement: str, said: str, database: str, db: psycopg.Connection
) -> None:
    db.execute(statement)
    before = _objects(db)
    refused = CliRunner().invoke(cdc, ["demo", "--dsn", database])
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert f"there is a {said} already" in refused.stderr
    assert _objects(db) == before


def test_a_slot_of_its_name_is_not_touched_and_nothing_is_made(database: str, db: psycopg.Connection) -> None:
    db.execute("SELECT pg_create_logical_replication_slot('cdc_demo', 'pgoutput')")
    before = _objects(db)
    refused = CliRunner().invoke(cdc, ["demo", "--dsn", database])
    assert refused.exit_code == 5
    assert "pg_drop_replication_slot('cdc_demo')" in refused.stderr
    assert _objects(db) == before
    db.execute("SELECT pg_drop_replication_slot('cdc_demo')")


def test_a_role_that_may_not_make_a_schema_gets_the_remedy(database: str, db: psycopg.Connection) -> None:
    role = f"test_{uuid.uuid4().hex[:12]}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    refused = CliRunner().invoke(cdc, ["demo", "--dsn", make_conninfo(database, user=role)])
    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert refused.exit_code == 1
    assert "GRANT CREATE ON DATABASE" in refused.stderr


def test_changes_that_were_not_processed_are_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "play", lambda **_: False)
    assert CliRunner().invoke(demo).exit_code == 1


def test_all_processed_is_exit_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "play", lambda **options: options["say"] is click.echo)
    assert CliRunner().invoke(demo).exit_code == 0
