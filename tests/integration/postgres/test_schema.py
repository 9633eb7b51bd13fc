"""Install, verify, print and uninstall on a real server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc
from cdc.core.errors import NotFoundError, RefusedError, SchemaError
from cdc.postgres import migration_scripts, migrations
from tests import servers
from tests.commands import invoke
from tests.eventually import eventually

ODD = 'Tenant "7" %s; it\'s é'


@contextmanager
def transaction_on(dsn: str, statement: str) -> Iterator[psycopg.Connection]:
    """Another session with a transaction open after ``statement``."""
    with psycopg.connect(dsn) as other:
        other.execute(statement.encode())
        yield other
        other.rollback()


def columns(db: psycopg.Connection, name: str) -> list[str]:
    return [
        column for (column,) in db.execute(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped"
            " ORDER BY attnum", [name])
    ]  # fmt: skip


def test_install_makes_every_documented_object_and_the_additions(db: psycopg.Connection):
    assert migrations.install(db, "public") == migration_scripts.migrations()
    assert set(columns(db, "entity_changes")) == {
        "id", "table_name", "operation", "entity_id", "entity_type", "old_data", "new_data", "metadata", "changed_at",
        "processed", "processed_at", "error_count", "last_error",
        "seq", "shard", "table_schema", "next_attempt_at", "dead_at", "started_by", "caused_by", "depth",
        "error_summary", "error_kind", "replay_of", "subscription",
    }  # fmt: skip
    assert columns(db, "action_processing_dashboard") == [
        "entity_type", "pending", "processed_today", "failed", "last_processed_at", "avg_processing_seconds",
    ]  # fmt: skip
    assert columns(db, "recent_action_history") == [
        "id", "entity_type", "operation", "changed_at", "processed", "processed_at", "processing_delay_seconds",
        "error_count", "last_error", "preview",
    ]  # fmt: skip
    untimed = "SELECT count(*) FROM information_schema.columns WHERE table_name IN ('entity_changes',"
    untimed += " 'recent_action_history', 'action_processing_dashboard') AND data_type = 'timestamp without time zone'"
    assert db.execute(untimed.encode()).fetchone() == (0,)
    assert migrations.verify(db, "public") == []


def test_install_again_changes_nothing_and_says_so(outbox_db: psycopg.Connection, outbox: str):
    before = outbox_db.execute("SELECT xmin, oid, relfilenode FROM pg_class ORDER BY oid").fetchall()
    assert migrations.install(outbox_db, "public") == []
    assert outbox_db.execute("SELECT xmin, oid, relfilenode FROM pg_class ORDER BY oid").fetchall() == before
    again = invoke(outbox, "db", "install")
    assert (again.exit_code, again.stdout) == (0, "")
    assert "up to date already" in again.stderr


@pytest.mark.parametrize("name", ["tenant", "Tenant", "entity_changes", "change", ODD, "@schema_literal@"])
def test_any_schema_name_works_and_is_created_when_missing(db: psycopg.Connection, name: str):
    migrations.install(db, name)
    assert migrations.verify(db, name) == []
    assert migrations.upgrade(db, name) == ([], [])
    migrations.uninstall(db, name)
    assert migrations.install(db, name) != []


def test_two_outboxes_in_one_database_do_not_wake_each_other(outbox_db: psycopg.Connection):
    migrations.install(outbox_db, ODD)
    bodies = outbox_db.execute("SELECT prosrc FROM pg_proc WHERE proname = 'publish_change'").fetchall()
    prefixes = {re.findall(r"'(entity_change:[^']*)'", body)[0] for (body,) in bodies}
    assert prefixes == {"entity_change:public", "entity_change:Tenant%20%227%22%20%25s%3B%20it%27s%20%C3%A9"}
    assert migrations.verify(outbox_db, ODD) == []


def test_a_schema_somebody_else_made_needs_no_right_to_create_one(database: str, db: psycopg.Connection):
    db.execute("CREATE ROLE plain_owner LOGIN")
    db.execute("CREATE SCHEMA owned AUTHORIZATION plain_owner")
    try:
        with psycopg.connect(make_conninfo(database, user="plain_owner"), autocommit=True) as owner:
            migrations.install(owner, "owned")
            assert migrations.verify(owner, "owned") == []
            with pytest.raises(SchemaError, match="permission denied"):
                migrations.install(owner, "another")
    finally:
        db.execute("DROP OWNED BY plain_owner CASCADE")
        db.execute("DROP ROLE plain_owner")


def test_two_installations_at_once_make_one(database: str, db: psycopg.Connection):
    applied: list[int] = []
    failures: list[Exception] = []

    def one() -> None:
        try:
            with psycopg.connect(database, autocommit=True) as connection:
                applied.append(len(migrations.install(connection, "both")))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(applied) == [0, 0, 0, len(migration_scripts.migrations())]
    assert migrations.verify(db, "both") == []


def test_an_installation_that_fails_in_the_middle_leaves_nothing(db: psycopg.Connection):
    db.execute("CREATE TABLE action_processing_dashboard (mine int)")
    with pytest.raises(SchemaError, match="not a view") as failure:
        migrations.install(db, "public")
    assert failure.value.hint
    assert db.execute("SELECT to_regclass('entity_changes'), to_regclass('cdc_migrations')").fetchone() == (None, None)


def test_a_crash_between_two_migrations_leaves_nothing(database: str, db: psycopg.Connection):
    crash = (
        "import os, signal, sys; from cdc.core import failpoints; from cdc.postgres import connect, migrations;"
        "seen = [];"
        "failpoints.install(lambda name: seen.append(name) or len(seen) < 3 or os.kill(os.getpid(), signal.SIGKILL));"
        "migrations.install(connect.connect(sys.argv[1], application_name='crash'), 'public')"
    )
    ended = subprocess.run([sys.executable, "-c", crash, database], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert db.execute("SELECT to_regclass('entity_changes'), to_regclass('cdc_migrations')").fetchone() == (None, None)
    assert migrations.install(db, "public") == migration_scripts.migrations()


def test_a_table_that_stays_locked_ends_the_upgrade_with_a_sentence(
    database: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(migration_scripts, "LOCK_TIMEOUT", "50ms")
    migrations.install(db, "public")
    db.execute("DELETE FROM cdc_migrations")
    with (
        transaction_on(
            database, "INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('t', 'INSERT', 1)"
        ),
        pytest.raises(SchemaError, match="stayed locked") as failure,
    ):
        migrations.install(db, "public")
    assert "pg_stat_activity" in failure.value.hint


def test_a_schema_newer_than_the_program_is_left_alone(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("INSERT INTO cdc_migrations (version, name) VALUES (999, 'later')")
    for command in ("install", "upgrade"):
        refused = invoke(outbox, "db", command)
        assert refused.exit_code == 1
        assert "version 999" in refused.stderr


def test_every_migration_may_run_again_over_rows(outbox_db: psycopg.Connection):
    outbox_db.execute("SELECT publish_change('t', i::text) FROM generate_series(1, 10) AS i")
    before = outbox_db.execute("SELECT * FROM entity_changes ORDER BY seq").fetchall()
    outbox_db.execute("DELETE FROM cdc_migrations")
    assert migrations.install(outbox_db, "public") == migration_scripts.migrations()
    assert outbox_db.execute("SELECT * FROM entity_changes ORDER BY seq").fetchall() == before
    assert outbox_db.execute("SELECT publish_change('t', '11')").fetchone() == (11,)
    assert migrations.verify(outbox_db, "public") == []


# What somebody did, and what verify says then; after a CASCADE it also says what else went.
DRIFT: tuple[tuple[str, set[str]], ...] = (
    ("DROP TABLE entity_changes CASCADE", {"table entity_changes is missing"}),
    ("DROP VIEW recent_action_history", {"view recent_action_history is missing"}),
    ("DROP FUNCTION reprocess_failed_actions", {"function reprocess_failed_actions(text, integer) is missing"}),
    (
        "ALTER TABLE entity_changes DROP COLUMN table_schema",
        {"column table_schema of table entity_changes is missing"},
    ),
    ("ALTER TABLE entity_changes ALTER metadata TYPE json", {"column metadata of table entity_changes is different"}),
    (
        "ALTER TABLE entity_changes ALTER processed DROP NOT NULL",
        {"column processed of table entity_changes is different"},
    ),
    (
        "ALTER TABLE entity_changes ALTER changed_at DROP DEFAULT",
        {"column changed_at of table entity_changes is different"},
    ),
    ("ALTER TABLE entity_changes ALTER shard DROP NOT NULL", {"column shard of table entity_changes is different"}),
    ("DROP TRIGGER fill_shard ON entity_changes", {"trigger fill_shard of table entity_changes is missing"}),
    (
        "ALTER TABLE entity_changes ALTER seq SET GENERATED BY DEFAULT",
        {"column seq of table entity_changes is different"},
    ),
    ("ALTER SEQUENCE entity_changes_seq_seq CACHE 20", {"counting of sequence entity_changes_seq_seq is different"}),
    (
        "ALTER TABLE entity_changes DROP CONSTRAINT entity_changes_pkey",
        {
            "constraint entity_changes_pkey of table entity_changes is missing",
            "index entity_changes_pkey of table entity_changes is missing",
        },
    ),
    ("DROP INDEX entity_changes_failed", {"index entity_changes_failed of table entity_changes is missing"}),
    (
        "DROP INDEX entity_changes_fresh; CREATE INDEX entity_changes_fresh ON entity_changes (shard, seq)",
        {"index entity_changes_fresh of table entity_changes is different"},
    ),
    (
        "ALTER TABLE entity_changes RESET (autovacuum_vacuum_threshold)",
        {"setting autovacuum_vacuum_threshold of table entity_changes is missing"},
    ),
    (
        "ALTER TABLE entity_changes SET UNLOGGED",
        {
            "sequence entity_changes_seq_seq is different",
            "table entity_changes is different",
        },
    ),
    (
        "ALTER FUNCTION capture_entity_change() SECURITY INVOKER",
        {"security of function capture_entity_change() is different"},
    ),
    (
        "ALTER FUNCTION capture_entity_change() RESET search_path",
        {"settings of function capture_entity_change() is different"},
    ),
    (
        "GRANT EXECUTE ON FUNCTION capture_entity_change() TO PUBLIC",
        {"PUBLIC rights of function capture_entity_change() is different"},
    ),
    ("GRANT SELECT ON entity_changes TO PUBLIC", {"PUBLIC rights of table entity_changes is different"}),
    (
        "CREATE OR REPLACE FUNCTION capture_entity_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
        {
            "security of function capture_entity_change() is different",
            "settings of function capture_entity_change() is different",
            "body of function capture_entity_change() is different",
        },
    ),
    (
        "CREATE OR REPLACE VIEW recent_action_history AS SELECT r.* FROM recent_action_history AS r LIMIT 0",
        {"query of view recent_action_history is different"},
    ),
    (
        "ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY",
        {"row-level security of table entity_changes is different"},
    ),
    ("CREATE POLICY mine ON cdc_shards USING (true)", {"policy mine of table cdc_shards is not ours"}),
    (
        "CREATE RULE quiet AS ON DELETE TO entity_changes DO INSTEAD NOTHING",
        {"rule quiet of table entity_changes is not ours"},
    ),
    (
        "CREATE TRIGGER echo AFTER UPDATE ON entity_changes EXECUTE FUNCTION capture_entity_change()",
        {"trigger echo of table entity_changes is not ours"},
    ),
)


@pytest.mark.parametrize(("drift", "findings"), DRIFT, ids=[drift[:60] for drift, _ in DRIFT])
def test_verify_names_what_is_missing_or_different(outbox_db: psycopg.Connection, drift: str, findings: set[str]):
    if "UNLOGGED" in drift and outbox_db.info.server_version < 150000:
        pytest.skip("sequences are unlogged with their table from 15 on")
    outbox_db.execute(drift.encode())
    found = {f"{finding.object} is {finding.problem}" for finding in migrations.verify(outbox_db, "public")}
    assert findings <= found
    assert found == findings or "CASCADE" in drift


def test_a_finding_says_what_is_different_where_that_is_short(outbox_db: psycopg.Connection):
    outbox_db.execute("ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY")
    [rules] = migrations.verify(outbox_db, "public")
    assert str(rules) == "row-level security of table entity_changes is different: on, not off"


def test_verify_leaves_no_trace_and_sees_nothing_but_our_objects(outbox_db: psycopg.Connection):
    outbox_db.execute(
        "CREATE TABLE mine (id int); CREATE VIEW yours AS SELECT 1; CREATE INDEX ON entity_changes (table_name)"
    )
    before = outbox_db.execute("SELECT oid FROM pg_class WHERE relkind <> 't' ORDER BY 1").fetchall()
    assert migrations.verify(outbox_db, "public") == []
    assert outbox_db.execute("SELECT oid FROM pg_class WHERE relkind <> 't' ORDER BY 1").fetchall() == before


def test_verify_needs_no_right_on_the_objects(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE ROLE onlooker LOGIN")
    try:
        with psycopg.connect(make_conninfo(outbox, user="onlooker"), autocommit=True) as onlooker:
            assert migrations.verify(onlooker, "public") == []
    finally:
        outbox_db.execute("DROP ROLE onlooker")


def test_verify_on_the_command_line_prints_findings_and_exits_with_1(outbox: str, outbox_db: psycopg.Connection):
    fine = invoke(outbox, "db", "verify", "--json")
    whole = {"schema": 1, "schema_name": "public", "findings": [], "notes": []}
    assert (fine.exit_code, json.loads(fine.stdout)) == (0, whole)
    outbox_db.execute("DROP INDEX entity_changes_failed")
    broken = invoke(outbox, "db", "verify")
    assert broken.exit_code == 1
    assert "index entity_changes_failed of table entity_changes  missing" in broken.stdout
    found = json.loads(invoke(outbox, "db", "verify", "--json").stdout)["findings"]
    assert [(finding["object"], finding["problem"]) for finding in found] == [
        ("index entity_changes_failed of table entity_changes", "missing")
    ]


def test_upgrade_repairs_what_can_be_made_again(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("DROP INDEX entity_changes_failed")
    outbox_db.execute("ALTER FUNCTION capture_entity_change() SECURITY INVOKER")
    outbox_db.execute("GRANT ALL ON entity_changes TO PUBLIC")
    outbox_db.execute("DROP VIEW recent_action_history; CREATE VIEW recent_action_history AS SELECT 1 AS x")
    repaired = invoke(outbox, "db", "upgrade")
    assert repaired.exit_code == 0, repaired.stderr
    assert "repaired: index entity_changes_failed of table entity_changes is missing" in repaired.stderr
    assert migrations.verify(outbox_db, "public") == []


def test_upgrade_says_what_it_cannot_repair_and_exits_with_1(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("ALTER TABLE entity_changes ALTER error_count SET DEFAULT 7")
    left = invoke(outbox, "db", "upgrade")
    assert left.exit_code == 1
    assert "column error_count of table entity_changes is different" in left.stderr


def test_upgrade_of_nothing_is_an_error(database: str, db: psycopg.Connection):
    with pytest.raises(NotFoundError, match="no entity_changes"):
        migrations.upgrade(db, "public")
    assert invoke(database, "db", "upgrade").exit_code == 4


def test_a_dry_run_prints_the_sql_and_runs_nothing(database: str, db: psycopg.Connection):
    shown = invoke(database, "db", "install", "--dry-run")
    assert shown.exit_code == 0
    assert 'CREATE TABLE IF NOT EXISTS "public".entity_changes' in shown.stdout
    assert db.execute("SELECT to_regclass('entity_changes')").fetchone() == (None,)
    migrations.install(db, "public")
    assert invoke(database, "db", "install", "--dry-run").stdout == ""


@pytest.mark.parametrize("name", ["public", ODD])
def test_psql_runs_the_printed_script_as_it_is_any_number_of_times(database: str, db: psycopg.Connection, name: str):
    script = CliRunner().invoke(cdc, ["db", "print", "--schema", name], catch_exceptions=False).stdout
    for _ in range(2):
        subprocess.run([servers.program("psql"), "-X", "-q", database], input=script, text=True, check=True)
    assert migrations.install(db, name) == []
    assert migrations.verify(db, name) == []


def test_the_same_key_has_the_same_shard_and_keys_spread_over_all_of_them(outbox_db: psycopg.Connection):
    outbox_db.execute("SELECT publish_change('t', (i % 2000)::text) FROM generate_series(1, 4000) AS i")
    shards = "SELECT entity_id, count(DISTINCT shard), min(shard) FROM entity_changes GROUP BY entity_id"
    rows = outbox_db.execute(shards.encode()).fetchall()
    assert {count for _, count, _ in rows} == {1}
    assert {shard for *_, shard in rows} == set(range(64))


def test_uninstall_removes_triggers_and_objects_and_nothing_else(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute('CREATE TABLE "Mine" (id int)')
    outbox_db.execute('CREATE TRIGGER t AFTER INSERT ON "Mine" FOR EACH ROW EXECUTE FUNCTION capture_entity_change()')
    removed = invoke(outbox, "db", "uninstall", "--yes")
    assert removed.exit_code == 0, removed.stderr
    assert "trigger t on public.Mine" in removed.stderr
    outbox_db.execute('INSERT INTO "Mine" VALUES (1)')
    left = "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert outbox_db.execute(left.encode()).fetchall() == [("Mine",)]
    assert outbox_db.execute("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace").fetchone() == (
        0,
    )
    assert invoke(outbox, "db", "uninstall", "--yes").exit_code == 4


def test_uninstall_asks_off_a_terminal_for_yes(outbox: str, outbox_db: psycopg.Connection):
    refused = invoke(outbox, "db", "uninstall")
    assert refused.exit_code == 5
    assert "--yes" in refused.stderr
    assert migrations.verify(outbox_db, "public") == []


def test_uninstall_refuses_to_lose_unprocessed_changes_without_the_option(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE mine (id int)")
    outbox_db.execute("CREATE TRIGGER t AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION capture_entity_change()")
    outbox_db.execute("INSERT INTO mine VALUES (1)")
    with pytest.raises(RefusedError, match="1 changes are not processed"):
        migrations.uninstall(outbox_db, "public")
    outbox_db.execute("INSERT INTO mine VALUES (2)")
    assert outbox_db.execute("SELECT count(*) FROM entity_changes").fetchone() == (2,)
    assert invoke(outbox, "db", "uninstall", "--yes", "--discard-unprocessed").exit_code == 0


def test_uninstall_under_a_writer_waits_or_gives_up_but_never_deadlocks(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE mine (id int)")
    outbox_db.execute("CREATE TRIGGER t AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION capture_entity_change()")
    done: list[list[str]] = []

    def uninstall() -> None:
        with psycopg.connect(outbox, autocommit=True) as connection:
            done.append(migrations.uninstall(connection, "public", discard_unprocessed=True))

    with psycopg.connect(outbox) as writer:
        writer.execute("LOCK TABLE mine IN ROW EXCLUSIVE MODE")
        thread = threading.Thread(target=uninstall)
        thread.start()
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'mine'::regclass"
        eventually(lambda: outbox_db.execute(waits.encode()).fetchone() == (1,), what="uninstall waits for the writer")
        writer.execute("INSERT INTO mine VALUES (1)")
        writer.commit()
    thread.join()
    assert len(done) == 1


def test_both_views_read_the_indexes_and_not_the_history(outbox_db: psycopg.Connection):
    outbox_db.execute(
        "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type, changed_at, processed,"
        " processed_at) SELECT 't', 'INSERT', i::text, 'message', at, true, at"
        " FROM generate_series(1, 100000) AS i, LATERAL (SELECT now() - i * interval '1 minute' AS at) AS moment"
    )
    outbox_db.execute("SELECT publish_change('task', i::text) FROM generate_series(1, 100) AS i")
    outbox_db.execute("VACUUM ANALYZE entity_changes")
    for view in ("action_processing_dashboard", "recent_action_history"):
        plan = "\n".join(line for (line,) in outbox_db.execute(f"EXPLAIN SELECT * FROM {view}".encode()))
        assert "Seq Scan" not in plan, plan
        assert "entity_changes_processed" in plan


def test_the_dashboard_counts_what_is_not_processed_and_what_was_processed_today(outbox_db: psycopg.Connection):
    insert = (
        "INSERT INTO entity_changes (table_name, entity_type, operation, entity_id, changed_at, processed,"
        " processed_at, next_attempt_at, dead_at, error_count)"
        " VALUES ('tasks', %s, 'INSERT', '1', %s, %s, %s, %s, %s, %s)"
    )
    row = outbox_db.execute("SELECT now() - interval '2 days', now(), now() - interval '3 seconds'").fetchone()
    assert row is not None
    long_ago, now, just_before = row
    outbox_db.cursor().executemany(insert, [
        ("task", now, False, None, None, None, 0),
        (None, now, False, None, None, None, 0),
        ("task", now, False, None, now, None, 1),
        ("task", now, False, None, None, now, 3),
        ("task", now, False, None, "infinity", now, 3),
        ("task", just_before, True, now, None, None, 1),
        ("task", long_ago, True, long_ago, None, None, 0),
    ])  # fmt: skip
    found = outbox_db.execute("SELECT * FROM action_processing_dashboard ORDER BY entity_type").fetchall()
    assert found == [("task", 2, 1, 3, now, 3), ("tasks", 1, 0, 0, None, None)]


def test_the_history_shows_the_last_24_hours_newest_first_with_a_preview(outbox_db: psycopg.Connection):
    insert = (
        "INSERT INTO entity_changes (table_name, entity_type, operation, entity_id, new_data, changed_at, processed,"
        " processed_at) VALUES ('t', %s, 'INSERT', '1', %s, now() - %s::interval, %s, now())"
    )
    outbox_db.cursor().executemany(insert, [
        ("reaction", '{"reaction": "✅"}', "1 h", True),
        ("message", json.dumps({"content": "x" * 60}), "2 h", False),
        ("task", '{"title": "t"}', "3 h", True),
        ("task", '{"title": "t"}', "25 h", True),
        ("task", '{"title": "t"}', "25 h", False),
    ])  # fmt: skip
    found = outbox_db.execute(
        "SELECT entity_type, preview, processing_delay_seconds FROM recent_action_history"
    ).fetchall()
    assert [(kind, preview) for kind, preview, _ in found] == [
        ("reaction", "✅"),
        ("message", "x" * 50),
        ("task", None),
    ]
    assert found[0][2] == pytest.approx(3600, abs=1)


def test_reprocess_makes_dead_letters_due_now_counts_them_and_sends_a_wake_up(
    outbox: str, outbox_db: psycopg.Connection
):
    outbox_db.execute("SELECT publish_change('task', i::text) FROM generate_series(1, 4) AS i")
    outbox_db.execute("SELECT publish_change('message', '5')")
    outbox_db.execute(
        "UPDATE entity_changes SET dead_at = now(), error_count = 3, last_error = 'x' WHERE seq IN (1, 2, 5)"
    )
    outbox_db.execute("UPDATE entity_changes SET next_attempt_at = 'infinity' WHERE seq = 2")
    outbox_db.execute("UPDATE entity_changes SET dead_at = now(), error_count = 1 WHERE seq = 3")
    outbox_db.execute("LISTEN entity_change")
    assert outbox_db.execute("SELECT * FROM reprocess_failed_actions('task')").fetchall() == [(2,)]
    state = "SELECT seq, next_attempt_at <= now(), dead_at IS NOT NULL, error_count FROM entity_changes ORDER BY seq"
    assert outbox_db.execute(state.encode()).fetchall() == [
        (1, True, False, 0), (2, True, False, 0), (3, None, True, 1), (4, None, False, 0), (5, None, True, 3),
    ]  # fmt: skip
    assert [(sent.channel, sent.payload) for sent in outbox_db.notifies(timeout=5, stop_after=1)] == [
        ("entity_change", "")
    ]
    assert outbox_db.execute("SELECT requeued_count FROM reprocess_failed_actions(p_max_errors => 1)").fetchone() == (
        2,
    )
    assert outbox_db.execute("SELECT * FROM reprocess_failed_actions()").fetchone() == (0,)


def test_reprocess_takes_the_callers_rights(outbox: str, outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE ROLE nobody_special")
    try:
        outbox_db.execute("SET ROLE nobody_special")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            outbox_db.execute("SELECT * FROM reprocess_failed_actions()")
    finally:
        outbox_db.execute("RESET ROLE; DROP ROLE nobody_special")
