"""docs/guides/migrate.md, under write load, each step forth, back and forth: nothing is lost or doubled."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.eventually import eventually
from tests.faults.guide import Shell, steps
from tests.fix_consumer import settled
from tests.handlers_migration import ACT, POISON
from tests.integration.postgres.test_schema_upgrade import DOCUMENTED
from tests.legacy_processor import Processor

TABLES = {"reaction": "whatsapp_message_reactions", "message": "whatsapp_messages", "task": "tasks"}
_SOURCE = "CREATE TABLE {} (id text PRIMARY KEY, user_id text, chat_id text, room_id text)"
_WRITE = "INSERT INTO {} (id, user_id) VALUES (%s, %s)"
_EFFECTS = "CREATE TABLE effects (entity_type text, entity_id text, done_by text)"
_PAUSE_S = 0.03
"""Between two rows of a writer: a load that the documented processor keeps up with."""
_PROGRESS = 15
"""Rows that are written between two steps, at least."""

Written = tuple[str, str]


class Writer:
    """Writes a row of each table in turn. ``handles``: it is a webhook that triggers these actions by itself."""

    def __init__(self, dsn: str, name: str, *, handles: Sequence[str] = (), options: str = "") -> None:
        self._dsn, self._name, self._handles, self._options = dsn, name, handles, options
        self.written: list[Written] = []
        self.poison: list[Written] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        with psycopg.connect(self._dsn, autocommit=True, options=self._options) as db:
            while not self._stopping.wait(_PAUSE_S):
                entity_type = tuple(TABLES)[number % len(TABLES)]
                number += 1
                self._write(db, entity_type, f"{self._name}-{number}", bad=number % 50 == 0)

    def _write(self, db: psycopg.Connection, entity_type: str, key: str, *, bad: bool) -> None:
        table = sql.Identifier(TABLES[entity_type])
        bad = bad and not self._handles
        db.execute(sql.SQL(_WRITE).format(table), [key, POISON if bad else "user"])
        if key.endswith("7"):  # an UPDATE as well, about which nothing is to be done
            db.execute(sql.SQL("UPDATE {} SET chat_id = 'c' WHERE id = %s").format(table), [key])
        (self.poison if bad else self.written).append((entity_type, key))
        if entity_type in self._handles:
            db.execute(ACT, [entity_type, key, "webhook"])


def _act(db: psycopg.Connection, change: dict[str, Any]) -> None:
    """What the documented processor does about a change."""
    if change["operation"] != "INSERT":
        return
    if change["new_data"]["user_id"] == POISON:
        raise ValueError(POISON)
    db.execute(ACT, [change["entity_type"], change["entity_id"], "processor"])


class Ledger:
    """What was written, against what was done about it."""

    def __init__(self, db: psycopg.Connection) -> None:
        self._db = db
        self.writers: list[Writer] = []

    def progress(self, done_by: str | None = None) -> None:
        """Return when more has been written, and some of it handled, by this one if it is named."""
        written, effects = self._written(), self._effects(done_by)
        eventually(lambda: self._written() >= written + _PROGRESS, what="the writers write")
        eventually(lambda: self._effects(done_by) >= effects + 5, what=f"{done_by or 'somebody'} handles changes")

    def _written(self) -> int:
        return sum(len(writer.written) for writer in self.writers)

    def _effects(self, done_by: str | None) -> int:
        asked = "SELECT count(*) FROM effects WHERE done_by = coalesce(%s, done_by)"
        [(count,)] = self._db.execute(asked, [done_by]).fetchall()
        return int(count)

    def stop(self) -> None:
        for writer in self.writers:
            writer.stop()

    def judge(self) -> None:
        """Every row has had its action once; those that nobody can handle are dead letters."""
        self.stop()
        eventually(lambda: settled(self._db), within_s=100, what="every change processed or dead")
        done = Counter(self._db.execute("SELECT entity_type, entity_id FROM effects").fetchall())
        written = {each for writer in self.writers for each in writer.written}
        assert written - set(done) == set(), "lost"
        assert {each: times for each, times in done.items() if times > 1} == {}, "done twice"
        assert set(done) == written
        dead = self._db.execute("SELECT entity_type, entity_id FROM entity_changes WHERE dead_at IS NOT NULL")
        assert set(dead) == {each for writer in self.writers for each in writer.poison}


@pytest.fixture
def ledger(db: psycopg.Connection) -> Iterator[Ledger]:
    for table in TABLES.values():
        db.execute(sql.SQL(_SOURCE).format(sql.Identifier(table)))
    db.execute(_EFFECTS)
    kept = Ledger(db)
    yield kept
    kept.stop()


@pytest.fixture
def shell(database: str, tmp_path: Path, slot: str) -> Iterator[Shell]:
    made = Shell(database, tmp_path, slot)
    yield made
    made.kill()


@contextmanager
def _processor(dsn: str, without: Sequence[str] = ()) -> Iterator[None]:
    with Processor(dsn, _act, without):
        yield


def _documented(db: psycopg.Connection) -> None:
    """The document's SQL; the triggers of its three tables."""
    db.execute(DOCUMENTED)
    for entity_type, table in TABLES.items():
        db.execute(
            sql.SQL(
                "CREATE TRIGGER {} AFTER INSERT OR UPDATE OR DELETE ON {}"
                " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
            ).format(sql.Identifier(f"track_{entity_type}_changes"), sql.Identifier(table))
        )


