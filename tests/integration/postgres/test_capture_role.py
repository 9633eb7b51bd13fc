"""The functions that capture have a role of their own, so that code which capturing calls can do next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

from cdc.diagnostics import check_outbox as checks
from cdc.diagnostics import inspect_outbox
from cdc.diagnostics.findings import Severity
from cdc.postgres import grants, migration_scripts, migrations, table_capture, tracking

pytestmark = pytest.mark.server

Make = Callable[..., str]
CAPTURING = ("capture_entity_change", "publish_change", "bounded_text", "captured_row", "default_entity_type",
             "capture_rows", "capture_truncate", "capture_barrier", "captured_columns", "capture_ddl")  # fmt: skip


@pytest.fixture
def make(db: psycopg.Connection) -> Iterator[Make]:
    """Makes a role, which owns a schema of its name."""
    made: list[sql.Identifier] = []

    def new(name: str, attributes: str = "LOGIN") -> str:
        role = f"{name}_{db.info.dbname}"
        made.append(sql.Identifier(role))
        db.execute(sql.SQL("CREATE ROLE {} {}").format(made[-1], sql.SQL(attributes)))
        db.execute(sql.SQL("CREATE SCHEMA {0} AUTHORIZATION {0}").format(made[-1]))
        db.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO PUBLIC").format(made[-1]))
        return role

    yield new
    for role in made:
        db.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(role))
    for role in made:
        db.execute(sql.SQL("DROP ROLE {}").format(role))


def act(db: psycopg.Connection, role: str, statement: str) -> list[str]:
    """As the role, in a session that begins as it: a definer's session user counts too. Returns the notices."""
    said: list[str] = []
    with psycopg.connect(make_conninfo(db.info.dsn, user=role), autocommit=True) as session:
        session.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
        session.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(role)))
        session.execute(statement.encode())
    return said


def owner_of(db: psycopg.Connection, function: str, namespace: str = "public") -> str:
    [(owner,)] = db.execute(
        "SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = %s::regnamespace AND proname = %s",
        [namespace, function],
    ).fetchall()
    return str(owner).strip('"')


_ATTACKS = {
    "read": "INSERT INTO {evil}.loot SELECT new_data::text FROM public.entity_changes",
    "read and say": "PERFORM new_data FROM public.entity_changes",
    "read what is due later": "PERFORM new_data FROM public.cdc_due_changes",
    "read when it is due": "PERFORM due FROM public.cdc_due_changes",
    "publish what is due": "PERFORM public.publish_due(1, 1)",
    "lock the outbox": "LOCK TABLE public.entity_changes IN ROW EXCLUSIVE MODE",
    "lock what is due later": "LOCK TABLE public.cdc_due_changes IN ROW EXCLUSIVE MODE",
    "lock what is due later for good": "LOCK TABLE public.cdc_due_changes IN ACCESS EXCLUSIVE MODE",
    "hold back a type": "INSERT INTO public.cdc_barriers (entity_type, seq, id) VALUES ('t', 0, gen_random_uuid())",
    "read what is held back": "PERFORM seq FROM public.cdc_barriers",
    "lock what is held back": "LOCK TABLE public.cdc_barriers IN ROW EXCLUSIVE MODE",
    "lock the columns that were told": "LOCK TABLE public.cdc_columns IN ROW EXCLUSIVE MODE",
    "lock one of them": "PERFORM FROM public.cdc_columns FOR UPDATE",
    "tell DDL": "PERFORM public.capture_barrier('SCHEMA', 's', 't', 'patient', NULL, NULL, '{{}}')",
    "alter who DDL is told as": "ALTER FUNCTION public.capture_ddl() SECURITY INVOKER",
    "delete": "DELETE FROM public.entity_changes",
    "mark": "UPDATE public.entity_changes SET processed = true, processed_at = now()",
    "truncate": "TRUNCATE public.entity_changes",
    "grant": "GRANT ALL ON public.entity_changes TO {evil}",
    "hang a trigger": "CREATE RULE r AS ON INSERT TO public.entity_changes DO NOTHING",
    "become a superuser": "ALTER ROLE {evil} SUPERUSER",
    "make a function": "CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "join the owner": "GRANT {owner} TO {evil}",
    "act as the owner": "SET ROLE {owner}",
    "add a change": "INSERT INTO public.entity_changes (table_name, operation, entity_id, entity_type)"
    " VALUES ('forged', 'INSERT', '9', 'forged')",
    "alter who it runs as": "ALTER FUNCTION public.capture_entity_change() SECURITY INVOKER",
    "alter where names are found": "ALTER FUNCTION public.capture_entity_change() SET search_path = {evil}, pg_catalog",
    "alter who the own one runs as": "ALTER FUNCTION public.{own}() SECURITY INVOKER",
    "write the own one anew": "CREATE OR REPLACE FUNCTION public.{own}() RETURNS trigger LANGUAGE plpgsql"
    " SECURITY DEFINER AS 'BEGIN RETURN NULL; END'",
    "call the own one": "CREATE TRIGGER mine AFTER INSERT ON {evil}.loot FOR EACH ROW EXECUTE FUNCTION public.{own}()",
    "drop the own one": "DROP FUNCTION public.{own}() CASCADE",
    "drop a function": "DROP FUNCTION public.publish_change",
    "make it writable again": "SET LOCAL transaction_read_only = off",
    "make it writable for good": "SET TRANSACTION READ WRITE",
    "write anywhere": "INSERT INTO {evil}.loot VALUES ('x')",
}
_TYPES = {
    "an enum": "{evil}.mood",
    "an array": "{evil}.mood[]",
    "a composite": "{evil}.pair",
    "a domain": "{evil}.kind",
    "a range": "{evil}.span",
}
_VALUES = {"an enum": "'x'", "an array": "'{x}'", "a composite": "'(x,1)'", "a domain": "'x'", "a range": "'[x,y]'"}


