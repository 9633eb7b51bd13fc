"""What the trigger writes, for whom, and the wake-up it sends."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import cdc
from cdc import testing
from cdc.postgres import migrations, tracking
from cdc.postgres.tracked_tables import DOCUMENTED_TYPES, Truncate
from tests.commands import done

pytestmark = pytest.mark.server

REACTIONS = """
CREATE TABLE whatsapp_message_reactions (
  id text PRIMARY KEY, message_id text, reaction text, user_id text, chat_id text
);
CREATE TABLE whatsapp_messages (id bigint PRIMARY KEY, content text, user_id text, room_id text);
CREATE SCHEMA cortex_projects;
CREATE TABLE cortex_projects.tasks (id uuid PRIMARY KEY, title text);

CREATE TRIGGER track_reaction_changes
  AFTER INSERT OR UPDATE OR DELETE ON whatsapp_message_reactions
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();

CREATE TRIGGER track_message_changes
  AFTER INSERT ON whatsapp_messages
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();

-- Optional: Track task creation for chain reactions
CREATE TRIGGER track_task_changes
  AFTER INSERT ON cortex_projects.tasks
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();
"""


def changes(db: psycopg.Connection) -> list[dict[str, Any]]:
    with db.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM entity_changes ORDER BY seq").fetchall()


def capture(db: psycopg.Connection, table: str, arguments: str = "", on: str = "INSERT OR UPDATE OR DELETE") -> None:
    db.execute(
        f"CREATE TRIGGER capture AFTER {on} ON {table}"
        f" FOR EACH ROW EXECUTE FUNCTION capture_entity_change({arguments})".encode()
    )


def refusal(db: psycopg.Connection, statement: str) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as failure:
        db.execute(statement.encode())
    return failure.value


@pytest.fixture
def documented(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute(REACTIONS.encode())
    return outbox_db


@pytest.fixture
def wakeups(outbox: str) -> Iterator[Callable[..., list[str]]]:
    """``wakeups()`` returns those sent since it was last asked, under the prefix of ``public`` or another."""
    name = f"bell_{uuid.uuid4().hex[:12]}"

    def notified(prefix: str = "entity_change:public") -> list[str]:
        # Only what is flushed is decoded, and the test server commits without waiting for that.
        listener.execute("SET synchronous_commit = on; SELECT pg_logical_emit_message(true, 'flush', '')")
        heard = listener.execute("SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL)", [name])
        message = re.compile(rf"message: transactional: 1 prefix: {re.escape(prefix)}, sz: [0-9]+ content:(.*)")
        return [found[1] for (data,) in heard if (found := message.fullmatch(data))]

    with psycopg.connect(outbox, autocommit=True) as listener:
        listener.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [name])
        yield notified
        listener.execute("SELECT pg_drop_replication_slot(%s)", [name])


def test_the_documented_triggers_work_verbatim_on_tables_without_the_columns_they_assume(
    documented: psycopg.Connection,
):
    task = uuid.uuid4()
    documented.execute("INSERT INTO whatsapp_message_reactions VALUES ('r1', 'm1', '✅', 'u1', 'c1')")
    documented.execute("INSERT INTO whatsapp_messages VALUES (7, 'help', NULL, 'room')")
    documented.execute("INSERT INTO cortex_projects.tasks VALUES (%s, 'write')", [task])
    found = changes(documented)
    assert [(row["entity_type"], row["entity_id"], row["table_schema"], row["table_name"]) for row in found] == [
        ("reaction", "r1", "public", "whatsapp_message_reactions"),
        ("message", "7", "public", "whatsapp_messages"),
        ("task", str(task), "cortex_projects", "tasks"),
    ]
    assert [set(row["metadata"]) for row in found] == [
        {"timestamp", "user_id", "chat_id"}, {"timestamp", "user_id", "chat_id"}, {"timestamp"},
    ]  # fmt: skip
    assert found[0]["metadata"]["user_id"] == "u1"
    assert (found[1]["metadata"]["user_id"], found[1]["metadata"]["chat_id"]) == (None, "room")


def test_no_application_is_named_where_rows_are_captured(outbox_db: psycopg.Connection):
    [source] = outbox_db.execute("SELECT prosrc FROM pg_proc WHERE proname = 'capture_entity_change'").fetchone() or ()
    assert [name for name in DOCUMENTED_TYPES if f"'{name}'" in source] == []


def test_code_that_reads_the_catalogs_alone_finds_the_same_type_by_the_tables_name(outbox_db: psycopg.Connection):
    said = outbox_db.execute(
        "SELECT name, default_entity_type(name) FROM unnest(%s::text[]) AS t(name)", [[*DOCUMENTED_TYPES, "orders"]]
    ).fetchall()
    assert dict(said) == {**DOCUMENTED_TYPES, "orders": "orders"}


def test_a_captured_row_calls_no_second_function_for_its_type(documented: psycopg.Connection):
    with documented.transaction():
        documented.execute("SET LOCAL track_functions = 'all'")
        documented.execute("INSERT INTO whatsapp_messages VALUES (7, 'help', NULL, 'room')")
        called = documented.execute("SELECT funcname, calls FROM pg_stat_xact_user_functions").fetchall()
    assert called == [("capture_entity_change", 1)]


@pytest.mark.parametrize("bring", [migrations.install, migrations.upgrade])
def test_an_outbox_of_before_the_types_were_apart_gets_them(
    bring: Callable[..., object], documented: psycopg.Connection
):
    documented.execute("DROP FUNCTION default_entity_type; DELETE FROM cdc_migrations WHERE version >= 8")
    bring(documented, "public")
    assert migrations.verify(documented, "public") == []
    documented.execute("INSERT INTO whatsapp_messages VALUES (7, 'help', NULL, 'room')")
    assert [row["entity_type"] for row in changes(documented)] == ["message"]


def test_insert_update_and_delete_carry_new_and_old_and_number_themselves(documented: psycopg.Connection):
    documented.execute("INSERT INTO whatsapp_message_reactions VALUES ('r1', 'm1', '👍', 'u1', 'c1')")
    documented.execute("UPDATE whatsapp_message_reactions SET reaction = '✅'")
    documented.execute("UPDATE whatsapp_message_reactions SET reaction = '✅'")
    documented.execute("DELETE FROM whatsapp_message_reactions")
    found = changes(documented)
    assert [row["operation"] for row in found] == ["INSERT", "UPDATE", "UPDATE", "DELETE"]
    reactions = [tuple(side and side["reaction"] for side in (row["old_data"], row["new_data"])) for row in found]
    assert reactions == [(None, "👍"), ("👍", "✅"), ("✅", "✅"), ("✅", None)]
    assert [row["entity_id"] for row in found] == ["r1"] * 4
    assert [row["seq"] for row in found] == [1, 2, 3, 4]
    assert found[3]["metadata"] is None
    assert not any(row["processed"] for row in found)


@pytest.mark.parametrize(
    ("columns", "arguments", "update", "keys"),
    [
        ("id text", "", "id = 'b'", ("a", "b")),
        ("id text", "", "id = NULL", ("a", "null")),
        ("id text, n int DEFAULT 1", '\'t\', \'{"key": ["id"], "exclude": ["n"]}\'', "id = 'b'", ("a", "b")),
        ("id text, n int DEFAULT 1", '\'t\', \'{"key": ["id", "n"]}\'', "n = 2", ('["a", 1]', '["a", 2]')),
        ("id text, code text PRIMARY KEY DEFAULT 'x'", "'t', '{\"key\": [\"code\"]}'", "code = 'y'", ("x", "y")),
    ],
)
def test_an_update_that_moves_the_key_is_captured_for_both_keys_in_order(
    outbox_db: psycopg.Connection, columns: str, arguments: str, update: str, keys: tuple[str, str]
):
    outbox_db.execute(f"CREATE TABLE moving ({columns})".encode())
    outbox_db.execute("INSERT INTO moving (id) VALUES ('a')")
    capture(outbox_db, "moving", arguments)
    outbox_db.execute(f"UPDATE moving SET {update}".encode())
    gone, come = changes(outbox_db)
    assert [(row["operation"], row["entity_id"]) for row in (gone, come)] == [("DELETE", keys[0]), ("INSERT", keys[1])]
    assert (gone["old_data"]["id"], gone["new_data"], come["old_data"]) == ("a", None, None)
    assert (gone["metadata"]["moved_to"], come["metadata"]["moved_from"]) == (keys[1], keys[0])


async def test_a_move_waits_behind_what_waits_of_the_old_key(outbox: str, outbox_db: psycopg.Connection):
    router, told = cdc.Router(), list[tuple[str, str, int]]()

    @router.on("*")
    async def mirror(change: cdc.Change) -> None:
        told.append((change.entity_id, str(change.operation), change.attempt))
        if told[-1] == ("1", "INSERT", 1):
            raise cdc.Retry(after=0.2)

    outbox_db.execute("CREATE TABLE moving (id int PRIMARY KEY)")
    capture(outbox_db, "moving")
    outbox_db.execute("INSERT INTO moving VALUES (1); UPDATE moving SET id = 2; DELETE FROM moving")
    await testing.drain(outbox, router)
    assert [each for each in told if each[0] == "1"] == [("1", "INSERT", 1), ("1", "INSERT", 2), ("1", "DELETE", 1)]
    assert [each[1] for each in told if each[0] == "2"] == ["INSERT", "DELETE"]


def test_what_is_rolled_back_was_never_captured(documented: psycopg.Connection, wakeups: Callable[..., list[str]]):
    with documented.transaction(force_rollback=True):
        documented.execute("INSERT INTO cortex_projects.tasks VALUES (gen_random_uuid(), 'x')")
    assert changes(documented) == []
    assert wakeups() == []


def test_each_change_sends_a_wake_up_with_its_number_and_shard_when_it_is_committed(
    documented: psycopg.Connection, wakeups: Callable[..., list[str]]
):
    with documented.transaction():
        documented.execute("INSERT INTO cortex_projects.tasks SELECT gen_random_uuid(), 'x' FROM generate_series(1, 3)")
        documented.execute("SELECT publish_change('order', '42')")
        assert wakeups() == []
    expected = [f"{row['seq']},{row['shard']}" for row in changes(documented)]
    assert len(expected) == 4
    assert wakeups() == expected


def test_an_outbox_in_another_schema_sends_wake_ups_with_its_own_prefix(
    outbox_db: psycopg.Connection, wakeups: Callable[..., list[str]]
):
    migrations.install(outbox_db, "tenant, 7")
    outbox_db.execute("SELECT \"tenant, 7\".publish_change('order', '42')")
    assert changes(outbox_db) == []
    assert len(wakeups("entity_change:tenant%2C%207")) == 1


def test_the_writers_transaction_never_notifies(documented: psycopg.Connection):
    documented.execute("LISTEN entity_change")
    documented.execute("INSERT INTO cortex_projects.tasks VALUES (gen_random_uuid(), 'x')")
    assert list(documented.notifies(timeout=0.1)) == []


def test_any_other_table_has_its_own_name_as_type_and_arguments_name_another(outbox_db: psycopg.Connection):
    outbox_db.execute('CREATE TABLE "Order Line" (id int); CREATE TABLE named (id int); CREATE TABLE tasks (id int)')
    capture(outbox_db, '"Order Line"')
    capture(outbox_db, "named", "'thing'")
    capture(outbox_db, "tasks", "'', '{}'")
    outbox_db.execute('INSERT INTO "Order Line" VALUES (1); INSERT INTO named VALUES (1); INSERT INTO tasks VALUES (1)')
    assert [row["entity_type"] for row in changes(outbox_db)] == ["Order Line", "thing", "task"]


def test_without_id_the_primary_key_is_the_key_in_its_own_order(outbox_db: psycopg.Connection):
    outbox_db.execute('CREATE TABLE lines (n int, "Order" text, v int, PRIMARY KEY ("Order", n))')
    outbox_db.execute("CREATE TABLE codes (code text PRIMARY KEY)")
    capture(outbox_db, "lines")
    capture(outbox_db, "codes")
    outbox_db.execute("INSERT INTO lines VALUES (1, 'a\"b', 0); UPDATE lines SET v = 1; DELETE FROM lines")
    outbox_db.execute("INSERT INTO codes VALUES ('DE')")
    assert [row["entity_id"] for row in changes(outbox_db)] == ['["a\\"b", 1]'] * 3 + ["DE"]


def test_a_composite_key_is_unambiguous(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE pairs (a text, b text)")
    capture(outbox_db, "pairs", """'pair', '{"key": ["a", "b"]}'""")
    rows = [("x", "y,z"), ("x,y", "z"), ('x","y', "z"), ("x", None), ("x", "null"), ("", "xy,z")]
    outbox_db.cursor().executemany("INSERT INTO pairs VALUES (%s, %s)", rows)
    found = [row["entity_id"] for row in changes(outbox_db)]
    assert len(set(found)) == len(rows)
    assert [tuple(json.loads(key)) for key in found] == rows


def test_a_key_column_that_holds_null_does_not_stop_the_writer(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE loose (id int)")
    capture(outbox_db, "loose")
    outbox_db.execute("INSERT INTO loose VALUES (NULL)")
    assert [row["entity_id"] for row in changes(outbox_db)] == ["null"]


def test_no_key_at_all_is_a_sentence_that_names_the_table_and_the_remedy(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE keyless (a int)")
    capture(outbox_db, "keyless")
    failure = refusal(outbox_db, "INSERT INTO keyless VALUES (1)")
    assert "table public.keyless has neither a column id nor a primary key" in str(failure)
    assert "cdc track" in (failure.diag.message_hint or "")


def test_a_key_column_that_is_gone_is_named(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE renamed (code int)")
    capture(outbox_db, "renamed", """'t', '{"key": ["code"]}'""")
    outbox_db.execute("ALTER TABLE renamed RENAME code TO number")
    assert 'has no column "code"' in str(refusal(outbox_db, "INSERT INTO renamed VALUES (1)"))


def test_a_misspelt_option_fails_rather_than_publishing_what_was_to_stay_inside(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE t (id int, secret text)")
    capture(outbox_db, "t", """'t', '{"excluded": ["secret"]}'""")
    failure = refusal(outbox_db, "INSERT INTO t VALUES (1, 'hidden')")
    assert 'options may have "key", "exclude", "columns", "virtual", "handled" and "schema_in_key", not' in str(failure)
    assert "hidden" not in str(failure)


def test_excluded_columns_are_in_no_part_of_the_change(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE people (id int, name text, user_id text, chat_id text, room_id text)")
    capture(outbox_db, "people", """'', '{"exclude": ["name", "user_id", "room_id", "not there"]}'""")
    outbox_db.execute("INSERT INTO people VALUES (1, 'secret', 'secret', NULL, 'secret')")
    outbox_db.execute("UPDATE people SET name = 'secret2'; DELETE FROM people")
    found = changes(outbox_db)
    assert "secret" not in repr(found)
    assert [set(row["new_data"] or row["old_data"]) for row in found] == [{"id", "chat_id"}] * 3
    assert set(found[0]["metadata"]) == {"timestamp", "chat_id"}


def test_partitions_report_their_root_also_those_of_partitions(outbox_db: psycopg.Connection):
    outbox_db.execute(
        "CREATE SCHEMA parts; CREATE TABLE events (id int, day int) PARTITION BY LIST (day);"
        "CREATE TABLE parts.one PARTITION OF events FOR VALUES IN (1);"
        "CREATE TABLE parts.others PARTITION OF events FOR VALUES IN (2, 3) PARTITION BY LIST (day);"
        "CREATE TABLE parts.two PARTITION OF parts.others FOR VALUES IN (2)"
    )
    capture(outbox_db, "events")
    outbox_db.execute("CREATE TABLE parts.three PARTITION OF parts.others FOR VALUES IN (3)")
    outbox_db.execute("INSERT INTO events VALUES (1, 1), (2, 2), (3, 3); INSERT INTO parts.two VALUES (4, 2)")
    outbox_db.execute("UPDATE events SET day = 2 WHERE id = 1")
    found = {(row["table_schema"], row["table_name"], row["entity_type"]) for row in changes(outbox_db)}
    assert found == {("public", "events", "events")}
    assert [row["operation"] for row in changes(outbox_db) if row["entity_id"] == "1"] == ["INSERT", "DELETE", "INSERT"]


ODD_VALUES = [
    ("text", "E'\\u0001\\t\\n\"\\\\ \\u2028 𝄞  é e\u0301'", '\x01\t\n"\\ \u2028 𝄞  é e\u0301'),
    ("text", "''", ""),
    ("timestamptz", "'infinity'", "infinity"),
    ("timestamp", "'-infinity'", "-infinity"),
    ("timestamptz", "'2026-03-01 12:00:00.123456+01'", "2026-03-01T11:00:00.123456+00:00"),
    ("date", "'infinity'", "infinity"),
    ("bytea", "'\\x00ff'", "\\x00ff"),
    ("int[]", "'{{1,2},{3,NULL}}'", [[1, 2], [3, None]]),
    ("text[]", "'{}'", []),
    ("numeric", "'NaN'", "NaN"),
    ("numeric", "'Infinity'", "Infinity"),
    ("numeric", "0.10", 0.10),
    ("float8", "'-Infinity'", "-Infinity"),
    ("float8", "0.1::float8 + 0.2::float8", 0.1 + 0.2),
    ("bigint", "9223372036854775807", 9223372036854775807),
    ("boolean", "NULL", None),
    ("interval", "'1 day 2 hours'", "1 day 02:00:00"),
    ("jsonb", "'{\"a\": [null, 1e2]}'", {"a": [None, 100]}),
    ("uuid", "'00000000-0000-0000-0000-000000000001'", "00000000-0000-0000-0000-000000000001"),
    ("int4range", "'[1,5)'", "[1,5)"),
    ("xml", "'<a/>'", "<a/>"),
]


@pytest.mark.parametrize(("kind", "value", "json_value"), ODD_VALUES, ids=[f"{k} {v[:20]!a}" for k, v, _ in ODD_VALUES])
def test_values_are_exact_whatever_the_writers_session_has_set(
    outbox_db: psycopg.Connection, kind: str, value: str, json_value: object
):
    outbox_db.execute(f"CREATE TABLE odd (id int, v {kind})".encode())
    capture(outbox_db, "odd")
    outbox_db.execute(
        "SET timezone = 'Asia/Tokyo'; SET bytea_output = 'escape'; SET intervalstyle = 'sql_standard';"
        " SET extra_float_digits = -10; SET datestyle = 'SQL, DMY'"
    )
    outbox_db.execute(f"INSERT INTO odd VALUES (1, {value})".encode())
    outbox_db.execute("RESET datestyle")  # the driver reads no other
    (row,) = changes(outbox_db)
    assert row["new_data"] == {"id": 1, "v": json_value}


def test_the_same_key_is_the_same_text_in_every_session(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE timed (id timestamptz)")
    capture(outbox_db, "timed")
    for zone in ("UTC", "Asia/Tokyo"):
        outbox_db.execute("SELECT set_config('timezone', %s, false)", [zone])
        outbox_db.execute("INSERT INTO timed VALUES ('2026-03-01 12:00+00')")
    assert len({row["entity_id"] for row in changes(outbox_db)}) == 1
    assert outbox_db.execute("SHOW timezone").fetchone() == ("Asia/Tokyo",)


def test_ten_megabytes_of_json_pass(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE large (id int, body jsonb)")
    capture(outbox_db, "large")
    body = json.dumps({"text": "é" * 10_000_000})
    outbox_db.execute("INSERT INTO large VALUES (1, %s)", [body])
    asked = "SELECT length(new_data -> 'body' ->> 'text') FROM entity_changes"
    assert outbox_db.execute(asked.encode()).fetchone() == (10_000_000,)


def test_created_before_by_mistake_it_swallows_no_row(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE kept (id int)")
    outbox_db.execute(
        "CREATE TRIGGER early BEFORE INSERT OR UPDATE OR DELETE ON kept"
        " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    outbox_db.execute("INSERT INTO kept VALUES (1), (2)")
    assert outbox_db.execute("UPDATE kept SET id = id").rowcount == 2
    assert outbox_db.execute("DELETE FROM kept").rowcount == 2
    assert len(changes(outbox_db)) == 6


def test_a_statement_trigger_is_refused(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE t (id int)")
    outbox_db.execute(
        "CREATE TRIGGER s AFTER TRUNCATE ON t FOR EACH STATEMENT EXECUTE FUNCTION capture_entity_change()"
    )
    failure = refusal(outbox_db, "TRUNCATE t")
    assert (failure.diag.message_hint, failure.sqlstate) == ("create the trigger FOR EACH ROW", "39P01")


def test_publish_change_returns_the_number_of_a_row_like_any_other(outbox_db: psycopg.Connection):
    published = outbox_db.execute(
        "SELECT publish_change('order', '42', 'UPDATE', old_data => '{\"a\": 1}', new_data => '{\"a\": 2}',"
        " metadata => '{\"user_id\": 7}')"
    ).fetchone()
    assert published == (1,)
    (row,) = changes(outbox_db)
    expected = {
        "seq": 1, "entity_type": "order", "entity_id": "42", "table_name": "order", "table_schema": None,
        "operation": "UPDATE", "old_data": {"a": 1}, "new_data": {"a": 2}, "metadata": {"user_id": 7},
        "processed": False,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    outbox_db.execute("SELECT publish_change('order', '43')")
    assert changes(outbox_db)[1]["operation"] == "INSERT"
    for wrong in ("NULL, '1'", "'order', NULL", "'order', '1', NULL"):
        assert refusal(outbox_db, f"SELECT publish_change({wrong})")
    unknown = refusal(outbox_db, "SELECT publish_change('order', '1', 'MERGE')")
    assert unknown.diag.message_primary == "publish_change() knows no operation MERGE"


CAUSE = "0198c0de-0000-7000-8000-0000000000ff"


def caused(db: psycopg.Connection, setting: str) -> set[tuple[object, int]]:
    """Causes and depths of a captured and of a published change, under this setting of their transaction."""
    with db.transaction():
        db.execute("SELECT set_config('cdc.cause', %s, true)", [setting])
        db.execute("INSERT INTO cortex_projects.tasks VALUES (gen_random_uuid(), 'x')")
        db.execute("SELECT publish_change('order', '1')")
    found = changes(db)[-2:]
    assert [row["entity_type"] for row in found] == ["task", "order"]
    return {(row["caused_by"] and str(row["caused_by"]), row["depth"]) for row in found}


def test_a_transaction_that_names_a_cause_has_its_changes_counted_from_there(documented: psycopg.Connection):
    assert caused(documented, f"{CAUSE},0") == {(CAUSE, 1)}
    assert caused(documented, f"{CAUSE},41") == {(CAUSE, 42)}
    documented.execute("INSERT INTO cortex_projects.tasks VALUES (gen_random_uuid(), 'x')")
    last = changes(documented)[-1]
    assert (last["caused_by"], last["depth"]) == (None, 0), "the setting ends with its transaction"


def test_a_depth_at_its_highest_stays_there(documented: psycopg.Connection):
    assert caused(documented, f"{CAUSE},999999998") == {(CAUSE, 999999999)}
    assert caused(documented, f"{CAUSE},999999999") == {(CAUSE, 999999999)}


NO_CAUSES = [
    "", ",", "x", "17", CAUSE, f"{CAUSE},", f"{CAUSE},-1", f"{CAUSE},1.5", f"{CAUSE},x", f"{CAUSE},1,2",
    f"{CAUSE},1000000000", f"{CAUSE},{'9' * 40}", f"{CAUSE}, 1", f" {CAUSE},1", f"{CAUSE},1\n", f"{CAUSE[:-1]},1",
    f"{CAUSE}0,1", f"{CAUSE[:-1]}g,1", f"{{{CAUSE}}},1", f"{CAUSE.replace('-', '')},1",
    f"{CAUSE},\N{FULLWIDTH DIGIT ONE}", f"x\n{CAUSE},1", "é" * 10_000,
]  # fmt: skip


def test_a_cause_that_makes_no_sense_is_none_and_fails_no_write(documented: psycopg.Connection):
    found = {setting: caused(documented, setting) for setting in NO_CAUSES}
    assert found == {setting: {(None, 0)} for setting in NO_CAUSES}


def test_whoever_writes_changes_has_a_transaction_id_before_a_number_is_drawn(
    outbox: str, outbox_db: psycopg.Connection
):
    """A reader that sees no transaction older than a number's must be able to rely on it."""
    outbox_db.execute("CREATE VIEW events AS SELECT 0 AS id; CREATE TABLE orders (id int PRIMARY KEY)")
    tracking.track(outbox_db, "public", "orders", truncate=Truncate.EVENT)
    outbox_db.execute(
        "CREATE TRIGGER on_view INSTEAD OF INSERT ON events FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    outbox_db.execute(
        "CREATE FUNCTION check_xid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " ASSERT pg_current_xact_id_if_assigned() IS NOT NULL; RETURN NEW; END $$;"
        "CREATE TRIGGER check_xid BEFORE INSERT ON entity_changes FOR EACH ROW EXECUTE FUNCTION check_xid()"
    )
    for _ in range(3):  # the sequence assigns an id itself when it logs, which it does not each time
        outbox_db.execute("SELECT publish_change('event', '1')")
        outbox_db.execute("INSERT INTO events VALUES (1)")
        outbox_db.execute("SELECT publish_change('event', '1', due => clock_timestamp() + interval '1 hour')")
        outbox_db.execute("UPDATE cdc_due_changes SET due = now()")
        outbox_db.execute("SELECT publish_due(10, 1000000)")
        outbox_db.execute("INSERT INTO orders VALUES (1)")
        done(outbox, "backfill", "orders")
        outbox_db.execute("TRUNCATE orders")
        outbox_db.execute("UPDATE entity_changes SET processed = true, processed_at = now()")
        done(outbox, "outbox", "replay", "--type", "event", "--all", "--yes")
    written = Counter(
        (row["entity_type"], row["operation"], row["replay_of"] is not None) for row in changes(outbox_db)
    )
    assert {kind for kind, count in written.items() if count < 3} == set()
    assert written.keys() == {
        ("event", "INSERT", False), ("event", "INSERT", True), ("events", "INSERT", False),
        ("orders", "INSERT", False), ("orders", "READ", False), ("orders", "TRUNCATE", False),
    }  # fmt: skip


