"""`cdc db grant`: each role logs in, does all it is for, and is refused everything else."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

import cdc
from cdc.app.application import App
from cdc.cli import cdc as root_command
from cdc.core.errors import NotFoundError, RefusedError, SchemaError, UsageError
from cdc.core.model import publication_name
from cdc.core.router import Router
from cdc.observability.snapshots import Role
from cdc.postgres import grants, migrations, tracking
from tests import servers
from tests.commands import invoke
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, metric, settled, slot_name, states
from tests.fix_outbox import count, fill

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[3]
SECRET = "row content"
NewRole = Callable[..., str]
_QUICK: dict[str, Any] = {"backoff_base": 0.01, "backoff_cap": 0.05}


@pytest.fixture
def new_role(outbox_db: psycopg.Connection) -> Iterator[NewRole]:
    """Makes a role of the test's own, with these attributes; its name."""
    made: list[str] = []

    def make(attributes: str = "LOGIN", name: str = "role") -> str:
        made.append(f"{name}_{uuid.uuid4().hex[:8]}")
        outbox_db.execute(sql.SQL("CREATE ROLE {} " + attributes).format(sql.Identifier(made[-1])))
        return made[-1]

    yield make
    names = sql.SQL(", ").join(map(sql.Identifier, made))
    if made:
        outbox_db.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(names))


@pytest.fixture
def consumer(outbox_db: psycopg.Connection, new_role: NewRole) -> str:
    """A role to which the rights of a consumer are granted."""
    role = new_role("LOGIN REPLICATION")
    assert grants.grant(outbox_db, "public", [grants.consumer(role)]) == [grants.Granted(role, "", ())]
    return role


