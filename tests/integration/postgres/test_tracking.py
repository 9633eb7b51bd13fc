"""cdc track, untrack, tracked on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.core.errors import CdcError, NotFoundError, RefusedError, UsageError
from cdc.core.model import Operation
from cdc.postgres import migrations, source_tables
from cdc.postgres.tracking import track, tracked, untrack
from tests.commands import invoke

pytestmark = pytest.mark.server


def captured(db: psycopg.Connection) -> list[tuple[str, str, str]]:
    return db.execute("SELECT entity_type, operation, entity_id FROM entity_changes ORDER BY seq").fetchall()


def triggers(db: psycopg.Connection) -> list[str]:
    """Without that of the outbox itself."""
    named = (
        "SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal AND tgparentid = 0"
        " AND tgrelid::regclass::text !~ 'entity_changes$' ORDER BY 1"
    )
    return [name for (name,) in db.execute(named.encode())]


@pytest.fixture
def tasks(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE tasks (id int PRIMARY KEY, title text, secret text)")
    return outbox_db


@pytest.fixture
def role(outbox_db: psycopg.Connection) -> Iterator[str]:
    outbox_db.execute("CREATE ROLE track_tester LOGIN")
    outbox_db.execute("GRANT USAGE ON SCHEMA public TO track_tester")
    yield "track_tester"
    outbox_db.execute("DROP OWNED BY track_tester CASCADE; DROP ROLE track_tester")


def test_a_tracked_table_is_captured_with_its_type_operations_and_exclusions(tasks: psycopg.Connection):
    done = track(tasks, "public", "tasks", entity_type="job", operations=[Operation.DELETE, Operation.INSERT],
                 exclude=["secret"])  # fmt: skip
    assert (done.changed, done.warnings) == (True, ())
    tasks.execute("INSERT INTO tasks VALUES (1, 'a', 'hidden'); UPDATE tasks SET title = 'b'; DELETE FROM tasks")
    assert captured(tasks) == [("job", "INSERT", "1"), ("job", "DELETE", "1")]
    assert "hidden" not in repr(tasks.execute("SELECT * FROM entity_changes").fetchall())


def test_without_options_all_operations_are_captured_by_id_under_the_documented_type(tasks: psycopg.Connection):
    assert track(tasks, "public", "tasks").tracked.key == ("id",)
    tasks.execute("INSERT INTO tasks VALUES (1); UPDATE tasks SET title = 'b'; DELETE FROM tasks")
    assert [(kind, operation) for kind, operation, _ in captured(tasks)] == [
        ("task", "INSERT"), ("task", "UPDATE"), ("task", "DELETE"),
    ]  # fmt: skip


def test_tracking_again_the_same_way_changes_nothing(tasks: psycopg.Connection):
    first = track(tasks, "public", "tasks", exclude=["secret"])
    before = tasks.execute("SELECT oid, xmin FROM pg_trigger").fetchall()
    again = track(tasks, "public", "tasks", exclude=["secret"])
    assert (again.changed, again.tracked) == (False, first.tracked)
    assert tasks.execute("SELECT oid, xmin FROM pg_trigger").fetchall() == before


def test_tracking_again_with_other_options_replaces_the_trigger(tasks: psycopg.Connection):
    track(tasks, "public", "tasks", exclude=["secret"])
    done = track(tasks, "public", "tasks", entity_type="job", operations=[Operation.INSERT])
    assert done.changed
    assert tracked(tasks, "public") == [done.tracked]
    assert triggers(tasks) == ["#cdc_capture"]


def test_tracking_again_enables_a_trigger_that_was_disabled(tasks: psycopg.Connection):
    track(tasks, "public", "tasks")
    tasks.execute('ALTER TABLE tasks DISABLE TRIGGER "#cdc_capture"')
    assert [each.enabled for each in tracked(tasks, "public")] == [False]
    assert track(tasks, "public", "tasks").changed
    assert [each.enabled for each in tracked(tasks, "public")] == [True]


def test_names_are_read_as_postgresql_reads_them(outbox_db: psycopg.Connection):
    outbox_db.execute('CREATE SCHEMA "My Shop"; CREATE TABLE "My Shop"."Order.Line" ("Id ""x""" int PRIMARY KEY)')
    outbox_db.execute('CREATE TABLE plain (id int); CREATE TABLE "Plain" (id int)')
    done = track(outbox_db, "public", '"My Shop"."Order.Line"', key=['Id "x"'], entity_type="it's \\ a line, é")
    assert done.tracked.table == '"My Shop"."Order.Line"'
    assert track(outbox_db, "public", "PLAIN").tracked.table == "plain"
    assert track(outbox_db, "public", '"Plain"').tracked.table == '"Plain"'
    assert track(outbox_db, "public", "public.plain").changed is False
    outbox_db.execute('INSERT INTO "My Shop"."Order.Line" VALUES (7)')
    assert captured(outbox_db) == [("it's \\ a line, é", "INSERT", "7")]
    assert done.tracked in tracked(outbox_db, "public")


