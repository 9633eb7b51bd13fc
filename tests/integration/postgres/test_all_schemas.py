"""The same table in many schemas: `cdc track --all-schemas`, keys that say the schema, types that do."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import unquote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc import testing
from cdc.postgres import source_tables
from tests.commands import done, invoke, refused, tracked
from tests.integration.postgres.test_tracking_again import captured, payloads

_TENANTS = ("tenant_1", "tenant_2", "acme")
_EACH = ("--all-schemas", "tenant_*")


def create(
    db: psycopg.Connection, *schemas: str, table: str = "orders (id int PRIMARY KEY, total int, card text)"
) -> None:
    for name in schemas:
        db.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(name)))
        db.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(name)))
        db.execute(f"CREATE TABLE {table}".encode())
        db.execute("RESET search_path")


def insert(db: psycopg.Connection, *schemas: str, row: str = "1, 10, '4111'") -> None:
    for name in schemas:
        db.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier(name, "orders"), sql.SQL(row)))


@pytest.fixture
def tenants(outbox_db: psycopg.Connection) -> psycopg.Connection:
    create(outbox_db, *_TENANTS)
    return outbox_db


# --- which tables --------------------------------------------------------------------------------------------------


def test_the_table_of_each_schema_that_matches_is_tracked_and_no_other(
    outbox: str, tenants: psycopg.Connection
) -> None:
    create(tenants, "tenant_3", table="customers (id int PRIMARY KEY)")
    tenants.execute("CREATE SCHEMA tenant_4; CREATE VIEW tenant_4.orders AS SELECT 1 AS id")
    said = done(outbox, "track", "orders", *_EACH, "--schema-in-key", "--type", "order", "--exclude", "card")
    assert said.splitlines() == [
        "plan: 2 tables: 2 new",
        "  tenant_1.orders new: insert,update,delete; key {schema}/id; type order; without card",
        "  tenant_2.orders new: insert,update,delete; key {schema}/id; type order; without card",
        "tenant_1.orders is tracked now: insert,update,delete; key {schema}/id; type order; without card",
        "tenant_2.orders is tracked now: insert,update,delete; key {schema}/id; type order; without card",
        "2 tables: 2 new",
    ]
    insert(tenants, *_TENANTS)
    assert captured(tenants) == [("order", "INSERT", "tenant_1/1"), ("order", "INSERT", "tenant_2/1")]
    assert payloads(tenants) == [{"id": 1, "total": 10}] * 2


def test_tracking_them_again_changes_nothing_and_says_so(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", *_EACH, "--schema-in-key", "--when", "NEW.total > 0", "--on", "insert")
    before = tenants.execute("SELECT oid, xmin FROM pg_trigger ORDER BY 1").fetchall()
    assert done(outbox, "track", "orders", *_EACH).splitlines() == [
        "plan: 2 tables: 2 the same", "2 tables: 2 the same",
    ]  # fmt: skip
    assert tenants.execute("SELECT oid, xmin FROM pg_trigger ORDER BY 1").fetchall() == before


def test_what_was_new_changed_and_the_same_is_said_of_each(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "tenant_1.orders", "--schema-in-key", "--exclude", "card")
    done(outbox, "track", "tenant_2.orders", "--schema-in-key")
    arguments = ("track", "orders", "--all-schemas", "*", "--exclude", "card", "--schema-in-key")
    said = done(outbox, *arguments)
    assert said.startswith("plan: 3 tables: 1 new, 2 changed\n")  # tenant_1: the pattern is kept with it
    found = json.loads(done(outbox, *arguments, "--json").partition("\n")[2])
    assert [(each["tracked"]["table"], each["changed"]) for each in found["tables"]] == [
        ("acme.orders", False), ("tenant_1.orders", False), ("tenant_2.orders", False),
    ]  # fmt: skip
    assert found["failed"] == []
    assert {each["all_schemas"] for each in tracked(outbox).values()} == {"*"}


def test_a_table_that_comes_later_is_named_by_the_doctor_and_gets_the_options_of_the_others(
    outbox: str, tenants: psycopg.Connection
) -> None:
    done(outbox, "track", "orders", *_EACH, "--type", "{schema}.order", "--exclude", "card", "--on", "insert,delete")
    assert "ok      all-schemas" in invoke(outbox, "doctor", "--no-stream").output
    create(tenants, "tenant_9", "other")
    said = invoke(outbox, "doctor", "--no-stream").output
    assert "tenant_9.orders is not tracked, and its schema matches tenant_*" in said
    assert "cdc track orders --all-schemas 'tenant_*'" in said
    assert "plan: 3 tables: 1 new, 2 the same" in done(outbox, "track", "orders", *_EACH)
    insert(tenants, "tenant_9", "other")
    assert captured(tenants) == [("tenant_9.order", "INSERT", "1")]
    assert payloads(tenants) == [{"id": 1, "total": 10}]
    assert "ok      all-schemas" in invoke(outbox, "doctor", "--no-stream").output


def test_a_new_table_gets_no_option_in_which_the_others_differ(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "tenant_1.orders", "--schema-in-key", "--exclude", "card")
    done(outbox, "track", "acme.orders", "--schema-in-key")
    said = refused(outbox, "track", "orders", "--all-schemas", "*")
    assert "tenant_2.orders would be tracked as acme.orders and tenant_1.orders are, which differ in --exclude" in said
    assert "tenant_2.orders" not in tracked(outbox)
    done(outbox, "track", "orders", "--all-schemas", "*", "--exclude", "card")


def test_a_new_table_gets_no_condition_that_is_not_named(outbox: str, tenants: psycopg.Connection) -> None:
    """A tenant may have written it, and its functions would run with the rights of the other tenants' writers."""
    done(outbox, "track", "tenant_1.orders", "--schema-in-key", "--on", "insert", "--when", "NEW.total > 0")
    said = refused(outbox, "track", "orders", *_EACH)
    assert "tenant_2.orders would be tracked as tenant_1.orders is, with its WHEN (new.total > 0)" in said
    assert "tenant_2.orders" not in tracked(outbox)
    done(outbox, "track", "orders", *_EACH, "--when", "NEW.total > 0")
    assert tracked(outbox)["tenant_2.orders"]["when"] == "new.total > 0"


