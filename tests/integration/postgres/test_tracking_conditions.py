"""`cdc track --on update:COLUMNS --when SQL`: what does not match never enters the function."""

from __future__ import annotations

import json

import psycopg
import pytest

from cdc.postgres import migrations
from tests.commands import done, invoke, refused, tracked


def captured(db: psycopg.Connection) -> list[tuple[str, str]]:
    return db.execute("SELECT operation, entity_id FROM entity_changes ORDER BY seq").fetchall()


@pytest.fixture
def orders(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute('CREATE TABLE orders (id int PRIMARY KEY, status text, total int, "a,b" int)')
    return outbox_db


def test_only_what_matches_is_captured(outbox: str, orders: psycopg.Connection) -> None:
    said = done(outbox, "track", "orders", "--on", "insert,update:status,total", "--when", "NEW.total > 0")
    assert "insert,update; key id; type orders; UPDATE OF status, total WHEN (new.total > 0)" in said
    orders.execute("INSERT INTO orders VALUES (1, 'new', 5), (2, 'new', 0)")
    orders.execute('UPDATE orders SET "a,b" = 1')
    orders.execute("UPDATE orders SET status = 'paid'")
    orders.execute("DELETE FROM orders")
    assert captured(orders) == [("INSERT", "1"), ("UPDATE", "1")]
    found = tracked(outbox)["orders"]
    assert (found["update_of"], found["when"]) == (["status", "total"], "new.total > 0")
    assert "insert,update UPDATE OF status, total WHEN (new.total > 0)" in invoke(outbox, "tracked").stdout


def test_conditions_that_are_not_named_stay(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--on", "update:status", "--when", "OLD.status IS DISTINCT FROM NEW.status")
    before = tracked(outbox)["orders"]
    assert "was tracked so already" in done(outbox, "track", "orders")
    done(outbox, "track", "orders", "--exclude", "total")
    assert tracked(outbox)["orders"] == {**before, "exclude": ["total"]}


def test_the_same_condition_in_other_words_changes_nothing(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--on", "insert", "--when", "NEW.total>0 -- none for nothing")
    assert "was tracked so already" in done(outbox, "track", "orders", "--when", "new.total > 0")


def test_a_condition_that_goes_needs_replace(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--on", "update:status", "--when", "NEW.total > 0")
    before = tracked(outbox)["orders"]
    assert "WHEN (new.total > 0) would go" in refused(outbox, "track", "orders", "--when", "")
    told = refused(outbox, "track", "orders", "--when", "NEW.total > 9")
    assert "WHEN (new.total > 0) would become WHEN (new.total > 9)" in told
    assert "UPDATE OF status would go" in refused(outbox, "track", "orders", "--on", "update")
    assert tracked(outbox)["orders"] == before
    done(outbox, "track", "orders", "--on", "update:status,total")  # captures more, and nothing less
    done(outbox, "track", "orders", "--on", "update", "--when", "", "--replace")
    assert tracked(outbox)["orders"]["only"] == ""


@pytest.mark.parametrize(
    ("on", "condition", "reason"),
    [
        ("insert,update", "OLD.total > 0", "INSERT trigger's WHEN condition cannot reference OLD values"),
        ("insert,delete", "NEW.total > 0", "DELETE trigger's WHEN condition cannot reference NEW values"),
        ("insert", "NEW.totl > 0", "column new.totl does not exist"),
        ("insert", "NEW.total >", "syntax error"),
        ("insert", "orders.total > 0", 'invalid reference to FROM-clause entry for table "orders"'),
        ("insert", "EXISTS (SELECT)", "cannot use subquery in trigger WHEN condition"),
        ("insert", "true) EXECUTE FUNCTION capture_entity_change(); DROP TABLE orders --", "syntax error"),
    ],
)
def test_a_condition_that_the_server_refuses_changes_nothing(
    on: str, condition: str, reason: str, outbox: str, orders: psycopg.Connection
) -> None:
    told = refused(outbox, "track", "orders", "--on", on, "--when", condition)
    assert "the server refuses --when for orders" in told
    assert reason in told
    assert "a condition on the columns of OLD and NEW" in told
    assert ("an INSERT has no OLD" in told) == ("cannot reference" in reason)
    assert json.loads(invoke(outbox, "tracked", "--json").stdout)["tracked"] == []


def test_a_condition_means_what_it_means_on_the_path_of_its_author(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute("CREATE FUNCTION is_large(total int) RETURNS bool LANGUAGE sql AS 'SELECT total > 9'")
    done(outbox, "track", "orders", "--on", "insert", "--when", "is_large(NEW.total)")
    done(outbox, "track", "orders", "--exclude", "status")
    assert tracked(outbox)["orders"]["when"] == "public.is_large(new.total)"
    orders.execute("INSERT INTO orders (id, total) VALUES (1, 9), (2, 10)")
    assert captured(orders) == [("INSERT", "2")]


@pytest.mark.parametrize(
    ("on", "operations", "columns"),
    [
        ("UPDATE:total", ["update"], ["total"]),
        ('update:"a,b",status', ["update"], ["a,b", "status"]),
        ("delete, update: status , total,insert", ["insert", "update", "delete"], ["status", "total"]),
        ("update:status,update:total", ["update"], ["status", "total"]),
    ],
)
def test_columns_are_named_as_those_of_other_options(
    on: str, operations: list[str], columns: list[str], outbox: str, orders: psycopg.Connection
) -> None:
    done(outbox, "track", "orders", "--on", on)
    found = tracked(outbox)["orders"]
    assert (found["operations"], sorted(found["update_of"])) == (operations, sorted(columns))


@pytest.mark.parametrize("on", ["status", "update:", "update:,insert", "insert:total", 'update:"status'])
def test_what_names_no_operation_is_refused(on: str, outbox: str, orders: psycopg.Connection) -> None:
    assert "expected insert, update, delete" in refused(outbox, "track", "orders", "--on", on)


@pytest.mark.parametrize("on", ["update,update:total", "update:total,update"])
def test_any_update_and_those_of_a_column_contradict_each_other(
    on: str, outbox: str, orders: psycopg.Connection
) -> None:
    assert "either any update, or update:COLUMNS" in refused(outbox, "track", "orders", "--on", on)


def test_a_column_with_a_comma_is_shown_in_quotes(outbox: str, orders: psycopg.Connection) -> None:
    assert 'UPDATE OF status, "a,b"' in done(outbox, "track", "orders", "--on", 'update:status,"a,b"')


def test_a_column_that_is_not_there_is_refused(outbox: str, orders: psycopg.Connection) -> None:
    assert "did you mean status?" in refused(outbox, "track", "orders", "--on", "update:statsu")


_ODD = "My \"Schema\", 'x'"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--on", "update:status", "--when", "OLD.status IS DISTINCT FROM NEW.status -- only then"],
        ["--type", "it's 100%", "--exclude", '"a,b"', "--always"],
    ],
)
def test_the_printed_statements_make_the_trigger_that_tracking_makes(
    outbox: str, orders: psycopg.Connection, options: list[str]
) -> None:
    printed = invoke(outbox, "track", "orders", "--print", *options).stdout
    assert json.loads(invoke(outbox, "tracked", "--json").stdout)["tracked"] == []
    done(outbox, "track", "orders", *options)
    meant = tracked(outbox)["orders"]
    done(outbox, "untrack", "orders")
    orders.execute("SET search_path = nowhere")
    for _ in range(2):
        orders.execute(printed.encode())
    assert tracked(outbox)["orders"] == meant


def test_printed_statements_fit_a_schema_and_a_table_of_any_name(database: str, db: psycopg.Connection) -> None:
    migrations.install(db, _ODD)
    db.execute('CREATE SCHEMA "S 1"; CREATE TABLE "S 1"."O""rders" (id int PRIMARY KEY) PARTITION BY RANGE (id)')
    db.execute('CREATE TABLE "S 1".part PARTITION OF "S 1"."O""rders" DEFAULT')
    named = ["track", '"S 1"."O""rders"', "--always", "--schema", _ODD]
    printed = invoke(database, *named, "--print").stdout
    db.execute(printed.encode())
    assert "was tracked so already" in done(database, *named)


def test_printing_says_what_tracking_would_refuse_and_drops_what_it_would_replace(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute(
        "CREATE TRIGGER mine AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION capture_entity_change('order')"
    )
    assert "mine" in refused(outbox, "track", "orders", "--print")
    printed = invoke(outbox, "track", "orders", "--print", "--replace").stdout
    assert printed.splitlines()[0] == 'DROP TRIGGER "mine" ON "public"."orders";'
    assert tracked(outbox)["orders"]["trigger"] == "mine"
    orders.execute(printed.encode())
    assert tracked(outbox)["orders"]["trigger"] == "#cdc_capture"


def test_printed_is_either_sql_or_json(outbox: str, orders: psycopg.Connection) -> None:
    assert "two kinds of output" in refused(outbox, "track", "orders", "--print", "--json")


@pytest.mark.parametrize(
    "condition",
    [
        "new.id > 0",
        "new.status <> ') EXECUTE FUNCTION '::text",
        "new.status <> ' WHEN ('::text",
        "new.status <> '''\" WHEN ('::text",
        'new."a\'b" > 0',
    ],
)
def test_a_condition_ends_where_it_ends_whatever_names_and_arguments_say(
    outbox: str, outbox_db: psycopg.Connection, condition: str
) -> None:
    """They are the table owner's, and a superuser may run `cdc track` after them."""
    role = f"made_by_{outbox_db.info.dbname}"
    outbox_db.execute("""CREATE TABLE "a WHEN (true) b" (id int PRIMARY KEY, status text, "a'b" int)""")
    outbox_db.execute(
        f"""CREATE TRIGGER "#cdc_capture" AFTER INSERT ON "a WHEN (true) b" FOR EACH ROW WHEN ({condition})
        EXECUTE FUNCTION capture_entity_change(
          '); COMMIT; CREATE ROLE {role}; --', '{{"key": ["id"]}}', ') EXECUTE FUNCTION ')""".encode()
    )
    assert tracked(outbox)['"a WHEN (true) b"']["when"] == condition
    done(outbox, "track", '"a WHEN (true) b"', "--exclude", "status")
    assert tracked(outbox)['"a WHEN (true) b"']["when"] == condition
    assert outbox_db.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchall() == []
