"""`cdc track` of a table that is tracked: what is not named stays, what would go is refused, and who fires when."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.commands import done, invoke, refused, tracked


def firing(db: psycopg.Connection) -> dict[str, str]:
    """tgenabled of each trigger that captures, by table."""
    rows = db.execute(
        "SELECT tgrelid::regclass::text, tgenabled::text FROM pg_trigger"
        " WHERE tgfoid = 'capture_entity_change()'::regprocedure ORDER BY 1"
    )
    return dict(rows.fetchall())


def captured(db: psycopg.Connection) -> list[tuple[str, str, str]]:
    return db.execute("SELECT entity_type, operation, entity_id FROM entity_changes ORDER BY seq").fetchall()


def payloads(db: psycopg.Connection) -> list[dict[str, Any]]:
    return [new for (new,) in db.execute("SELECT new_data FROM entity_changes ORDER BY seq")]


@pytest.fixture
def orders(outbox_db: psycopg.Connection) -> psycopg.Connection:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, total int, card text)")
    return outbox_db


@pytest.fixture
def measures(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """A table with the partitions measures_1 and measures_2, by column d."""
    outbox_db.execute(
        "CREATE TABLE measures (id int, d int, v int, PRIMARY KEY (id, d)) PARTITION BY LIST (d);"
        "CREATE TABLE measures_1 PARTITION OF measures FOR VALUES IN (1);"
        "CREATE TABLE measures_2 PARTITION OF measures FOR VALUES IN (2)"
    )
    return outbox_db


# Options


def test_options_that_are_not_named_stay(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--type", "order", "--exclude", "card", "--on", "insert", "--key", "id,total")
    before = tracked(outbox)
    assert "was tracked so already" in done(outbox, "track", "orders")
    assert tracked(outbox) == before
    said = done(outbox, "track", "orders", "--on", "insert,update")
    assert "orders was tracked: insert; key id,total; type order; without card" in said
    assert "orders is tracked now: insert,update; key id,total; type order; without card" in said
    orders.execute("INSERT INTO orders VALUES (1, 2, '4111')")
    assert payloads(orders) == [{"id": 1, "total": 2}]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--exclude", "total", "card, left out until now, would be captured"),
        ("--exclude", "", "card, left out until now, would be captured"),
        ("--type", "sale", "its type order would become sale"),
        ("--type", "", "its type order would become orders"),
        ("--key", "id,total", "its key id would become id,total"),
    ],
)
def test_what_would_go_is_refused_unless_it_is_meant(
    outbox: str, orders: psycopg.Connection, option: str, value: str, said: str
) -> None:
    done(outbox, "track", "orders", "--type", "order", "--exclude", "card")
    before = tracked(outbox)
    told = refused(outbox, "track", "orders", option, value)
    assert said in told
    assert "--replace" in told
    assert tracked(outbox) == before
    done(outbox, "track", "orders", option, value, "--replace")
    assert tracked(outbox) != before


def test_an_exclusion_that_is_added_and_a_type_where_there_was_none_need_no_leave(
    outbox: str, orders: psycopg.Connection
) -> None:
    done(outbox, "track", "orders")
    done(outbox, "track", "orders", "--exclude", "card", "--type", "order")
    done(outbox, "track", "orders", "--exclude", "card,total")
    assert tracked(outbox)["orders"]["exclude"] == ["card", "total"]


def test_conditions_of_a_trigger_made_by_hand_are_shown_and_stay(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute(
        "CREATE TRIGGER by_hand AFTER UPDATE OF total ON orders FOR EACH ROW WHEN (old.total <> new.total)"
        " EXECUTE FUNCTION capture_entity_change('order', '{\"exclude\": [\"card\"]}')"
    )
    assert tracked(outbox)["orders"]["only"] == "UPDATE OF total WHEN (old.total <> new.total)"
    orders.execute('ALTER TRIGGER by_hand ON orders RENAME TO "#cdc_capture"')
    done(outbox, "track", "orders", "--key", "id")
    assert tracked(outbox)["orders"]["only"] == "UPDATE OF total WHEN (old.total <> new.total)"


def test_a_trigger_made_by_hand_leaves_its_options_to_the_one_that_takes_its_place(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute(
        "CREATE TRIGGER by_hand AFTER INSERT ON orders FOR EACH ROW"
        " EXECUTE FUNCTION capture_entity_change('order', '{\"exclude\": [\"card\"]}')"
    )
    done(outbox, "track", "orders", "--replace")
    found = tracked(outbox)["orders"]
    assert (found["entity_type"], found["exclude"], found["operations"]) == ("order", ["card"], ["insert"])


def test_a_misspelt_option_goes_and_takes_no_exclusion_along(outbox: str, orders: psycopg.Connection) -> None:
    orders.execute(
        "CREATE TRIGGER by_hand AFTER INSERT ON orders FOR EACH ROW"
        """ EXECUTE FUNCTION capture_entity_change('order', '{"exclude": ["card"], "excluded": ["total"]}')"""
    )
    assert "knows no option excluded" in invoke(outbox, "tracked").stderr
    done(outbox, "track", "orders", "--replace")
    found = tracked(outbox)["orders"]
    assert (found["entity_type"], found["exclude"]) == ("order", ["card"])
    orders.execute("INSERT INTO orders VALUES (1)")


def test_two_triggers_that_differ_ask_which_is_meant(outbox: str, orders: psycopg.Connection) -> None:
    for name, column in (("one", "card"), ("two", "total")):
        orders.execute(
            f"CREATE TRIGGER {name} AFTER INSERT ON orders FOR EACH ROW"
            f" EXECUTE FUNCTION capture_entity_change('order', '{{\"exclude\": [\"{column}\"]}}')".encode()
        )
    assert "one and two, which differ in --exclude" in refused(outbox, "track", "orders", "--replace")
    done(outbox, "track", "orders", "--replace", "--exclude", "card,total")


@pytest.mark.parametrize("option", ["--exclude", "--key"])
def test_a_column_that_is_gone_is_marked_and_has_to_be_named_again(
    outbox: str, orders: psycopg.Connection, option: str
) -> None:
    done(outbox, "track", "orders", "--key", "id", "--exclude", "card")
    column = {"--exclude": "card", "--key": "id"}[option]
    orders.execute(f"ALTER TABLE orders RENAME COLUMN {column} TO renamed".encode())
    assert tracked(outbox)["orders"]["missing"] == [column]
    listed = invoke(outbox, "tracked")
    assert f"orders has no column {column}" in listed.stderr
    verified = invoke(outbox, "db", "verify")
    assert verified.exit_code == 1
    assert f"orders has no column {column}" in verified.output
    assert f"no column {column} any more, which its {option} names" in refused(outbox, "track", "orders")
    done(outbox, "track", "orders", option, "renamed")
    assert tracked(outbox)["orders"]["missing"] == []
    assert invoke(outbox, "db", "verify").exit_code == 0


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (["--exclude", '"a,b"'], ["a,b"]),
        (["--exclude", '" c "', "--exclude", "card"], [" c ", "card"]),
        (["--exclude", '"a,b", card," c ","d""e"'], ["a,b", "card", " c ", 'd"e']),
        (["--exclude", "card , total,"], ["card", "total"]),
    ],
)
def test_a_column_with_a_comma_a_blank_or_a_quote_in_its_name_can_be_left_out(
    outbox: str, orders: psycopg.Connection, options: list[str], columns: list[str]
) -> None:
    orders.execute('ALTER TABLE orders ADD "a,b" text, ADD " c " text, ADD "d""e" text')
    done(outbox, "track", "orders", *options)
    assert tracked(outbox)["orders"]["exclude"] == columns
    orders.execute("INSERT INTO orders VALUES (1, 2, 'x', 'x', 'x', 'x')")
    assert not set(payloads(orders)[0]) & set(columns)


def test_an_allow_list_captures_what_it_names_whatever_comes_or_is_renamed(
    outbox: str, orders: psycopg.Connection
) -> None:
    said = done(outbox, "track", "orders", "--columns", "id,total")
    assert "orders is tracked now: insert,update,delete; key id; type orders; only id,total" in said
    orders.execute("ALTER TABLE orders ADD ssn text; ALTER TABLE orders RENAME card TO pan")
    orders.execute("INSERT INTO orders VALUES (1, 2, 'x', 'y'); UPDATE orders SET ssn = 'z'; DELETE FROM orders")
    rows = orders.execute("SELECT old_data, new_data FROM entity_changes ORDER BY seq").fetchall()
    row = {"id": 1, "total": 2}
    assert rows == [(None, row), (row, row), (row, None)]
    assert "only id,total" in invoke(outbox, "tracked").stdout
    assert invoke(outbox, "db", "verify").exit_code == 0


def test_an_allow_list_changes_with_leave_only(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders", "--columns", "id")
    assert "total,card, left out until now, would be captured" in refused(outbox, "track", "orders", "--columns", "")
    assert "would be captured" in refused(outbox, "track", "orders", "--exclude", "card")
    done(outbox, "track", "orders", "--columns", "id,total")
    assert "total would be captured no more" in refused(outbox, "track", "orders", "--columns", "id")
    assert "in the key of orders" in refused(outbox, "track", "orders", "--columns", "total", "--replace")
    assert "name one of them" in refused(outbox, "track", "orders", "--columns", "id", "--exclude", "card")
    orders.execute("ALTER TABLE orders RENAME total TO sum")
    assert "orders has no column total, which is to be captured" in invoke(outbox, "tracked").stderr


def test_a_capture_function_that_does_not_know_the_allow_list_is_not_given_one(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute(
        "CREATE OR REPLACE FUNCTION capture_entity_change() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
        " SET search_path = pg_catalog AS $$BEGIN RETURN NULL; END$$"
    )
    assert "cdc db upgrade" in refused(outbox, "track", "orders", "--columns", "id")
    done(outbox, "db", "upgrade")
    done(outbox, "track", "orders", "--columns", "id")


def test_leave_to_say_that_a_change_is_handled_stays_until_it_is_taken_away(
    outbox: str, orders: psycopg.Connection
) -> None:
    said = done(outbox, "track", "orders", "--type", "order", "--handled")
    assert "may keep its changes of the type order from the handlers" in said
    done(outbox, "track", "orders", "--exclude", "card")
    assert tracked(outbox)["orders"]["handled"]
    assert "by writers too" in invoke(outbox, "tracked").stdout
    assert "warn    handled-by-writers" in invoke(outbox, "doctor", "--no-stream").stdout
    orders.execute("SET cdc.handled = 'order'; INSERT INTO orders (id) VALUES (1)")
    assert "was tracked: " in done(outbox, "track", "orders", "--no-handled")
    orders.execute("INSERT INTO orders (id) VALUES (2)")
    rows = orders.execute("SELECT entity_id, processed FROM entity_changes ORDER BY seq").fetchall()
    assert rows == [("1", True), ("2", False)]


@pytest.mark.parametrize("where", ["ROLE {user} IN DATABASE {database}", "DATABASE {database}"])
def test_who_says_that_changes_are_handled_where_it_does_not_count_is_named(
    outbox: str, orders: psycopg.Connection, where: str
) -> None:
    done(outbox, "track", "orders", "--type", "order")
    names = {"user": sql.Identifier(orders.info.user), "database": sql.Identifier(orders.info.dbname)}
    orders.execute(sql.SQL("ALTER {} SET cdc.handled = 'reaction,order'").format(sql.SQL(where).format(**names)))
    said = invoke(outbox, "doctor", "--no-stream").stdout
    who = f"the role {orders.info.user}" if "ROLE" in where else "every role"
    assert f"{who} sets cdc.handled for order, which does not count" in said
    assert "cdc track public.orders --handled" in said
    done(outbox, "track", "orders", "--handled")
    assert "does not count" not in invoke(outbox, "doctor", "--no-stream").stdout


def test_a_quote_that_is_not_closed_is_an_error(outbox: str, orders: psycopg.Connection) -> None:
    assert "a quote is not closed" in refused(outbox, "track", "orders", "--exclude", '"a,b')


# When it fires


@pytest.mark.parametrize(("how", "fires"), [("ALWAYS", "always"), ("REPLICA", "replica")])
def test_a_trigger_that_fires_for_replicated_rows_still_does_after_another_track(
    outbox: str, orders: psycopg.Connection, how: str, fires: str
) -> None:
    done(outbox, "track", "orders")
    orders.execute(f'ALTER TABLE orders ENABLE {how} TRIGGER "#cdc_capture"'.encode())
    assert tracked(outbox)["orders"]["fires"] == fires
    done(outbox, "track", "orders", "--exclude", "card")
    assert tracked(outbox)["orders"]["fires"] == fires
    assert "was tracked so already" in done(outbox, "track", "orders")


def test_always_captures_what_replication_writes_and_can_be_taken_back(outbox: str, orders: psycopg.Connection) -> None:
    done(outbox, "track", "orders")
    orders.execute("SET session_replication_role = replica; INSERT INTO orders VALUES (1)")
    assert captured(orders) == []
    done(outbox, "track", "orders", "--always")
    assert "always" in invoke(outbox, "tracked").stdout
    orders.execute("INSERT INTO orders VALUES (2)")
    assert captured(orders) == [("orders", "INSERT", "2")]
    done(outbox, "track", "orders", "--no-always")
    orders.execute("INSERT INTO orders VALUES (3)")
    assert len(captured(orders)) == 1


def test_a_role_that_may_not_alter_the_table_gets_the_statement_for_its_owner(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute("CREATE ROLE trigger_maker LOGIN; GRANT TRIGGER ON orders TO trigger_maker")
    orders.execute("GRANT EXECUTE ON FUNCTION capture_entity_change() TO trigger_maker")
    said = refused(make_conninfo(outbox, user="trigger_maker"), "track", "orders", "--always")
    orders.execute("DROP OWNED BY trigger_maker; DROP ROLE trigger_maker")
    assert 'ALTER TABLE ONLY "public"."orders" ENABLE ALWAYS TRIGGER "#cdc_capture"' in said
    assert tracked(outbox) == {}


# Partitions


def test_a_partition_that_is_captured_by_hand_is_not_captured_twice(outbox: str, measures: psycopg.Connection) -> None:
    by_hand = "CREATE TRIGGER by_hand AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    measures.execute(by_hand.format("measures_1").encode())
    said = refused(outbox, "track", "measures", "--key", "id,d")
    assert "captured by by_hand of its partition measures_1 already" in said
    done(outbox, "track", "measures", "--key", "id,d", "--replace")
    measures.execute("INSERT INTO measures VALUES (1, 1)")
    assert len(captured(measures)) == 1


def test_a_partition_whose_trigger_is_disabled_is_named_and_enabled(outbox: str, measures: psycopg.Connection) -> None:
    done(outbox, "track", "measures", "--key", "id,d")
    measures.execute('ALTER TABLE measures_1 DISABLE TRIGGER "#cdc_capture"')
    assert tracked(outbox)["measures"]["disabled_partitions"] == ["measures_1"]
    assert "not in measures_1" in invoke(outbox, "tracked").stdout
    assert "measures is tracked now" in done(outbox, "track", "measures")
    measures.execute("INSERT INTO measures VALUES (1, 1)")
    assert len(captured(measures)) == 1
    assert "was tracked so already" in done(outbox, "track", "measures")


def test_partitions_fire_always_with_their_table_and_stay_so(outbox: str, measures: psycopg.Connection) -> None:
    done(outbox, "track", "measures", "--key", "id,d", "--always")
    assert set(firing(measures).values()) == {"A"}
    measures.execute('ALTER TABLE measures_2 DISABLE TRIGGER "#cdc_capture"')
    done(outbox, "track", "measures", "--exclude", "v")
    assert firing(measures) == {"measures": "A", "measures_1": "A", "measures_2": "O"}
    done(outbox, "track", "measures", "--always")
    assert set(firing(measures).values()) == {"A"}


def test_updates_alone_of_a_partitioned_table_are_warned_of(outbox: str, measures: psycopg.Connection) -> None:
    said = done(outbox, "track", "measures", "--key", "id", "--on", "update")
    assert "moves a row of measures to another partition is a DELETE and an INSERT" in said
    said = done(outbox, "track", "measures", "--on", "insert,update,delete")
    assert "moves a row" not in said


# The order of triggers


def touching(db: psycopg.Connection, event: str) -> None:
    """A trigger whose name comes before most, and that writes the row again."""
    db.execute(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN UPDATE orders SET total = NEW.total + 1 WHERE id = NEW.id AND total < 5; RETURN NULL; END$$"
    )
    db.execute(f"CREATE TRIGGER after_order AFTER {event} ON orders FOR EACH ROW EXECUTE FUNCTION touch()".encode())


@pytest.mark.parametrize("event", ["INSERT", "UPDATE", "INSERT OR UPDATE"])
def test_what_another_trigger_writes_is_captured_after_what_made_it_write(
    outbox: str, orders: psycopg.Connection, event: str
) -> None:
    touching(orders, event)
    done(outbox, "track", "orders")
    orders.execute("INSERT INTO orders VALUES (1, 3); UPDATE orders SET total = 4")
    totals = [new["total"] for new in payloads(orders)]
    assert totals == {"INSERT": [3, 4, 4], "UPDATE": [3, 4, 5], "INSERT OR UPDATE": [3, 4, 5, 4, 5]}[event]
    assert [operation for _, operation, _ in captured(orders)] == ["INSERT", *["UPDATE"] * (len(totals) - 1)]


FORMER = (
    "CREATE TRIGGER cdc_capture AFTER INSERT OR UPDATE OR DELETE ON {} FOR EACH ROW"
    ' EXECUTE FUNCTION capture_entity_change(\'order\', \'{{"key": ["id"], "exclude": ["card"]}}\')'
)


@pytest.mark.parametrize("command", [["track", "orders"], ["db", "upgrade"], ["db", "install"]])
def test_a_trigger_with_its_former_name_gets_the_one_that_fires_first(
    outbox: str, orders: psycopg.Connection, command: list[str]
) -> None:
    orders.execute(FORMER.format("orders").encode())
    touching(orders, "INSERT")
    done(outbox, *command)
    found = tracked(outbox)["orders"]
    assert (found["trigger"], found["entity_type"], found["exclude"]) == ("#cdc_capture", "order", ["card"])
    orders.execute("INSERT INTO orders VALUES (1, 3)")
    assert [operation for _, operation, _ in captured(orders)] == ["INSERT", "UPDATE"]


def test_a_former_trigger_of_a_partitioned_table_is_renamed_in_its_partitions_too(
    outbox: str, measures: psycopg.Connection
) -> None:
    measures.execute("ALTER TABLE measures ADD card text")
    measures.execute(FORMER.format("measures").encode())
    done(outbox, "db", "upgrade")
    names = measures.execute(
        "SELECT DISTINCT tgname::text FROM pg_trigger WHERE NOT tgisinternal AND tgrelid <> 'entity_changes'::regclass"
    ).fetchall()
    assert names == [("#cdc_capture",)]


def test_an_upgrade_leaves_the_name_of_a_trigger_on_a_table_that_is_somebody_elses(
    outbox: str, orders: psycopg.Connection
) -> None:
    orders.execute(FORMER.format("orders").encode())
    orders.execute("CREATE ROLE outbox_owner LOGIN; GRANT ALL ON SCHEMA public TO outbox_owner")
    owned = orders.execute(
        "SELECT format('ALTER %s %s OWNER TO outbox_owner', CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,"
        " oid::regclass)"
        " FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND relname <> 'orders'"
        " UNION ALL SELECT format('ALTER FUNCTION %s OWNER TO outbox_owner', oid::regprocedure) FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace"
    ).fetchall()
    for (statement,) in owned:
        orders.execute(statement.encode())
    try:
        result = invoke(make_conninfo(outbox, user="outbox_owner"), "db", "upgrade")
        assert "the trigger of public.orders keeps its former name" in result.output
        assert "cdc track public.orders" in result.output
        assert tracked(outbox)["orders"]["trigger"] == "cdc_capture"
    finally:
        orders.execute(sql.SQL("REASSIGN OWNED BY outbox_owner TO {}").format(sql.Identifier(orders.info.user)))
        orders.execute("DROP OWNED BY outbox_owner; DROP ROLE outbox_owner")
