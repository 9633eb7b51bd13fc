"""Who may create functions in the outbox's schema has none of them called in place of the outbox's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

import cdc
from tests.commands import done
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled

pytestmark = pytest.mark.server

_FUNCTIONS = """
SELECT p.proname::text, ARRAY(
  SELECT a::regtype::text FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS u (a, place) ORDER BY place)
FROM pg_proc AS p WHERE p.pronamespace = 'public'::regnamespace AND p.pronargs > 0
"""
_NOT_IN_PLPGSQL = ("record", "anyarray")
_OTHERS = ("text", "name", "varchar", "bpchar", "json", "jsonb", "smallint", "integer", "bigint", "numeric", "oid")


@pytest.fixture
def mallory(outbox: str, outbox_db: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A session of a role that may create in the outbox's schema, as everybody might before PostgreSQL 15."""
    role = sql.Identifier(f"mallory_{outbox_db.info.dbname}")
    outbox_db.execute(sql.SQL("CREATE ROLE {0} LOGIN; GRANT CREATE ON SCHEMA public TO {0}").format(role))
    with psycopg.connect(make_conninfo(outbox, user=role.as_string().strip('"')), autocommit=True) as session:
        yield session
    outbox_db.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


def overload_all(session: psycopg.Connection) -> int:
    """Each function of the outbox once more, with another type in each place of its arguments."""
    made = 0
    for name, types in session.execute(_FUNCTIONS).fetchall():
        for place, other in product(range(len(types)), _OTHERS):
            if other != types[place] and types[place] not in _NOT_IN_PLPGSQL:
                changed = ", ".join([*types[:place], other, *types[place + 1 :]]).replace("record", "anyelement")
                session.execute(
                    f"CREATE OR REPLACE FUNCTION public.{name}({changed}) RETURNS text LANGUAGE plpgsql"
                    f" AS $$ BEGIN RAISE EXCEPTION 'mallory was called as {name}({changed})'; END $$".encode()
                )
                made += 1
    return made


async def test_whatever_captures_and_consumes_calls_the_outboxs_own(
    outbox: str, outbox_db: psycopg.Connection, mallory: psycopg.Connection
) -> None:
    done(outbox, "db", "ddl")
    assert overload_all(mallory) > 100
    said: list[str] = []
    outbox_db.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
    handled: list[str] = []
    router = cdc.Router()

    @router.on("*", *cdc.Operation)
    async def handle(change: cdc.Change) -> None:
        handled.append(change.operation)

    outbox_db.execute("CREATE TABLE orders (id int PRIMARY KEY); CREATE TABLE tasks (id int PRIMARY KEY)")
    done(outbox, "track", "orders", "--ddl", "event", "--truncate", "event")
    general = "FOR EACH {} EXECUTE FUNCTION {}('', '{}', '{}')"
    outbox_db.execute(
        ("CREATE TRIGGER a AFTER INSERT OR UPDATE OR DELETE ON tasks "
        + general.format("ROW", "capture_entity_change", '{"key": ["id"]}', '{"ddl": "event"}')).encode()
    )  # fmt: skip
    outbox_db.execute(
        "CREATE TRIGGER b AFTER TRUNCATE ON tasks FOR EACH STATEMENT EXECUTE FUNCTION capture_truncate('', 'event')"
    )
    for table in ("orders", "tasks"):
        outbox_db.execute(
            f"INSERT INTO {table} SELECT generate_series(1, 3); UPDATE {table} SET id = id + 10; DELETE FROM {table}"
            f" WHERE id = 11; ALTER TABLE {table} ADD a int; ALTER TABLE {table} RENAME a TO b; TRUNCATE {table};"
            f" DROP TABLE {table}".encode()
        )
    outbox_db.execute(
        "SELECT publish_change('x'::text, '1'::text, 'INSERT'::text, %s, due => now() + interval '0.2 s')", [Jsonb({})]
    )

    async def all_settled() -> bool:
        return settled(outbox_db) and "READ" not in handled and len(handled) >= 2 * (3 + 6 + 1 + 3 + 1) + 1

    async with consuming(outbox, router):
        await eventually_async(all_settled, within_s=30)
    assert [each for each in said if "mallory" in each or "not told" in each] == []