@pytest.fixture
def shop(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """The outbox's database with two tables of the application in it; one is tracked."""
    outbox_db.execute(
        "CREATE TABLE tasks (id int PRIMARY KEY, title text); CREATE TABLE effect (seq bigint, note text)"
    )
    tracking.track(outbox_db, "public", "tasks")
    return outbox_db


def as_(role: str, dsn: str) -> str:
    return make_conninfo(dsn, user=role)


def publish(db: psycopg.Connection, entity_type: str, *keys: str) -> None:
    for key in keys:
        db.execute("SELECT publish_change(%s, %s, 'INSERT', %s)", [entity_type, key, Jsonb({"secret": SECRET})])


def execute(dsn: str, statement: str) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def until(condition: Callable[[], Any], what: str) -> Any:
    async def check() -> Any:
        return condition()

    return eventually_async(check, what=what)


def streams(app: App) -> Any:
    return until(lambda: app.status.role is Role.STREAMING, "it streams")


# --- the consumer --------------------------------------------------------------------------------------------------


def _every_kind_of_handler() -> Router:
    router = Router()

    @router.on("plain")
    async def plain(change: cdc.Change) -> None:
        assert change.new == {"secret": SECRET}

    @router.on("thread")
    def thread(change: cdc.Change) -> None:
        pass

    @router.on("transaction")
    async def transaction(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO effect VALUES (%s, 'transaction')", [change.seq])

    @router.on("transaction in a thread")
    def transaction_in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("INSERT INTO effect VALUES (%s, 'transaction in a thread')", [change.seq])

    @router.on("batch")
    async def batch(changes: list[cdc.Change], connection: psycopg.AsyncConnection) -> None:
        await connection.execute(
            "INSERT INTO effect SELECT n, 'batch' FROM generate_series(1, %s) AS n", [len(changes)]
        )

    @router.on("retried")
    async def retried(change: cdc.Change) -> None:
        if change.attempt < 3:
            raise ValueError("not yet")

    @router.on("discarded")
    async def discarded(change: cdc.Change) -> None:
        raise cdc.Discard("not for us")

    @router.on("dead", dead="pause")
    async def dead(change: cdc.Change) -> None:
        raise ValueError("never")

    return router


async def test_the_consumers_role_does_all_that_a_consumer_does(
    outbox: str, shop: psycopg.Connection, consumer: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop.execute(sql.SQL("GRANT INSERT ON effect TO {}").format(sql.Identifier(consumer)))
    router = _every_kind_of_handler()
    types = sorted({entity_type for entity_type, _ in router.handlers})
    # Somebody died holding all shards: the first changes are written down before they start.
    shop.execute("INSERT INTO cdc_shards (shard, owner) SELECT n, gen_random_uuid() FROM generate_series(0, 63) AS n")
    for entity_type in types:
        publish(shop, entity_type, "1", "2")
    async with consuming(as_(consumer, outbox), router, **_QUICK) as app:
        await streams(app)
        for entity_type in types:
            publish(shop, entity_type, "3")

        def all_but_the_dead() -> bool:
            return states(shop) == {"processed": 3 * len(types) - 3, "dead": 3}

        await until(all_but_the_dead, "all are processed, and the dead are dead")
        registry = app.metrics.registry
        await until(lambda: app.status.listening, "it listens")
        for collector in ("outbox", "slot"):
            await until(partial(_collected, registry, collector), collector)
        assert metric(registry, "cdc_outbox_table_bytes") > 0
    assert count_of(shop, "effect") >= 7
    assert "refused" not in caplog.text
    assert "denied" not in caplog.text


def _collected(registry: CollectorRegistry, collector: str) -> bool:
    return metric(registry, "cdc_collector_success", collector=collector) == 1


def count_of(db: psycopg.Connection, table: str) -> int:
    [(found,)] = db.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchall()
    return int(found)


async def test_two_consumers_of_this_role_share_the_work_and_one_relays(
    outbox: str, outbox_db: psycopg.Connection, consumer: str
) -> None:
    calls: Counter[str] = Counter()

    def router(name: str) -> Router:
        made = Router()

        @made.on("x")
        async def handle(change: cdc.Change) -> None:
            calls[name] += 1

        return made

    shared: dict[str, Any] = {"slot_name": slot_name(), "sweep_interval": 3600, "poll_interval": 3600}
    dsn = as_(consumer, outbox)
    async with consuming(dsn, router("first"), **shared) as first:
        await streams(first)
        async with consuming(dsn, router("second"), **shared) as second:

            def fair() -> bool:
                intakes = [app.status.consumer.catching_up for app in (first, second)]
                return second.status.consumer.owned_shards == 32 and second.status.listening and not any(intakes)

            await until(fair, "each has its share")
            publish(outbox_db, "x", *map(str, range(200)))
            await until(lambda: settled(outbox_db), "all are processed")
            assert metric(second.metrics.registry, "cdc_wakeups_total", source="notify") == calls["second"]
    assert sum(calls.values()) == 200
    assert min(calls.values()) > 0


async def test_retention_takes_the_right_to_delete_and_says_so(
    outbox: str, outbox_db: psycopg.Connection, consumer: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(outbox_db, 5)
    async with consuming(as_(consumer, outbox), Router(), stream=False, retention="1d"):
        await until(lambda: "retention does not remove old changes" in caplog.text, "it says why not")
    assert "permission denied" in caplog.text
    assert count(outbox_db) == 5
    assert invoke(as_(consumer, outbox), "outbox", "prune", "--older-than", "1d").exit_code == 1
    assert invoke(outbox, "db", "grant", "--consumer", consumer, "--retention").exit_code == 0
    async with consuming(as_(consumer, outbox), Router(), stream=False, retention="1d"):
        await until(lambda: count(outbox_db) == 0, "what is old is gone")


async def test_handlers_publish_only_when_that_was_asked_for(
    outbox: str, outbox_db: psycopg.Connection, consumer: str
) -> None:
    router = Router()

    @router.on("x", max_attempts=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT publish_change('y', %s)", [change.entity_id])

    publish(outbox_db, "x", "refused")
    async with consuming(as_(consumer, outbox), router, stream=False, unhandled="discard"):
        await until(lambda: states(outbox_db) == {"dead": 1}, "it may not")
        assert invoke(outbox, "db", "grant", "--consumer", consumer, "--publish").exit_code == 0
        publish(outbox_db, "x", "allowed")
        await until(lambda: states(outbox_db) == {"dead": 1, "processed": 2}, "it may")
    [(depth,)] = outbox_db.execute("SELECT depth FROM entity_changes WHERE entity_type = 'y'").fetchall()
    assert depth == 1


async def test_a_stream_of_its_own_needs_replication_and_no_right_on_anything(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole, plugin: str
) -> None:
    worker, streamer = new_role("LOGIN"), new_role("LOGIN REPLICATION", "stream")
    [granted] = grants.grant(outbox_db, "public", [grants.consumer(worker)])
    assert f'ALTER ROLE "{worker}" REPLICATION' in granted.advice[0]
    router = Router()

    @router.on("x")
    async def handle(change: cdc.Change) -> None:
        pass

    never: dict[str, Any] = {"sweep_interval": 3600, "poll_interval": 3600, "slot_plugin": plugin}
    async with consuming(as_(worker, outbox), router, stream_dsn=as_(streamer, outbox), **never) as app:
        await streams(app)
        await until(lambda: not app.status.consumer.catching_up, "it has swept")
        publish(outbox_db, "x", "1")
        await until(lambda: settled(outbox_db), "it was woken")
        assert metric(app.metrics.registry, "cdc_wakeups_total", source="wal") == 1
        [(user,)] = outbox_db.execute(
            "SELECT usename FROM pg_stat_activity WHERE application_name = 'cdc: stream'"
            " AND datname = current_database()"
        ).fetchall()
    assert user == streamer
    for relation in grants.RELATIONS:
        with pytest.raises(errors.InsufficientPrivilege):
            execute(as_(streamer, outbox), f"SELECT FROM {relation}")


async def test_without_replication_a_consumer_sweeps_and_the_alter_role_is_named(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole, caplog: pytest.LogCaptureFixture
) -> None:
    role = new_role("LOGIN")
    told = invoke(outbox, "db", "grant", "--consumer", role)
    assert told.exit_code == 0
    assert f'ALTER ROLE "{role}" REPLICATION' in told.stderr
    router = Router()
    router.on("x")(_nothing)
    publish(outbox_db, "x", "1")
    async with consuming(as_(role, outbox), router):
        await until(lambda: settled(outbox_db), "it was swept for")
        await until(lambda: "no_replication_role" in caplog.text, "it says why it does not stream")


async def _nothing(change: cdc.Change) -> None:
    pass


def test_the_commands_of_operation_work_for_the_consumers_role(
    outbox: str, shop: psycopg.Connection, consumer: str
) -> None:
    dsn, slot = as_(consumer, outbox), slot_name()
    publish(shop, "x", "1", "2", "3")
    shop.execute("UPDATE entity_changes SET dead_at = now(), error_count = 3")
    seqs = [str(seq) for (seq,) in shop.execute("SELECT seq FROM entity_changes ORDER BY seq").fetchall()]
    for arguments in (
        ["db", "verify"], ["tracked"],
        ["outbox", "stats"], ["outbox", "list"], ["outbox", "show", seqs[0], "--show-payload"],
        ["outbox", "retry", seqs[0]], ["outbox", "discard", seqs[1]], ["outbox", "retry", "--all", "--yes"],
        ["slot", "create", slot], ["slot", "list"], ["slot", "advance", slot], ["slot", "recreate", slot, "--yes"],
        ["slot", "drop", slot, "--yes"],
    ):  # fmt: skip
        result = invoke(dsn, *arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    shop.execute(
        "UPDATE entity_changes SET dead_at = now(), error_count = 3, next_attempt_at = NULL WHERE NOT processed"
    )
    assert execute(dsn, "SELECT * FROM reprocess_failed_actions()") == [(2,)]


def test_the_doctor_finds_nothing_missing_for_the_consumers_role(
    outbox: str, shop: psycopg.Connection, consumer: str
) -> None:
    report = invoke(as_(consumer, outbox), "doctor", "--json", "--slot-name", slot_name())
    found = {each["id"]: each for each in json.loads(report.stdout)["findings"]}
    for check in ("connect", "stream-connect", "replication-role", "plugin", "schema", "triggers", "grants", "backlog"):
        assert found[check]["severity"] == "ok", found[check]
    skipped = {name: each["detail"] for name, each in found.items() if each["severity"] == "skip"}
    assert "permission" not in repr(skipped)


_FORBIDDEN = {
    "change a payload": "UPDATE entity_changes SET new_data = '{}'",
    "change a key": "UPDATE entity_changes SET entity_id = 'other'",
    "change a cause": "UPDATE entity_changes SET depth = 0",
    "delete": "DELETE FROM entity_changes",
    "truncate": "TRUNCATE entity_changes",
    "forge a row": "INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('t', 'INSERT', '1')",
    "draw numbers": "SELECT nextval('entity_changes_seq_seq')",
    "publish": "SELECT publish_change('x', '1')",
    "capture from a table of its own": "CREATE TEMP TABLE t (id int); CREATE TRIGGER t AFTER INSERT ON t"
    " FOR EACH ROW EXECUTE FUNCTION capture_entity_change()",
    "put a trigger on the outbox": "CREATE TRIGGER t BEFORE INSERT ON entity_changes"
    " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "disable the trigger of a table": 'ALTER TABLE tasks DISABLE TRIGGER "#cdc_capture"',
    "disable all triggers of its session": "SET session_replication_role = replica",
    "stop writers": "BEGIN; LOCK TABLE entity_changes IN SHARE MODE",
    "alter the outbox": "ALTER TABLE entity_changes DROP COLUMN depth",
    "drop the outbox": "DROP TABLE entity_changes",
    "replace the function": "ALTER FUNCTION capture_entity_change() SECURITY INVOKER",
    "grant": "GRANT SELECT ON entity_changes TO PUBLIC",
    "read another table": "SELECT FROM tasks",
    "write another table": "INSERT INTO tasks VALUES (2)",
    "rewrite the ledger": "DELETE FROM cdc_migrations",
}


@pytest.mark.parametrize("statement", _FORBIDDEN.values(), ids=_FORBIDDEN)
def test_the_consumers_role_may_do_nothing_else(
    outbox: str, shop: psycopg.Connection, consumer: str, statement: str
) -> None:
    shop.execute("INSERT INTO tasks VALUES (1, 'a')")
    before = shop.execute("SELECT * FROM entity_changes").fetchall()
    try:
        execute(as_(consumer, outbox), statement)
    except errors.InsufficientPrivilege:
        pass
    else:
        # A grant by somebody who may not grant is a warning and nothing more.
        assert statement.startswith("GRANT")
        acl = "SELECT FROM pg_class, aclexplode(relacl) WHERE relname = 'entity_changes' AND grantee = 0"
        assert shop.execute(acl.encode()).fetchall() == []
    assert shop.execute("SELECT * FROM entity_changes").fetchall() == before


# --- the reader ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(shop: psycopg.Connection) -> psycopg.Connection:
    """A message, with its content, and a dead letter."""
    shop.execute("SELECT publish_change('message', '1', 'INSERT', jsonb_build_object('content', %s::text))", [SECRET])
    publish(shop, "x", "1")
    shop.execute("UPDATE entity_changes SET dead_at = now(), error_count = 3 WHERE entity_type = 'x'")
    return shop


def test_who_only_looks_sees_the_state_of_everything_and_no_content(
    outbox: str, watched: psycopg.Connection, new_role: NewRole
) -> None:
    role = new_role()
    assert invoke(outbox, "db", "grant", "--readonly", role).exit_code == 0
    dsn = as_(role, outbox)
    assert len(execute(dsn, "SELECT * FROM action_processing_dashboard")) == 2
    columns = ", ".join(grants.HISTORY_WITHOUT_PREVIEW)
    assert len(execute(dsn, f"SELECT {columns} FROM recent_action_history")) == 2
    for arguments in ("stats", "list", "list --state fresh", "list --state processed", "show 1"):
        result = invoke(dsn, "outbox", *arguments.split())
        assert result.exit_code == 0, result.output
        assert SECRET not in result.output
    for statement in (
        *(f"SELECT {column} FROM entity_changes" for column in grants.PAYLOAD),
        "SELECT preview FROM recent_action_history",
        "UPDATE entity_changes SET processed = true, processed_at = now()",
        "SELECT id FROM entity_changes FOR UPDATE",
        "DELETE FROM entity_changes",
        "SELECT * FROM reprocess_failed_actions()",
        "SELECT publish_change('x', '1')",
        "SELECT FROM cdc_shards",
        "SELECT FROM tasks",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            execute(dsn, statement)


def test_content_is_read_by_who_was_granted_it(outbox: str, watched: psycopg.Connection, new_role: NewRole) -> None:
    role = new_role()
    assert invoke(outbox, "db", "grant", "--readonly", role, "--payload").exit_code == 0
    dsn = as_(role, outbox)
    assert SECRET in repr(execute(dsn, "SELECT * FROM recent_action_history"))
    assert SECRET in repr(execute(dsn, "SELECT * FROM entity_changes"))
    [(dead,)] = execute(dsn, "SELECT seq FROM entity_changes WHERE dead_at IS NOT NULL")
    assert SECRET in invoke(dsn, "outbox", "show", str(dead), "--show-payload").stdout
    assert invoke(outbox, "db", "grant", "--readonly", role).exit_code == 0
    with pytest.raises(errors.InsufficientPrivilege):
        execute(dsn, "SELECT new_data FROM entity_changes")


# --- the command ---------------------------------------------------------------------------------------------------


def rights(db: psycopg.Connection, *roles: str) -> set[tuple[Any, ...]]:
    """Whatever was granted to these roles directly, with who granted it."""
    acl = """
        SELECT relname::text, '', acl.* FROM pg_class, aclexplode(relacl) AS acl
        UNION ALL SELECT attrelid::regclass::text, attname::text, acl.* FROM pg_attribute, aclexplode(attacl) AS acl
        UNION ALL SELECT proname::text, '', acl.* FROM pg_proc, aclexplode(proacl) AS acl
        UNION ALL SELECT nspname::text, '', acl.* FROM pg_namespace, aclexplode(nspacl) AS acl
    """
    query = f"SELECT * FROM ({acl}) AS r WHERE grantee = ANY (SELECT oid FROM pg_roles WHERE rolname = ANY (%s))"
    return set(db.execute(query.encode(), [list(roles)]).fetchall())


def psql(dsn: str, script: str) -> subprocess.CompletedProcess[str]:
    program = servers.program("psql")
    return subprocess.run([program, "-X", "-q", dsn], input=script, text=True, check=False, capture_output=True)


ODD = 'Tenant "7" %s; it\'s é'


@pytest.mark.parametrize("name", ["public", ODD])
def test_the_printed_script_grants_the_same_and_both_may_be_repeated(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole, name: str
) -> None:
    migrations.install(outbox_db, name)
    consumer, reader = new_role("LOGIN REPLICATION", ODD), new_role("LOGIN", "--\n'\\; DROP")
    options = ["db", "grant", "--schema", name, "--consumer", consumer, "--readonly", reader, "--retention"]
    by_hand = CliRunner().invoke(root_command, [*options, "--print"])
    assert (by_hand.exit_code, rights(outbox_db, consumer, reader)) == (0, set())
    for _ in range(2):
        done = psql(outbox, by_hand.stdout)
        assert (done.returncode, done.stderr) == (0, "")
    printed = rights(outbox_db, consumer, reader)
    outbox_db.execute(sql.SQL("DROP OWNED BY {}, {}").format(sql.Identifier(consumer), sql.Identifier(reader)))
    for _ in range(2):
        assert invoke(outbox, *options).exit_code == 0
        assert rights(outbox_db, consumer, reader) == printed
    assert len(printed) > 20
    assert migrations.verify(outbox_db, name) == []


async def test_an_outbox_with_an_owner_and_a_schema_of_its_own_is_set_up_as_documented(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole
) -> None:
    owner, app, consumer = new_role("NOLOGIN", "owner"), new_role("LOGIN", "app"), new_role("LOGIN REPLICATION")
    names = [sql.Identifier(name) for name in (owner, app)]
    outbox_db.execute(sql.SQL("CREATE SCHEMA events AUTHORIZATION {}").format(names[0]))
    outbox_db.execute(sql.SQL("CREATE SCHEMA {0} AUTHORIZATION {0}").format(names[1]))
    as_owner, here = make_conninfo(outbox, options=f"-c role={owner}"), ["--schema", "events"]
    assert invoke(as_owner, "db", "install", *here).exit_code == 0
    outbox_db.execute(
        sql.SQL(
            "GRANT USAGE ON SCHEMA events TO {0}; GRANT EXECUTE ON FUNCTION events.capture_entity_change() TO {0}"
        ).format(names[1])
    )
    granted = invoke(as_owner, "db", "grant", *here, "--consumer", consumer)
    assert granted.exit_code == 0, granted.output
    # The owner of a schema may not, and pgoutput needs it.
    outbox_db.execute(sql.SQL("CREATE PUBLICATION {}").format(sql.Identifier(publication_name("events"))))
    execute(as_(app, outbox), "CREATE TABLE orders (id int PRIMARY KEY, total int)")
    assert invoke(as_(app, outbox), "track", "orders", *here).exit_code == 0
    router, seen = Router(), []

    @router.on("orders", "INSERT")
    async def handle(change: cdc.Change) -> None:
        seen.append(change.new)

    async with consuming(as_(consumer, outbox), router, schema="events") as consuming_app:
        await streams(consuming_app)
        execute(as_(app, outbox), "INSERT INTO orders VALUES (1, 15)")
        await until(lambda: seen == [{"id": 1, "total": 15}], "it was handled")
    with pytest.raises(errors.InsufficientPrivilege):
        execute(as_(app, outbox), "SELECT FROM events.entity_changes")


def test_what_was_granted_too_widely_is_taken_back(outbox: str, shop: psycopg.Connection, new_role: NewRole) -> None:
    role = new_role("LOGIN REPLICATION")
    assert invoke(outbox, "db", "grant", "--consumer", role).exit_code == 0
    exact = rights(shop, role)
    shop.execute(
        sql.SQL(
            "GRANT ALL ON entity_changes, cdc_shards, cdc_migrations, recent_action_history TO {0} WITH GRANT OPTION;"
            "GRANT UPDATE (new_data), SELECT (id) ON entity_changes TO {0};"
            "GRANT EXECUTE ON FUNCTION publish_change, capture_entity_change TO {0}"
        ).format(sql.Identifier(role))
    )
    assert invoke(outbox, "db", "grant", "--consumer", role).exit_code == 0
    assert rights(shop, role) == exact


def test_the_owner_is_refused_because_capturing_would_stop(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole
) -> None:
    owner = new_role("LOGIN SUPERUSER")
    outbox_db.execute(sql.SQL("ALTER TABLE entity_changes OWNER TO {}").format(sql.Identifier(owner)))
    with pytest.raises(RefusedError, match="owns the outbox"):
        grants.grant(outbox_db, "public", [grants.consumer(owner)])
    done = psql(outbox, grants.print_sql("public", [grants.consumer(owner)]))
    assert done.returncode == 3
    assert "owns the outbox" in done.stderr
    assert rights(outbox_db, owner) != set(), "its own are still there"


def test_what_no_grant_can_limit_is_said_and_ends_with_1(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole
) -> None:
    mighty, member, other = new_role("LOGIN SUPERUSER"), new_role("LOGIN"), new_role("LOGIN")
    owner = new_role("NOLOGIN", "owner")
    for relation in ("entity_changes", "cdc_shards"):
        outbox_db.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(relation), sql.Identifier(owner)))
    outbox_db.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(owner), sql.Identifier(member)))
    for role, said in ((mighty, "is a superuser"), (member, f"is a member of {owner}"), (other, "")):
        result = invoke(outbox, "db", "grant", "--consumer", role)
        assert (result.exit_code, said in result.stderr) == (1 if said else 0, True), result.output
    outbox_db.execute("GRANT INSERT, UPDATE ON entity_changes TO PUBLIC")
    result = invoke(outbox, "db", "grant", "--consumer", other)
    assert result.exit_code == 1
    assert "through PUBLIC or a role it is a member of, INSERT (" in result.stderr
    assert "UPDATE (" in result.stderr


def test_a_role_that_may_not_connect_gets_an_advice(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole
) -> None:
    role = new_role("LOGIN REPLICATION")
    database = sql.Identifier(outbox_db.info.dbname)
    outbox_db.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(database))
    [granted] = grants.grant(outbox_db, "public", [grants.consumer(role)])
    [advice] = granted.advice
    outbox_db.execute(advice.partition("as its owner: ")[2].encode())
    assert execute(as_(role, outbox), "SELECT 1") == [(1,)]


def test_a_role_that_is_not_there_is_named_with_the_statement_that_makes_it(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    missing = invoke(outbox, "db", "grant", "--consumer", "no such")
    assert missing.exit_code == 4
    assert missing.stderr.splitlines() == [
        "Error: there is no role no such",
        "  create it: CREATE ROLE \"no such\" LOGIN REPLICATION PASSWORD '...'",
    ]
    with pytest.raises(NotFoundError) as error:
        grants.grant(outbox_db, "public", [grants.reader("no such")])
    assert "REPLICATION" not in error.value.hint


def test_an_outbox_that_is_not_there_or_too_old_is_named_with_the_command(
    outbox_db: psycopg.Connection, new_role: NewRole
) -> None:
    role = new_role()
    with pytest.raises(NotFoundError) as error:
        grants.grant(outbox_db, "elsewhere", [grants.consumer(role)])
    assert "cdc db install" in error.value.hint
    outbox_db.execute("DROP TABLE cdc_shards")
    with pytest.raises(SchemaError) as old:
        grants.grant(outbox_db, "public", [grants.consumer(role)])
    assert "cdc db upgrade" in old.value.hint
    assert rights(outbox_db, role) == set()


def test_a_role_that_may_not_grant_is_refused_with_the_remedy_and_nothing_changes(
    outbox: str, outbox_db: psycopg.Connection, new_role: NewRole
) -> None:
    somebody, role = new_role(), new_role()
    result = invoke(as_(somebody, outbox), "db", "grant", "--consumer", role)
    assert result.exit_code == 1
    assert "owner" in result.stderr
    # The tables' owner, but not the schema's: the server warns and grants nothing on the schema.
    outbox_db.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {} WITH GRANT OPTION;"
                              "GRANT ALL ON ALL FUNCTIONS IN SCHEMA public TO {} WITH GRANT OPTION;"
                              "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {} WITH GRANT OPTION;"
                              "GRANT USAGE ON SCHEMA public TO {}; REVOKE USAGE ON SCHEMA public FROM PUBLIC"
                              ).format(*[sql.Identifier(somebody)] * 4))  # fmt: skip
    result = invoke(as_(somebody, outbox), "db", "grant", "--consumer", role)
    assert (result.exit_code, "still lack USAGE on its schema" in result.stderr) == (1, True), result.output
    assert rights(outbox_db, role) == set()


@pytest.mark.parametrize(
    "options",
    [[], ["--consumer", "a", "--readonly", "a"], ["--readonly", "a", "--retention"], ["--consumer", "a", "--payload"],
     ["--readonly", "a", "--publish"], ["--consumer", ""], ["--consumer", "x" * 64], ["--consumer", "$cdc$"]],
)  # fmt: skip
def test_options_that_mean_nothing_together_are_refused(options: list[str]) -> None:
    result = CliRunner().invoke(root_command, ["db", "grant", "--print", *options])
    assert (result.exit_code, result.stdout) == (2, "")


def test_names_are_checked_before_anything_is_asked(outbox_db: psycopg.Connection) -> None:
    with pytest.raises(UsageError):
        grants.grant(outbox_db, "$cdc$", [grants.consumer("a")])


# --- one truth -----------------------------------------------------------------------------------------------------


def test_every_column_is_classified_as_state_description_or_payload(outbox_db: psycopg.Connection) -> None:
    columns = "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped"
    named = [name for (name,) in outbox_db.execute(columns.encode(), [grants.CHANGES])]
    assert sorted(named) == sorted(grants.STATE + grants.DESCRIPTION + grants.PAYLOAD)
    named = [name for (name,) in outbox_db.execute(columns.encode(), [grants.HISTORY])]
    assert sorted(named) == sorted((*grants.HISTORY_WITHOUT_PREVIEW, "preview"))


def test_what_is_granted_is_what_the_documents_say() -> None:
    document = (ROOT / "docs/operations/roles.md").read_text("utf-8")
    [changed] = re.findall(r"^\| `--consumer ROLE` \| reads; changes (.*?) \|", document, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", changed)) == grants.STATE
    [hidden] = re.findall(r"^\| `--readonly ROLE` \| reads all but (.*?) \|", document, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", hidden)) == grants.PAYLOAD
    [shown] = re.findall(r"^SELECT (.*)\n  FROM events.recent_action_history;", document, re.MULTILINE)
    assert tuple(shown.split(", ")) == grants.HISTORY_WITHOUT_PREVIEW
