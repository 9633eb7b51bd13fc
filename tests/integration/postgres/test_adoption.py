"""An installation adopts nothing that somebody else has made, and says whose it is."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc as command
from cdc.core.errors import SchemaError
from cdc.postgres import migration_scripts, migrations

pytestmark = pytest.mark.server

_OWN = """CREATE FUNCTION public.shout() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN EXECUTE 'ALTER ROLE ' || quote_ident({role}) || ' SUPERUSER'; RETURN NEW; END $$"""
_DOCUMENTED = """CREATE TABLE public.entity_changes (id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  table_name text NOT NULL, operation text NOT NULL, entity_id text NOT NULL, entity_type text,
  old_data jsonb, new_data jsonb, metadata jsonb, changed_at timestamp DEFAULT now(),
  processed boolean DEFAULT false, processed_at timestamp, error_count integer DEFAULT 0, last_error text);
  INSERT INTO public.entity_changes (table_name, operation, entity_id) VALUES ('x', 'INSERT', '1')"""


@pytest.fixture
def intern(db: psycopg.Connection, database: str) -> Iterator[psycopg.Connection]:
    """Somebody who may CREATE in the schema, and nothing else."""
    name = f"intern_{db.info.dbname}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    db.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(name)))
    with psycopg.connect(make_conninfo(database, user=name), autocommit=True) as connection:
        yield connection
    db.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(name)))
    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


_PREMADE = {
    "the function that captures": (
        "CREATE FUNCTION public.capture_entity_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "capture_entity_change() belongs to",
    ),
    "a function of the same name with other arguments": (
        "CREATE FUNCTION public.publish_change(text, text) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
        "publish_change(text,text) belongs to",
    ),
    "the documented table": (_DOCUMENTED, "entity_changes belongs to"),
    "the table of owners": ("CREATE TABLE public.cdc_shards (shard int)", "cdc_shards belongs to"),
    "the ledger": ("CREATE TABLE public.cdc_migrations (version int)", "cdc_migrations belongs to"),
    "the ledger of the sets": ("CREATE TABLE public.cdc_sets (version int)", "cdc_sets belongs to"),
    "a view": ("CREATE VIEW public.recent_action_history AS SELECT 1 AS id", "recent_action_history belongs to"),
    "a sequence": ("CREATE SEQUENCE public.entity_changes_seq_seq", "entity_changes_seq_seq belongs to"),
}


@pytest.mark.parametrize(("made", "said"), _PREMADE.values(), ids=_PREMADE)
def test_a_superuser_does_not_adopt_what_somebody_made_before(
    db: psycopg.Connection, intern: psycopg.Connection, made: str, said: str
) -> None:
    intern.execute(made.encode())
    before = _objects(db)
    with pytest.raises(SchemaError, match="does not adopt") as refused:
        migrations.install(db, "public")
    assert said in str(refused.value)
    assert intern.info.user in str(refused.value)
    assert "ALTER ... OWNER TO" in refused.value.hint
    assert _objects(db) == before


_CODE = {
    "a trigger": "CREATE TRIGGER x BEFORE UPDATE ON public.entity_changes FOR EACH ROW EXECUTE FUNCTION public.shout()",
    "a default": "ALTER TABLE public.entity_changes ALTER last_error SET DEFAULT public.told()",
    "a constraint": "ALTER TABLE public.entity_changes ADD CHECK (public.told() = last_error)",
    "an index": "CREATE INDEX ON public.entity_changes (public.told(last_error))",
    "a rule": "CREATE RULE x AS ON UPDATE TO public.entity_changes DO ALSO SELECT public.told()",
    "a policy": "CREATE POLICY x ON public.entity_changes USING (public.told() IS NULL)",
    "a column's type": "ALTER TABLE public.entity_changes ADD extra public.mood",
}


@pytest.mark.parametrize("attach", _CODE.values(), ids=_CODE)
def test_nor_its_own_table_where_code_of_somebody_else_hangs_on_it(
    db: psycopg.Connection, intern: psycopg.Connection, attach: str
) -> None:
    intern.execute(_OWN.format(role="session_user").encode())
    intern.execute("CREATE FUNCTION public.told() RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN NULL; END'")
    intern.execute(
        "CREATE FUNCTION public.told(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN NULL; END'"
    )
    intern.execute("CREATE TYPE public.mood AS ENUM ('ok')")
    db.execute(_DOCUMENTED.encode())
    db.execute(attach.encode())
    before = _objects(db)
    with pytest.raises(SchemaError, match=f"belongs to {intern.info.user}"):
        migrations.install(db, "public")
    assert _objects(db) == before


def test_the_printed_script_refuses_as_well(db: psycopg.Connection, intern: psycopg.Connection) -> None:
    intern.execute(_PREMADE["the function that captures"][0].encode())
    script = migration_scripts.print_sql("public").partition("\n")[2]  # without what only psql knows
    with pytest.raises(psycopg.errors.InvalidObjectDefinition, match="does not adopt"):
        db.execute(script.encode())
    db.rollback()


def test_whose_it_is_may_go_on_and_a_superuser_may_act_as_that_role(
    db: psycopg.Connection, intern: psycopg.Connection
) -> None:
    intern.execute(_DOCUMENTED.encode())
    db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(intern.info.user)))
    migrations.install(db, "public")
    db.execute("RESET ROLE")
    assert migrations.verify(db, "public") == []
    with pytest.raises(SchemaError, match="does not adopt"):
        migrations.upgrade(db, "public")
    assert migrations.upgrade(intern, "public") == ([], [])


def test_a_member_of_the_owning_role_may_upgrade(db: psycopg.Connection, intern: psycopg.Connection) -> None:
    group, member = (sql.Identifier(f"{name}_{db.info.dbname}") for name in ("group", "member"))
    db.execute(sql.SQL("CREATE ROLE {0}; CREATE ROLE {1}; GRANT {0} TO {1}").format(group, member))
    db.execute(sql.SQL("GRANT ALL ON SCHEMA public TO {}").format(group))
    try:
        for role in (group, member):
            db.execute(sql.SQL("SET ROLE {}").format(role))
            migrations.install(db, "public")
            assert migrations.upgrade(db, "public") == ([], [])
    finally:
        db.execute(sql.SQL("RESET ROLE; DROP OWNED BY {0}, {1}; DROP ROLE {0}, {1}").format(group, member))


def test_verify_and_upgrade_say_which_object_has_another_owner(outbox_db: psycopg.Connection, outbox: str) -> None:
    name = f"other_{outbox_db.info.dbname}"
    role = sql.Identifier(name)
    outbox_db.execute(sql.SQL("CREATE ROLE {0}; ALTER TABLE cdc_shards OWNER TO {0}").format(role))
    try:
        said = CliRunner().invoke(command, ["db", "verify", "--json"], env={"CDC_DSN": outbox})
        assert said.exit_code == 1
        assert f'"found": "{name}"' in said.stdout
        assert "owner of table cdc_shards" in said.stdout
        refused = CliRunner().invoke(command, ["db", "upgrade"], env={"CDC_DSN": outbox})
        assert f"cdc_shards belongs to {name}" in " ".join(refused.output.split())
    finally:
        outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def _objects(db: psycopg.Connection) -> list[tuple[object, ...]]:
    return db.execute(
        "SELECT relname, relkind, relowner FROM pg_class WHERE relnamespace = 'public'::regnamespace UNION ALL"
        " SELECT proname, 'f', proowner FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1"
    ).fetchall()