def test_the_options_of_one_stay_when_it_is_tracked_alone(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", *_EACH, "--type", "{schema}.order", "--schema-in-key", "--exclude", "card")
    before = tracked(outbox)
    assert "was tracked so already" in done(outbox, "track", "tenant_1.orders")
    done(outbox, "track", "tenant_1.orders", "--on", "insert,update")
    after = tracked(outbox)
    assert after["tenant_1.orders"] == {**before["tenant_1.orders"], "operations": ["insert", "update"]}
    said = refused(outbox, "track", "tenant_1.orders", "--no-schema-in-key")
    assert "its key {schema}/id would become id" in said
    assert "its key id would become {schema}/id" in refused(
        *_prepared(outbox, tenants), "track", "acme.orders", "--schema-in-key"
    )


def _prepared(outbox: str, db: psycopg.Connection) -> tuple[str]:
    db.execute("DROP TABLE tenant_1.orders, tenant_2.orders")
    done(outbox, "track", "acme.orders")
    return (outbox,)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("*", {"tenant_1", "tenant_2", "acme", "Tenant_3", "tenantx1"}),
        ("tenant_*", {"tenant_1", "tenant_2"}),
        ("tenant_?", {"tenant_1", "tenant_2"}),
        ("tenant?1", {"tenant_1", "tenantx1"}),
        ("*enant_[!2]", {"tenant_1", "Tenant_3"}),
        ("acme", {"acme"}),
    ],
)
def test_a_pattern_has_the_wildcards_of_a_shell_and_knows_capitals(
    outbox: str, tenants: psycopg.Connection, pattern: str, matching: set[str]
) -> None:
    create(tenants, "Tenant_3", "tenantx1")
    done(outbox, "track", "orders", "--all-schemas", pattern, "--schema-in-key")
    assert {name.split(".")[0].strip('"') for name in tracked(outbox)} == matching


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("orders", "--all-schemas", "tenant_%"), 4, "any characters are *"),
        (("orders", "--all-schemas", ""), 4, "no schema that matches"),
        (("orders", "--all-schemas", "x*"), 4, "it is in acme, tenant_1, tenant_2"),
        (("order", "--all-schemas", "*"), 4, "no schema has one"),
        (("tenant_1.orders", "--all-schemas", "*"), 2, "says a schema, and --all-schemas another"),
        (('"orders', "--all-schemas", "*"), 2, "is not the name of a table"),
    ],
)
def test_what_matches_nothing_is_refused(
    outbox: str, tenants: psycopg.Connection, arguments: tuple[str, ...], code: int, said: str
) -> None:
    for command in ("track", "untrack"):
        result = invoke(outbox, command, *arguments)
        assert (result.exit_code, said in result.output) == (code, True), result.output
    assert tracked(outbox) == {}