def test_without_id_the_primary_key_is_written_into_the_trigger(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE lines (n int, order_id int, PRIMARY KEY (order_id, n))")
    assert track(outbox_db, "public", "lines").tracked.key == ("order_id", "n")
    outbox_db.execute("INSERT INTO lines VALUES (1, 2)")
    assert captured(outbox_db) == [("lines", "INSERT", "[2, 1]")]


@pytest.mark.parametrize(
    ("table", "key", "warned"),
    [
        ("a int, b int, PRIMARY KEY (a, b)", "a,b", False),
        ("a int, b int, PRIMARY KEY (a, b)", "b,a", False),
        ("a int PRIMARY KEY, b int", "a,b", False),
        ("a int, b int, PRIMARY KEY (a, b)", "a", True),
        ("a int PRIMARY KEY, b int NOT NULL UNIQUE", "b", False),
        ("a int PRIMARY KEY, b int UNIQUE", "b", True),
        ("a int PRIMARY KEY, b int NOT NULL UNIQUE DEFERRABLE", "b", True),
        ("a int PRIMARY KEY, b int NOT NULL", "b", True),
        ("a int, b int", "a,b", True),
    ],
)
def test_a_key_coarser_than_the_row_is_warned_of(outbox_db: psycopg.Connection, table: str, key: str, warned: bool):
    outbox_db.execute(f"CREATE TABLE t ({table})".encode())
    warnings = track(outbox_db, "public", "t", key=key.split(",")).warnings
    assert bool(warnings) == warned
    assert all("no one true order between concurrent transactions" in warning for warning in warnings)


def test_a_unique_index_with_a_condition_or_an_expression_makes_no_key(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE t (a int NOT NULL, b int NOT NULL)")
    outbox_db.execute("CREATE UNIQUE INDEX ON t (a) WHERE b > 0; CREATE UNIQUE INDEX ON t ((a + b), a)")
    assert track(outbox_db, "public", "t", key=["a"]).warnings
    outbox_db.execute("CREATE UNIQUE INDEX ON t (a) INCLUDE (b)")
    assert not track(outbox_db, "public", "t", key=["a"]).warnings


def test_a_partitioned_table_is_tracked_at_its_root(outbox_db: psycopg.Connection):
    outbox_db.execute(
        "CREATE TABLE events (id int, day int, PRIMARY KEY (id, day)) PARTITION BY LIST (day);"
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1)"
    )
    with pytest.raises(UsageError, match="events_1 is a partition of events") as refused:
        track(outbox_db, "public", "events_1")
    assert refused.value.hint == "track events"
    track(outbox_db, "public", "events", key=["id", "day"])
    outbox_db.execute("CREATE TABLE events_2 PARTITION OF events FOR VALUES IN (2)")
    outbox_db.execute("INSERT INTO events VALUES (1, 1), (2, 2)")
    assert captured(outbox_db) == [("events", "INSERT", "[1, 1]"), ("events", "INSERT", "[2, 2]")]
    assert [each.table for each in tracked(outbox_db, "public")] == ["events"]
    track(outbox_db, "public", "events", key=["id", "day"], operations=[Operation.DELETE])
    outbox_db.execute("INSERT INTO events VALUES (3, 1)")
    assert len(captured(outbox_db)) == 2
    assert len(untrack(outbox_db, "public", "events")) == 1
    assert triggers(outbox_db) == []


@pytest.mark.parametrize(
    ("table", "error", "said"),
    [
        ("taks", NotFoundError, "did you mean tasks?"),
        ("TASK", NotFoundError, "did you mean tasks?"),
        ("mixed", NotFoundError, 'did you mean "Mixed"?'),
        ("nowhere.tasks", NotFoundError, "did you mean tasks?"),
        ("entirely_else", NotFoundError, "schema.table"),
        ("a.b.c.d", UsageError, "as in SQL"),
        ("", UsageError, "as in SQL"),
        ('"open', UsageError, "as in SQL"),
        ("seen", UsageError, "a view"),
        ("counted", UsageError, "a materialized view"),
        ("tasks_pkey", UsageError, "is no table"),
        ("entity_changes", UsageError, "outbox itself"),
        ("cdc_migrations", UsageError, "outbox itself"),
    ],
)
def test_what_cannot_be_tracked_is_refused_with_the_remedy(
    tasks: psycopg.Connection, table: str, error: type[CdcError], said: str
):
    tasks.execute('CREATE TABLE "Mixed" (id int); CREATE VIEW seen AS SELECT 1 AS id')
    tasks.execute("CREATE MATERIALIZED VIEW counted AS SELECT 1 AS id")
    with pytest.raises(error) as refused:
        track(tasks, "public", table)
    assert said in f"{refused.value} {refused.value.hint}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": ["ID"]}, "did you mean id?"),
        ({"exclude": ["secert"]}, "did you mean secret?"),
        ({"key": ["xyz"]}, "its columns: id, title, secret"),
        ({"key": ["id"], "exclude": ["id"]}, "cannot be left out"),
        ({"exclude": ["id"]}, "cannot be left out"),
    ],
)
def test_columns_that_do_not_fit_are_named_and_nothing_is_tracked(
    tasks: psycopg.Connection, options: dict[str, Any], said: str
):
    with pytest.raises(UsageError) as refused:
        track(tasks, "public", "tasks", **options)
    assert said in f"{refused.value} {refused.value.hint}"
    assert tracked(tasks, "public") == []


