"""Optional sets of tables: installed by name, recorded, and never taken away again."""

from __future__ import annotations

import subprocess

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from cdc.cli import cdc
from cdc.core.errors import SchemaError
from cdc.core.model import Operation
from cdc.postgres import migration_scripts, migrations, tracking
from tests import servers
from tests.commands import invoke

ODD = 'Tenant "7" %s; it\'s é'


def tables(db: psycopg.Connection) -> set[str]:
    rows = db.execute("SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND oid >= 16384")
    return {name for (name,) in rows if "information_schema" not in name}


def tracked(db: psycopg.Connection, name: str = "public") -> dict[str, tuple[str | None, str]]:
    return {each.table: (each.entity_type, ",".join(each.operations)) for each in tracking.tracked(db, name)}


CAPTURED = {
    "whatsapp_message_reactions": ("reaction", "INSERT,UPDATE,DELETE"),
    "whatsapp_messages": ("message", "INSERT"),
    "cortex_projects.tasks": ("task", "INSERT"),
}
"""As the documented triggers say."""


def test_a_set_is_made_with_the_outbox_and_captured_at_once(database: str, db: psycopg.Connection) -> None:
    installed = invoke(database, "db", "install", "--with", "whatsapp")
    assert installed.exit_code == 0, installed.stderr
    assert "applied whatsapp 0001 tables" in installed.stderr
    assert tables(db) >= {*CAPTURED, '"actionRules"', "whatsapp_removed_reactions"}
    assert tracked(db) == CAPTURED
    assert migrations.verify(db, "public") == []

    def track_messages() -> tracking.Tracking:
        return tracking.track(db, "public", "whatsapp_messages", entity_type="message", operations=[Operation.INSERT])

    track_messages()  # which makes a function for the table: a set has the documented one
    assert tracked(db) == CAPTURED, "as `cdc track` would have made it"
    assert not track_messages().changed


def test_without_its_name_no_table_of_a_set_is_made(database: str, db: psycopg.Connection) -> None:
    invoke(database, "db", "install")
    assert not [name for name in tables(db) if "whatsapp" in name or name == "cdc_sets"]


def test_the_documented_statements_fit_the_tables(outbox_db: psycopg.Connection) -> None:
    migrations.install(outbox_db, "public", ["whatsapp"])
    outbox_db.execute(
        "INSERT INTO whatsapp_message_reactions (id, message_id, reaction, user_id, chat_id)"
        " VALUES ('test-1', 'msg-123', '✅', 'test-user', 'test-chat')"
    )
    outbox_db.execute(
        "SELECT * FROM \"actionRules\" WHERE rule_type = 'simple_action' AND config->>'trigger_emoji' = '✅'"
        " AND active = true"
    )
    outbox_db.execute(
        "SELECT * FROM cortex_projects.tasks WHERE created_at > NOW() - INTERVAL '1 minute' ORDER BY created_at DESC"
    )
    captured = outbox_db.execute("SELECT entity_type, entity_id, metadata ->> 'chat_id' FROM entity_changes").fetchall()
    assert captured == [("reaction", "test-1", "test-chat")]


@pytest.mark.parametrize("name", ["public", ODD])
def test_a_set_can_be_added_later_and_named_again_without_doing_anything(db: psycopg.Connection, name: str) -> None:
    migrations.install(db, name)
    assert [str(step) for step in migrations.install(db, name, ["whatsapp"])] == ["whatsapp 0001 tables"]
    assert migrations.install(db, name, ["whatsapp"]) == []
    assert migrations.pending(db, name) == []
    assert migrations.verify(db, name) == []


def test_what_is_captured_no_longer_stays_so_when_a_set_is_named_again(db: psycopg.Connection) -> None:
    migrations.install(db, "public", ["whatsapp"])
    tracking.untrack(db, "public", "whatsapp_messages")
    migrations.install(db, "public", ["whatsapp"])
    assert "whatsapp_messages" not in tracked(db)


