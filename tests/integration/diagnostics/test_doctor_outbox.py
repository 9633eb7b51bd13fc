"""`cdc doctor` about the outbox and the tables that are captured into it: what used to be silent, on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres import migrations, sequence, tracking
from tests.commands import done, invoke, tracked
from tests.integration.diagnostics.test_doctor import BLIND, apply, db, findings, role, run, shop, troubles, well

__all__ = ["db", "role", "shop", "well"]


def unstreamed(dsn: str, *options: str) -> dict[str, str]:
    return {name: each for name, each in troubles(dsn, "--no-stream", *options).items() if name not in BLIND}


def test_before_the_installation_it_is_said_once_and_not_in_the_words_of_the_server(well: TempServer) -> None:
    with psycopg.connect(well.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE not_installed")
        try:
            result = run(well.dsn("not_installed"), "--no-stream")
            found = findings(well.dsn("not_installed"), "--no-stream")
        finally:
            admin.execute("DROP DATABASE not_installed WITH (FORCE)")
    assert result.exit_code == 1
    assert "42P01" not in result.output
    assert [name for name, each in found.items() if each["severity"] == "fail"] == ["schema"]
    assert {found[name]["detail"] for name in ("backlog", "triggers", "grants", "sequence", "shards")} == {
        "there is no outbox: see schema"
    }


def test_what_could_not_be_read_is_unknown_and_no_success(shop: str, db: psycopg.Connection, role: str) -> None:
    weak = make_conninfo(shop, user=role)
    apply(shop, run(weak, "--no-stream", "--fix").stdout)
    assert run(weak, "--no-stream").exit_code == 0
    db.execute(sql.SQL("REVOKE SELECT ON SEQUENCE entity_changes_seq_seq FROM {}").format(sql.Identifier(role)))
    result = run(weak, "--no-stream")
    assert result.exit_code == 1
    assert "1 unknown" in result.stderr
    found = findings(weak, "--no-stream")["sequence"]
    assert found["severity"] == "unknown"
    assert "GRANT SELECT ON SEQUENCE public.entity_changes_seq_seq" in found["remedies"][0]


@pytest.mark.parametrize(
    ("broken", "lacking"),
    [
        ("REVOKE ALL ON entity_changes FROM {captures}", "INSERT on entity_changes"),
        ("REVOKE INSERT (entity_id) ON entity_changes FROM {captures}", "INSERT on entity_changes"),
        ("DROP POLICY cdc_capture ON entity_changes; ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY", "a policy"),
        ("REVOKE SELECT (seq) ON entity_changes FROM {captures}", "SELECT (seq, shard)"),
        ("REVOKE USAGE ON SCHEMA public FROM PUBLIC, {owner} CASCADE", "USAGE on the schema"),
        ("REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text) FROM PUBLIC, {captures}",
         "EXECUTE on pg_logical_emit_message(boolean,text,text)"),
    ],
)  # fmt: skip
def test_an_owner_of_the_function_that_may_not_write_the_outbox_fails(
    shop: str, db: psycopg.Connection, broken: str, lacking: str
) -> None:
    captures = sql.Identifier(f"cdc_capture_{db.info.dbname}_public")
    db.execute(sql.SQL(broken).format(captures=captures, owner=sql.Identifier(f"{db.info.dbname}_owner")))
    found = findings(shop, "--no-stream")["capture-function"]
    assert (found["severity"], lacking in found["detail"]) == ("fail", True), found
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute("INSERT INTO tasks VALUES (1)")


def test_who_may_send_messages_is_shown_and_the_script_grants_it_to_those_who_have_to(
    shop: str, db: psycopg.Connection, role: str
) -> None:
    db.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(role)))
    shout = "SELECT pg_logical_emit_message(false, 'x', {})"
    messages = "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'pg_logical_emit_message'"
    captures = f"cdc_capture_{db.info.dbname}_public"
    opened = sql.SQL("GRANT EXECUTE ON FUNCTION {0} TO PUBLIC; REVOKE EXECUTE ON FUNCTION {0} FROM {1}")
    for (message,) in db.execute(messages).fetchall():
        db.execute(opened.format(sql.SQL(message), sql.Identifier(captures)))
    weak = make_conninfo(shop, user=role)
    assert findings(weak)["message-senders"]["severity"] == "warn"
    apply(shop, run(shop, "--no-stream", "--fix").stdout)
    db.execute("INSERT INTO tasks VALUES (1)")
    with psycopg.connect(weak, autocommit=True) as connection:
        for value in ("'y'::text", "'y'::bytea"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(shout.format(value))
    found = findings(weak)
    assert found["message-senders"]["severity"] == "ok"
    assert captures in found["message-senders"]["detail"]
    # Without the right itself, the doctor says what it could prove.
    assert (found["plugin"]["severity"], "may not send it a message" in found["plugin"]["detail"]) == ("ok", True)


def test_row_level_security_on_the_outbox_fails_for_whom_it_goes(shop: str, db: psycopg.Connection, role: str) -> None:
    weak = make_conninfo(shop, user=role)
    apply(shop, run(weak, "--no-stream", "--fix").stdout)
    db.execute("ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY")
    assert findings(shop, "--no-stream")["row-security"]["severity"] == "ok"
    found = findings(weak, "--no-stream")["row-security"]
    assert found["severity"] == "fail"
    assert found["remedies"][0] == "ALTER TABLE public.entity_changes DISABLE ROW LEVEL SECURITY;"
    assert f'ALTER ROLE "{role}" BYPASSRLS' in found["remedies"][1]
    assert run(weak, "--no-stream").exit_code == 1
    apply(shop, "ALTER TABLE public.entity_changes DISABLE ROW LEVEL SECURITY;")
    assert unstreamed(weak) == {}


def test_who_reads_the_outbox_by_default_privileges_is_named_and_put_out(shop: str, role: str) -> None:
    owner = f"{psycopg.conninfo.conninfo_to_dict(shop)['dbname']}_owner"
    with psycopg.connect(shop, autocommit=True) as admin:
        admin.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
        admin.execute(sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {}").format(
            sql.Identifier(role)))  # fmt: skip
        migrations.uninstall(admin, "public")
        migrations.install(admin, "public")
        tracking.track(admin, "public", "tasks")
    found = findings(shop, "--no-stream")["readers"]
    assert (found["severity"], f"{role} (by default privileges)" in found["detail"]) == ("warn", True)
    apply(shop, run(shop, "--no-stream", "--fix").stdout)
    assert findings(shop, "--no-stream")["readers"]["severity"] == "ok"


@pytest.mark.parametrize("granted", [["--consumer"], ["--readonly"], ["--payload", "--readonly"]])
def test_who_was_granted_what_is_meant_to_read_the_outbox_is_named_and_no_trouble(
    shop: str, role: str, granted: list[str]
) -> None:
    done(shop, "db", "grant", *granted, role)
    found = findings(shop, "--no-stream")["readers"]
    assert found["severity"] == "ok"
    assert (role in found["detail"]) == (granted != ["--readonly"])


def test_everybody_is_named_among_the_readers(shop: str, db: psycopg.Connection) -> None:
    db.execute("GRANT SELECT (new_data) ON entity_changes TO PUBLIC")
    found = findings(shop, "--no-stream")["readers"]
    assert (found["severity"], found["detail"].endswith(": PUBLIC")) == ("warn", True)
    apply(shop, run(shop, "--no-stream", "--fix").stdout)
    assert findings(shop, "--no-stream")["readers"]["severity"] == "ok"


STATES = {
    "fresh": "",
    "waiting": "UPDATE entity_changes SET next_attempt_at = now(), error_count = 1",
    "dead": "UPDATE entity_changes SET dead_at = now()",
    "paused": "UPDATE entity_changes SET dead_at = now(), next_attempt_at = 'infinity'",
    "processed": "UPDATE entity_changes SET processed = true, processed_at = now()",
    "processed without a time": "UPDATE entity_changes SET processed = true",
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("fix", ["--fix", "upgrade", "install"])
def test_a_sequence_that_was_left_behind_is_found_and_set_right(
    shop: str, db: psycopg.Connection, state: str, fix: str
) -> None:
    db.execute("SELECT setval('entity_changes_seq_seq', 900); INSERT INTO tasks VALUES (1), (2)")
    if STATES[state]:
        db.execute(STATES[state].encode())
    db.execute("SELECT setval('entity_changes_seq_seq', 10)")
    found = findings(shop, "--no-stream")["sequence"]
    assert (found["severity"], "is 10, and there is a change 902" in found["detail"]) == ("fail", True)
    if fix == "--fix":
        apply(shop, run(shop, "--no-stream", "--fix").stdout)
    else:
        owner = f"{db.info.dbname}_owner"
        said = invoke(make_conninfo(shop, options=f"-c role={owner}"), "db", fix)
        assert "goes on behind the highest number; it was at 10" in said.output
    assert findings(shop, "--no-stream")["sequence"]["severity"] == "ok"
    db.execute("INSERT INTO tasks VALUES (3)")
    assert db.execute("SELECT max(seq) FROM entity_changes").fetchone() == (903,)


def test_changes_that_were_marked_without_a_time_do_not_hide_one_with_a_higher_number(
    shop: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "_ROWS_EXAMINED", 20)
    db.execute("INSERT INTO tasks SELECT generate_series(1, 30)")
    db.execute("UPDATE entity_changes SET processed = true, processed_at = NULL")
    db.execute("SELECT setval('entity_changes_seq_seq', 900); INSERT INTO tasks VALUES (100)")
    db.execute("UPDATE entity_changes SET processed = true, processed_at = now() WHERE NOT processed")
    db.execute("SELECT setval('entity_changes_seq_seq', 500)")
    found = findings(shop, "--no-stream")["sequence"]
    assert (found["severity"], "is 500, and there is a change 901" in found["detail"]) == ("fail", True)


def test_a_column_that_was_to_be_left_out_and_was_renamed_fails(shop: str, db: psycopg.Connection) -> None:
    db.execute("ALTER TABLE tasks ADD card text")
    tracking.track(db, "public", "tasks", exclude=["card"])
    assert unstreamed(shop) == {}
    db.execute("ALTER TABLE tasks RENAME card TO pan")
    found = findings(shop, "--no-stream")["triggers"]
    assert (found["severity"], "no column card, which is to be left out" in found["detail"]) == ("fail", True)
    assert "cdc track public.tasks --exclude COLUMNS" in found["remedies"][0]
    tracking.track(db, "public", "tasks", exclude=["pan"])
    assert unstreamed(shop) == {}


@pytest.mark.parametrize("options", ["[", "[" * 3000, '{"a":' * 3000, '{"key": "id"}', '{"excluded": ["id"]}'])
def test_a_trigger_whose_options_cannot_be_read_fails(shop: str, db: psycopg.Connection, options: str) -> None:
    db.execute("CREATE TABLE odd (id int PRIMARY KEY)")
    db.execute(
        sql.SQL("CREATE TRIGGER odd AFTER INSERT ON odd FOR EACH ROW EXECUTE FUNCTION capture_entity_change('', {})")
        .format(sql.Literal(options))
    )  # fmt: skip
    found = findings(shop, "--no-stream")["triggers"]
    assert (found["severity"], "every write to public.odd fails" in found["detail"]) == ("fail", True)
    done(shop, "track", "odd", "--replace")
    assert unstreamed(shop) == {}


def test_a_trigger_for_statements_fails(shop: str, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE odd (id int PRIMARY KEY)")
    db.execute("CREATE TRIGGER odd AFTER INSERT ON odd EXECUTE FUNCTION capture_entity_change()")
    assert "it is not FOR EACH ROW" in findings(shop, "--no-stream")["triggers"]["detail"]


def test_what_a_table_is_tracked_by_is_looked_at_columns_and_conditions(shop: str, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE odd (id int PRIMARY KEY, status text, total int, note text)")
    done(shop, "track", "odd", "--on", "update:status", "--when", "NEW.total > 0", "--columns", "id,status,note")
    assert unstreamed(shop) == {}
    db.execute("ALTER TABLE odd RENAME status TO state; ALTER TABLE odd RENAME total TO sum")
    assert "odd has no column status, which is to be captured" in findings(shop, "--no-stream")["triggers"]["detail"]
    done(shop, "track", "odd", "--columns", "id,state", "--replace")
    assert unstreamed(shop) == {}, "the trigger keeps what its columns and its condition mean"
    db.execute(
        "CREATE TRIGGER odd AFTER UPDATE OF sum ON odd FOR EACH ROW WHEN (NEW.sum > 9)"
        " EXECUTE FUNCTION capture_entity_change()"
    )
    assert findings(shop, "--no-stream")["captured-twice"]["severity"] == "fail", "an UPDATE may set both"


def test_rows_that_are_captured_twice_fail(shop: str, db: psycopg.Connection) -> None:
    by_hand = "CREATE TRIGGER {} AFTER {} ON {} FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    db.execute("CREATE TABLE odd (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    db.execute("CREATE TABLE odd_1 PARTITION OF odd FOR VALUES FROM (0) TO (10)")
    db.execute(by_hand.format("a", "INSERT", "odd").encode())
    db.execute(by_hand.format("b", "DELETE", "odd_1").encode())
    assert unstreamed(shop) == {}
    db.execute(by_hand.format("c", "INSERT OR UPDATE", "odd_1").encode())
    found = findings(shop, "--no-stream")["captured-twice"]
    assert (found["severity"], "by a of public.odd and by c of public.odd_1" in found["detail"]) == ("fail", True)
    db.execute("DROP TRIGGER c ON odd_1")
    db.execute(by_hand.format("c", "UPDATE OR DELETE", "odd_1").encode())
    assert findings(shop, "--no-stream")["captured-twice"]["severity"] == "fail"


def test_a_trigger_that_fires_before_a_documented_one_is_named_also_on_a_partition(
    shop: str, db: psycopg.Connection
) -> None:
    db.execute("CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    db.execute("CREATE TABLE odd (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    db.execute("CREATE TABLE odd_1 PARTITION OF odd FOR VALUES FROM (0) TO (10)")
    db.execute(
        "CREATE TRIGGER track_task_changes AFTER INSERT ON odd FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    for name, when, table in (
        ("a", "AFTER DELETE", "odd"),
        ("b", "BEFORE INSERT", "odd_1"),
        ("z", "AFTER INSERT", "odd"),
    ):
        db.execute(f"CREATE TRIGGER {name} {when} ON {table} FOR EACH ROW EXECUTE FUNCTION mine()".encode())
    assert unstreamed(shop) == {}
    db.execute("CREATE TRIGGER aa AFTER INSERT ON odd_1 FOR EACH ROW EXECUTE FUNCTION mine()")
    found = findings(shop, "--no-stream")["trigger-order"]
    assert (found["severity"], "aa on public.odd_1 fires before track_task_changes" in found["detail"]) == (
        "warn",
        True,
    )


@pytest.mark.parametrize(("wanted", "severity"), [("tasks", "warn"), ("task", "ok")])
def test_a_type_by_the_name_of_its_table_is_missed_where_no_handler_wants_it(
    shop: str, db: psycopg.Connection, wanted: str, severity: str, tmp_path: Path
) -> None:
    db.execute(
        'DROP TRIGGER "#cdc_capture" ON tasks; CREATE TRIGGER by_hand AFTER INSERT ON tasks'
        " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    checks = findings(shop, "--no-stream", "--deliver-to", "http://127.0.0.1:3000/", "--type", wanted)
    assert checks["triggers"]["severity"] == "ok"
    assert "1 without a type" in checks["triggers"]["detail"]
    assert checks["unrouted"]["severity"] == severity
    db.execute("ALTER TABLE tasks RENAME TO jobs")
    found = findings(shop, "--no-stream", "--deliver-to", "http://127.0.0.1:3000/", "--type", wanted)["unrouted"]
    assert (found["severity"], "jobs INSERT" in found["detail"]) == ("warn", True)


@pytest.fixture
def latin(well: TempServer) -> Iterator[str]:
    with psycopg.connect(well.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE latin1 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        with psycopg.connect(well.dsn("latin1"), autocommit=True, client_encoding="utf8") as connection:
            migrations.install(connection, "public")
            connection.execute('CREATE TABLE teil ("größe" int PRIMARY KEY, "prüfziffer" text)')
        yield well.dsn("latin1")
        admin.execute("DROP DATABASE latin1 WITH (FORCE)")


def test_names_in_a_database_of_another_encoding_are_no_fault(latin: str) -> None:
    done(latin, "track", "teil", "--type", "bestellübersicht", "--exclude", "prüfziffer")
    found = findings(latin, "--no-stream", "--deliver-to", "http://127.0.0.1:3000/", "--type", "bestellübersicht")
    assert (found["triggers"]["severity"], found["unrouted"]["severity"]) == ("ok", "ok")
    assert json.dumps(tracked(latin), ensure_ascii=False).count("größe") == 1


def test_an_event_that_is_overdue_is_told(shop: str, db: psycopg.Connection) -> None:
    db.execute("SELECT publish_change('x', '1', due => now() + interval '1 hour')")
    assert findings(shop, "--no-stream")["due-later"]["detail"] == "1, the first in 60 min"
    db.execute("UPDATE cdc_due_changes SET due = now() - interval '5 minutes'")
    found = findings(shop, "--no-stream")["due-later"]
    assert (found["severity"], "due for 5 min" in found["detail"]) == ("warn", True)


def test_a_truncate_that_holds_back_its_type_is_told(shop: str, db: psycopg.Connection) -> None:
    assert findings(shop, "--no-stream")["barriers"]["detail"] == "none holds anything back"
    db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    done(shop, "track", "orders", "--type", "order", "--truncate", "event")
    db.execute("TRUNCATE orders")
    found = findings(shop, "--no-stream")["barriers"]
    assert (found["severity"], "of the type order holds back" in found["detail"]) == ("ok", True)
    db.execute("UPDATE entity_changes SET changed_at = now() - interval '10 minutes'")
    found = findings(shop, "--no-stream")["barriers"]
    assert (found["severity"], "for 10 min now: it waits for changes" in found["detail"]) == ("warn", True)
    db.execute("UPDATE entity_changes SET processed = true")
    assert findings(shop, "--no-stream")["barriers"]["detail"] == "none holds anything back"


def test_subscriptions_that_nobody_consumes_or_that_name_an_unknown_type_are_told(
    shop: str, db: psycopg.Connection
) -> None:
    assert findings(shop, "--no-stream")["subscriptions"]["detail"] == "none beside the default one"
    db.execute("SELECT publish_change('by hand', '1')")
    done(shop, "subscription", "create", "search", "--type", "task", "--type", "by hand", "--from", "beginning")
    db.execute("INSERT INTO tasks VALUES (100)")
    found = findings(shop, "--no-stream")
    assert "search (2)" in found["subscriptions"]["detail"]
    assert [found[name]["severity"] for name in ("subscriptions", "subscriptions-behind", "subscription-types")] == [
        "warn", "ok", "ok"
    ]  # fmt: skip
    done(shop, "subscription", "create", "audit", "--type", "tsak")
    done(shop, "subscription", "pause", "search")
    db.execute("UPDATE cdc_controls SET set_at = now() - interval '2 days'")
    db.execute(
        "UPDATE entity_changes SET processed = true, processed_at = now(), changed_at = now() - interval '2 days'"
    )
    found = findings(shop, "--no-stream")
    assert found["subscriptions"]["severity"] == "ok", "nobody consumes what is paused"
    assert "paused for more than a day: everything in the subscription search" in found["paused"]["detail"]
    assert "search (2, the oldest 2 days old)" in found["subscriptions-behind"]["detail"]
    assert "audit (tsak)" in found["subscription-types"]["detail"]


def test_the_index_of_subscriptions_is_missed_and_the_remedy_makes_it(shop: str, db: psycopg.Connection) -> None:
    done(shop, "subscription", "create", "search")
    for broken in (
        "DROP INDEX entity_changes_settled",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'entity_changes_settled'::regclass",
    ):
        db.execute(broken.encode())
        found = findings(shop, "--no-stream")["subscriptions"]
        assert found["severity"] == "fail"
        for statement in found["remedies"]:
            db.execute(statement.encode())
        assert findings(shop, "--no-stream")["subscriptions"]["severity"] == "ok"
    db.execute("DELETE FROM cdc_subscriptions")
    found = findings(shop, "--no-stream")["subscriptions"]
    assert found["severity"] == "warn"
    for statement in found["remedies"]:
        db.execute(statement.encode())
    assert findings(shop, "--no-stream")["subscriptions"]["severity"] == "ok"
