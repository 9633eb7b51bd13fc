"""The function that is made for a table captures what capture_entity_change() does, whatever changes under it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.postgres import migrations, table_functions, tracking
from cdc.postgres.table_capture import function_name
from cdc.postgres.tracked_tables import Truncate
from cdc.postgres.tracking import track, untrack
from tests.commands import done, invoke

pytestmark = pytest.mark.server

TABLE = "CREATE TABLE orders (id int PRIMARY KEY, line int, note text, card text, j json, at timestamptz, {})"
_ROW = "(1, 2, 'a', 'secret', '{\"b\": 1}', '2026-01-02 03:04:05Z')"
_ALL = (f"INSERT INTO orders VALUES {_ROW}", "UPDATE orders SET note = 'b'", "DELETE FROM orders")
_SAID = """
CREATE FUNCTION said(mood) RETURNS json LANGUAGE plpgsql
AS $$BEGIN PERFORM set_config('search_path', 'public', false); RETURN '1'; END$$
"""


def redefined(old: str, new: str) -> str:
    """Replaces the trigger by hand, with a part of its definition changed."""
    return (
        "DO $$ BEGIN EXECUTE replace(replace((SELECT pg_get_triggerdef(oid) FROM pg_trigger"
        f" WHERE tgrelid = 'orders'::regclass), '{old}', '{new}'), 'CREATE ', 'CREATE OR REPLACE '); END $$"
    )


def captured(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    """All but what is another each time; of a time its zone stays."""
    rows = db.execute(
        "SELECT table_schema, table_name, operation, entity_id, entity_type, old_data, new_data,"
        " metadata || CASE WHEN metadata ? 'timestamp' THEN"
        " jsonb_build_object('timestamp', right(metadata ->> 'timestamp', 6)) ELSE '{}' END,"
        " caused_by, depth, processed, shard, last_error FROM entity_changes ORDER BY seq"
    ).fetchall()
    db.execute("DELETE FROM entity_changes")
    return rows


def function_of(db: psycopg.Connection, table: str = "orders") -> str:
    [(name,)] = db.execute(
        "SELECT p.proname::text FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid"
        " WHERE t.tgrelid = %s::regclass",
        [table],
    ).fetchall()
    return str(name)


def made(db: psycopg.Connection) -> list[str]:
    return [
        name for (name,) in db.execute("SELECT proname::text FROM pg_proc WHERE proname LIKE 'capture\\_table\\_%'")
    ]


def doctor(dsn: str) -> str:
    return invoke(dsn, "doctor", "--no-stream").output.replace("public.", "")


def source(db: psycopg.Connection) -> str:
    [(text,)] = db.execute("SELECT prosrc FROM pg_proc WHERE proname = %s", [function_of(db)]).fetchall()
    return str(text)


def proof(db: psycopg.Connection) -> bytes:
    """The query of whether the table is as its function was made for."""
    asked = re.search(r"IF (.*is_tracked_so.*)$", source(db), re.MULTILINE)
    assert asked
    return f"SELECT {asked[1]}".encode()


def use_general(db: psycopg.Connection, table: str = "orders") -> None:
    """The same trigger, with the general function."""
    [(definition,)] = db.execute(
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = %s::regclass", [table]
    ).fetchall()
    named = definition.replace(function_of(db, table), "capture_entity_change")
    db.execute(named.replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER").encode())


@pytest.fixture
def orders(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute(TABLE.format("CHECK (true)").encode())
    return outbox_db


_LARGE = """
INSERT INTO orders (id, note) SELECT 1, string_agg(sha256(n::text::bytea)::text, '') FROM generate_series(1, 2000) AS n
"""
_CAUSE = "SET cdc.cause = '01234567-89ab-cdef-0123-456789abcdef,3'"
STATEMENTS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "all operations": ({}, _ALL),
    "a type": ({"entity_type": "order's"}, _ALL),
    "a key of two columns": ({"key": ["line", "id"]}, _ALL),
    "a key that is NULL in part": ({"key": ["line", "id"]}, ["INSERT INTO orders (id) VALUES (1)", *_ALL[1:]]),
    "a key that is NULL": ({"key": ["line"]}, ["INSERT INTO orders (id) VALUES (1)", *_ALL[1:]]),
    "a key that moves": ({}, [*_ALL[:1], "UPDATE orders SET id = 7", *_ALL[2:]]),
    "a key of two that moves": ({"key": ["id", "line"]}, [*_ALL[:1], "UPDATE orders SET line = 7", *_ALL[2:]]),
    "a key that becomes NULL": ({"key": ["line"]}, [*_ALL[:1], "UPDATE orders SET line = NULL", *_ALL[2:]]),
    "a key that is too long": ({"key": ["note"]}, [*_ALL[:1], "UPDATE orders SET note = repeat('x', 2000)", *_ALL[2:]]),
    "left out": ({"exclude": ["card", "j"]}, _ALL),
    "left out, not JSON": (
        {"exclude": ["j"]},
        ["INSERT INTO orders (id, j) VALUES (1, '{\"a\": \"\\u0000\"}')", *_ALL[1:]],
    ),
    "a value that is not JSON": ({}, ["INSERT INTO orders (id, j) VALUES (1, '{\"a\": \"\\u0000\"}')", *_ALL[1:]]),
    "a row that is large": ({}, [_LARGE, *_ALL[1:]]),
    "an array more": ({}, [*_ALL[:1], "ALTER TABLE orders ADD tags text[] DEFAULT '{a}'", *_ALL[1:]]),
    "a cause": ({}, [_CAUSE, *_ALL, "RESET cdc.cause"]),
    "a temporary table": ({}, ["CREATE TEMPORARY TABLE t ()", *_ALL, "DROP TABLE t"]),
    "odd settings": (
        {},
        ["SET timezone = 'Asia/Tokyo'", "SET datestyle = 'SQL, DMY'", "SET search_path = public", *_ALL,
         "RESET timezone", "RESET datestyle", "RESET search_path"],
    ),
    "another table's name": ({}, ["ALTER TABLE orders RENAME TO sales", "INSERT INTO sales (id) VALUES (1)",
                                  "ALTER TABLE sales RENAME TO orders"]),
    "another schema": ({}, ["CREATE SCHEMA shop", "ALTER TABLE orders SET SCHEMA shop",
                            "INSERT INTO shop.orders (id) VALUES (1)", "ALTER TABLE shop.orders SET SCHEMA public",
                            "DROP SCHEMA shop"]),
    "a column more": ({}, [*_ALL[:1], "ALTER TABLE orders ADD user_id int DEFAULT 5", *_ALL[1:]]),
    "a column of another type": ({}, ["ALTER TABLE orders ALTER line TYPE text", *_ALL]),
    "a column left out renamed": ({"exclude": ["card"]}, ["ALTER TABLE orders RENAME card TO pan", *_ALL]),
    "a column left out gone": (
        {"exclude": ["card"]}, ["ALTER TABLE orders DROP card", "INSERT INTO orders VALUES (1)"],
    ),
    "a partition": ({}, [
        "CREATE TABLE parted (LIKE orders) PARTITION BY LIST (id)",
        "ALTER TABLE parted ATTACH PARTITION orders FOR VALUES IN (1)", *_ALL,
        "ALTER TABLE parted DETACH PARTITION orders", "DROP TABLE parted",
    ]),
    "other arguments": ({}, [redefined('["id"]', '["id"], "exclude": ["card"]'), *_ALL]),
    "a trigger before": ({}, [redefined("AFTER", "BEFORE"), *_ALL]),
    "a cast of its own": ({}, [
        "CREATE TYPE mood AS ENUM ('ok')", _SAID, "CREATE CAST (mood AS json) WITH FUNCTION said(mood)",
        "CREATE FUNCTION coalesced(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'",
        "CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = coalesced)",
        "ALTER TABLE orders ADD m mood DEFAULT 'ok'", *_ALL, "ALTER TABLE orders DROP m",
        "DROP OPERATOR public.= (text, text)", "DROP FUNCTION coalesced", "DROP TYPE mood CASCADE",
    ]),
}  # fmt: skip


@pytest.mark.parametrize("j", ["json", "text"])
@pytest.mark.parametrize("case", STATEMENTS)
def test_it_captures_what_the_general_one_does(outbox_db: psycopg.Connection, case: str, j: str) -> None:
    """Also where all types are such that its rows need no subtransaction."""
    options, statements = STATEMENTS[case]
    seen = []
    for general in (False, True):
        outbox_db.execute(TABLE.replace("j json", f"j {j}").format("CHECK (true)").encode())
        track(outbox_db, "public", "orders", **options)
        assert general or ("is_tracked_so" in source(outbox_db)) is (j == "text")
        assert function_of(outbox_db).startswith("capture_table_")
        if general:
            use_general(outbox_db)
        for statement in statements:
            outbox_db.execute(statement.encode())
        seen.append(captured(outbox_db))
        outbox_db.execute("DROP TABLE orders")
    assert seen[0]
    assert seen[0] == seen[1]


_TOLD = (
    "INSERT INTO orders VALUES (1, 'a', NULL, {numbers})",
    "INSERT INTO orders (id) VALUES (2)",
    "UPDATE orders SET {last} = NULL WHERE id = 1",
    "UPDATE orders SET {last} = 8, note = 'b'",
    "ALTER TABLE orders RENAME {last} TO renamed",
    "UPDATE orders SET note = 'c' WHERE id = 1",
    "ALTER TABLE orders RENAME renamed TO {last}",
    "UPDATE orders SET note = 'd' WHERE id = 1",
    "ALTER TABLE orders DROP {last}",
    "UPDATE orders SET note = 'e' WHERE id = 1",
    "DELETE FROM orders",
)
_METADATA = [
    ("user_id", []), ("chat_id", []), ("room_id", []), ("user_id, chat_id", []), ("user_id, room_id", []),
    ("chat_id, room_id", []), ("user_id, chat_id, room_id", []), ("user_id, chat_id", ["user_id"]),
    ("room_id, chat_id", ["chat_id"]), ("chat_id, room_id", ["room_id"]),
]  # fmt: skip


@pytest.mark.parametrize("j", ["json", "text"])
@pytest.mark.parametrize(("columns", "exclude"), _METADATA)
def test_it_tells_in_the_metadata_what_the_general_one_does(
    outbox_db: psycopg.Connection, columns: str, exclude: list[str], j: str
) -> None:
    names = columns.split(", ")
    told = {"last": names[-1], "numbers": ", ".join(str(5 + place) for place, _ in enumerate(names))}
    seen = []
    for general in (False, True):
        kinds = " int, ".join(names)
        outbox_db.execute(f"CREATE TABLE orders (id int PRIMARY KEY, note text, j {j}, {kinds} int)".encode())
        track(outbox_db, "public", "orders", exclude=exclude)
        if general:
            use_general(outbox_db)
        elif j == "text":
            assert outbox_db.execute(proof(outbox_db)).fetchone() == (True,)
        for statement in _TOLD:
            outbox_db.execute(statement.format(**told).encode())
        seen.append(captured(outbox_db))
        outbox_db.execute("DROP TABLE orders")
    assert len(seen[0]) == 10
    assert seen[0] == seen[1]


@pytest.mark.parametrize("column", ["mood", "mood[]", "kind", "span", "pair"])
def test_a_type_that_somebody_made_keeps_the_general_function(orders: psycopg.Connection, column: str) -> None:
    """Its cast to JSON may set a search_path for the writer's session, which only the general one undoes."""
    orders.execute(
        "CREATE TYPE mood AS ENUM ('ok'); CREATE TYPE pair AS (m mood); CREATE DOMAIN kind AS mood;"
        " CREATE TYPE span AS RANGE (subtype = mood)"
    )
    orders.execute(f"ALTER TABLE orders ADD m {column}".encode())
    assert track(orders, "public", "orders").changed
    assert function_of(orders) == "capture_entity_change"
    orders.execute("ALTER TABLE orders DROP m")
    assert track(orders, "public", "orders").changed
    assert function_of(orders).startswith("capture_table_")
    orders.execute(f"ALTER TABLE orders ADD m {column}".encode())
    assert track(orders, "public", "orders").changed
    assert function_of(orders) == "capture_entity_change"