@pytest.fixture
def writer(documented: psycopg.Connection, outbox: str) -> Iterator[psycopg.Connection]:
    """A session of a role that may write the application's tables and nothing else."""
    role = f"writer_{uuid.uuid4().hex[:8]}"
    documented.execute(f"CREATE ROLE {role} LOGIN".encode())
    documented.execute(f"GRANT USAGE ON SCHEMA public, cortex_projects TO {role}".encode())
    documented.execute(f"GRANT INSERT, UPDATE, DELETE, SELECT ON cortex_projects.tasks TO {role}".encode())
    documented.execute(f"CREATE SCHEMA own AUTHORIZATION {role}".encode())
    with psycopg.connect(make_conninfo(outbox, user=role), autocommit=True) as connection:
        connection.execute("CREATE TABLE own.mine (id int)")
        yield connection
    documented.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}".encode())


def test_a_role_that_may_only_write_the_application_table_is_captured(
    documented: psycopg.Connection, writer: psycopg.Connection, wakeups: Callable[..., list[str]]
):
    writer.execute("INSERT INTO cortex_projects.tasks VALUES (gen_random_uuid(), 'x')")
    (row,) = changes(documented)
    assert row["entity_type"] == "task"
    assert wakeups() == [f"{row['seq']},{row['shard']}"]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM entity_changes",
        "SELECT * FROM recent_action_history",
        "SELECT * FROM action_processing_dashboard",
        "INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('tasks', 'INSERT', '1')",
        "UPDATE entity_changes SET processed = true, processed_at = now()",
        "DELETE FROM entity_changes",
        "TRUNCATE entity_changes",
        "SELECT nextval('entity_changes_seq_seq')",
        "SELECT setval('entity_changes_seq_seq', 1)",
        "SELECT publish_change('task', '1')",
        "SELECT * FROM reprocess_failed_actions()",
        "SELECT * FROM cdc_migrations",
        "CREATE TRIGGER forge AFTER INSERT ON own.mine FOR EACH ROW EXECUTE FUNCTION capture_entity_change()",
        "CREATE TRIGGER twice AFTER INSERT ON cortex_projects.tasks EXECUTE FUNCTION capture_entity_change()",
    ],
)
def test_that_role_can_neither_read_nor_write_nor_forge_changes(writer: psycopg.Connection, statement: str):
    assert refusal(writer, statement).sqlstate == psycopg.errors.InsufficientPrivilege.sqlstate