@pytest.mark.parametrize("owned", ["by a superuser", "by a role of its own"])
@pytest.mark.parametrize("kind", _TYPES)
@pytest.mark.parametrize("tracked", ["before", "later"])
def test_code_that_capturing_calls_may_do_nothing_with_the_outbox(
    db: psycopg.Connection, make: Make, owned: str, kind: str, tracked: str
) -> None:
    evil, victim, owner = make("evil"), make("victim"), make("owner", "NOLOGIN CREATEROLE")
    db.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {} WITH GRANT OPTION").format(sql.Identifier(owner)))
    db.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
    db.execute(
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    )  # everybody's before PostgreSQL 15, also the capture role's
    if owned == "by a role of its own":
        db.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {} WITH GRANT OPTION").format(sql.Identifier(owner)))
        db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
    migrations.install(db, "public")
    db.execute("RESET ROLE")
    assert owner_of(db, "capture_entity_change").startswith("cdc_capture_")
    for due in ("NULL", "now() + interval '1 h'"):
        publish = f"SELECT public.publish_change('patient', '1', new_data => '{{\"secret\": 1}}', due => {due})"
        db.execute(publish.encode())

    # The type belongs to one, the table and its trigger to another, who also writes.
    act(
        db,
        evil,
        """
        CREATE TABLE loot (what text); GRANT ALL ON loot TO PUBLIC; CREATE TYPE mood AS ENUM ('x', 'y');
        CREATE TYPE pair AS (m mood, n int); CREATE DOMAIN kind AS mood; CREATE TYPE span AS RANGE (subtype = mood)""",
    )
    own = table_capture.function_name(victim, "orders")
    tries = "\n".join(
        f"BEGIN {attack.format(evil=evil, owner=owner, own=own)}; RAISE NOTICE '{name}: done';"
        f" EXCEPTION WHEN OTHERS THEN RAISE NOTICE '{name}: %', SQLSTATE; END;"
        for name, attack in _ATTACKS.items()
    )
    for source in ("mood", "span", "pair"):
        act(db, evil, f"""CREATE FUNCTION as_json({source}) RETURNS json LANGUAGE plpgsql AS $$ BEGIN {tries}
            RETURN '"x"'; END $$; CREATE CAST ({source} AS json) WITH FUNCTION as_json({source})""")  # fmt: skip
    # With a function of the table's own, which is made only while it has no such column; or with the general one.
    act(db, victim, "CREATE TABLE orders (id int PRIMARY KEY)")
    column = f"ALTER TABLE orders ADD c {_TYPES[kind].format(evil=evil)}"
    if tracked == "later":
        act(db, victim, column)
    tracking.track(db, "public", f"{victim}.orders")
    if tracked == "before":
        act(db, victim, column)
        assert owner_of(db, own) == owner_of(db, "capture_entity_change")
    said = act(db, victim, f"INSERT INTO orders VALUES (1, {_VALUES[kind]})")

    tried = dict(each.split(": ") for each in said)
    assert set(tried) == set(_ATTACKS)
    assert "done" not in tried.values(), tried
    assert db.execute(sql.SQL("SELECT count(*) FROM {}.loot").format(sql.Identifier(evil))).fetchone() == (0,)
    assert db.execute("SELECT count(*), bool_or(processed) FROM entity_changes").fetchone() == (2, False)
    assert db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [evil]).fetchone() == (False,)
    for right in ("SELECT", "INSERT", "UPDATE", "DELETE"):
        asked = "SELECT has_table_privilege(%s, 'public.entity_changes', %s)"
        assert db.execute(asked, [evil, right]).fetchone() == (False,)
    assert migrations.verify(db, "public") == []


