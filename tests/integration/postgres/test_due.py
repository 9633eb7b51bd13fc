"""``publish_change(..., due => ...)``: kept apart until it is due, and then published once, in order."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from cdc.core.errors import RefusedError, SchemaError
from cdc.postgres import grants, migration_scripts, migrations
from cdc.postgres.due import DueChanges
from cdc.postgres.pages import DueLater
from tests.fix_outbox import count

ODD = 'Odd "one" %s {x}\'s'
_LATER = "SELECT publish_change('x', %s, due => clock_timestamp() + %s)"


def later(db: psycopg.Connection, key: str = "k", within: timedelta = timedelta(hours=1)) -> int | None:
    [(seq,)] = db.execute(_LATER, [key, within]).fetchall()
    assert seq is None or isinstance(seq, int)
    return seq


def make_due(db: psycopg.Connection) -> None:
    """As if their time had come, in the order in which they are due."""
    db.execute("UPDATE cdc_due_changes SET due = due - interval '1 year'")


def publish(db: psycopg.Connection, events: int = 1_000, size: int = 1 << 20) -> float | None:
    [(seconds,)] = db.execute("SELECT publish_due(%s, %s)", [events, size]).fetchall()
    assert seconds is None or isinstance(seconds, float)
    return seconds


def keys(db: psycopg.Connection) -> list[str]:
    return [key for (key,) in db.execute("SELECT entity_id FROM entity_changes ORDER BY seq")]


def waiting(db: psycopg.Connection) -> int:
    [(number,)] = db.execute("SELECT count(*) FROM cdc_due_changes").fetchall()
    return int(number)


def test_an_event_that_is_due_later_is_no_change_until_then(outbox_db: psycopg.Connection) -> None:
    assert later(outbox_db) is None
    assert publish(outbox_db) == pytest.approx(3600, abs=60)
    assert (count(outbox_db), waiting(outbox_db)) == (0, 1)
    make_due(outbox_db)
    assert publish(outbox_db) == 0
    assert (count(outbox_db), waiting(outbox_db)) == (1, 0)
    assert publish(outbox_db) is None


@pytest.mark.parametrize("due", ["NULL", "now()", "now() - interval '1 s'", "'-infinity'"])
def test_one_that_is_due_already_is_published_at_once(outbox_db: psycopg.Connection, due: str) -> None:
    statement = sql.SQL("SELECT publish_change('x', 'k', due => {})").format(sql.SQL(due))
    assert outbox_db.execute(statement).fetchone() == (1,)
    assert (count(outbox_db), waiting(outbox_db)) == (1, 0)


def test_what_would_never_come_is_refused_and_what_comes_late_is_not(outbox_db: psycopg.Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="due at infinity: it would never come"):
        outbox_db.execute("SELECT publish_change('x', 'k', due => 'infinity')")
    outbox_db.execute("SELECT publish_change('x', 'k', due => '290000-01-01Z')")
    seen = DueChanges("public").count(outbox_db)
    assert seen is not None
    assert seen.count == 1
    assert str(seen).startswith("1, the first in ")


def test_what_its_writer_said_is_kept_with_its_id_its_cause_and_when_it_was_due(outbox_db: psycopg.Connection) -> None:
    cause = "7b8a1a0e-9a3b-4f5e-8a55-0123456789ab"
    outbox_db.execute("SET timezone = 'Asia/Kolkata'")
    with outbox_db.transaction():
        outbox_db.execute("SELECT set_config('cdc.cause', %s, true)", [f"{cause},4"])
        outbox_db.execute(
            "SELECT publish_change('x', 'k', 'UPDATE', '{\"n\": 2}', '{\"n\": 1}', '{\"by\": \"me\"}',"
            " now() + interval '1 h')"
        )
    [(id_, due, written)] = outbox_db.execute("SELECT id, due, written_at FROM cdc_due_changes").fetchall()
    make_due(outbox_db)
    publish(outbox_db)
    [found] = outbox_db.execute(
        "SELECT id, entity_type, table_name, operation, new_data, old_data, metadata, caused_by::text, depth,"
        " changed_at > %s FROM entity_changes",
        [written],
    ).fetchall()
    metadata: dict[str, Any] = found[6]
    assert found[:6] == (id_, "x", "x", "UPDATE", {"n": 2}, {"n": 1})
    assert found[7:] == (cause, 5, True)
    assert metadata.pop("by") == "me"
    assert metadata.keys() == {"due", "written_at"}
    assert outbox_db.execute("SELECT %s::timestamptz = %s", [metadata["due"], due]).fetchone() == (True,)
    assert outbox_db.execute("SELECT %s::timestamptz = %s", [metadata["written_at"], written]).fetchone() == (True,)
    assert {metadata[name][-6:] for name in ("due", "written_at")} == {"+00:00"}, "whatever the session's time zone"


def test_what_could_fail_fails_for_its_writer_and_publishing_moves_what_is_stored(
    outbox_db: psycopg.Connection,
) -> None:
    """Metadata may be as large as jsonb can be, and more would not fit: such an event would stop all others."""
    later(outbox_db, "made larger")
    later(outbox_db, "not")
    stored = outbox_db.execute("SELECT metadata FROM cdc_due_changes ORDER BY number").fetchall()
    assert [sorted(metadata) for (metadata,) in stored] == [["due", "written_at"]] * 2
    outbox_db.execute("UPDATE cdc_due_changes SET metadata = '{\"as\": \"it is\"}' WHERE entity_id = 'made larger'")
    make_due(outbox_db)
    publish(outbox_db)
    published = outbox_db.execute("SELECT metadata FROM entity_changes ORDER BY seq").fetchall()
    assert published == [({"as": "it is"},), stored[1]]


def test_metadata_that_is_no_object_stays_as_it_was_given(outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("SELECT publish_change('x', 'k', metadata => '[1]', due => now() + interval '1 h')")
    make_due(outbox_db)
    publish(outbox_db)
    assert outbox_db.execute("SELECT metadata FROM entity_changes").fetchall() == [([1],)]


def test_the_first_due_is_published_first_then_the_first_written(outbox_db: psycopg.Connection) -> None:
    for key, minutes in [("c", 30), ("a", 10), ("b", 20)]:
        later(outbox_db, key, timedelta(minutes=minutes))
    with outbox_db.transaction():  # at the same moment
        for key in "def":
            outbox_db.execute("SELECT publish_change('x', %s, due => now() + interval '9 days')", [key])
    make_due(outbox_db)
    publish(outbox_db)
    assert keys(outbox_db) == list("abcdef")


def test_a_statement_publishes_a_bounded_number_of_events_and_of_bytes_and_at_least_one(
    outbox_db: psycopg.Connection,
) -> None:
    random_text = "(SELECT string_agg(md5(m::text), '') FROM generate_series(1, 1000) AS m)"
    outbox_db.execute(
        "SELECT publish_change('x', n::text, new_data => jsonb_build_object('text', "
        + random_text
        + "), due => now() + n * interval '1 s') FROM generate_series(100, 109) AS n"
    )
    make_due(outbox_db)
    steps = []
    for events, size in [(3, 1 << 20), (10, 1), (10, 60_000), (10, 1 << 20)]:
        assert publish(outbox_db, events, size) == 0
        steps.append(count(outbox_db))
    assert steps == [3, 4, 6, 10]
    assert keys(outbox_db) == [str(n) for n in range(100, 110)]


def test_a_transaction_that_rolls_back_leaves_nothing_that_is_due_later(outbox_db: psycopg.Connection) -> None:
    with outbox_db.transaction(force_rollback=True):
        later(outbox_db)
    assert waiting(outbox_db) == 0


def test_one_that_somebody_is_cancelling_delays_no_other(outbox: str, outbox_db: psycopg.Connection) -> None:
    later(outbox_db, "cancelled")
    later(outbox_db, "other", timedelta(hours=2))
    make_due(outbox_db)
    with psycopg.connect(outbox) as cancelling:
        cancelling.execute("DELETE FROM cdc_due_changes WHERE entity_id = 'cancelled'")
        assert publish(outbox_db) == 0
        assert publish(outbox_db) is None
        assert keys(outbox_db) == ["other"]
    assert waiting(outbox_db) == 0


async def test_two_that_publish_at_once_do_not_mix(outbox: str, outbox_db: psycopg.Connection) -> None:
    due = DueChanges("public")
    later(outbox_db)
    make_due(outbox_db)
    async with (
        await psycopg.AsyncConnection.connect(outbox) as first,
        await psycopg.AsyncConnection.connect(outbox, autocommit=True) as second,
    ):
        assert await due.publish(first) == 0
        assert await due.publish(second) is None
        await first.commit()
    assert count(outbox_db) == 1


async def test_the_check_for_what_is_due_reads_a_few_pages_of_many_events_and_takes_no_transaction_id(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute(
        "SELECT count(publish_change('x', n::text, due => now() + n * interval '1 min'))"
        " FROM generate_series(1, 20000) AS n"
    )
    publish(outbox_db)  # loads what a session keeps
    with outbox_db.transaction():
        [([found],)] = outbox_db.execute(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT publish_due(1000, 1000000)"
        ).fetchall()
        assert outbox_db.execute("SELECT pg_current_xact_id_if_assigned()").fetchone() == (None,)
    assert found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"] < 20


def test_a_consumer_may_publish_what_is_due_and_an_application_may_only_ask_for_it(
    outbox_db: psycopg.Connection,
) -> None:
    consumer, application = (f"{name}_{outbox_db.info.dbname}" for name in ("consumer", "application"))
    for name in (consumer, application):
        outbox_db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    try:
        grants.grant(outbox_db, "public", [grants.consumer(consumer)])
        outbox_db.execute(sql.SQL("GRANT EXECUTE ON FUNCTION publish_change TO {}").format(sql.Identifier(application)))
        outbox_db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(application)))
        assert later(outbox_db) is None
        for forbidden in ("SELECT publish_due(1, 1)", "SELECT FROM cdc_due_changes", "DELETE FROM cdc_due_changes"):
            with pytest.raises(errors.InsufficientPrivilege):
                outbox_db.execute(forbidden)
        assert DueChanges("public").count(outbox_db) is None
        outbox_db.execute("RESET ROLE")
        make_due(outbox_db)
        outbox_db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(consumer)))
        seen = DueChanges("public").count(outbox_db)
        assert seen is not None
        assert (seen.count, seen.overdue_s > 0) == (1, True)
        assert publish(outbox_db) == 0
        for forbidden in (
            "SELECT new_data FROM cdc_due_changes",
            "DELETE FROM cdc_due_changes",
            "INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('x', 'INSERT', '1')",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                outbox_db.execute(forbidden)
    finally:
        outbox_db.execute("RESET ROLE")
        for name in (consumer, application):
            outbox_db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            outbox_db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_a_role_that_may_not_see_them_is_told_nothing_and_refused_nothing(db: psycopg.Connection) -> None:
    assert DueChanges("public").count(db) is None, "an outbox of an earlier version"
    migrations.install(db, "public")
    assert DueChanges("public").count(db) == DueLater()


@pytest.mark.parametrize("owned", ["by a superuser", "by a role of its own"])
@pytest.mark.parametrize("how", ["ENABLE", "FORCE"])
def test_it_works_where_row_security_is_switched_on(db: psycopg.Connection, how: str, owned: str) -> None:
    owner, application = (sql.Identifier(f"{name}_{db.info.dbname}") for name in ("owner", "application"))
    db.execute(sql.SQL("CREATE ROLE {} CREATEROLE; CREATE ROLE {}").format(owner, application))
    try:
        db.execute(sql.SQL("GRANT ALL ON SCHEMA public TO {} WITH GRANT OPTION").format(owner))
        if owned == "by a role of its own":
            db.execute(sql.SQL("SET ROLE {}").format(owner))
        migrations.install(db, "public")
        for table in ("entity_changes", "cdc_due_changes"):
            db.execute(sql.SQL("ALTER TABLE {} {} ROW LEVEL SECURITY").format(sql.Identifier(table), sql.SQL(how)))
            db.execute(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(sql.Identifier(table)))
        for function in ("publish_change", "publish_due"):
            grant = sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}")
            db.execute(grant.format(sql.Identifier(function), application))
        db.execute(sql.SQL("RESET ROLE; SET ROLE {}").format(application))
        later(db)
        db.execute("RESET ROLE")
        make_due(db)
        db.execute(sql.SQL("SET ROLE {}").format(application))
        assert publish(db) == 0
        db.execute("RESET ROLE")
        assert count(db) == 1
    finally:
        db.execute("RESET ROLE")
        if owned == "by a role of its own":
            db.execute(sql.SQL("SET ROLE {}").format(owner))
        migrations.uninstall(db, "public", discard_unprocessed=True)
        db.execute("RESET ROLE")
        for role in (application, owner):
            db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_uninstalling_refuses_while_events_are_due_later(outbox_db: psycopg.Connection) -> None:
    later(outbox_db)
    with pytest.raises(RefusedError, match="1 events are due later"):
        migrations.uninstall(outbox_db, "public")
    dropped = migrations.uninstall(outbox_db, "public", discard_unprocessed=True)
    assert "table public.cdc_due_changes" in dropped
    left = "SELECT count(*) FROM pg_proc WHERE proname IN ('publish_change', 'publish_due')"
    assert outbox_db.execute(left).fetchone() == (0,)


def test_a_schema_with_an_odd_name_has_events_that_are_due_later(db: psycopg.Connection) -> None:
    migrations.install(db, ODD)
    assert migrations.verify(db, ODD) == []
    ask = sql.SQL("SELECT {}('x', 'k', due => clock_timestamp() + interval '1 h')")
    db.execute(ask.format(sql.Identifier(ODD, "publish_change")))
    seen = DueChanges(ODD).count(db)
    assert seen is not None
    assert seen.count == 1
    migrations.uninstall(db, ODD, discard_unprocessed=True)


_EARLIER = """
CREATE FUNCTION {schema}.publish_change(
  entity_type text, entity_id text, operation text DEFAULT 'INSERT', new_data jsonb DEFAULT NULL,
  old_data jsonb DEFAULT NULL, metadata jsonb DEFAULT NULL
) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'
"""


@pytest.mark.parametrize("schema", ["public", ODD])
@pytest.mark.parametrize("way", ["install", "upgrade", "print"])
def test_an_outbox_of_an_earlier_version_gets_the_parameter_and_whoever_might_publish_still_may(
    db: psycopg.Connection, schema: str, way: str
) -> None:
    migrations.install(db, schema)
    place = sql.Identifier(schema)
    for statement in (
        "DROP FUNCTION {schema}.publish_change",
        "DROP FUNCTION {schema}.publish_due",
        "DROP TABLE {schema}.cdc_due_changes",
        "DELETE FROM {schema}.cdc_migrations WHERE name = 'due'",
        _EARLIER,
        "REVOKE ALL ON FUNCTION {schema}.publish_change FROM PUBLIC",
        "GRANT EXECUTE ON FUNCTION {schema}.publish_change TO pg_monitor WITH GRANT OPTION",
        "GRANT EXECUTE ON FUNCTION {schema}.publish_change TO pg_signal_backend",
        "INSERT INTO {schema}.entity_changes (table_name, operation, entity_id) VALUES ('x', 'INSERT', '1')",
    ):
        db.execute(sql.SQL(statement).format(schema=place))
    if way == "print":
        db.execute(migration_scripts.print_sql(schema, transaction=False).encode())
    elif way == "install":
        migrations.install(db, schema)
    else:
        migrations.upgrade(db, schema)
    assert migrations.verify(db, schema) == []
    rights = db.execute(
        "SELECT a.grantee::regrole::text, a.is_grantable FROM pg_proc AS p CROSS JOIN aclexplode(p.proacl) AS a"
        " WHERE p.proname = 'publish_change' AND a.grantee <> p.proowner ORDER BY 1"
    )
    assert rights.fetchall() == [("pg_monitor", True), ("pg_signal_backend", False)]
    assert db.execute(sql.SQL("SELECT {}.publish_change('x', '1')").format(place)).fetchone() == (2,)


def test_an_outbox_that_was_not_upgraded_is_uninstalled_whole(db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    [(role,)] = db.execute("SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'publish_change'").fetchall()
    db.execute("DROP FUNCTION publish_change, publish_due; DROP TABLE cdc_due_changes")
    db.execute("DELETE FROM cdc_migrations WHERE name = 'due'")
    db.execute(sql.SQL(_EARLIER).format(schema=sql.SQL("public")))
    db.execute(sql.SQL("ALTER FUNCTION publish_change OWNER TO {}").format(sql.Identifier(role)))
    dropped = migrations.uninstall(db, "public")
    functions = "SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    assert db.execute(functions).fetchall() == []
    assert dropped.count("function public.publish_change") == 1
    assert f"role {role}" in dropped
    assert db.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchall() == []
    not_there = {"function public.publish_due", "table public.cdc_due_changes", "table public.cdc_sets"}
    assert not_there.isdisjoint(dropped)


def test_who_depends_on_the_earlier_function_is_named_and_nothing_is_changed(db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    db.execute("DROP FUNCTION publish_change")
    db.execute("DELETE FROM cdc_migrations WHERE name = 'due'")
    db.execute(sql.SQL(_EARLIER).format(schema=sql.SQL("public")))
    db.execute("CREATE VIEW mine AS SELECT publish_change('x', '1')")
    with pytest.raises(SchemaError, match="other objects depend on it"):
        migrations.install(db, "public")
    assert db.execute("SELECT * FROM mine").fetchone() == (1,)