def test_the_trigger_function_cannot_be_called_at_all(writer: psycopg.Connection):
    assert refusal(writer, "SELECT capture_entity_change()").sqlstate in ("42501", "0A000")


def test_objects_of_the_writers_own_cannot_slip_into_the_function(
    documented: psycopg.Connection, writer: psycopg.Connection
):
    """The owner's rights must not run what a writer put first in its search_path or into its temporary schema."""
    trap = "RETURNS {} LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$"
    for place in ("own", "pg_temp"):
        writer.execute(f"CREATE FUNCTION {place}.to_jsonb(anyelement) {trap.format('jsonb')}".encode())
        writer.execute(f"CREATE FUNCTION {place}.now() {trap.format('timestamptz')}".encode())
    writer.execute("CREATE TEMP TABLE entity_changes (table_name text)")
    writer.execute("CREATE TEMP TABLE pg_class (oid oid)")
    writer.execute("SET search_path = own, pg_temp, public, pg_catalog")
    writer.execute("INSERT INTO cortex_projects.tasks VALUES (pg_catalog.gen_random_uuid(), 'x')")
    assert len(changes(documented)) == 1


@pytest.mark.parametrize("value", [r'{"a": "\u0000"}', r'{"a": "\ud800"}', '{"a": 1e200000}'])
def test_json_that_jsonb_cannot_hold_is_left_out_with_a_marker_and_the_write_goes_on(
    outbox_db: psycopg.Connection, value: str
):
    outbox_db.execute("CREATE TABLE d (id int PRIMARY KEY, j json, v int)")
    capture(outbox_db, "d")
    outbox_db.execute("INSERT INTO d VALUES (1, %s, 1)", [value])
    outbox_db.execute("UPDATE d SET v = 2; DELETE FROM d")
    found = changes(outbox_db)
    assert [(row["operation"], row["entity_id"]) for row in found] == [
        ("INSERT", "1"),
        ("UPDATE", "1"),
        ("DELETE", "1"),
    ]
    for side in (found[0]["new_data"], found[1]["old_data"], found[1]["new_data"], found[2]["old_data"]):
        assert set(side) == {"id", "j", "v"}
        assert side["j"].keys() == {"cdc:omitted"}
        assert value not in repr(side)