_LEAVINGS = {
    "a search path": "PERFORM pg_catalog.set_config('search_path', '{evil}, pg_catalog', true)",
    "a row in a temporary table": "INSERT INTO carrier VALUES (1)",
}


@pytest.mark.parametrize("left", _LEAVINGS)
@pytest.mark.parametrize("others", ["'1'", """'"\\u0000"'"""], ids=["a row", "a row that is taken value by value"])
def test_code_that_capturing_calls_leaves_nothing_behind_that_runs_later_with_its_rights(
    db: psycopg.Connection, make: Make, left: str, others: str
) -> None:
    evil = make("evil")
    migrations.install(db, "public")
    act(db, evil, f"""
        CREATE TYPE mood AS ENUM ('x');
        CREATE FUNCTION told() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
          RAISE NOTICE '% %', current_user, current_setting('transaction_read_only'); RETURN ''; END $$;
        CREATE FUNCTION now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN
          PERFORM {evil}.told(); RETURN pg_catalog.now(); END $$;
        CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM {evil}.told(); RETURN NULL; END $$;
        CREATE FUNCTION as_json(mood) RETURNS json LANGUAGE plpgsql AS $$ BEGIN
          {_LEAVINGS[left].format(evil=evil)}; RETURN '"x"'; END $$;
        CREATE CAST (mood AS json) WITH FUNCTION as_json(mood);
        CREATE TABLE orders (id int PRIMARY KEY, c mood, j json)""")  # fmt: skip
    tracking.track(db, "public", f"{evil}.orders")
    said = act(db, evil, f"""
        CREATE TEMP TABLE carrier (n int); GRANT ALL ON carrier TO PUBLIC;
        CREATE CONSTRAINT TRIGGER later AFTER INSERT ON carrier DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION later();
        INSERT INTO orders VALUES (1, 'x', {others}); UPDATE orders SET id = 2; DELETE FROM orders""")  # fmt: skip
    assert [each for each in said if each.endswith(" off")] == []
    written = db.execute("SELECT operation, entity_id FROM entity_changes ORDER BY seq").fetchall()
    assert written == [("INSERT", "1"), ("DELETE", "1"), ("INSERT", "2"), ("DELETE", "2")]