@pytest.mark.parametrize("key", [["line"], ["id", "line"]])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_key_column_that_is_gone_fails_with_the_same_words(
    orders: psycopg.Connection, renamed: bool, key: list[str]
) -> None:
    track(orders, "public", "orders", key=key)
    orders.execute("ALTER TABLE orders RENAME line TO place" if renamed else "ALTER TABLE orders DROP line")
    with pytest.raises(psycopg.errors.UndefinedColumn, match="has no column"):
        orders.execute("INSERT INTO orders (id) VALUES (1)")


VALUES = {
    "real": "1.1", "double precision": "0.1", "bytea": "'\\x01'", "interval": "'1 day -2 hours'", "money": "'1.5'",
    "regclass": "'pg_class'", "daterange": "'[2026-01-02,2026-02-03)'", "real[]": "'{1.1}'", "point": "'(0.1,2)'",
    "timestamptz": "'2026-01-02 03:04:05Z'", "date": "'2026-01-02'", "time": "'03:04'", "name": "'x'",
}  # fmt: skip
_ODD = ("timezone = 'Asia/Tokyo'", "datestyle = 'SQL, DMY'", "bytea_output = 'escape'", "intervalstyle = 'iso_8601'",
        "extra_float_digits = -3", "quote_all_identifiers = on")  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("later", [False, True])