@pytest.mark.timeout(600)
@pytest.mark.promise("G1")
def test_from_the_documented_processor_to_consumers_and_back_at_every_step(
    database: str, db: psycopg.Connection, ledger: Ledger, shell: Shell
) -> None:
    guide = steps("From the documented trigger and processor")
    _documented(db)
    ledger.writers += [Writer(database, f"w{number}") for number in range(2)]
    with ExitStack() as old:
        old.enter_context(_processor(database))
        ledger.progress("processor")
        forth, back, forth_again = guide["The schema"]
        for commands in (forth, back, forth_again):
            shell.run(commands)
            ledger.progress("processor")
        [look] = guide["A consumer that only looks"]
        for _ in range(2):
            shell.run(look)
            ledger.progress("processor")
            shell.stop()
    first, then, whole = guide["Type by type"]
    _switch_and_back(database, shell, ledger, first, ["reaction"])
    with _processor(database, ["reaction", "message"]):
        shell.run(then)
        ledger.progress("consumer")
        ledger.progress("processor")
    shell.stop()
    shell.run(whole)
    ledger.progress("consumer")
    forth, back = guide["Without the processor"]
    for commands in (forth, back, forth):
        shell.run(commands)
        ledger.progress("consumer")
    ledger.judge()
    shell.stop()
    by: dict[str, int] = dict(db.execute("SELECT done_by, count(*) FROM effects GROUP BY 1").fetchall())
    assert by.keys() == {"processor", "consumer"}


def _switch_and_back(dsn: str, shell: Shell, ledger: Ledger, commands: list[str], types: list[str]) -> None:
    """Forth, back to the processor alone, and forth again."""
    with _processor(dsn, types):
        shell.run(commands)
        ledger.progress("consumer")
        ledger.progress("processor")
    shell.stop()
    with _processor(dsn):
        ledger.progress("processor")
    with _processor(dsn, types):
        shell.run(commands)
        ledger.progress("consumer")
    shell.stop()


@pytest.mark.timeout(600)
@pytest.mark.promise("G1")
def test_from_actions_in_the_webhook_to_consumers_one_instance_after_the_other(
    database: str, db: psycopg.Connection, ledger: Ledger, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(TABLES, "task")
    guide = steps("From actions in the webhook")
    [environment] = guide["Capturing"][0]
    [options] = re.findall(r'PGOPTIONS="(.*)"', environment)

    def webhook(name: str, *, acts: bool, says: bool = True) -> Writer:
        made = Writer(database, name, handles=tuple(TABLES) if acts else (), options=options if acts and says else "")
        ledger.writers.append(made)
        return made

    instances = [webhook(f"old{n}", acts=True, says=False) for n in range(3)]
    shell.run(guide["The schema of it"][0])
    shell.run(["cdc db uninstall --yes"])
    shell.run(guide["The schema of it"][0])
    ledger.progress("webhook")
    for n, instance in enumerate(instances):
        instance.stop()
        instances[n] = webhook(f"says{n}", acts=True)
    _, forth, _, back = guide["Capturing"]
    for commands in (forth, back, forth):
        shell.run(commands)
        ledger.progress("webhook")
    [work] = guide["Looking, then working"]
    for commands in (["cdc run --observe --handlers handlers:router"], work):
        shell.run(commands)
        ledger.progress("webhook")
        shell.stop()
    assert db.execute("SELECT count(*) FROM effects WHERE done_by = 'consumer'").fetchone() == (0,)
    shell.run(work)
    for n, acts in ((0, False), (1, False), (1, True), (2, False), (1, False)):
        instances[n].stop()
        instances[n] = webhook(f"new{n}-{acts}-{len(ledger.writers)}", acts=acts)
        ledger.progress("consumer")
    for n in range(3):
        instances[n].stop()
        instances[n] = webhook(f"last{n}", acts=False)
    forth, back = guide["The leave taken back"]
    for commands in (forth, back, forth):
        shell.run(commands)
        ledger.progress("consumer")
    ledger.judge()
    shell.stop()
