"""Event triggers fire for everybody. They are made only where nobody gains by replacing their function."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.core.errors import NotFoundError, RefusedError
from cdc.postgres import ddl_triggers, migrations
from tests.commands import invoke, refused

pytestmark = pytest.mark.server


@pytest.fixture
def owner(db: psycopg.Connection) -> Iterator[str]:
    """A role that nobody logs in as, and its schema with an outbox."""
    role = f"owner_{db.info.dbname}"
    db.execute(
        sql.SQL("CREATE ROLE {0} CREATEROLE; CREATE SCHEMA events AUTHORIZATION {0}").format(sql.Identifier(role))
    )
    db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    migrations.install(db, "events")
    db.execute("RESET ROLE")
    yield role
    db.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.fixture
def mallory(db: psycopg.Connection) -> Iterator[str]:
    role = f"mallory_{db.info.dbname}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    yield role
    db.execute(sql.SQL("REASSIGN OWNED BY {0} TO CURRENT_USER; DROP OWNED BY {0} CASCADE").format(sql.Identifier(role)))
    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_an_outbox_whose_owner_nobody_logs_in_as_may_have_them(db: psycopg.Connection, owner: str) -> None:
    assert ddl_triggers.enable(db, "events") == ["cdc_ddl_events", "cdc_drop_events"]
    assert ddl_triggers.outsiders(db, "events") == []


WAYS = {
    "logs in as the owner": "ALTER ROLE {owner} LOGIN",
    "is a member of the owner": "GRANT {owner} TO {mallory}",
    "is a member of the role that captures": "GRANT {captures} TO {mallory}",
    "is a member of a member": "CREATE ROLE {between}; GRANT {owner} TO {between}; GRANT {between} TO {mallory}",
    "owns the schema": "ALTER SCHEMA events OWNER TO {mallory}",
    "owns the table of changes": "ALTER TABLE events.entity_changes OWNER TO {mallory}",
    "owns what was told": "ALTER TABLE events.cdc_columns OWNER TO {mallory}",
    "owns what the function calls": "ALTER FUNCTION events.bounded_text OWNER TO {mallory}",
    "may hang a trigger on the table of changes": "GRANT ALL ON events.entity_changes TO {mallory}",
    "may hang one on what was told": "GRANT TRIGGER ON events.cdc_columns TO {mallory}",
    "may hang one as everybody may": "GRANT TRIGGER ON events.cdc_barriers TO PUBLIC",
    "may grant itself any role": "ALTER ROLE {mallory} CREATEROLE",
}


@pytest.mark.parametrize("way", WAYS)
def test_they_are_refused_where_a_role_that_is_no_superuser_could_run_code_by_them(
    db: psycopg.Connection, owner: str, mallory: str, way: str
) -> None:
    [(captures,)] = db.execute(
        "SELECT proowner::regrole::text FROM pg_proc WHERE oid = 'events.capture_ddl()'::regprocedure"
    ).fetchall()
    if way == "may grant itself any role" and db.info.server_version >= 160_000:
        pytest.skip("from PostgreSQL 16 on CREATEROLE takes ADMIN OPTION as well")
    between = f"between_{db.info.dbname}"
    db.execute(WAYS[way].format(owner=owner, mallory=mallory, captures=captures, between=between).encode())
    named = owner if way == "logs in as the owner" else mallory
    with pytest.raises(RefusedError, match=f"{named} could run code as whoever issues DDL"):
        ddl_triggers.enable(db, "events")
    script = "\n".join(ddl_triggers.script("events").splitlines()[2:-1])
    with pytest.raises(psycopg.errors.RaiseException, match=named), db.transaction():
        db.execute(script.encode())
    # Made before, they are told.
    db.execute("CREATE EVENT TRIGGER cdc_ddl_events ON ddl_command_end EXECUTE FUNCTION events.capture_ddl()")
    assert f"{named} could run code" in invoke(db.info.dsn, "doctor", "--no-stream", "--schema", "events").output
    db.execute("DROP EVENT TRIGGER cdc_ddl_events")
    if way == "is a member of a member":
        db.execute(f"DROP ROLE {between}".encode())


def test_the_public_schema_of_a_databases_owner_is_no_place_for_it(db: psycopg.Connection, mallory: str) -> None:
    if db.info.server_version < 150_000:
        pytest.skip("before PostgreSQL 15 a superuser owns the schema public")
    migrations.install(db, "public")
    db.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(db.info.dbname), sql.Identifier(mallory)))
    with pytest.raises(RefusedError, match=mallory):
        ddl_triggers.enable(db, "public")


def test_a_role_that_may_make_none_is_told_who_may(db: psycopg.Connection, owner: str, mallory: str) -> None:
    dsn = make_conninfo(db.info.dsn, user=mallory)
    said = refused(dsn, "db", "ddl", "--schema", "events")
    assert "permission denied to create event trigger" in said
    assert "superusers, or the administrator of a managed service" in said
    ddl_triggers.enable(db, "events")
    said = refused(dsn, "db", "ddl", "--off", "--schema", "events")
    assert "may not do this" in said
    assert "to be rid of them: cdc db ddl --off" in said
    db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
    with pytest.raises(RefusedError, match="must be owner of event trigger"):
        migrations.uninstall(db, "events")
    db.execute("RESET ROLE")
    assert "event trigger cdc_ddl_events" in migrations.uninstall(db, "events")
    with psycopg.connect(dsn) as session, pytest.raises(NotFoundError, match="has no capture_ddl"):
        ddl_triggers.enable(session, "elsewhere")