def test_a_value_has_one_text_under_every_setting(outbox_db: psycopg.Connection, value: str, later: bool) -> None:
    """Also in a column that came later, once the table is tracked again or the outbox upgraded."""
    columns = "" if later else f", v {value}"
    outbox_db.execute(f"CREATE TABLE t (id int PRIMARY KEY{columns})".encode())
    track(outbox_db, "public", "t")
    if later:
        outbox_db.execute(f"ALTER TABLE t ADD v {value}".encode())
        table_functions.refresh(outbox_db, "public")
    assert function_of(outbox_db, "t").startswith("capture_table_")
    insert = f"INSERT INTO t VALUES (1, {VALUES[value]}); DELETE FROM t"
    outbox_db.execute(insert.encode())
    plain = captured(outbox_db)
    for setting in _ODD:
        outbox_db.execute(f"SET {setting}".encode())
    outbox_db.execute(insert.encode())
    assert captured(outbox_db) == plain


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE orders ADD v real", "ALTER TABLE orders RENAME TO sales", "ALTER TABLE orders ADD user_id int"],
)
def test_a_function_that_is_not_its_tables_any_more_is_named_and_track_mends_it(
    orders: psycopg.Connection, outbox: str, change: str
) -> None:
    track(orders, "public", "orders")
    assert "was made for" not in doctor(outbox)
    orders.execute(change.encode())
    [(table,)] = orders.execute("SELECT relname FROM pg_class WHERE relname IN ('orders', 'sales')").fetchall()
    assert f"was made for {table} as it was" in doctor(outbox)
    assert track(orders, "public", table).changed
    assert "was made for" not in doctor(outbox)
    assert made(orders) == [function_name("public", table)]
    assert not track(orders, "public", table).changed