def test_a_name_is_read_as_sql_reads_it(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox_db, "a", "b", table='"Order Line" ("Id" int PRIMARY KEY)')
    create(outbox_db, "a", table="orders (id int PRIMARY KEY)")
    done(outbox, "track", '"Order Line"', "--all-schemas", "*", "--schema-in-key")
    done(outbox, "track", "ORDERS", "--all-schemas", "*")
    assert set(tracked(outbox)) == {'a."Order Line"', 'b."Order Line"', "a.orders"}
    create(outbox_db, "it's", table='"Order Line" ("Id" int PRIMARY KEY)')
    said = invoke(outbox, "doctor", "--no-stream").output
    assert """"it's"."Order Line" is not tracked""" in said
    assert """cdc track '"Order Line"' --all-schemas '*'""" in said


# --- all or none, one by one ---------------------------------------------------------------------------------------


def test_what_one_table_cannot_have_is_refused_before_any_is_changed(outbox: str, tenants: psycopg.Connection) -> None:
    create(tenants, "tenant_3", table="orders (number int)")
    create(tenants, "tenant_4", table="orders (number int)")
    said = refused(outbox, "track", "orders", *_EACH, "--schema-in-key")
    assert "tenant_3.orders has neither a column id nor a primary key" in said
    assert "and so for 1 more (tenant_4.orders); nothing was changed" in said
    assert tracked(outbox) == {}


def test_a_condition_that_the_server_refuses_ends_it_at_the_first(outbox: str, tenants: psycopg.Connection) -> None:
    said = refused(outbox, "track", "orders", *_EACH, "--schema-in-key", "--when", "NEW.nothing > 0")
    assert "the server refuses --when for tenant_1.orders" in said
    assert "tenant_2.orders:" not in said
    assert tracked(outbox) == {}


def test_a_table_that_stays_locked_is_left_and_the_others_are_tracked(
    outbox: str, tenants: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_tables, "LOCK_TIMEOUT", "50ms")
    done(outbox, "track", "acme.orders", "--schema-in-key")
    with psycopg.connect(outbox) as busy:
        busy.execute("LOCK TABLE tenant_1.orders IN ROW EXCLUSIVE MODE")
        result = invoke(outbox, "track", "orders", *_EACH, "--schema-in-key")
        assert result.exit_code == 1
        assert "left as it was: tenant_1.orders: " in result.output
        assert "stayed locked for 50ms" in result.output
        assert "1 table is not tracked so; the others are" in result.output
        assert set(tracked(outbox)) == {"acme.orders", "tenant_2.orders"}
    assert done(outbox, "track", "orders", *_EACH, "--schema-in-key").endswith("2 tables: 1 new, 1 the same\n")


def test_it_is_printed_for_a_migration_and_nothing_is_changed(outbox: str, tenants: psycopg.Connection) -> None:
    arguments = ("track", "orders", *_EACH, "--type", "{schema}.order", "--schema-in-key", "--exclude", "card")
    printed = invoke(outbox, *arguments, "--print")
    assert (printed.exit_code, tracked(outbox)) == (0, {})
    tenants.execute(printed.stdout.encode())
    by_script = tracked(outbox)
    assert set(by_script) == {"tenant_1.orders", "tenant_2.orders"}
    assert "plan: 2 tables: 2 the same" in done(outbox, *arguments)
    assert tracked(outbox) == by_script