def test_a_writer_may_write_on_after_its_row_was_captured(db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    db.execute("CREATE TABLE orders (id int PRIMARY KEY, j json)")
    tracking.track(db, "public", "orders")
    with db.transaction():
        db.execute("INSERT INTO orders VALUES (1)")
        with db.transaction():
            db.execute("""INSERT INTO orders VALUES (2, '"\\u0000"')""")
        with pytest.raises(errors.DivisionByZero), db.transaction():
            db.execute("INSERT INTO orders VALUES (3); SELECT 1 / 0")
        db.execute("CREATE TEMP TABLE beside (n int) ON COMMIT DROP")
        db.execute("INSERT INTO orders VALUES (4)")
        assert db.execute("SHOW transaction_read_only").fetchone() == ("off",)
    assert db.execute("SELECT entity_id FROM entity_changes ORDER BY seq").fetchall() == [("1",), ("2",), ("4",)]


def test_plain_writers_are_captured_by_a_role_that_may_do_only_that(db: psycopg.Connection, make: Make) -> None:
    app = make("app")
    db.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    migrations.install(db, "public")
    act(db, app, "CREATE TABLE orders (id int PRIMARY KEY, n text)")
    tracking.track(db, "public", f"{app}.orders")
    act(db, app, "INSERT INTO orders VALUES (1, 'a'); UPDATE orders SET id = 2; DELETE FROM orders")
    written = db.execute("SELECT operation, entity_id FROM entity_changes ORDER BY seq").fetchall()
    assert written == [("INSERT", "1"), ("DELETE", "1"), ("INSERT", "2"), ("DELETE", "2")]
    role = owner_of(db, "capture_entity_change")
    assert {owner_of(db, name) for name in CAPTURING} == {role}
    attributes = "SELECT rolcanlogin, rolsuper, rolcreaterole FROM pg_roles WHERE rolname = %s"
    assert db.execute(attributes, [role]).fetchone() == (False, False, False)
    assert db.execute("SELECT has_schema_privilege(%s, 'public', 'CREATE')", [role]).fetchone() == (False,)
    inserted = db.execute(
        "SELECT attname::text FROM pg_attribute WHERE attrelid = 'entity_changes'::regclass AND attnum > 0"
        " AND has_column_privilege(%s, attrelid, attnum, 'INSERT')",
        [role],
    ).fetchall()
    named = {"id", "table_schema", "table_name", "operation", "entity_id", "entity_type", "old_data", "new_data",
             "metadata", "caused_by", "depth", "processed", "processed_at", "last_error", "shard",
             "subscription"}  # fmt: skip
    assert {column for (column,) in inserted} == named, "what the functions write, and no more"
    finding = checks.capture_function(inspect_outbox.capture(db, "public"))
    assert (finding.severity, role in finding.detail) == (Severity.OK, True)


def test_the_owner_may_upgrade_repair_grant_and_uninstall(db: psycopg.Connection, make: Make) -> None:
    owner, app = make("owner", "LOGIN CREATEROLE"), make("app")
    with psycopg.connect(make_conninfo(db.info.dsn, user=owner), autocommit=True) as session:
        migrations.install(session, owner)
        role = owner_of(db, "publish_change", f'"{owner}"')
        broken = sql.SQL("ALTER FUNCTION {}.capture_entity_change() RESET search_path")
        session.execute(broken.format(sql.Identifier(owner)))
        _, repaired = migrations.upgrade(session, owner)
        assert [each.object for each in repaired] == ["settings of function capture_entity_change()"]
        said: list[str] = []
        migrations.on_warning(session, said.append)
        dropped = sql.SQL("DROP FUNCTION {}.publish_change")
        session.execute(dropped.format(sql.Identifier(owner)))
        migrations.upgrade(session, owner)
        assert [each for each in said if "functions that capture" in each] == []
        assert owner_of(db, "publish_change", f'"{owner}"') == role
        assert migrations.verify(session, owner) == []
        grants.grant(session, owner, [grants.consumer(app, publish=True)])
        assert f"role {role}" in migrations.uninstall(session, owner)
    assert db.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchall() == []


def test_who_may_make_no_role_gets_the_statements_for_an_administrator(db: psycopg.Connection, make: Make) -> None:
    owner = make("owner")
    said: list[str] = []
    with psycopg.connect(make_conninfo(db.info.dsn, user=owner), autocommit=True) as session:
        migrations.on_warning(session, said.append)
        migrations.install(session, owner)
        assert owner_of(db, "capture_entity_change", f'"{owner}"') == owner
        finding = checks.capture_function(inspect_outbox.capture(db, owner))
        assert (finding.severity, "also owns the outbox" in finding.detail) == (Severity.WARN, True)
        [warning] = [each for each in said if "functions that capture" in each]
        statements = warning.partition("have an administrator run: ")[2].partition("; then run")[0]
        db.execute(statements.encode())
        said.clear()
        migrations.upgrade(session, owner)
        assert [each for each in said if "functions that capture" in each] == []
        assert owner_of(db, "capture_entity_change", f'"{owner}"').startswith("cdc_capture_")
        assert migrations.verify(session, owner) == []
        [(may_create,)] = db.execute(
            "SELECT has_schema_privilege(p.proowner, p.pronamespace, 'CREATE') FROM pg_proc AS p"
            " WHERE p.proname = 'capture_entity_change' AND p.pronamespace = %s::regnamespace", [f'"{owner}"']
        ).fetchall()  # fmt: skip
        assert not may_create


def test_a_role_of_this_name_that_may_do_more_is_not_taken(db: psycopg.Connection, make: Make) -> None:
    name = f"cdc_capture_{db.info.dbname}_public"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    try:
        said: list[str] = []
        migrations.on_warning(db, said.append)
        migrations.install(db, "public")
        assert owner_of(db, "capture_entity_change") == db.info.user
        assert "may do more than capture" in said[0]
        finding = checks.capture_function(inspect_outbox.capture(db, "public"))
        assert finding.severity == Severity.WARN
        app = make("app")
        act(db, app, "CREATE TABLE orders (id int PRIMARY KEY)")
        tracking.track(db, "public", f"{app}.orders")
        finding = checks.capture_function(inspect_outbox.capture(db, "public"))
        assert (finding.severity, app in finding.detail) == (Severity.FAIL, True)
    finally:
        with suppress(errors.UndefinedObject):
            db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_an_outbox_of_before_gets_the_role_by_install_and_by_upgrade(db: psycopg.Connection) -> None:
    for bring in (migrations.install, migrations.upgrade):
        migrations.install(db, "public")
        for function in CAPTURING:
            db.execute(sql.SQL("ALTER FUNCTION public.{} OWNER TO CURRENT_USER").format(sql.Identifier(function)))
        bring(db, "public")
        assert owner_of(db, "capture_entity_change").startswith("cdc_capture_")
        assert migrations.verify(db, "public") == []


def test_row_security_takes_no_role_away_that_is_there(db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    captures = owner_of(db, "capture_entity_change")
    db.execute("ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY")
    said: list[str] = []
    migrations.on_warning(db, said.append)
    [left] = migrations.verify(db, "public")
    assert migrations.upgrade(db, "public") == ([], [])
    assert (said, owner_of(db, "capture_entity_change")) == ([], captures)
    db.execute(left.by_hand.encode())
    assert migrations.verify(db, "public") == []


@pytest.mark.parametrize("how", ["ENABLE", "FORCE"])
@pytest.mark.parametrize("session", ["off", "on"])
def test_writers_go_on_where_row_security_is_switched_on(
    db: psycopg.Connection, make: Make, how: str, session: str
) -> None:
    """As an adviser of a hosted database asks for: it shows the changes to fewer, and refuses none."""
    migrations.install(db, "public")
    db.execute("CREATE TABLE t (id int PRIMARY KEY); GRANT INSERT ON t TO PUBLIC")
    tracking.track(db, "public", "t")
    db.execute(f"ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY, {how} ROW LEVEL SECURITY".encode())
    act(db, make("writer"), f"SET row_security = {session}; INSERT INTO public.t VALUES (1)")
    assert db.execute("SELECT count(*) FROM entity_changes").fetchone() == (1,)
    migrations.upgrade(db, "public")
    policies = db.execute("SELECT polname, polrelid::regclass::text FROM pg_policy ORDER BY 2").fetchall()
    tables = ("cdc_barriers", "cdc_columns", "cdc_due_changes", "entity_changes")
    assert policies == [("cdc_capture", table) for table in tables]
    assert [str(left) for left in migrations.verify(db, "public") if "row-level" not in str(left)] == []
    migrations.uninstall(db, "public", discard_unprocessed=True)
    assert db.execute("SELECT count(*) FROM pg_policy").fetchone() == (0,)


def test_the_printed_script_makes_the_role_too(db: psycopg.Connection) -> None:
    lines = migration_scripts.print_sql("events").splitlines()
    db.execute("\n".join(line for line in lines if not line.startswith("\\")).encode())
    assert owner_of(db, "capture_entity_change", "events").startswith("cdc_capture_")


def test_a_long_name_and_an_odd_one_are_bounded(db: psycopg.Connection) -> None:
    for name in ("é" * 31, 'a"b\\c%d'):
        migrations.install(db, name)
        role = owner_of(db, "capture_entity_change", sql.Identifier(name).as_string())
        assert role.startswith("cdc_capture_")
        assert migrations.verify(db, name) == []
        db.execute(sql.SQL("SELECT {}.publish_change('t', '1')").format(sql.Identifier(name)))
        assert [each for each in migrations.uninstall(db, name, discard_unprocessed=True) if each.startswith("role ")]