def test_an_upgrade_rewrites_it_and_drops_what_no_trigger_calls(orders: psycopg.Connection, outbox: str) -> None:
    track(orders, "public", "orders")
    orders.execute("ALTER TABLE orders ADD v real")
    assert "rewrote the function that captures public.orders" in invoke(outbox, "db", "upgrade").stderr
    assert "rewrote" not in invoke(outbox, "db", "upgrade").stderr
    orders.execute("DROP TABLE orders")
    invoke(outbox, "db", "upgrade")
    assert made(orders) == []


def test_untrack_drops_it_and_uninstall_all_of_them(orders: psycopg.Connection) -> None:
    track(orders, "public", "orders")
    untrack(orders, "public", "orders")
    assert made(orders) == []
    orders.execute("CREATE TABLE t (id int PRIMARY KEY)")
    track(orders, "public", "orders")
    track(orders, "public", "t", truncate=Truncate.EVENT)
    dropped = migrations.uninstall(orders, "public")
    assert {"trigger #cdc_capture on public.orders", "trigger #cdc_capture on public.t"} <= {*dropped}
    assert [each for each in dropped if "truncate on public.t" in each]
    assert made(orders) == []


def test_a_function_of_the_application_whose_name_begins_alike_is_none_of_them(orders: psycopg.Connection) -> None:
    orders.execute(
        "CREATE FUNCTION capture_table_audit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER audit AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION capture_table_audit()"
    )
    assert tracking.tracked(orders, "public") == []
    assert not [each for each in migrations.uninstall(orders, "public") if "audit" in each]
    assert function_of(orders) == "capture_table_audit"


