"""`cdc track --ddl event`: DDL that changes the columns or the name of a table is a change of its own."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.postgres import tracking
from cdc.postgres.tracked_tables import Ddl
from tests.commands import done, invoke, refused, tracked

pytestmark = pytest.mark.server

ID = {"type": "integer", "nullable": False, "position": 1}
TOTAL = {"type": "numeric(10,2)", "nullable": True, "position": 2}
COLUMNS = {"id": ID, "total": TOTAL}


@pytest.fixture
def orders(outbox: str, outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric(10,2))")
    done(outbox, "db", "ddl")
    done(outbox, "track", "orders", "--type", "order", "--ddl", "event")
    return outbox_db


def told(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    """(old, new) of each, in the order of their numbers."""
    return db.execute(
        "SELECT old_data, new_data FROM entity_changes WHERE operation = 'SCHEMA' ORDER BY seq"
    ).fetchall()


@pytest.mark.parametrize(
    ("ddl", "new"),
    {
        "ALTER TABLE orders ADD note text": COLUMNS | {"note": {"type": "text", "nullable": True, "position": 3}},
        "ALTER TABLE orders DROP COLUMN total": {"id": ID},
        "ALTER TABLE orders DROP COLUMN total, ADD COLUMN sum bigint NOT NULL": {
            "id": ID, "sum": {"type": "bigint", "nullable": False, "position": 3},
        },
        "ALTER TABLE orders RENAME total TO sum": {"id": ID, "sum": TOTAL},
        "ALTER VIEW orders RENAME COLUMN total TO sum": {"id": ID, "sum": TOTAL},
        "ALTER TABLE orders ALTER total TYPE double precision": COLUMNS | {
            "total": TOTAL | {"type": "double precision"},
        },
        "ALTER TABLE orders ALTER total SET NOT NULL": COLUMNS | {"total": TOTAL | {"nullable": False}},
        "DROP TABLE orders": None,
        "DROP TABLE orders CASCADE": None,
    }.items(),
)  # fmt: skip
def test_what_ddl_does_to_the_columns_is_told_once_with_those_before_and_after(
    orders: psycopg.Connection, ddl: str, new: Any
) -> None:
    orders.execute(ddl.encode())
    assert told(orders) == [(COLUMNS, new)]
    row = orders.execute(
        "SELECT entity_type, entity_id, table_schema, table_name, metadata - 'timestamp' FROM entity_changes"
    ).fetchone()
    assert row == ("order", "", "public", "orders", {"command": " ".join(ddl.split()[:2])})


@pytest.mark.parametrize(
    ("ddl", "command", "place"),
    [
        ("ALTER TABLE orders RENAME TO purchases", "ALTER TABLE", ("public", "purchases")),
        ("ALTER INDEX orders RENAME TO purchases", "ALTER INDEX", ("public", "purchases")),
        ("CREATE SCHEMA shop; ALTER TABLE orders SET SCHEMA shop", "ALTER TABLE", ("shop", "orders")),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_table_of_another_name_is_told_with_the_former_one_and_the_type_that_it_had(
    orders: psycopg.Connection, ddl: str, command: str, place: tuple[str, str], named: bool
) -> None:
    if not named:  # a trigger of before the type was written out
        orders.execute('DROP TRIGGER "#cdc_capture" ON orders')
        orders.execute(
            "CREATE TRIGGER mine AFTER INSERT ON orders FOR EACH ROW"
            """ EXECUTE FUNCTION capture_entity_change('', '{"key": ["id"]}', '{"ddl": "event"}')"""
        )
    orders.execute(ddl.encode())
    assert told(orders) == [(COLUMNS, COLUMNS)]
    row = orders.execute(
        "SELECT entity_type, table_schema, table_name, metadata - 'timestamp' FROM entity_changes"
    ).fetchone()
    renamed = {"command": command, "renamed_from": {"schema": "public", "table": "orders"}}
    assert row == ("order" if named else "orders", *place, renamed)


def test_what_changes_a_table_without_naming_it_is_told_too(orders: psycopg.Connection, outbox: str) -> None:
    orders.execute(
        "CREATE TYPE mood AS ENUM ('calm'); CREATE SCHEMA shop; CREATE TABLE shop.feelings (id int, mood mood)"
    )
    done(outbox, "track", "shop.feelings", "--key", "id", "--ddl", "event")
    for ddl in (
        "ALTER TYPE mood RENAME TO temper",
        "ALTER TYPE temper ADD VALUE 'wild'",
        "ALTER SCHEMA shop RENAME TO store",
        "DROP TYPE temper CASCADE",
        "DROP SCHEMA store CASCADE",
    ):
        orders.execute(ddl.encode())
    place = {"id": {"type": "integer", "nullable": True, "position": 1}}
    mood = [
        place | {"mood": {"type": f"public.{name}", "nullable": True, "position": 2}} for name in ("mood", "temper")
    ]
    assert told(orders) == [(mood[0], mood[1]), (mood[1], mood[1]), (mood[1], place), (place, None)]


@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE INDEX ON orders (total)",
        "COMMENT ON COLUMN orders.total IS 'x'",
        "ALTER TABLE orders ALTER total SET STATISTICS 5",
        "ALTER TABLE orders ALTER total SET DEFAULT 0",
        "ALTER TABLE orders ADD CHECK (total > 0)",
        "CREATE TEMP TABLE t (i int); ALTER TABLE t ADD j int; DROP TABLE t",
        "CREATE TABLE other (i int); ALTER TABLE other ADD j int; DROP TABLE other",
        "CREATE TRIGGER t BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "ALTER TABLE orders OWNER TO CURRENT_USER",
        "CREATE TYPE mood AS ENUM (); ALTER TYPE mood ADD VALUE 'calm'",
        "BEGIN; ALTER TABLE orders ADD j int; ROLLBACK",
        'DROP TRIGGER "#cdc_capture" ON orders; ALTER TABLE orders ADD j int; DROP TABLE orders',
    ],
)
def test_what_changes_no_column_of_a_table_that_is_captured_tells_nothing(orders: psycopg.Connection, ddl: str) -> None:
    orders.execute(ddl.encode())
    assert told(orders) == []


def test_a_column_that_is_not_captured_is_not_told(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute("CREATE TABLE cards (id int PRIMARY KEY, number text, city text)")
    done(outbox, "track", "cards", "--exclude", "number", "--ddl", "event")
    orders.execute("ALTER TABLE cards ALTER number TYPE varchar(20)")
    assert told(orders) == []
    done(outbox, "track", "cards", "--columns", "id", "--ddl", "event", "--replace")
    orders.execute("ALTER TABLE cards ADD expires date")
    orders.execute("ALTER TABLE cards ALTER id TYPE bigint")
    assert [set(new) for _, new in told(orders)] == [{"id"}]


def test_a_parent_tells_of_its_children_and_a_partitioned_table_once(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute(
        "CREATE TABLE late () INHERITS (orders); CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE p_1 PARTITION OF p FOR VALUES FROM (0) TO (10); CREATE TABLE p_2 (id int NOT NULL)"
    )
    done(outbox, "track", "late", "--key", "id", "--ddl", "event")
    done(outbox, "track", "p", "--ddl", "event")
    orders.execute("ALTER TABLE orders ADD COLUMN note text")
    assert len(told(orders)) == 2
    orders.execute(
        "ALTER TABLE p ATTACH PARTITION p_2 FOR VALUES FROM (10) TO (20); ALTER TABLE p DETACH PARTITION p_1"
    )
    assert len(told(orders)) == 2
    orders.execute("ALTER TABLE p ADD COLUMN note text")
    assert len(told(orders)) == 3


def test_what_was_not_told_is_told_by_the_next_ddl(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute(
        "ALTER EVENT TRIGGER cdc_ddl DISABLE; ALTER TABLE orders ADD a int; ALTER EVENT TRIGGER cdc_ddl ENABLE"
    )
    assert told(orders) == []
    orders.execute("ALTER TABLE orders ADD b int")
    [(old, new)] = told(orders)
    assert (old, set(new) - set(old)) == (COLUMNS, {"a", "b"})


def test_of_a_table_whose_columns_nobody_has_noted_those_before_are_not_told(orders: psycopg.Connection) -> None:
    orders.execute("DELETE FROM cdc_columns; ALTER TABLE orders ADD a int")
    [(old, new)] = told(orders)
    assert (old, set(new)) == (None, {"id", "total", "a"})


def test_an_upgrade_notes_the_columns_that_nobody_has_noted_and_no_others(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute("UPDATE cdc_columns SET trigger = 1")  # as a restore would: of another database's oids
    orders.execute("CREATE TABLE lines (id int PRIMARY KEY)")
    done(outbox, "track", "lines", "--ddl", "event")
    orders.execute(
        "ALTER EVENT TRIGGER cdc_ddl DISABLE; ALTER TABLE lines ADD a int; ALTER EVENT TRIGGER cdc_ddl ENABLE"
    )
    said = done(outbox, "db", "upgrade")
    assert ("the columns of public.orders" in said, "the columns of public.lines" in said) == (True, False)
    orders.execute("ALTER TABLE orders ADD b int; ALTER TABLE lines ADD b int")
    assert [(old and set(old), set(new)) for old, new in told(orders)] == [
        ({"id", "total"}, {"id", "total", "b"}),
        ({"id"}, {"id", "a", "b"}),
    ]


@pytest.mark.parametrize(
    "fault",
    [
        "REVOKE ALL ON entity_changes, cdc_columns FROM {captures}",
        "ALTER TABLE entity_changes ADD CONSTRAINT never CHECK (operation <> 'SCHEMA')",
        "ALTER TABLE cdc_columns RENAME TO elsewhere",
        "DROP FUNCTION captured_columns",
    ],
)
def test_ddl_goes_on_whatever_is_wrong_with_the_outbox(orders: psycopg.Connection, fault: str) -> None:
    said: list[str] = []
    orders.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
    [(captures,)] = orders.execute(
        "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'capture_ddl'"
    ).fetchall()
    orders.execute(fault.format(captures=captures).encode())
    orders.execute("ALTER TABLE orders ADD a int")
    assert orders.execute("SELECT a FROM orders").fetchall() == []
    assert any("not told: SQLSTATE" in each for each in said)


def test_ddl_waits_for_nobody_who_has_noted_the_columns_of_another_table(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute("CREATE TYPE mood AS ENUM ('calm'); ALTER TABLE orders ADD mood mood")
    with psycopg.connect(outbox) as other:
        other.execute("ALTER TABLE orders ADD a int")
        orders.execute("SET lock_timeout = '2s'; ALTER TYPE mood RENAME TO temper")
    orders.execute("ALTER TABLE orders ADD b int")
    news = [set(new) - {"id", "total"} for _, new in told(orders)]
    assert news == [{"mood"}, {"mood", "a"}, {"mood", "a", "b"}]
    assert told(orders)[-1][1]["mood"]["type"] == "public.temper"


def test_any_role_may_issue_ddl_and_may_do_nothing_more_by_it(outbox: str, orders: psycopg.Connection) -> None:
    role = f"app_{orders.info.dbname}"
    orders.execute(f'CREATE ROLE "{role}" LOGIN; ALTER TABLE orders OWNER TO "{role}"'.encode())
    try:
        with psycopg.connect(make_conninfo(outbox, user=role), autocommit=True) as session:
            session.execute("SET search_path = public; ALTER TABLE orders ADD a int")
            for statement in ("SELECT FROM cdc_columns", "SELECT captured_columns(0)",
                              "SELECT capture_barrier('SCHEMA', '', '', 'order', NULL, NULL, '{}')"):  # fmt: skip
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute(statement.encode())
        assert len(told(orders)) == 1
    finally:
        orders.execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"'.encode())


def test_no_code_of_who_issues_ddl_runs_with_the_rights_of_the_role_that_captures(
    outbox: str, orders: psycopg.Connection
) -> None:
    role = f"evil_{orders.info.dbname}"
    orders.execute(f'CREATE ROLE "{role}" LOGIN; CREATE SCHEMA "{role}" AUTHORIZATION "{role}"'.encode())
    orders.execute(f'ALTER TABLE orders OWNER TO "{role}"; GRANT USAGE ON SCHEMA public TO "{role}"'.encode())
    said: list[str] = []
    try:
        with psycopg.connect(make_conninfo(outbox, user=role), autocommit=True) as session:
            session.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
            session.execute(f'SET search_path = "{role}", pg_catalog, public'.encode())
            for signature in (
                "now() RETURNS timestamptz",
                "format_type(oid, int) RETURNS text",
                "default_entity_type(text) RETURNS text",
                "bounded_text(text) RETURNS text",
                "captured_columns(oid) RETURNS text",
                "jsonb_build_object(VARIADIC text[]) RETURNS jsonb",
            ):
                body = "BEGIN RAISE NOTICE 'ran as %', current_user; RETURN NULL; END"
                session.execute(f"CREATE FUNCTION {signature} LANGUAGE plpgsql AS $${body}$$".encode())
            session.execute(
                "CREATE FUNCTION same(jsonb, jsonb) RETURNS bool LANGUAGE plpgsql AS"
                " $$BEGIN RAISE NOTICE 'ran as %', current_user; RETURN true; END$$;"
                "CREATE OPERATOR = (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = same);"
                "CREATE TEMP TABLE cdc_columns (relation oid, columns jsonb); CREATE TEMP TABLE entity_changes (id int)"
            )
            for ddl in ("ALTER TABLE public.orders ADD a int", "ALTER TABLE public.orders RENAME a TO b",
                        "DROP TABLE public.orders"):  # fmt: skip
                session.execute(ddl.encode())
        assert said == []
        assert len(told(orders)) == 3
    finally:
        orders.execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"'.encode())


def test_who_may_create_in_the_outboxs_schema_tells_nothing_by_a_function_called_like_one_of_ours(
    outbox: str, orders: psycopg.Connection
) -> None:
    role = f"app_{orders.info.dbname}"
    orders.execute(f'CREATE ROLE "{role}" LOGIN; GRANT CREATE ON SCHEMA public TO "{role}"'.encode())
    try:
        with psycopg.connect(make_conninfo(outbox, user=role), autocommit=True) as session:
            session.execute(
                "CREATE FUNCTION public.capture_table_x_01234567() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END';"
                "CREATE TABLE public.x (id int); CREATE TRIGGER x AFTER INSERT ON public.x FOR EACH ROW"
                """ EXECUTE FUNCTION public.capture_table_x_01234567('order', '{"key": ["id"]}', '{"ddl": "event"}');"""
                "ALTER TABLE public.x ADD a int; DROP TABLE public.x"
            )
        assert told(orders) == []
    finally:
        orders.execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"'.encode())


@pytest.mark.parametrize(
    "third", ['{"ddl": "event"', "[]", '{"ddl": ["event"]}', '"event"', '{"ddl": "ignore"}', "\\x00"]
)
def test_a_trigger_whose_arguments_say_something_else_tells_nothing_and_stops_no_other(
    orders: psycopg.Connection, third: str
) -> None:
    orders.execute("CREATE TYPE mood AS ENUM ('calm'); ALTER TABLE orders ADD mood mood; CREATE TABLE odd (mood mood)")
    create = "CREATE TRIGGER mine AFTER INSERT ON odd FOR EACH ROW EXECUTE FUNCTION capture_entity_change('', '', {})"
    orders.execute(sql.SQL(create).format(sql.Literal(third)))
    orders.execute("ALTER TYPE mood RENAME TO temper; ALTER TABLE odd ADD a int")
    assert len(told(orders)) == 2
    assert orders.execute("SELECT count(*) FROM cdc_columns").fetchone() == (1,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CREATE TEMP TABLE t (i int); DROP TABLE t; UPDATE stock SET n = 0",
         "TABLE stock; ALTER TABLE lines ADD b int"),
        ("CREATE TABLE t (i int); ALTER TABLE t ADD j int; DROP TABLE t; UPDATE stock SET n = 0",
         "TABLE stock; ALTER TABLE lines ADD b int"),
        ("ALTER TABLE orders ADD b int", "ALTER TABLE lines ADD b int"),
        ("ALTER TABLE orders DROP total", "ALTER TABLE lines DROP note"),
        ("DROP TABLE orders", "DROP TABLE lines"),
    ],
)  # fmt: skip
def test_serializable_transactions_do_not_fail_because_of_what_is_compared(
    outbox: str, orders: psycopg.Connection, one: str, other: str
) -> None:
    orders.execute("CREATE TABLE lines (id int PRIMARY KEY, note text); CREATE TABLE stock (n int)")
    orders.execute("INSERT INTO stock VALUES (1)")
    done(outbox, "track", "lines", "--ddl", "event")
    orders.execute("VACUUM ANALYZE")
    with psycopg.connect(outbox) as first, psycopg.connect(outbox) as second:
        for session, ddl in ((first, one), (second, other)):
            session.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            session.execute(ddl.encode())
    assert len(told(orders)) == sum(each in one + other for each in ("orders", "lines"))


@pytest.mark.parametrize("function", ["capture_ddl", "publish_due"])
def test_a_scan_that_is_switched_off_and_needed_all_the_same_is_not_compiled(
    function: str, orders: psycopg.Connection
) -> None:
    [(settings,)] = orders.execute("SELECT proconfig FROM pg_proc WHERE proname = %s", [function]).fetchall()
    assert {"enable_seqscan=off", "jit=off"} <= set(settings)


_SETTINGS = (
    "standard_conforming_strings = off", "quote_all_identifiers = on", "array_nulls = off",
    "transform_null_equals = on", "backslash_quote = off", "bytea_output = escape", "search_path = pg_temp",
    "datestyle = 'SQL, DMY'", "row_security = off", "default_transaction_isolation = serializable",
    "escape_string_warning = on", "plpgsql.extra_errors = 'all'", "check_function_bodies = off",
    "client_min_messages = error",
)  # fmt: skip


@pytest.mark.parametrize("setting", _SETTINGS)
def test_it_is_told_alike_whatever_the_settings_of_who_issues_it(orders: psycopg.Connection, setting: str) -> None:
    said: list[str] = []
    orders.execute(f"SET {setting}".encode())
    orders.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
    orders.execute("ALTER TABLE public.orders DROP COLUMN total; DROP TABLE public.orders")
    orders.execute("RESET ALL")
    assert (told(orders), said) == ([(COLUMNS, {"id": ID}), ({"id": ID}, None)], [])


# --- cdc track, untrack, tracked -------------------------------------------------------------------------------------


def test_track_refuses_it_where_no_event_trigger_would_tell(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    assert "cdc db ddl" in refused(outbox, "track", "orders", "--ddl", "event")
    assert tracked(outbox) == {}
    assert '{"ddl": "event"}' in done(outbox, "track", "orders", "--ddl", "event", "--print")


def test_a_second_track_keeps_it_and_untrack_ends_it(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--on", "insert")
    assert tracked(outbox)["orders"]["ddl"] == "event"
    assert "insert,schema" in done(outbox, "tracked")
    assert "ddl event" in done(outbox, "track", "orders")
    done(outbox, "track", "orders", "--ddl", "ignore")
    orders.execute("ALTER TABLE orders ADD a int")
    done(outbox, "track", "orders", "--ddl", "event")
    orders.execute("ALTER TABLE orders ADD b int")
    assert [set(new) - set(old) for old, new in told(orders)] == [{"b"}]
    done(outbox, "untrack", "orders")
    orders.execute("DROP TABLE orders")
    assert len(told(orders)) == 1
    assert orders.execute("SELECT columns FROM cdc_columns").fetchall() == [(None,)]


def test_what_is_printed_does_what_track_does(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute("CREATE TABLE lines (id int PRIMARY KEY)")
    orders.execute(done(outbox, "track", "lines", "--ddl", "event", "--print").encode())
    assert tracking.tracked(orders, "public")[0].ddl == Ddl.EVENT
    orders.execute("ALTER TABLE lines ADD a int")
    assert len(told(orders)) == 1


# --- the event triggers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("ALTER EVENT TRIGGER cdc_ddl DISABLE", "cdc_ddl is disabled"),
        ("ALTER EVENT TRIGGER cdc_drop ENABLE REPLICA", "cdc_drop is disabled"),
        ("DROP EVENT TRIGGER cdc_drop", "cdc_drop is missing"),
        ("DROP EVENT TRIGGER cdc_ddl; CREATE EVENT TRIGGER cdc_ddl ON ddl_command_end EXECUTE FUNCTION capture_ddl()",
         "cdc_ddl is of another version"),
    ],
)  # fmt: skip
def test_one_that_is_not_as_it_should_be_is_told_and_made_anew(
    outbox: str, orders: psycopg.Connection, fault: str, said: str
) -> None:
    orders.execute(fault.encode())
    assert said in invoke(outbox, "tracked").stderr
    assert said in refused(outbox, "db", "verify")
    assert said in invoke(outbox, "doctor", "--no-stream").output
    assert said in refused(outbox, "track", "orders", "--ddl", "event")
    assert "made the event trigger" in done(outbox, "db", "ddl")
    assert "both event triggers are there already" in done(outbox, "db", "ddl")
    assert "as this version makes it" in done(outbox, "db", "verify")
    orders.execute("DROP TABLE orders")
    assert len(told(orders)) == 1


@pytest.mark.parametrize("by", ["command", "script"])
def test_they_can_be_taken_away_and_go_with_the_outbox(outbox: str, orders: psycopg.Connection, by: str) -> None:
    def run(*options: str) -> None:
        if by == "command":
            done(outbox, "db", "ddl", *options)
        else:
            printed = invoke(outbox, "db", "ddl", *options, "--print").stdout
            orders.execute("\n".join(printed.splitlines()[1:]).encode())

    names = "SELECT evtname::text FROM pg_event_trigger ORDER BY 1"
    run()
    assert orders.execute(names.encode()).fetchall() == [("cdc_ddl",), ("cdc_drop",)]
    run("--off")
    assert orders.execute(names.encode()).fetchall() == []
    run()
    done(outbox, "db", "uninstall", "--yes")
    assert orders.execute(names.encode()).fetchall() == []