def test_untrack_takes_a_pattern_too(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--all-schemas", "*", "--schema-in-key")
    said = done(outbox, "untrack", "orders", *_EACH)
    assert said.splitlines() == [
        "dropped trigger #cdc_capture on tenant_1.orders", "dropped trigger #cdc_capture on tenant_2.orders",
    ]  # fmt: skip
    assert set(tracked(outbox)) == {"acme.orders"}
    assert "no orders is tracked in a schema that matches tenant_*" in refused(outbox, "untrack", "orders", *_EACH)


def test_untrack_leaves_a_table_that_stays_locked(
    outbox: str, tenants: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_tables, "LOCK_TIMEOUT", "50ms")
    done(outbox, "track", "orders", *_EACH, "--schema-in-key")
    with psycopg.connect(outbox) as busy:
        busy.execute("LOCK TABLE tenant_1.orders IN ROW EXCLUSIVE MODE")
        said = refused(outbox, "untrack", "orders", *_EACH)
    assert "1 table is not untracked; the others are" in said
    assert set(tracked(outbox)) == {"tenant_1.orders"}


# --- keys ----------------------------------------------------------------------------------------------------------

_NAMES = ("a", "a/b", "a%2Fb", "a%b", "a/", "%", "/", "A b", 'quo"te', "it's", "größe", "b/1", "é/%2F", "x" * 63)


def test_the_key_says_any_schema_exactly(outbox: str, outbox_db: psycopg.Connection) -> None:
    create(outbox_db, *_NAMES, table="orders (id text PRIMARY KEY)")
    done(outbox, "track", "orders", "--all-schemas", "*", "--schema-in-key")
    ids = ("1", "b/1", "", "/", "%")
    for name in _NAMES:
        for each in ids:
            insert(outbox_db, name, row=sql.Literal(each).as_string(outbox_db))
    rows = outbox_db.execute("SELECT entity_id, table_schema, new_data ->> 'id' FROM entity_changes").fetchall()
    assert len({key for key, _, _ in rows}) == len(_NAMES) * len(ids)
    for key, schema, row in rows:
        prefix, _, rest = key.partition("/")
        assert (unquote(prefix), rest) == (schema, row)


def test_an_update_that_changes_the_key_a_delete_and_a_key_of_several_columns_say_the_schema(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox_db, "t", table="orders (a int, b text, PRIMARY KEY (a, b))")
    create(outbox_db, "t", table="lines (id int PRIMARY KEY)")
    done(outbox, "track", "orders", "--all-schemas", "t", "--schema-in-key")
    done(outbox, "track", "t.lines", "--schema-in-key")
    outbox_db.execute("INSERT INTO t.orders VALUES (1, 'x'); UPDATE t.orders SET a = 2; DELETE FROM t.orders")
    outbox_db.execute("INSERT INTO t.lines VALUES (1); UPDATE t.lines SET id = 2; UPDATE t.lines SET id = id")
    found = outbox_db.execute(
        "SELECT operation, entity_id, metadata ->> 'moved_to', metadata ->> 'moved_from'"
        " FROM entity_changes ORDER BY seq"
    ).fetchall()
    assert found == [
        ("INSERT", 't/[1, "x"]', None, None), ("DELETE", 't/[1, "x"]', 't/[2, "x"]', None),
        ("INSERT", 't/[2, "x"]', None, 't/[1, "x"]'), ("DELETE", 't/[2, "x"]', None, None),
        ("INSERT", "t/1", None, None), ("DELETE", "t/1", "t/2", None), ("INSERT", "t/2", None, "t/1"),
        ("UPDATE", "t/2", None, None),
    ]  # fmt: skip


def test_a_key_that_is_too_long_with_its_schema_is_its_head_and_a_hash(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox_db, "tenant_1", "tenant_2", table="orders (id text PRIMARY KEY)")
    done(outbox, "track", "orders", *_EACH, "--schema-in-key")
    for length in (900, 995, 5_000):
        insert(outbox_db, "tenant_1", "tenant_2", row=f"'{'k' * length}'")
    keys = [key for _, _, key in captured(outbox_db)]
    assert [len(key) <= 1_000 for key in keys] == [True] * 6
    assert len(set(keys)) == 6
    assert {key.partition("/")[0] for key in keys} == {"tenant_1", "tenant_2"}


def test_a_row_of_a_partition_has_the_schema_of_the_partitioned_table(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    create(outbox_db, "tenant_1", table="orders (id int PRIMARY KEY) PARTITION BY LIST (id)")
    outbox_db.execute(
        "CREATE SCHEMA tenant_parts; CREATE TABLE tenant_parts.orders PARTITION OF tenant_1.orders FOR VALUES IN (1, 2)"
    )
    done(outbox, "track", "orders", *_EACH, "--schema-in-key")
    assert set(tracked(outbox)) == {"tenant_1.orders"}
    insert(outbox_db, "tenant_1", row="1")
    outbox_db.execute("UPDATE tenant_1.orders SET id = 2")
    assert [key for _, _, key in captured(outbox_db)] == ["tenant_1/1", "tenant_1/1", "tenant_1/2"]
    assert "ok      all-schemas" in invoke(outbox, "doctor", "--no-stream").output


def test_the_schema_stands_in_the_key_beside_every_other_option(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", *_EACH, "--type", "order", "--schema-in-key", "--handled", "--columns", "id,total",
         "--key", "total,id")  # fmt: skip
    with tenants.transaction():
        tenants.execute("SET LOCAL cdc.handled = 'order'")
        tenants.execute("SET LOCAL cdc.cause = '00000000-0000-4000-8000-000000000001,3'")
        insert(tenants, "tenant_1")
    insert(tenants, "tenant_2")
    found = tenants.execute(
        "SELECT entity_id, processed, depth, shard = hashtext(entity_id) & 63 FROM entity_changes ORDER BY seq"
    ).fetchall()
    assert found == [("tenant_1/[10, 1]", True, 4, True), ("tenant_2/[10, 1]", False, 0, True)]


def test_an_option_that_says_no_is_none(outbox: str, tenants: psycopg.Connection) -> None:
    tenants.execute(
        "CREATE TRIGGER mine AFTER INSERT ON acme.orders FOR EACH ROW"
        """ EXECUTE FUNCTION capture_entity_change('order', '{"schema_in_key": false}')"""
    )
    insert(tenants, "acme")
    assert captured(tenants) == [("order", "INSERT", "1")]


def test_a_schema_that_is_renamed_changes_the_key_and_not_the_type(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", *_EACH, "--type", "{schema}.order", "--schema-in-key")
    tenants.execute("ALTER SCHEMA tenant_1 RENAME TO tenant_one")
    insert(tenants, "tenant_one")
    assert captured(tenants) == [("tenant_1.order", "INSERT", "tenant_one/1")]
    assert "was tracked so already" in done(outbox, "track", "tenant_one.orders")


# --- one key, one row ----------------------------------------------------------------------------------------------

_BY_HAND = "CREATE TRIGGER mine AFTER INSERT ON tenant_1.orders FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
_SHARED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "by their name": ((), ()),
    "by a type that both name": (("--type", "order"), ("--type", "order")),
    "by a type that is the name": ((), ("--type", "orders")),
    "by a key of which one says the schema": ((), ("--schema-in-key",)),
    "by a key of which the other says the schema": (("--schema-in-key",), ()),
}


@pytest.mark.parametrize("options", _SHARED.values(), ids=_SHARED)
def test_the_same_table_in_two_schemas_is_refused_under_one_type(
    outbox: str, tenants: psycopg.Connection, options: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    done(outbox, "track", "tenant_1.orders", *options[0])
    result = invoke(outbox, "track", "tenant_2.orders", *options[1])
    assert result.exit_code == 5
    assert "tenant_2.orders and tenant_1.orders would both have the type order" in result.output
    for way in ("--schema-in-key", "--type '{schema}.orders'", "--shared-key"):
        assert way in result.output
    assert set(tracked(outbox)) == {"tenant_1.orders"}
    assert "was tracked so already" in done(outbox, "track", "tenant_1.orders")


def test_all_schemas_without_a_way_to_tell_them_apart_is_refused(outbox: str, tenants: psycopg.Connection) -> None:
    said = refused(outbox, "track", "orders", *_EACH, "--type", "order")
    assert "tenant_1.orders and tenant_2.orders would both have the type order" in said
    assert tracked(outbox) == {}
    create(tenants, "lone", table="invoices (id int PRIMARY KEY)")
    done(outbox, "track", "invoices", "--all-schemas", "*")


def test_a_trigger_made_by_hand_counts(outbox: str, tenants: psycopg.Connection) -> None:
    tenants.execute(_BY_HAND)
    assert "tenant_2.orders and tenant_1.orders" in refused(outbox, "track", "tenant_2.orders")
    tenants.execute("DROP TRIGGER mine ON tenant_1.orders")
    done(outbox, "track", "tenant_2.orders")
    tenants.execute(_BY_HAND)
    assert "was tracked so already" in done(outbox, "track", "tenant_2.orders")
    assert "mine" in done(outbox, "track", "tenant_1.orders", "--replace"), "it shares no more than it did"


def test_a_key_that_is_one_thing_in_all_schemas_may_be_shared(outbox: str, tenants: psycopg.Connection) -> None:
    tenants.execute(
        "CREATE TRIGGER mine AFTER INSERT ON tenant_1.orders FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )  # without a type, it has that of its name
    assert "share the type orders" in done(outbox, "track", "tenant_2.orders", "--shared-key")
    assert "cdc track TABLE --shared-key" in invoke(outbox, "doctor", "--no-stream").output
    assert "Warning" not in done(outbox, "track", "tenant_1.orders", "--shared-key", "--replace")
    assert "ok      shared-types" in invoke(outbox, "doctor", "--no-stream").output
    assert "Warning" not in done(outbox, "track", "orders", *_EACH)
    insert(tenants, "tenant_1", "tenant_2")
    assert captured(tenants) == [("orders", "INSERT", "1")] * 2


def test_types_or_keys_that_say_the_schema_are_not_warned_of(outbox: str, tenants: psycopg.Connection) -> None:
    assert "Warning" not in done(outbox, "track", "orders", *_EACH, "--schema-in-key")
    assert "Warning" not in done(outbox, "track", "acme.orders", "--type", "{schema}.order")
    assert "ok      shared-types" in invoke(outbox, "doctor", "--no-stream").output
    assert tracked(outbox)["acme.orders"]["entity_type"] == "acme.order"


def test_tables_of_other_names_may_share_a_type_that_they_name(outbox: str, tenants: psycopg.Connection) -> None:
    create(tenants, "tenant_1", table="old_orders (id int PRIMARY KEY)")
    done(outbox, "track", "tenant_1.orders", "--type", "order")
    assert "Warning" not in done(outbox, "track", "tenant_1.old_orders", "--type", "order")


def test_keys_change_in_all_tables_at_once_with_replace(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", *_EACH, "--type", "order", "--shared-key")
    assert "its key id would become {schema}/id" in refused(outbox, "track", "orders", *_EACH, "--schema-in-key")
    done(outbox, "track", "orders", *_EACH, "--schema-in-key", "--replace")
    insert(tenants, "tenant_1", "tenant_2")
    assert captured(tenants) == [("order", "INSERT", "tenant_1/1"), ("order", "INSERT", "tenant_2/1")]


# --- what works on them --------------------------------------------------------------------------------------------


def test_a_handler_gets_the_schema_and_the_row_of_each_tenant(outbox: str, tenants: psycopg.Connection) -> None:
    done(outbox, "track", "orders", *_EACH, "--type", "order", "--schema-in-key")
    insert(tenants, "tenant_1", "tenant_2")
    tenants.execute("SELECT publish_change('order', 'tenant_1/1', 'UPDATE', '{\"id\": 1}')")
    router, seen = cdc.Router(), list[tuple[str | None, str, str, int]]()

    @router.on("order")
    async def handle(change: cdc.Change) -> None:
        seen.append((change.table_schema, change.table, change.entity_id, change.new["id"]))

    asyncio.run(testing.drain(outbox, router))
    assert [each for each in seen if each[2] == "tenant_1/1"] == [
        ("tenant_1", "orders", "tenant_1/1", 1), (None, "order", "tenant_1/1", 1),
    ]  # fmt: skip
    assert [each for each in seen if each[2] != "tenant_1/1"] == [("tenant_2", "orders", "tenant_2/1", 1)]


def test_rows_that_are_there_and_changes_that_were_are_found_by_the_key(
    outbox: str, tenants: psycopg.Connection
) -> None:
    insert(tenants, "tenant_1", "tenant_2")
    done(outbox, "track", "orders", *_EACH, "--type", "order", "--schema-in-key")
    for name in ("tenant_1", "tenant_2"):
        done(outbox, "backfill", f"{name}.orders", "--backlog", "100000")
    assert captured(tenants) == [("order", "READ", "tenant_1/1"), ("order", "READ", "tenant_2/1")]
    found = json.loads(done(outbox, "outbox", "list", "--state", "fresh", "--key", "tenant_1/1", "--json"))["changes"]
    assert [each["entity_id"] for each in found] == ["tenant_1/1"]
    tenants.execute("UPDATE entity_changes SET processed = true, processed_at = now()")
    done(outbox, "outbox", "replay", "--type", "order", "--key", "tenant_2/1", "--yes")
    assert captured(tenants)[2:] == [("order", "READ", "tenant_2/1")]


def test_a_role_that_is_granted_trigger_alone_tracks_them(outbox: str, tenants: psycopg.Connection) -> None:
    tenants.execute("CREATE ROLE all_schemas_tester LOGIN; GRANT SELECT ON cdc_migrations TO all_schemas_tester")
    try:
        for name in ("tenant_1", "tenant_2"):
            tenants.execute(f"GRANT USAGE ON SCHEMA {name} TO all_schemas_tester".encode())
            tenants.execute(f"GRANT TRIGGER ON {name}.orders TO all_schemas_tester".encode())
        tenants.execute("GRANT EXECUTE ON FUNCTION capture_entity_change() TO all_schemas_tester")
        dsn = make_conninfo(outbox, user="all_schemas_tester")
        done(dsn, "track", "orders", *_EACH, "--schema-in-key")
        result = invoke(dsn, "track", "orders", "--all-schemas", "*", "--schema-in-key")
        assert "left as it was: acme.orders" in result.output
        assert result.exit_code == 1
    finally:
        tenants.execute("DROP OWNED BY all_schemas_tester CASCADE; DROP ROLE all_schemas_tester")


# --- an older function ---------------------------------------------------------------------------------------------


def test_a_function_of_an_earlier_version_is_refused_the_key_and_goes_on_with_what_it_has(
    outbox: str, tenants: psycopg.Connection
) -> None:
    done(outbox, "track", "acme.orders", "--type", "order", "--exclude", "card")
    tenants.execute(
        "DO $$BEGIN EXECUTE replace(replace("
        "pg_get_functiondef('capture_entity_change()'::regprocedure), ',schema_in_key}', '}'), '''schema_in_key''',"
        " '''none''');END$$"
    )
    assert "which does not know the option schema_in_key" in refused(
        outbox, "track", "orders", *_EACH, "--schema-in-key"
    )
    insert(tenants, "acme")
    before = tracked(outbox)
    done(outbox, "db", "upgrade")
    assert tracked(outbox) == before
    assert "tenant_1.orders and acme.orders" in refused(
        outbox, "track", "orders", *_EACH, "--type", "order", "--schema-in-key"
    )
    done(outbox, "track", "orders", *_EACH, "--type", "sale", "--schema-in-key")
    insert(tenants, "tenant_1")
    tenants.execute("UPDATE acme.orders SET total = 2")
    assert captured(tenants) == [
        ("order", "INSERT", "1"), ("sale", "INSERT", "tenant_1/1"), ("order", "UPDATE", "1"),
    ]  # fmt: skip