def test_what_is_printed_works_on_any_outbox(orders: psycopg.Connection, outbox: str) -> None:
    assert "EXECUTE FUNCTION capture_entity_change(" in done(outbox, "track", "orders", "--print").replace(
        "public.", ""
    )
    assert made(orders) == []


@pytest.mark.parametrize("option", [{"columns": ["id"]}, {"handled": True}], ids=str)
def test_what_is_unusual_has_the_general_function(orders: psycopg.Connection, option: dict[str, Any]) -> None:
    track(orders, "public", "orders", **option)
    assert function_of(orders) == "capture_entity_change"


def test_a_name_of_any_kind_is_quoted(outbox_db: psycopg.Connection) -> None:
    name = "o'r\"d\\e$cdc$r{}%s " + "ü" * 40
    key, left_out = "k'\\\"{,}", "s'\\\"{,}"
    names = {"t": sql.Identifier(name), "k": sql.Identifier(key), "s": sql.Identifier(left_out)}
    outbox_db.execute(sql.SQL("CREATE TABLE {t} ({k} int PRIMARY KEY, {s} text)").format(**names))
    track(outbox_db, "public", names["t"].as_string(), key=[key], exclude=[left_out], entity_type="t'\\\"{,}")
    outbox_db.execute(sql.SQL("INSERT INTO {t} VALUES (1, 'secret')").format(**names))
    [row] = captured(outbox_db)
    assert row[3:7] == ("1", "t'\\\"{,}", None, {key: 1})
    assert len(made(outbox_db)) == 1


def test_a_role_that_may_make_no_such_function_has_the_general_one(orders: psycopg.Connection) -> None:
    role = f"app_{orders.info.dbname}"
    orders.execute(
        f"CREATE ROLE {role} LOGIN; ALTER TABLE orders OWNER TO {role};"
        f" GRANT EXECUTE ON FUNCTION capture_entity_change() TO {role}".encode()
    )
    try:
        with psycopg.connect(make_conninfo(orders.info.dsn, user=role), autocommit=True) as app:
            assert track(app, "public", "orders").changed
            app.execute("INSERT INTO orders (id) VALUES (1)")
            assert function_of(orders) == "capture_entity_change"
            assert track(orders, "public", "orders").changed
            assert function_of(orders).startswith("capture_table_")
            app.execute("DELETE FROM orders")
            assert [row[2] for row in captured(orders)] == ["INSERT", "DELETE"]
            # Without a right on the function it stays, until the trigger has to be made anew.
            assert not track(app, "public", "orders").changed
            assert track(app, "public", "orders", entity_type="order").changed
            app.execute("INSERT INTO orders (id) VALUES (1)")
            assert [row[4] for row in captured(orders)] == ["order"]
            untrack(app, "public", "orders")
    finally:
        orders.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}".encode())


def test_the_outboxs_owner_makes_it_and_leaves_no_right_behind(outbox_db: psycopg.Connection) -> None:
    role = sql.Identifier(f"owner_{outbox_db.info.dbname}")
    events = sql.Identifier("events")
    outbox_db.execute(sql.SQL("CREATE ROLE {} CREATEROLE").format(role))
    outbox_db.execute(sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(events, role))
    try:
        outbox_db.execute(sql.SQL("SET ROLE {}").format(role))
        migrations.install(outbox_db, "events")
        outbox_db.execute("CREATE TABLE events.orders (id int PRIMARY KEY)")
        track(outbox_db, "events", "events.orders")
        outbox_db.execute("INSERT INTO events.orders VALUES (1)")
        assert outbox_db.execute("SELECT entity_id FROM events.entity_changes").fetchall() == [("1",)]
        assert function_of(outbox_db, "events.orders").startswith("capture_table_")
        [(left,)] = outbox_db.execute(
            "SELECT has_schema_privilege(proowner, 'events', 'CREATE') FROM pg_proc"
            " WHERE proname LIKE 'capture\\_table\\_%'"
        ).fetchall()
        assert not left
        migrations.uninstall(outbox_db, "events", discard_unprocessed=True)
    finally:
        outbox_db.execute("RESET ROLE")
        outbox_db.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