def test_a_recorded_set_is_brought_to_the_present_version_with_the_outbox(
    db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations.install(db, "public", ["whatsapp"])
    known = migration_scripts.migrations
    later = migration_scripts.Migration(2, "later", "CREATE TABLE @schema@.later ();", "whatsapp")
    monkeypatch.setattr(migration_scripts, "migrations", lambda name="": known(name) + ([later] if name else []))
    applied, repaired = migrations.upgrade(db, "public")
    assert (list(map(str, applied)), repaired) == (["whatsapp 0002 later"], [])
    assert "later" in tables(db)
    monkeypatch.undo()
    with pytest.raises(SchemaError, match="the set whatsapp in schema public is at version 2"):
        migrations.install(db, "public")


def test_tables_of_a_live_system_are_kept_with_the_triggers_it_made_itself(db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    db.execute(
        "CREATE TABLE whatsapp_messages (id uuid UNIQUE, content text, user_id int, chat_id int, extra text,"
        " sent_at timestamptz)"
    )
    db.execute(
        "CREATE TRIGGER track_message_changes AFTER INSERT ON whatsapp_messages"
        " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    db.execute("INSERT INTO whatsapp_messages VALUES (gen_random_uuid(), 'hi', 1, 2, 'kept', now())")
    migrations.install(db, "public", ["whatsapp"])
    assert db.execute("SELECT extra FROM whatsapp_messages").fetchall() == [("kept",)]
    triggers = [each.trigger for each in tracking.tracked(db, "public") if each.table == "whatsapp_messages"]
    assert triggers == ["track_message_changes"], "captured once"


def test_a_table_that_lacks_what_the_code_needs_is_named_with_the_remedy_and_nothing_is_changed(
    database: str, db: psycopg.Connection
) -> None:
    db.execute("CREATE SCHEMA cortex_projects CREATE TABLE tasks (id text, title text, user_id text, room_id text)")
    refused = invoke(database, "db", "install", "--with", "whatsapp")
    assert refused.exit_code == 1
    said = "the table cortex_projects.tasks is there already, without the column reaction_id, rule_id; nothing was"
    assert said in refused.stderr
    assert tables(db) == {"cortex_projects.tasks"}
    [remedy] = [line.strip() for line in refused.stderr.splitlines() if "ALTER TABLE" in line]
    db.execute(remedy.partition(";")[0].encode())
    assert invoke(database, "db", "install", "--with", "whatsapp").exit_code == 0


def test_a_table_in_which_an_id_may_be_there_twice_is_refused_with_the_remedy(
    database: str, db: psycopg.Connection
) -> None:
    db.execute(
        "CREATE TABLE whatsapp_messages"
        " (id text, content text, user_id text, chat_id text, sent_at timestamptz, UNIQUE (id, chat_id))"
    )
    refused = invoke(database, "db", "install", "--with", "whatsapp")
    assert refused.exit_code == 1
    assert "without a unique key on its column id; nothing was changed" in refused.stderr
    db.execute("ALTER TABLE whatsapp_messages ADD UNIQUE (id)")
    assert invoke(database, "db", "install", "--with", "whatsapp").exit_code == 0


def test_the_printed_script_does_the_same_any_number_of_times(database: str, db: psycopg.Connection) -> None:
    script = CliRunner().invoke(cdc, ["db", "print", "--with", "whatsapp", "--with", "whatsapp"]).stdout
    assert script.count("-- whatsapp 0001 tables") == 1
    for _ in range(2):
        psql = [servers.program("psql"), "-X", "-q", "-d", database]
        subprocess.run(psql, input=script, text=True, check=True, stdout=subprocess.DEVNULL)
    assert tracked(db) == CAPTURED
    assert migrations.pending(db, "public", ["whatsapp"]) == []


def test_a_dry_run_prints_the_set_and_makes_nothing(database: str, db: psycopg.Connection) -> None:
    dry = invoke(database, "db", "install", "--with", "whatsapp", "--dry-run")
    assert "-- whatsapp 0001 tables" in dry.stdout
    assert tables(db) == set()


def test_uninstall_leaves_the_applications_tables_and_all_that_is_in_them(db: psycopg.Connection) -> None:
    migrations.install(db, "public", ["whatsapp"])
    db.execute("INSERT INTO whatsapp_messages (id, user_id, chat_id) VALUES ('1', 'a', 'b')")
    dropped = migrations.uninstall(db, "public", discard_unprocessed=True)
    assert "table public.cdc_sets" in dropped
    assert tables(db) == {*CAPTURED, '"actionRules"', "whatsapp_removed_reactions"}
    db.execute("INSERT INTO whatsapp_messages (id, user_id, chat_id) VALUES ('2', 'a', 'b')")
    migrations.install(db, "public", ["whatsapp"])
    assert tracked(db) == CAPTURED
    assert db.execute("SELECT count(*) FROM whatsapp_messages").fetchall() == [(2,)]


def test_two_outboxes_capture_one_table_of_tasks_each_for_itself(db: psycopg.Connection) -> None:
    for name in ("public", ODD):
        migrations.install(db, name, ["whatsapp"])
    db.execute("INSERT INTO cortex_projects.tasks (title) VALUES ('x')")
    for name in ("public", ODD):
        count = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name, "entity_changes"))
        assert db.execute(count).fetchall() == [(1,)]


def test_grants_of_a_set_are_about_a_consumer_and_printed_with_the_rest(database: str, db: psycopg.Connection) -> None:
    printed = CliRunner().invoke(cdc, ["db", "grant", "--consumer", 'Odd "one"', "--with", "whatsapp", "--print"])
    arguments = "text, text, text, jsonb, jsonb, jsonb, timestamp with time zone"
    assert f'GRANT EXECUTE ON FUNCTION "public".publish_change({arguments}) TO "Odd ""one""";' in printed.stdout
    assert CliRunner().invoke(cdc, ["db", "grant", "--readonly", "x", "--with", "whatsapp"]).exit_code == 2
    migrations.install(db, "public")
    missing = invoke(database, "db", "grant", "--consumer", "pg_monitor", "--with", "whatsapp")
    assert missing.exit_code == 1
    assert "cdc db install with the same --with" in missing.stderr


@pytest.mark.parametrize("command", [["install"], ["print"], ["grant", "--consumer", "x"]])
def test_a_set_that_does_not_exist_is_a_usage_error_that_names_those_that_do(command: list[str]) -> None:
    refused = CliRunner().invoke(cdc, ["db", *command, "--with", "watsapp"])
    assert refused.exit_code == 2
    assert "there is no set 'watsapp'" in refused.stderr
    assert "there are legacy_processor, whatsapp" in refused.stderr
