"""cdc backfill: the rows that a table has already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc import testing
from cdc.core.errors import CdcError, NotFoundError, RefusedError
from cdc.postgres import migrations, tracking
from cdc.postgres.backfill import BACKLOG, Backfills
from cdc.postgres.connect import connect
from tests.commands import done, invoke
from tests.eventually import eventually
from tests.fix_consumer import ROOT
from tests.forked import Forked

pytestmark = pytest.mark.server
_ALL = ("--backlog", "100000")
"""No consumer runs in most tests."""


def backfilled(dsn: str, *arguments: str) -> dict[str, Any]:
    result = invoke(dsn, "backfill", *arguments, "--json", *_ALL)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def read(db: psycopg.Connection, schema: str = "public") -> list[tuple[Any, ...]]:
    """Key and document of each READ, in order."""
    return db.execute(
        sql.SQL("SELECT entity_id, new_data FROM {} WHERE operation = 'READ' ORDER BY seq").format(
            sql.Identifier(schema, "entity_changes")
        )
    ).fetchall()


def orders(db: psycopg.Connection, count: int = 0) -> None:
    db.execute("CREATE TABLE orders (id int PRIMARY KEY, total int, card text)")
    db.execute("INSERT INTO orders SELECT n, n, 'x' FROM generate_series(1, %s) AS n", [count])
    tracking.track(db, "public", "orders", entity_type="order")


def test_a_function_that_somebody_has_made_in_place_of_ours_is_refused_and_not_called(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    orders(outbox_db, 3)
    outbox_db.execute(
        "CREATE FUNCTION capture_rows(orders[], text, jsonb, integer)"
        " RETURNS TABLE (written_seq bigint, written_shard smallint) LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION 'it was called'; END $$"
    )
    refused = invoke(outbox, "backfill", "orders", *_ALL)
    assert refused.exit_code == 5, refused.output
    assert "has made a function public.capture_rows(public.orders[],text,jsonb,integer)" in refused.output
    assert "it was called" not in refused.output
    outbox_db.execute("DROP FUNCTION capture_rows(orders[], text, jsonb, integer)")
    done(outbox, "backfill", "resume", "orders", *_ALL)
    assert len(read(outbox_db)) == 3


# --- what is written -----------------------------------------------------------------------------------------------

_COLUMNS = """
  id int, part text, n numeric, f float8, r real, b bytea, ts timestamptz, d date, i interval, j json, jb jsonb,
  tags text[], m money, c char(5), gone int, e mood, k kind, card text, user_id int, room_id int, "a%s b" text"""
_ROWS = """
  (1, 'a', 1.500, 0.1, 0.1, '\\x00ff', 'infinity', '0044-03-15 BC', '1 mon -3 days', '{"a": 1.0, "a": 2}', '{"b": [1]}',
   '{x,NULL}', '1234.5', 'ab', 'good', 'bad', 'secret', 7, NULL, 'y'),
  (2, 'b,"c', 'NaN', '-Infinity', 3e38, '', '2026-01-01 12:00+05', NULL, NULL, '"\\u0000"', NULL,
   NULL, NULL, NULL, NULL, NULL, NULL, NULL, 9, NULL)"""
_TRACKED: dict[str, tuple[str, ...]] = {
    "as it is": ("--type", "thing"),
    "its own key": ("--key", "part,n"),
    "a key that may be NULL": ("--key", "jb"),
    "the schema in its key": ("--schema-in-key",),
    "without": ("--exclude", "card,j"),
    "only": ("--columns", "id,part,n,user_id"),
}


@pytest.mark.parametrize("partitioned", [False, True], ids=["table", "partitions"])
@pytest.mark.parametrize("options", _TRACKED.values(), ids=_TRACKED)
def test_a_read_is_what_the_trigger_would_have_captured(
    outbox: str, outbox_db: psycopg.Connection, options: tuple[str, ...], partitioned: bool
) -> None:
    outbox_db.execute("CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE DOMAIN kind AS mood")
    by = "PARTITION BY RANGE (id)" if partitioned else ""
    outbox_db.execute(f"CREATE TABLE things ({_COLUMNS}, PRIMARY KEY (part, id)) {by}".encode())
    if partitioned:
        outbox_db.execute("CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (1) TO (2);"
                          "CREATE TABLE things_2 PARTITION OF things FOR VALUES FROM (2) TO (9)")  # fmt: skip
    outbox_db.execute("ALTER TABLE things DROP COLUMN gone")
    done(outbox, "track", "things", *options)
    outbox_db.execute(f"INSERT INTO things VALUES {_ROWS}".encode())
    for setting in ("datestyle TO 'German'", "intervalstyle TO 'sql_standard'", "bytea_output TO 'escape'",
                    "extra_float_digits TO 0", "timezone TO 'Asia/Tokyo'", "quote_all_identifiers TO on"):  # fmt: skip
        outbox_db.execute(f"ALTER DATABASE {outbox_db.info.dbname} SET {setting}".encode())
    assert backfilled(outbox, "things")["written"] == 2
    columns = (
        "table_schema, table_name, entity_type, entity_id, old_data, new_data, metadata - 'timestamp' - 'backfill'"
    )
    found = {
        operation: outbox_db.execute(
            f"SELECT {columns} FROM entity_changes WHERE operation = %s ORDER BY seq".encode(), [operation]
        ).fetchall()
        for operation in ("INSERT", "READ")
    }
    assert found["READ"] == found["INSERT"]
    assert outbox_db.execute("SELECT DISTINCT metadata -> 'backfill' FROM entity_changes"
                             " WHERE operation = 'READ'").fetchall() == [(1,)]  # fmt: skip


def test_a_trigger_made_by_hand_says_how_rows_are_read(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute(
        "CREATE TABLE tasks (a int, b text, PRIMARY KEY (a, b)); INSERT INTO tasks VALUES (1, 'x'), (1, 'y');"
        "CREATE TRIGGER mine AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    backfilled(outbox, "tasks")
    assert [key for key, _ in read(outbox_db)] == ['[1, "x"]', '[1, "y"]']
    assert outbox_db.execute("SELECT DISTINCT entity_type FROM entity_changes").fetchall() == [("task",)]


def test_a_condition_and_a_first_key_say_which_rows(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 1_000)
    found = backfilled(outbox, "orders", "--where", "orders.total % 100 = 0 -- hundreds", "--since", "301")
    assert (found["examined"], found["written"]) == (700, 7)
    assert [key for key, _ in read(outbox_db)] == [str(n) for n in range(400, 1_001, 100)]


def test_a_key_of_several_columns_is_gone_through_in_its_order(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute('CREATE TABLE lines (shop text, "no" int8, at timestamptz, PRIMARY KEY (shop, "no", at))')
    outbox_db.execute("INSERT INTO lines SELECT 's,' || n % 7, n, '2026-01-01'::timestamptz + n * interval '1 ms'"
                      " FROM generate_series(1, 500) AS n")  # fmt: skip
    tracking.track(outbox_db, "public", "lines")
    everything = [row["no"] for _, row in _wanted(outbox, outbox_db, "lines")]
    assert sorted(everything) == list(range(1, 501))
    outbox_db.execute("DELETE FROM entity_changes")
    later = _wanted(outbox, outbox_db, "lines", "--since", '"s,3",100,2026-01-01 00:00:00.1+00')
    assert [row["no"] for _, row in later] == everything[everything.index(101) :]


def test_a_key_of_a_domain_is_compared_as_the_type_below_it(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE DOMAIN kind AS mood")
    outbox_db.execute("CREATE TABLE kinds (k kind PRIMARY KEY); INSERT INTO kinds VALUES ('bad'), ('good')")
    tracking.track(outbox_db, "public", "kinds", key=["k"])
    assert [row["k"] for _, row in _wanted(outbox, outbox_db, "kinds", "--since", "good")] == ["good", "bad"]


def _wanted(dsn: str, db: psycopg.Connection, *arguments: str) -> list[tuple[Any, ...]]:
    backfilled(dsn, *arguments)
    return read(db)


def test_a_key_with_operators_of_two_schemas_is_gone_through_in_its_order(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE EXTENSION citext; CREATE TABLE seats (hall citext, place int, PRIMARY KEY (hall, place))")
    outbox_db.execute("INSERT INTO seats SELECT h, p FROM unnest('{B,a,C}'::text[]) AS h, generate_series(1, 90) AS p")
    tracking.track(outbox_db, "public", "seats", entity_type="seat")
    assert backfilled(outbox, "seats", "--since", "A,81")["written"] == 10 + 90 + 90
    places = [f'["{hall}", {place}]' for hall in "aBC" for place in range(1, 91)]
    assert [key for key, _ in read(outbox_db)] == places[80:]


@pytest.mark.parametrize("rate", ["5000", "5e3/s", "5000.0/s"])
def test_a_rate_is_kept_for_whoever_resumes_it(outbox: str, outbox_db: psycopg.Connection, rate: str) -> None:
    orders(outbox_db, 10)
    found = backfilled(outbox, "orders", "--rate", rate)
    assert (found["rate"], found["written"]) == (5_000, 10)


def test_names_of_any_kind_are_read(database: str, db: psycopg.Connection) -> None:
    schema, table, column = 'out\'s "@schema@" %s', 'my "table" %s', 'my "table" %s'
    migrations.install(db, schema)
    name = sql.Identifier("public", table)
    db.execute(sql.SQL("CREATE TABLE {} ({} int PRIMARY KEY)").format(name, sql.Identifier(column)))
    db.execute(sql.SQL("INSERT INTO {} SELECT generate_series(1, 60)").format(name))
    done(database, "track", sql.Identifier(table).as_string(), "--schema", schema)
    found = backfilled(database, sql.Identifier(table).as_string(), "--schema", schema)
    assert found["written"] == 60
    assert read(db, schema) == [(str(n), {column: n}) for n in range(1, 61)]


@pytest.mark.parametrize("implicit", [False, True])
def test_the_role_that_reads_runs_no_code_of_the_tables_owner(
    outbox: str, outbox_db: psycopg.Connection, implicit: bool
) -> None:
    outbox_db.execute(
        "CREATE ROLE mallory; CREATE SCHEMA theirs AUTHORIZATION mallory; CREATE TABLE said (by text);"
        "GRANT INSERT ON said TO PUBLIC; SET ROLE mallory; SET search_path = theirs, public;"
        "CREATE TYPE mood AS ENUM ('x');"
        "CREATE FUNCTION spell(mood) RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        "  INSERT INTO public.said VALUES (current_user); RETURN 'x'; END $$;"
        "CREATE FUNCTION as_json(mood) RETURNS json LANGUAGE plpgsql AS $$ BEGIN"
        "  INSERT INTO public.said VALUES (current_user); RETURN '\"y\"'; END $$;"
        "CREATE CAST (mood AS text) WITH FUNCTION spell(mood) AS ASSIGNMENT;"
        "CREATE CAST (mood AS json) WITH FUNCTION as_json(mood);"
        "CREATE TABLE orders (id mood PRIMARY KEY, c mood); INSERT INTO orders VALUES ('x', 'x');"
        "RESET ROLE; RESET search_path"
    )
    if implicit:
        outbox_db.execute("UPDATE pg_cast SET castcontext = 'i' WHERE castsource = 'theirs.mood'::regtype"
                          " AND casttarget = 'text'::regtype")  # fmt: skip
    tracking.track(outbox_db, "public", "theirs.orders")
    if implicit:
        refused = invoke(outbox, "backfill", "theirs.orders")
        assert (refused.exit_code, "cannot be compared" in refused.output) == (5, True)
    else:
        backfilled(outbox, "theirs.orders")
    assert outbox_db.execute("SELECT * FROM said").fetchall() == []
    omitted = {"cdc:omitted": "cannot be JSON: 25006"}
    assert read(outbox_db) == ([] if implicit else [(json.dumps(omitted), {"id": omitted, "c": omitted})])
    outbox_db.execute("DROP SCHEMA theirs CASCADE; DROP TABLE said; DROP ROLE mallory")


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G3")
def test_of_a_read_and_a_change_of_its_row_the_later_one_has_the_newer_data(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    """Writers insert, update, delete and move keys meanwhile; each write counts up the row's version."""
    outbox_db.execute("CREATE TABLE rows (id int PRIMARY KEY, version bigint); CREATE SEQUENCE versions")
    outbox_db.execute("INSERT INTO rows SELECT n * 2, 0 FROM generate_series(1, 1500) AS n")
    tracking.track(outbox_db, "public", "rows")
    stop, failures = threading.Event(), list[Exception]()

    def write(seed: int) -> None:
        with psycopg.connect(outbox, autocommit=True) as connection:
            connection.execute("SELECT setseed(%s)", [seed / 10])
            while not stop.is_set():
                try:
                    connection.execute(_WRITES)
                except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                    continue
                except Exception as error:
                    failures.append(error)
                    return

    writers = [threading.Thread(target=write, args=[n]) for n in range(3)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(2):
            backfilled(outbox, "rows")
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert failures == []
    _judge(outbox_db)


_WRITES = """
DO $$
DECLARE v_id int := 1 + floor(random() * 3000); v_kind int := floor(random() * 4);
BEGIN
  IF v_kind = 0 THEN INSERT INTO rows VALUES (v_id, nextval('versions')) ON CONFLICT DO NOTHING;
  ELSIF v_kind = 1 THEN DELETE FROM rows WHERE id = v_id;
  ELSIF v_kind = 2 THEN UPDATE rows SET id = 1 + floor(random() * 3000), version = nextval('versions') WHERE id = v_id;
  ELSE UPDATE rows SET version = nextval('versions') WHERE id BETWEEN v_id AND v_id + 20; END IF;
  PERFORM pg_sleep(random() * 0.002);
END $$
"""


def _judge(db: psycopg.Connection) -> None:
    """For each key: a READ repeats what the change before it said; the last change is the table's row."""
    rows: dict[str, Any] = {str(2 * n): {"id": 2 * n, "version": 0} for n in range(1, 1_501)}
    changes = db.execute("SELECT entity_id, operation, new_data FROM entity_changes ORDER BY seq").fetchall()
    reads = 0
    for key, operation, new in changes:
        if operation == "READ":
            reads += 1
            assert rows.get(key) == new, f"a READ of {key} has {new}, after {rows.get(key)}"
        rows[key] = new
    assert reads > 2_000
    assert {operation for _, operation, _ in changes} == {"READ", "INSERT", "UPDATE", "DELETE"}
    left = {str(id_): {"id": id_, "version": version} for id_, version in db.execute("SELECT * FROM rows").fetchall()}
    assert {key: row for key, row in rows.items() if row} == left


def test_it_waits_for_a_locked_row_holding_no_other_and_nobody_is_ended_for_a_deadlock(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    orders(outbox_db, 20)
    with psycopg.connect(outbox) as writer, closing(_connected(outbox)) as mine:
        writer.execute("UPDATE orders SET total = -1 WHERE id = 11")
        backfills = Backfills("public")
        steps = backfills.work(mine, backfills.start(mine, "orders"))
        for step in steps:
            if step.written == 10 and step.waits and step.waits.locked:
                break
        writer.execute("SET lock_timeout = '5s'; UPDATE orders SET total = -1")
        writer.commit()
        for step in steps:
            assert step.state in ("running", "done")
    assert [row["total"] for _, row in read(outbox_db)] == [*range(1, 11), *[-1] * 10]


def _connected(dsn: str) -> psycopg.Connection:
    return connect(dsn, application_name="test", user_path=True)


# --- pace ----------------------------------------------------------------------------------------------------------


def test_it_writes_no_more_than_its_backlog_while_nothing_is_handled(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    orders(outbox_db, 500)
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        steps = backfills.work(mine, backfills.start(mine, "orders", backlog=30))
        for written in (30, 60, 90):
            step = next(each for each in steps if each.waits and each.waits.backlog)
            assert (step.written, step.unsettled) == (written, 30)
            outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now() WHERE NOT processed")
        assert next(each for each in steps if each.waits and each.waits.backlog).written == 120
        outbox_db.execute("UPDATE entity_changes SET next_attempt_at = now() WHERE NOT processed")
        assert all(step.written == 120 for step, _ in zip(steps, range(3), strict=False)), "what fails stops it"
        outbox_db.execute("UPDATE entity_changes SET dead_at = now(), next_attempt_at = NULL WHERE NOT processed")
        assert next(each for each in steps if not each.waits).written == 132


def test_its_memory_does_not_depend_on_how_many_rows_there_are(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 40_000)
    backfills, peaks = Backfills("public"), list[int]()
    with closing(_connected(outbox)) as mine:
        for condition in ("id <= 4000", None):
            begun = backfills.start(mine, "orders", condition=condition, backlog=1_000)
            tracemalloc.start()
            for step in backfills.work(mine, begun):
                if step.waits:
                    outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now()"
                                      " WHERE NOT processed")  # fmt: skip
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert len(read(outbox_db)) == 44_000
    assert peaks[1] < peaks[0] + 200_000


def test_a_page_holds_no_more_bytes_than_its_bound_and_one_row_always_fits(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE files (id int PRIMARY KEY, content text)")
    outbox_db.execute("ALTER TABLE files ALTER content SET STORAGE EXTERNAL")
    outbox_db.execute("INSERT INTO files SELECT n, repeat('x', CASE n WHEN 4 THEN 6 ELSE 1 END << 20)"
                      " FROM generate_series(1, 9) AS n")  # fmt: skip
    tracking.track(outbox_db, "public", "files", entity_type="file")
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        begun = backfills.start(mine, "files", backlog=1_000)
        written = [step.written for step in backfills.work(mine, begun)]
    assert list(dict.fromkeys(written)) == [3, 4, 7, 9], "below 4 MB; the one of 6 MB alone"


async def test_a_consumer_handles_the_rows_as_reads_in_order_with_what_is_written(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    orders(outbox_db, 200)
    backfilled(outbox, "orders")
    outbox_db.execute("UPDATE orders SET total = -1 WHERE id <= 50")
    router, seen = cdc.Router(), dict[str, list[Any]]()

    @router.on("order", "READ")
    async def load(change: cdc.Change) -> None:
        assert change.old is None
        assert change.metadata is not None
        seen.setdefault(change.entity_id, []).append(change.new["total"])

    @router.on("order", "UPDATE")
    async def follow(change: cdc.Change) -> None:
        seen.setdefault(change.entity_id, []).append(change.new["total"])

    drained = await testing.drain(outbox, router)
    assert drained.processed == 250
    assert seen == {str(n): [n, -1] if n <= 50 else [n] for n in range(1, 201)}


# --- stopped and resumed -------------------------------------------------------------------------------------------


@pytest.fixture
def started(outbox: str, outbox_db: psycopg.Connection, tmp_path: Path) -> Iterator[Forked]:
    """A backfill of 500 rows that waits, since nothing is handled."""
    orders(outbox_db, 500)
    process = _started(outbox, tmp_path, "orders")
    eventually(lambda: len(read(outbox_db)) == BACKLOG, what="it waits for its backlog")
    yield process
    process.kill()
    process.wait()


def _started(dsn: str, tmp_path: Path, *arguments: str) -> Forked:
    log = tmp_path / "backfill.log"
    log.touch()
    environment = {**os.environ, "CDC_DSN": dsn}
    return Forked("cdc", ["backfill", *arguments], cwd=ROOT, environment=environment, log=log)


def _states(dsn: str) -> list[str]:
    found = json.loads(invoke(dsn, "backfill", "status", "--json").stdout)["backfills"]
    return [each["state"] for each in found]


def test_on_a_terminal_a_bar_says_how_far_it_is(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 2 * BACKLOG)
    outbox_db.execute("ANALYZE orders")
    terminal, inner = os.openpty()
    command = [sys.executable, "-m", "cdc", "backfill", "orders", "--dsn", outbox]
    with subprocess.Popen(command, stderr=inner, cwd=ROOT) as process, os.fdopen(terminal, "rb", buffering=0) as shown:
        os.close(inner)
        said = b""
        while b"[############............] 50% 100 of about 200" not in said:
            said += shown.read(1_000)
        process.terminate()
    assert b"\r\x1b[K" in said


def test_killed_it_is_resumed_where_it_was(outbox: str, outbox_db: psycopg.Connection, started: Forked) -> None:
    assert _states(outbox) == ["running"]
    started.kill()
    started.wait()
    eventually(lambda: _states(outbox) == ["interrupted"], what="the server has noticed")
    refused = invoke(outbox, "backfill", "orders")
    assert refused.exit_code == 5
    assert "cdc backfill resume 1" in refused.output
    assert backfilled(outbox, "resume", "orders")["state"] == "done"
    assert [key for key, _ in read(outbox_db)] == [str(n) for n in range(1, 501)]
    assert invoke(outbox, "backfill", "resume", "1").exit_code == 5


def test_it_is_paused_from_elsewhere_and_one_session_works_on_it(
    outbox: str, outbox_db: psycopg.Connection, started: Forked
) -> None:
    twice = invoke(outbox, "backfill", "resume", "1")
    assert twice.exit_code == 5
    assert "another session works on" in twice.output
    done(outbox, "backfill", "pause", "1")
    assert started.wait(30) == 0
    assert _states(outbox) == ["paused"]
    assert invoke(outbox, "backfill", "pause", "1").exit_code == 5
    assert backfilled(outbox, "resume", "1")["written"] == 500
    assert len(read(outbox_db)) == 500


def test_cancelled_it_ends_and_another_may_begin(outbox: str, outbox_db: psycopg.Connection, started: Forked) -> None:
    done(outbox, "backfill", "cancel", "orders")
    assert started.wait(30) == 0
    assert len(read(outbox_db)) == BACKLOG
    assert invoke(outbox, "backfill", "resume", "1").exit_code == 5
    assert backfilled(outbox, "orders")["written"] == 500
    assert _states(outbox) == ["done", "cancelled"]


def test_ctrl_c_ends_it_and_says_nothing_that_is_wrong(outbox: str, started: Forked, tmp_path: Path) -> None:
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    said = (tmp_path / "backfill.log").read_text()
    assert "if it is interrupted: cdc backfill resume 1" in said
    assert "Traceback" not in said
    eventually(lambda: _states(outbox) == ["interrupted"], what="the session has ended")


def test_what_is_excluded_meanwhile_is_not_read_any_more(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 100)
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        steps = backfills.work(mine, backfills.start(mine, "orders"))
        assert next(steps).written == 40
        tracking.track(outbox_db, "public", "orders", exclude=["card"])
        next(steps)
    assert [("card" in row) for _, row in read(outbox_db)] == [True] * 40 + [False] * 40


def test_rows_that_come_after_the_start_are_captured_and_not_read(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 60)
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        begun = backfills.start(mine, "orders", backlog=1_000)
        outbox_db.execute(
            "INSERT INTO orders SELECT n FROM generate_series(61, 90) AS n; DELETE FROM orders WHERE id = 5"
        )
        assert [step.state for step in backfills.work(mine, begun)][-1] == "done"
    assert [key for key, _ in read(outbox_db)] == [str(n) for n in range(1, 61) if n != 5]


# --- refused -------------------------------------------------------------------------------------------------------

_ANOTHER = "CREATE TRIGGER another AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION capture_entity_change('other')"
_REFUSED: list[tuple[str, tuple[str, ...], int, str]] = [
    ("", ("nothing",), 4, "there is no table nothing"),
    ("CREATE TABLE t (id int PRIMARY KEY)", ("t",), 5, "not tracked"),
    ("CREATE TABLE t (id int); {track}", ("t",), 5, "no primary key"),
    ("CREATE TABLE t (id int4range PRIMARY KEY); {track}", ("t",), 5, "of type int4range"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--where", "nope = 1"), 2, "--where does not fit t"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--where", "id = 1 OR"), 2, "--where does not fit t"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--where", "true) OR (true"), 2, "--where does not fit t"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--where", ""), 2, "--where does not fit t"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--since", "x"), 2, "--since does not fit t"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--since", "1,2"), 2, "has 1 columns"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--rate", "-1"), 2, "expected rows a second"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}", ("t", "--rate", "nan/s"), 2, "expected rows a second"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}; " + _ANOTHER, ("t",), 5, "captured by another and c, which differ"),
    ("CREATE TABLE t (id int PRIMARY KEY); {track}; ALTER TABLE t DISABLE TRIGGER ALL", ("t",), 5, "disabled"),
]  # fmt: skip
_TRACK = (
    "CREATE TRIGGER c AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION capture_entity_change('t', '{\"key\": [\"id\"]}')"
)


@pytest.mark.parametrize("case", _REFUSED)
def test_what_cannot_be_read_is_refused_with_a_sentence(
    outbox: str, outbox_db: psycopg.Connection, case: tuple[str, tuple[str, ...], int, str]
) -> None:
    made, arguments, code, said = case
    outbox_db.execute(made.replace("{track}", _TRACK).encode())
    result = invoke(outbox, "backfill", *arguments)
    assert (result.exit_code, said in " ".join(result.output.split())) == (code, True), result.output
    assert _states(outbox) == []


def test_an_operator_needs_no_more_than_the_documented_rights_and_is_refused_what_policies_hide(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    orders(outbox_db, 10)
    outbox_db.execute("CREATE ROLE ops LOGIN")
    mine = make_conninfo(outbox, user="ops")
    try:
        assert invoke(mine, "backfill", "orders").exit_code == 5
        for block in (ROOT / "docs/operations/roles.md").read_text("utf-8").split("```sql\n")[1:]:
            script = block.partition("```")[0]
            if "cdc_backfills" in script:
                outbox_db.execute(
                    script.replace("events.", "public.").replace("SCHEMA events", "SCHEMA public").encode()
                )
        refused = invoke(mine, "backfill", "orders")
        assert refused.exit_code == 5
        assert "GRANT SELECT, UPDATE" in refused.output
        outbox_db.execute("GRANT SELECT, UPDATE (total) ON orders TO ops")
        assert backfilled(mine, "orders")["written"] == 10
        outbox_db.execute("ALTER TABLE orders ENABLE ROW LEVEL SECURITY; CREATE POLICY half ON orders USING (id > 5)")
        refused = invoke(mine, "backfill", "orders")
        assert refused.exit_code == 5
        assert "only some rows" in refused.output
    finally:
        outbox_db.execute("DROP OWNED BY ops; DROP ROLE ops")


def test_a_condition_of_another_role_does_not_run_with_ones_own_rights(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    orders(outbox_db, 10)
    with closing(_connected(outbox)) as mine:
        Backfills("public").start(mine, "orders")
    outbox_db.execute("UPDATE cdc_backfills SET condition = 'total > 5', started_by = 'mallory'")
    done(outbox, "backfill", "pause", "1")
    for options in ([], ["--where", "true"], ["--where", "total > 5 OR true"]):
        refused = invoke(outbox, "backfill", "resume", "1", *options)
        assert refused.exit_code == 5
        assert "has a condition of mallory" in " ".join(refused.output.split())
    assert _states(outbox) == ["paused"]
    assert backfilled(outbox, "resume", "1", "--where", "total > 5")["written"] == 5


def test_a_table_that_is_untracked_meanwhile_is_read_no_further(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 100)
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        steps = backfills.work(mine, backfills.start(mine, "orders", backlog=125))
        next(steps)
        tracking.untrack(outbox_db, "public", "orders")
        with pytest.raises(RefusedError, match="not tracked"):
            next(steps)
    assert len(read(outbox_db)) == 50


@pytest.mark.parametrize(
    "meanwhile", ["DROP COLUMN card", "ADD COLUMN note text", "ALTER COLUMN card TYPE int USING 1"]
)
def test_columns_that_change_meanwhile_are_read_as_they_are(
    outbox: str, outbox_db: psycopg.Connection, meanwhile: str
) -> None:
    orders(outbox_db, 100)
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        steps = backfills.work(mine, backfills.start(mine, "orders", backlog=125))
        next(steps)
        outbox_db.execute(f"ALTER TABLE orders {meanwhile}".encode())
        assert [step.written for step in steps][-1] == 100
    (columns,) = outbox_db.execute("SELECT to_jsonb(orders) FROM orders WHERE id = 100").fetchone() or ({},)
    assert read(outbox_db)[-1] == ("100", columns)
    assert len(read(outbox_db)) == 100


@pytest.mark.parametrize(
    ("meanwhile", "error", "said"),
    [
        ("ALTER TABLE orders DROP COLUMN total", RefusedError, "cannot go on: --where does not fit public.orders"),
        ("ALTER TABLE orders RENAME TO older", NotFoundError, "there is no table public.orders"),
        ("DROP TABLE orders", NotFoundError, "there is no table public.orders"),
        ("ALTER TABLE orders RENAME COLUMN id TO number", RefusedError, "there is no column id"),
    ],
)
def test_a_table_that_changes_meanwhile_is_told_from_an_outbox_that_does_not_fit(
    outbox: str, outbox_db: psycopg.Connection, meanwhile: str, error: type[CdcError], said: str
) -> None:
    orders(outbox_db, 100)
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        begun = backfills.start(mine, "orders", condition="total > 0", backlog=125)
        steps = backfills.work(mine, begun)
        next(steps)
        outbox_db.execute(meanwhile.encode())
        with pytest.raises(error, match=said):
            next(steps)
        with pytest.raises(error, match=said):
            next(backfills.work(mine, begun))


def test_what_a_condition_raises_is_not_said_as_it_may_be_a_row(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 3)
    outbox_db.execute("CREATE FUNCTION odd(int) RETURNS bool LANGUAGE plpgsql AS"
                      " $$ BEGIN RAISE EXCEPTION 'secret %', $1; END $$")  # fmt: skip
    result = invoke(outbox, "backfill", "orders", "--where", "odd(total)")
    assert "cannot read a row: P0001" in result.output
    assert "secret" not in result.output


def test_another_table_that_takes_its_name_meanwhile_is_not_read(outbox: str, outbox_db: psycopg.Connection) -> None:
    orders(outbox_db, 100)
    outbox_db.execute("CREATE TABLE newer (LIKE orders INCLUDING ALL); INSERT INTO newer SELECT * FROM orders")
    tracking.track(outbox_db, "public", "newer", exclude=["card"])
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        steps = backfills.work(mine, backfills.start(mine, "orders", backlog=125))
        next(steps)
        outbox_db.execute("BEGIN; ALTER TABLE orders RENAME TO older; ALTER TABLE newer RENAME TO orders; COMMIT")
        with pytest.raises(RefusedError, match="not tracked"):
            next(steps)
    assert len(read(outbox_db)) == 50


@pytest.mark.parametrize(
    "change",
    ['ALTER TABLE words ALTER word TYPE text COLLATE "und-x-icu"', "ALTER TABLE words ALTER word TYPE varchar(9)"],
)
def test_a_key_that_is_ordered_otherwise_meanwhile_is_read_no_further(
    outbox: str, outbox_db: psycopg.Connection, change: str
) -> None:
    """In another order the rows behind the last page are others, and some would never be read."""
    outbox_db.execute('CREATE TABLE words (word text COLLATE "C" PRIMARY KEY)')
    outbox_db.execute("INSERT INTO words SELECT chr(64 + n % 2 * 32 + n / 2) || n FROM generate_series(2, 50) AS n")
    invoke(outbox, "track", "words")
    backfills = Backfills("public")
    with closing(_connected(outbox)) as mine:
        begun = backfills.start(mine, "words")
        steps = backfills.work(mine, begun)
        next(steps)
        outbox_db.execute(change.encode())
        with pytest.raises(RefusedError, match="primary key"):
            for _ in steps:
                pass
    refused = invoke(outbox, "backfill", "resume", "words")
    assert refused.exit_code == 5
    assert "cdc backfill cancel 1; cdc backfill" in " ".join(refused.output.split())