def test_nobody_may_call_it_and_it_belongs_to_the_role_that_captures(orders: psycopg.Connection) -> None:
    orders.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # everybody's before PostgreSQL 15
    track(orders, "public", "orders")
    [row] = orders.execute(
        "SELECT p.proowner = g.proowner, p.prosecdef, p.proacl::text ~ '[{,]=',"
        " has_schema_privilege(p.proowner, 'public', 'CREATE') FROM pg_proc AS p, pg_proc AS g"
        " WHERE p.proname LIKE 'capture\\_table\\_%' AND g.proname = 'capture_entity_change'"
    ).fetchall()
    assert row == (True, True, False, False)


@pytest.mark.parametrize("before", [True, False], ids=["made before", "given away"])
def test_one_of_this_name_that_is_somebody_elses_is_not_taken_over(
    orders: psycopg.Connection, outbox: str, before: bool
) -> None:
    name, role = function_name("public", "orders"), f"intern_{orders.info.dbname}"
    orders.execute(f"CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}".encode())
    try:
        if before:
            body = "RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN RETURN NULL; END'"
            orders.execute(f"SET ROLE {role}; CREATE FUNCTION {name}() {body}; RESET ROLE".encode())
        else:
            track(orders, "public", "orders")
            orders.execute(f"ALTER FUNCTION {name}() OWNER TO {role}".encode())
            assert f"{name}() of orders runs with the rights of {role}, not of cdc_capture_" in doctor(outbox)
        assert track(orders, "public", "orders").changed
        assert function_of(orders) == "capture_entity_change"
        orders.execute("INSERT INTO orders (id) VALUES (1)")
        assert len(captured(orders)) == 1
        [(owner,)] = orders.execute("SELECT proowner::regrole::text FROM pg_proc WHERE proname = %s", [name]).fetchall()
        assert owner == role
    finally:
        orders.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}".encode())


def test_one_that_a_restore_gave_to_a_superuser_is_given_back_by_an_upgrade(
    orders: psycopg.Connection, outbox: str
) -> None:
    """A dump without owners: else casts of others would run with a superuser's rights."""
    track(orders, "public", "orders")
    name = function_name("public", "orders")
    [(owner, superuser)] = orders.execute(
        "SELECT proowner::regrole::text, current_user::text FROM pg_proc WHERE proname = %s", [name]
    ).fetchall()
    orders.execute(f"ALTER FUNCTION {name}() OWNER TO {superuser}".encode())
    assert f"{name}() of orders runs with the rights of {superuser}, not of {owner}" in doctor(outbox)
    assert "rewrote the function that captures public.orders" in invoke(outbox, "db", "upgrade").stderr
    [(now,)] = orders.execute("SELECT proowner::regrole::text FROM pg_proc WHERE proname = %s", [name]).fetchall()
    assert now == owner
    assert f"rights of {superuser}" not in doctor(outbox)


def test_tables_of_one_name_in_many_schemas_have_one_each(outbox_db: psycopg.Connection) -> None:
    for tenant in ("a", "b"):
        outbox_db.execute(f"CREATE SCHEMA {tenant}; CREATE TABLE {tenant}.orders (id int PRIMARY KEY)".encode())
        track(outbox_db, "public", f"{tenant}.orders", entity_type=f"{tenant}.order")
        outbox_db.execute(f"INSERT INTO {tenant}.orders VALUES (1)".encode())
    assert len(made(outbox_db)) == 2
    assert [(row[0], row[4]) for row in captured(outbox_db)] == [("a", "a.order"), ("b", "b.order")]


def test_one_that_a_restore_gave_away_and_no_trigger_calls_is_dropped_with_the_next_change(
    orders: psycopg.Connection, outbox: str
) -> None:
    track(orders, "public", "orders")
    [name] = made(orders)
    orders.execute(f'ALTER FUNCTION {name} OWNER TO CURRENT_USER; DROP TRIGGER "#cdc_capture" ON orders'.encode())
    other = "capture_table_audit_0123abcd"
    create = f"CREATE FUNCTION {other}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    orders.execute(f"{create}; CREATE TABLE lines (id int PRIMARY KEY)".encode())
    done(outbox, "track", "lines")
    left = orders.execute(
        "SELECT proname::text FROM pg_proc WHERE proname ~ '^capture_table_(orders|audit)'"
    ).fetchall()
    assert left == [(other,)]