def test_a_table_without_any_key_asks_for_one(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE keyless (a int, b int)")
    with pytest.raises(UsageError, match="neither a column id nor a primary key") as refused:
        track(outbox_db, "public", "keyless")
    assert "--key" in refused.value.hint


def test_a_trigger_made_by_hand_is_listed_and_not_doubled(tasks: psycopg.Connection):
    tasks.execute(
        "CREATE TRIGGER track_task_changes AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    (listed,) = tracked(tasks, "public")
    assert (listed.trigger, listed.ours, listed.operations, listed.entity_type, listed.key) == (
        "track_task_changes", False, (Operation.INSERT,), None, (),
    )  # fmt: skip
    with pytest.raises(RefusedError, match="captured by track_task_changes already"):
        track(tasks, "public", "tasks")
    assert track(tasks, "public", "tasks", replace=True).replaced == ("track_task_changes",)
    assert triggers(tasks) == ["#cdc_capture"]


def test_somebody_elses_trigger_under_our_name_is_not_replaced(tasks: psycopg.Connection):
    tasks.execute("CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    tasks.execute('CREATE TRIGGER "#cdc_capture" AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION mine()')
    with pytest.raises(RefusedError, match="not ours"):
        track(tasks, "public", "tasks")


def test_two_outboxes_may_capture_one_table(tasks: psycopg.Connection):
    migrations.install(tasks, "second")
    track(tasks, "public", "tasks")
    track(tasks, "second", "tasks")
    tasks.execute("INSERT INTO tasks VALUES (1)")
    counts = "SELECT (SELECT count(*) FROM public.entity_changes), (SELECT count(*) FROM second.entity_changes)"
    assert tasks.execute(counts.encode()).fetchone() == (1, 1)
    untrack(tasks, "second", "tasks")
    assert triggers(tasks) == ["#cdc_capture"]


def test_untrack_drops_every_capturing_trigger_of_the_table_and_no_other(tasks: psycopg.Connection):
    tasks.execute("CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    tasks.execute("CREATE TRIGGER mine AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION mine()")
    tasks.execute("CREATE TRIGGER hand AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION capture_entity_change()")
    assert [each.trigger for each in untrack(tasks, "public", "tasks")] == ["hand"]
    assert triggers(tasks) == ["mine"]
    with pytest.raises(NotFoundError, match="not tracked"):
        untrack(tasks, "public", "tasks")


def test_without_the_outbox_everything_says_to_install_it(db: psycopg.Connection):
    db.execute("CREATE TABLE tasks (id int)")
    for attempt in (lambda: track(db, "public", "tasks"), lambda: tracked(db, "public")):
        with pytest.raises(NotFoundError, match="no capture_entity_change") as missing:
            attempt()
        assert "cdc db install" in missing.value.hint


def test_a_table_that_stays_locked_ends_with_a_sentence(
    outbox: str, tasks: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(source_tables, "LOCK_TIMEOUT", "50ms")
    with psycopg.connect(outbox) as other:
        other.execute("INSERT INTO tasks VALUES (1)")
        with pytest.raises(CdcError, match="tasks stayed locked") as busy:
            track(tasks, "public", "tasks")
        other.rollback()
    assert "pg_stat_activity" in busy.value.hint
    assert triggers(tasks) == []


def test_a_role_with_trigger_on_the_table_may_track_but_not_untrack(outbox: str, tasks: psycopg.Connection, role: str):
    with psycopg.connect(make_conninfo(outbox, user=role), autocommit=True) as connection:
        with pytest.raises(RefusedError, match="may not do this"):
            track(connection, "public", "tasks")
        tasks.execute("GRANT TRIGGER ON tasks TO track_tester")
        tasks.execute("GRANT EXECUTE ON FUNCTION capture_entity_change() TO track_tester")
        track(connection, "public", "tasks")
        assert track(connection, "public", "tasks", entity_type="job").changed
        with pytest.raises(RefusedError, match="must be owner of relation tasks") as refused:
            untrack(connection, "public", "tasks")
    assert 'DROP TRIGGER "#cdc_capture" ON "public"."tasks"' in refused.value.hint
    assert triggers(tasks) == ["#cdc_capture"]


def test_the_command_line_from_track_to_untrack(outbox: str, tasks: psycopg.Connection):
    done = invoke(outbox, "track", "tasks", "--type", "job", "--on", "insert, DELETE", "--key", "id,title",
                  "--exclude", "secret")  # fmt: skip
    assert (done.exit_code, done.stdout) == (0, "")
    assert "tasks is tracked now: insert,delete; key id,title; type job; without secret" in done.stderr
    again = invoke(outbox, "track", "tasks", "--type", "job", "--on", "insert,delete", "--key", "id,title",
                   "--exclude", "secret", "--json")  # fmt: skip
    expected = {
        "table": "tasks", "trigger": "#cdc_capture", "operations": ["insert", "delete"], "entity_type": "job",
        "key": ["id", "title"], "exclude": ["secret"], "columns": [], "virtual": False, "handled": False,
        "schema_in_key": False, "all_schemas": None, "enabled": True, "fires": "origin",
        "disabled_partitions": [], "missing": [], "update_of": [], "when": "", "only": "", "ours": True,
        "truncate": "ignore", "ddl": "ignore",
    }  # fmt: skip
    assert json.loads(again.stdout) == {
        "schema": 1, "tracked": expected, "changed": False, "before": expected, "warnings": [],
    }  # fmt: skip
    assert json.loads(invoke(outbox, "tracked", "--json").stdout) == {"schema": 1, "tracked": [expected]}
    assert "job   insert,delete  id,title  all but secret" in invoke(outbox, "tracked").stdout
    assert "dropped trigger #cdc_capture on tasks" in invoke(outbox, "untrack", "tasks").stderr
    assert json.loads(invoke(outbox, "tracked", "--json").stdout)["tracked"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["track", "taks"], 4, "did you mean tasks?"),
        (["untrack", "tasks"], 4, "not tracked"),
        (["track", "tasks", "--on", "insert,truncate"], 2, "--truncate"),
        (["track", "tasks", "--on", "insert,read"], 2, "expected insert, update, delete"),
        (["track", "tasks", "--on", ""], 2, "no operation"),
        (["track", "tasks", "--key", "titel"], 2, "did you mean title?"),
        (["track", "tasks", "--schema", "nowhere"], 4, "cdc db install"),
    ],
)
def test_mistakes_on_the_command_line_get_a_sentence_and_their_exit_code(
    outbox: str, tasks: psycopg.Connection, arguments: list[str], code: int, said: str
):
    failed = invoke(outbox, *arguments)
    assert failed.exit_code == code
    assert said in failed.stderr
    assert triggers(tasks) == []


def test_a_coarse_key_is_warned_of_on_the_command_line_and_still_tracked(outbox: str, tasks: psycopg.Connection):
    warned = invoke(outbox, "track", "tasks", "--key", "title")
    assert warned.exit_code == 0
    assert "Warning: the key title does not tell the rows of tasks apart" in warned.stderr
    assert len(tracked(tasks, "public")) == 1


def test_a_table_that_is_renamed_keeps_its_type_and_none_takes_it_by_its_name(outbox: str, tasks: psycopg.Connection):
    track(tasks, "public", "tasks")
    tasks.execute("ALTER TABLE tasks RENAME TO jobs; CREATE TABLE tasks (id int PRIMARY KEY)")
    tasks.execute("INSERT INTO jobs (id) VALUES (1)")
    assert tasks.execute("SELECT entity_type, table_name FROM entity_changes").fetchall() == [("task", "jobs")]
    # A trigger of before is given its type by the next `cdc track`.
    tasks.execute("CREATE TABLE lines (id int PRIMARY KEY)")
    tasks.execute("CREATE TRIGGER mine AFTER INSERT ON lines FOR EACH ROW EXECUTE FUNCTION capture_entity_change()")
    assert "lines (by table)" in invoke(outbox, "tracked").stdout
    track(tasks, "public", "lines", replace=True)
    assert "lines (by table)" not in invoke(outbox, "tracked").stdout


def test_a_function_of_a_table_that_is_outdated_is_told_where_the_triggers_are(outbox: str, tasks: psycopg.Connection):
    track(tasks, "public", "tasks")
    assert invoke(outbox, "tracked").stderr == ""
    tasks.execute("ALTER TABLE tasks ADD takes interval")
    for arguments in (["tracked"], ["db", "verify"]):
        assert "tasks as it was: capturing costs more now" in invoke(outbox, *arguments).output
    assert invoke(outbox, "db", "verify").exit_code == 1
    assert invoke(outbox, "db", "upgrade").exit_code == 0
    assert invoke(outbox, "db", "verify").exit_code == 0
    assert invoke(outbox, "tracked").stderr == ""
