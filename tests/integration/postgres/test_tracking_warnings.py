"""What `cdc track` refuses or warns of, because of what the table or the outbox is."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.postgres import migrations
from tests.commands import done, invoke, refused, tracked
from tests.integration.postgres.test_tracking_again import payloads


@pytest.fixture
def latin(admin_dsn: str) -> Iterator[str]:
    """The DSN of a LATIN1 database with the outbox in it."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("CREATE DATABASE test_latin1 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        dsn = make_conninfo(admin_dsn, dbname="test_latin1")
        with psycopg.connect(dsn, autocommit=True) as connection:
            migrations.install(connection, "public")
        yield dsn
        admin.execute("DROP DATABASE test_latin1 WITH (FORCE)")


def test_names_are_read_as_they_are_in_a_database_of_another_encoding(latin: str) -> None:
    with psycopg.connect(latin, autocommit=True, client_encoding="utf8") as db:
        db.execute('CREATE TABLE teil ("größe" int PRIMARY KEY, "prüfziffer" text)')
        done(latin, "track", "teil", "--type", "bestellübersicht", "--exclude", "prüfziffer")
        found = tracked(latin)["teil"]
        assert (found["entity_type"], found["key"], found["exclude"], found["missing"]) == (
            "bestellübersicht", ["größe"], ["prüfziffer"], [],
        )  # fmt: skip
        assert "was tracked so already" in done(latin, "track", "teil")
        db.execute("INSERT INTO teil VALUES (1, 'x')")
        assert payloads(db) == [{"größe": 1}]


def test_every_table_of_the_outbox_is_refused(outbox: str, outbox_db: psycopg.Connection) -> None:
    migrations.install(outbox_db, "public", ["whatsapp"])
    of_application = {"actionRules", "whatsapp_messages", "whatsapp_message_reactions", "whatsapp_removed_reactions"}
    tables = outbox_db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"
    ).fetchall()
    ours = {name for (name,) in tables} - of_application
    assert {"entity_changes", "cdc_migrations", "cdc_shards", "cdc_sets"} <= ours
    for name in ours:
        assert "belongs to the outbox itself" in refused(outbox, "track", name)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("DROP TABLE entity_changes CASCADE", "the table entity_changes, which is not there"),
        ("ALTER TABLE entity_changes RENAME TO changes_of_before", "the table entity_changes, which is not there"),
        ("ALTER TABLE entity_changes OWNER TO other_owner", "INSERT on entity_changes"),
        ("ALTER FUNCTION capture_entity_change() OWNER TO other_owner", "INSERT on entity_changes"),
    ],
)
def test_where_every_write_would_fail_nothing_is_tracked(
    outbox: str, outbox_db: psycopg.Connection, broken: str, said: str
) -> None:
    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    outbox_db.execute("CREATE ROLE plain_owner; CREATE ROLE other_owner; GRANT ALL ON SCHEMA public TO plain_owner")
    outbox_db.execute("GRANT ALL ON SCHEMA public TO other_owner")
    outbox_db.execute("ALTER TABLE entity_changes OWNER TO plain_owner")
    outbox_db.execute("ALTER FUNCTION capture_entity_change() OWNER TO plain_owner")
    outbox_db.execute(broken.encode())
    try:
        assert said in refused(outbox, "track", "orders")
        outbox_db.execute("INSERT INTO orders VALUES (1)")
    finally:
        outbox_db.execute(sql.SQL("REASSIGN OWNED BY plain_owner, other_owner TO {}").format(
            sql.Identifier(outbox_db.info.user)))  # fmt: skip
        outbox_db.execute("DROP OWNED BY plain_owner, other_owner; DROP ROLE plain_owner, other_owner")


_BY_HAND = "CREATE TRIGGER c AFTER INSERT ON tenant.t FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
_WRITTEN_BY_IT = (
    "CREATE SUBSCRIPTION cdc_test_none CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false);"
    "INSERT INTO pg_subscription_rel SELECT oid, 't'::regclass, 'r', NULL FROM pg_subscription"
    " WHERE subname = 'cdc_test_none'"
)
WARNED = {
    "row level security": (
        "CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t ENABLE ROW LEVEL SECURITY",
        "t has row level security, and what is captured of it is not under it",
    ),
    "unlogged": ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)", "t is unlogged: after a crash its rows are gone"),
    "children": (
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE child () INHERITS (t); CREATE TABLE x () INHERITS (child)",
        "child, x inherits from t, and rows of it are not captured by that",
    ),
    "the same table in another schema": (
        f"CREATE TABLE t (id int PRIMARY KEY); CREATE SCHEMA tenant; CREATE TABLE tenant.t (id int); {_BY_HAND}",
        "t and tenant.t share the type t: rows with the same key are one entity",
    ),
    "a subscription": (
        f"CREATE TABLE t (id int PRIMARY KEY); {_WRITTEN_BY_IT}",
        "a subscription writes t, and what it writes is not captured",
    ),
}


