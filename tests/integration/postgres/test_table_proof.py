"""What a table's capture function takes for granted is proved by the server's plan, and anew when the table changes."""

from __future__ import annotations

from threading import Thread

import psycopg
import pytest

from cdc.postgres.tracking import track
from tests.eventually import eventually
from tests.integration.postgres.test_table_capture import proof, redefined

pytestmark = pytest.mark.server


CHANGES = {
    "another name": "ALTER TABLE orders RENAME TO sales",
    "another schema": "CREATE SCHEMA shop; ALTER TABLE orders SET SCHEMA shop",
    "a type that somebody made": "CREATE TYPE mood AS ENUM ('ok'); ALTER TABLE orders ADD m mood",
    "an array of one": "CREATE TYPE mood AS ENUM ('ok'); ALTER TABLE orders ADD m mood[]",
    "a domain": "CREATE DOMAIN kind AS text; ALTER TABLE orders ADD m kind",
    "a column that becomes one": "CREATE DOMAIN kind AS text; ALTER TABLE orders ALTER note TYPE kind",
    "JSON": "ALTER TABLE orders ADD m json",
    "a type whose text depends on a setting": "ALTER TABLE orders ADD m real",
    "metadata": "ALTER TABLE orders ADD room_id int",
    "other arguments": redefined('["id"]', '["note"]'),
    "a trigger before": redefined("AFTER", "BEFORE"),
    "a second trigger": redefined("cdc_capture", "another"),
    "a partition": "CREATE TABLE parted (LIKE orders) PARTITION BY LIST (id);"
    " ALTER TABLE parted ATTACH PARTITION orders FOR VALUES IN (1)",
    "no trigger": 'DROP TRIGGER "#cdc_capture" ON orders',
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_is_not_as_its_function_was_made_for_is_found_out(
    outbox_db: psycopg.Connection, change: str
) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, note text, at timestamptz, price numeric(10,2))")
    track(outbox_db, "public", "orders", entity_type="it's")
    asked = proof(outbox_db)
    assert outbox_db.execute(asked).fetchone() == (True,)
    outbox_db.execute("ALTER TABLE orders ADD more varchar(20), DROP price, ALTER note SET DEFAULT ''")
    assert outbox_db.execute(asked).fetchone() == (True,)
    outbox_db.execute(CHANGES[change].encode())
    assert outbox_db.execute(asked).fetchone() == (False,)


_TELLS = """
CREATE TYPE mood AS ENUM ('ok');
CREATE FUNCTION told(mood) RETURNS json LANGUAGE plpgsql AS $$ BEGIN
  RAISE NOTICE 'read only: %', current_setting('transaction_read_only'); RETURN '1'; END $$;
CREATE CAST (mood AS json) WITH FUNCTION told(mood);
CREATE TABLE customers (id int PRIMARY KEY);
CREATE TABLE orders (id int PRIMARY KEY, customer int REFERENCES customers ON DELETE CASCADE);
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  PERFORM pg_advisory_lock(1), pg_advisory_unlock(1); RETURN OLD; END $$;
CREATE TRIGGER wait BEFORE DELETE ON customers FOR EACH ROW EXECUTE FUNCTION wait();
"""
_MORE = "ALTER TABLE orders ADD m mood DEFAULT 'ok'"


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_session_that_has_captured_before_learns_of_a_type_that_somebody_made(
    outbox_db: psycopg.Connection, isolation: str
) -> None:
    """Whatever its snapshot: a cast of that type runs where nothing may be written."""
    outbox_db.execute(_TELLS)
    track(outbox_db, "public", "orders")
    with psycopg.connect(outbox_db.info.dsn, autocommit=True) as writer:
        said = list[str | None]()
        writer.add_notice_handler(lambda notice: said.append(notice.message_primary))
        writer.execute("INSERT INTO orders VALUES (1)")
        writer.execute(f"BEGIN ISOLATION LEVEL {isolation}; SELECT FROM customers".encode())
        outbox_db.execute(_MORE)
        writer.execute("INSERT INTO orders VALUES (2)")
        writer.execute("COMMIT")
        writer.execute("INSERT INTO orders VALUES (3)")
    assert said == ["read only: on"] * 2


def test_so_does_one_whose_statement_began_before_it_locked_the_table(outbox_db: psycopg.Connection) -> None:
    """A cascade locks it late, and what it deletes is captured with the snapshot of the outer statement."""
    outbox_db.execute(_TELLS)
    track(outbox_db, "public", "orders")
    with psycopg.connect(outbox_db.info.dsn, autocommit=True) as writer:
        said = list[str | None]()
        writer.add_notice_handler(lambda notice: said.append(notice.message_primary))
        writer.execute("INSERT INTO customers VALUES (1); INSERT INTO orders VALUES (1, 1)")
        outbox_db.execute("SELECT pg_advisory_lock(1)")
        deleting = Thread(target=writer.execute, args=["DELETE FROM customers"])
        deleting.start()
        waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: bool(outbox_db.execute(waiting).fetchall()), what="the DELETE to wait")
        outbox_db.execute(_MORE)
        outbox_db.execute("SELECT pg_advisory_unlock(1)")
        deleting.join()
    assert said == ["read only: on"]


@pytest.mark.parametrize("change", ["ADD room_id int", "DROP chat_id", "RENAME user_id TO who"])
def test_it_has_the_columns_that_go_into_the_metadata_and_no_other(outbox_db: psycopg.Connection, change: str) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY, user_id int, chat_id text)")
    track(outbox_db, "public", "orders")
    asked = proof(outbox_db)
    outbox_db.execute("ALTER TABLE orders DROP chat_id, ADD chat_id varchar(9)")
    assert outbox_db.execute(asked).fetchone() == (True,)
    outbox_db.execute(f"ALTER TABLE orders {change}".encode())
    assert outbox_db.execute(asked).fetchone() == (False,)