def test_what_is_left_out_is_not_converted(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE DOMAIN present AS text NOT NULL")
    outbox_db.execute("CREATE TABLE d (id int PRIMARY KEY, j json, big bytea, p present, v int)")
    capture(outbox_db, "d", """'', '{"exclude": ["j", "big", "p"]}'""")
    for statement in (
        r"""INSERT INTO d VALUES (1, '{"a": "\u0000"}', decode(repeat('00', 140 * 1024 * 1024), 'hex'), 'x', 1)""",
        "UPDATE d SET v = 2",
        "DELETE FROM d",
    ):
        outbox_db.execute(statement.encode())
    assert [row["new_data"] or row["old_data"] for row in changes(outbox_db)] == [
        {"id": 1, "v": 1}, {"id": 1, "v": 2}, {"id": 1, "v": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["decode(repeat('00', 140 * 1024 * 1024), 'hex')", "ARRAY[repeat('x', 135000000), repeat('y', 135000000)]"]
)
def test_a_value_larger_than_json_holds_is_left_out_with_a_marker(outbox_db: psycopg.Connection, value: str):
    outbox_db.execute(f"CREATE TABLE d AS SELECT 1 AS id, {value} AS big, 1 AS v LIMIT 0".encode())
    capture(outbox_db, "d")
    outbox_db.execute(f"INSERT INTO d SELECT 1, {value}, 1".encode())
    outbox_db.execute("UPDATE d SET v = 2")
    inserted, updated = changes(outbox_db)
    assert inserted["new_data"]["big"].keys() == updated["old_data"]["big"].keys() == {"cdc:omitted"}
    assert (updated["entity_id"], updated["new_data"]["v"]) == ("1", 2)


def test_values_that_are_too_large_together_leave_room_to_those_that_fit(outbox_db: psycopg.Connection):
    outbox_db.execute("CREATE TABLE d (a text, b text, c text, id int)")
    capture(outbox_db, "d")
    outbox_db.execute(
        "INSERT INTO d SELECT repeat('a', n), repeat('b', n), repeat('c', n), 1 FROM (VALUES (90000000)) AS v(n)"
    )
    sizes = "SELECT length(new_data ->> 'a'), new_data -> 'b', new_data -> 'c', entity_id FROM entity_changes"
    omitted = {"cdc:omitted": "too large"}
    assert outbox_db.execute(sizes.encode()).fetchall() == [(90_000_000, omitted, omitted, "1")]


def test_a_cast_that_fails_costs_its_value_and_no_write(outbox_db: psycopg.Connection):
    outbox_db.execute(
        "CREATE TYPE mood AS ENUM ('x');"
        "CREATE FUNCTION fail(mood) RETURNS json LANGUAGE plpgsql AS $$ BEGIN ASSERT false; END $$;"
        "CREATE CAST (mood AS json) WITH FUNCTION fail(mood); CREATE TABLE d (id int, m mood)"
    )
    capture(outbox_db, "d")
    outbox_db.execute("INSERT INTO d VALUES (1, 'x')")
    assert changes(outbox_db)[0]["new_data"] == {"id": 1, "m": {"cdc:omitted": "cannot be JSON: P0004"}}


def test_a_key_or_type_that_is_too_long_is_replaced_by_its_head_and_a_hash(outbox_db: psycopg.Connection):
    long = ["\N{SNOWMAN}" * 5_000 + end for end in ("a", "b")]
    outbox_db.execute("CREATE TABLE d (id text)")
    capture(outbox_db, "d", f"'{'t' * 2000}'")
    for key in (*long, long[0]):
        outbox_db.execute("INSERT INTO d VALUES (%s)", [key])
        outbox_db.execute("SELECT publish_change(%s, %s)", ["t" * 2000, key])
    found = changes(outbox_db)
    assert len({row["entity_type"] for row in found}) == 1
    assert [row["entity_id"] for row in found[::2]] == [row["entity_id"] for row in found[1::2]]
    assert found[0]["entity_id"] != found[2]["entity_id"]
    assert found[0]["entity_id"] == found[4]["entity_id"]
    assert max(len(row[name].encode()) for row in found for name in ("entity_id", "entity_type")) < 500
    assert found[0]["entity_id"].startswith("\N{SNOWMAN}" * 100 + "...sha256:")
    assert found[0]["new_data"] == {"id": long[0]}


ODD_SETTINGS = [
    ("datestyle", ("SQL, DMY", "Postgres, MDY", "German", "ISO, DMY")),
    ("timezone", ("Asia/Tokyo", "America/New_York")),
    ("intervalstyle", ("sql_standard", "iso_8601", "postgres_verbose")),
    ("extra_float_digits", ("-15", "3")),
    ("bytea_output", ("escape",)),
    ("quote_all_identifiers", ("on",)),
    ("lc_monetary", ("C.UTF-8", "POSIX")),
    ("search_path", ("public, pg_catalog", "")),
    ("xmlbinary", ("hex",)),
    ("xmloption", ("document",)),
    ("array_nulls", ("off",)),
    ("standard_conforming_strings", ("off",)),
    ("transform_null_equals", ("on",)),
]
SHAPED = [
    "daterange '[2026-01-02,2026-02-03)'", "tsrange '[2026-01-02 03:04,2026-02-03)'",
    "tstzrange '[2026-01-02 03:04+00,2026-02-03 00:00+00)'", "datemultirange '{[2026-01-02,2026-02-03)}'",
    "date '2026-01-02'", "timestamp '2026-01-02 03:04'", "timestamptz '2026-01-02 03:04+00'", "interval '1 day 02:03'",
    "float8 '0.1'", "float4 '0.1'", "point '(0.1,0.2)'", "bytea '\\xff00'", "money '1234.50'", "regclass 'pg_class'",
    "regtype 'int'", "ARRAY[date '2026-01-02']", "ARRAY[daterange '[2026-01-02,2026-02-03)']", "xml '<a/>'",
    "interval '-1 year'", "ARRAY[NULL, 1]",
]  # fmt: skip


@pytest.mark.parametrize("value", SHAPED)
def test_a_value_has_one_key_and_one_text_under_every_setting_of_its_writer(outbox_db: psycopg.Connection, value: str):
    outbox_db.execute(f"CREATE TABLE shaped AS SELECT {value} AS id, 0 AS n".encode())
    capture(outbox_db, "shaped")
    for name, odd in (("application_name", ("x",)), *ODD_SETTINGS):
        for setting in odd:
            with outbox_db.transaction():
                outbox_db.execute("SELECT set_config(%s, %s, true)", [name, setting])
                outbox_db.execute("UPDATE public.shaped SET n = n + 1")
    asked = "SELECT count(DISTINCT (entity_id, new_data ->> 'id')), count(*) FROM entity_changes"
    assert outbox_db.execute(asked).fetchone() == (1, 1 + sum(len(odd) for _, odd in ODD_SETTINGS))