@pytest.mark.parametrize("table", WARNED)
def test_what_is_unexpected_about_the_table_is_a_warning(
    outbox: str, outbox_db: psycopg.Connection, table: str
) -> None:
    prepare, said = WARNED[table]
    if table == "a subscription":
        outbox_db.execute("SET allow_system_table_mods = on")
    for statement in prepare.split(";"):
        outbox_db.execute(statement.encode())
    try:
        assert said in done(outbox, "track", "t", "--shared-key")
        doctor = invoke(outbox, "doctor", "--no-stream").output.replace("public.", "")
        assert said in doctor
    finally:
        if table == "a subscription":
            outbox_db.execute("ALTER SUBSCRIPTION cdc_test_none SET (slot_name = NONE)")
            outbox_db.execute("DROP SUBSCRIPTION cdc_test_none")


def test_a_child_that_is_captured_itself_and_a_type_of_its_own_are_not_warned_of(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (t)")
    done(outbox, "track", "child")
    assert "Warning" not in done(outbox, "track", "t")
    outbox_db.execute("CREATE SCHEMA tenant; CREATE TABLE tenant.t (id int PRIMARY KEY)")
    assert "Warning" not in done(outbox, "track", "tenant.t", "--type", "tenant's t")


def test_a_table_that_two_outboxes_capture_is_not_warned_of_and_what_else_fires_first_is(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    migrations.install(outbox_db, "search")
    outbox_db.execute("CREATE TABLE t (id int PRIMARY KEY)")
    assert "Warning" not in done(outbox, "track", "t")
    assert "Warning" not in done(outbox, "track", "t", "--schema", "search")
    doctor = invoke(outbox, "doctor", "--no-stream", "--schema", "search").output
    assert "ok      trigger-order" in doctor
    outbox_db.execute("CREATE FUNCTION capture() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    outbox_db.execute('CREATE TRIGGER "!own" AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION capture()')
    assert "!own fires before #cdc_capture_search of t" in done(outbox, "track", "t", "--schema", "search")


FOREIGN = {
    "an enum": "m mood",
    "an array": "m mood[]",
    "a domain": "m spirit",
    "a composite": "m pair",
    "an array of composites": "m pair[]",
    "a range": "m moods",
    "a multirange": "m moods_multi",
    "a domain of a domain": "m humour",
    "a domain of an array": "m spirits",
    "a composite in a composite": "m pairs",
    "a composite of a range": "m ranged",
    "an array of multiranges in a composite": "m multiranged",
    "a range of a domain": "m humours",
    "a multirange of a range of a domain": "m humours_multi[]",
}
_NESTED = (
    "CREATE DOMAIN humour AS spirit; CREATE DOMAIN spirits AS mood[]; CREATE TYPE pairs AS (p pair);"
    "CREATE TYPE humours AS RANGE (SUBTYPE = humour, MULTIRANGE_TYPE_NAME = humours_multi);"
    "CREATE TYPE ranged AS (r moods); CREATE TYPE multiranged AS (m moods_multi[])"
)
"""Made by another role than what is in it."""


@pytest.mark.parametrize("column", FOREIGN)
def test_a_type_with_somebodys_cast_to_json_is_named(outbox: str, outbox_db: psycopg.Connection, column: str) -> None:
    outbox_db.execute(
        "CREATE ROLE caster; GRANT ALL ON SCHEMA public TO caster; SET ROLE caster;"
        "CREATE TYPE mood AS ENUM ('ok'); CREATE DOMAIN spirit AS mood; CREATE TYPE pair AS (a int, b mood);"
        "CREATE TYPE moods AS RANGE (SUBTYPE = mood, MULTIRANGE_TYPE_NAME = moods_multi);"
        "CREATE FUNCTION peek(mood) RETURNS json LANGUAGE sql AS $$SELECT '1'::json$$;"
        "CREATE CAST (mood AS json) WITH FUNCTION peek(mood); RESET ROLE"
    )
    outbox_db.execute(_NESTED)
    outbox_db.execute(f"CREATE TABLE t (id int PRIMARY KEY, {FOREIGN[column]}, plain int)".encode())
    try:
        said = done(outbox, "track", "t")
        assert "may run code of others" in said
        assert "m (mood: peek(mood) of caster)" in said.replace("public.", "")
        assert "may run code of others" in invoke(outbox, "doctor", "--no-stream").output
        # Where it runs as a superuser, whose a nested type is makes the difference.
        outbox_db.execute("ALTER FUNCTION capture_entity_change() OWNER TO CURRENT_USER")
        assert "types may make: caster" in invoke(outbox, "doctor", "--no-stream").output
        assert "code of others" not in done(outbox, "track", "t", "--exclude", "m")
    finally:
        outbox_db.execute("DROP OWNED BY caster CASCADE; DROP ROLE caster")


def test_casts_of_superusers_and_extensions_are_not_named(outbox: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("CREATE EXTENSION IF NOT EXISTS hstore; CREATE TABLE t (id int PRIMARY KEY, h hstore, j jsonb)")
    assert "Warning" not in done(outbox, "track", "t")
