"""Whoever may CREATE in a schema of the search path gets no code of theirs run by a statement or command of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from prometheus_client import generate_latest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.app.application import App
from cdc.cli import cdc as command
from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres import migrations
from cdc.postgres.sql_files import load
from tests import hijackers, servers
from tests.eventually import eventually_async
from tests.fix_consumer import consuming

_PREPARE = """
CREATE ROLE intern LOGIN; CREATE ROLE app LOGIN; CREATE ROLE cdc LOGIN REPLICATION; CREATE ROLE grafana LOGIN;
GRANT CREATE ON DATABASE shop TO app
"""
_DEAD = """
UPDATE outbox.entity_changes SET next_attempt_at = 'infinity', dead_at = now() WHERE seq = ANY (ARRAY(
  SELECT seq FROM outbox.entity_changes WHERE entity_type OPERATOR(pg_catalog.=) 'late' LIMIT 4))
"""
_DEAD_IN_SUBSCRIPTION = """
INSERT INTO outbox.cdc_subscription_changes (seq, subscription, shard, dead_at, type_hash, key_hash)
SELECT c.seq, s.subscription, c.shard, now(), 1, 1 FROM outbox.cdc_subscriptions AS s, (
  SELECT seq, shard FROM outbox.entity_changes WHERE entity_type OPERATOR(pg_catalog.=) 'late' LIMIT 4) AS c
"""
_TABLES = """
CREATE TABLE public.orders (id int PRIMARY KEY, note text);
CREATE TABLE public.done (id text);
GRANT INSERT ON public.done TO cdc;
INSERT INTO public.orders VALUES (1, 'before')
"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[TempServer]:
    """A server with a database ``shop``, in whose schema ``public`` an intern has offered better matches."""
    with TempServer(durable=False) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("CREATE DATABASE shop")
            for statement in _PREPARE.split(";"):
                admin.execute(statement.encode())
        with psycopg.connect(server.dsn("shop"), autocommit=True) as admin:
            admin.execute("GRANT CREATE ON SCHEMA public TO intern, app")
        with psycopg.connect(server.dsn("shop", user="intern"), autocommit=True) as intern:
            assert hijackers.offer(intern, "public") > 5_000
        yield server


class Shop:
    """The database, and what of it the intern has got hold of."""

    def __init__(self, server: TempServer) -> None:
        self._log = server.folder / "server.log"
        self._server = server
        self._seen = len(self._text())

    def _text(self) -> str:
        return self._log.read_text(errors="replace")

    def dsn(self, user: str) -> str:
        return self._server.dsn("shop", user=user)

    def hijacked(self) -> list[str]:
        """Since the last time."""
        text, seen = self._text(), self._seen
        self._seen = len(text)
        return sorted({line.partition("ERROR:")[2].strip() for line in text[seen:].splitlines() if "hijacked" in line
                       and "ERROR:" in line})  # fmt: skip

    def cli(self, user: str, *arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(command, list(arguments), env={"CDC_DSN": self.dsn(user)})
        assert not self.hijacked(), arguments
        assert done.exit_code == code, (arguments, done.output, done.exception)
        return done


@pytest.fixture
def shop(hostile: TempServer) -> Shop:
    return Shop(hostile)


@pytest.fixture(scope="module", params=["app", "postgres"])
def owner(request: pytest.FixtureRequest, hostile: TempServer) -> Iterator[str]:
    """Who installs and looks: an ordinary owner, and a superuser."""
    with psycopg.connect(hostile.dsn("shop", user=request.param), autocommit=True) as db:
        db.execute(_TABLES.encode())
    yield str(request.param)
    with psycopg.connect(hostile.dsn("shop"), autocommit=True) as db:
        db.execute("DROP SCHEMA IF EXISTS outbox CASCADE")
        db.execute("DROP TABLE public.orders, public.done")


def test_the_offers_would_be_taken_by_who_does_not_look(shop: Shop) -> None:
    with psycopg.connect(shop.dsn("postgres"), autocommit=True) as db:
        for query in ("SELECT 1::oid = 1::int2", "SELECT unnest('{1}'::int4[])", "SELECT count(1::int8)"):
            with pytest.raises(psycopg.errors.RaiseException, match="hijacked"):
                db.execute(query.encode())
    assert len(shop.hijacked()) == 3


def test_no_command_about_the_objects_takes_them(shop: Shop, owner: str) -> None:
    shop.cli(owner, "db", "install", "--schema", "public")  # where the offers themselves are
    shop.cli(owner, "db", "upgrade", "--schema", "public")
    shop.cli(owner, "db", "verify", "--schema", "public")
    shop.cli(owner, "db", "uninstall", "--schema", "public", "--yes")
    at = ("--schema", "outbox")
    shop.cli(owner, "db", "install", *at)
    shop.cli(owner, "db", "install", *at, "--with", "legacy_processor")
    shop.cli(owner, "db", "remove", "legacy_processor", *at)
    with psycopg.connect(shop.dsn(owner), autocommit=True) as db:
        db.execute("DROP FUNCTION outbox.publish_change")
    assert "missing" in shop.cli(owner, "db", "verify", *at, code=1).stdout
    shop.cli(owner, "db", "upgrade", *at)
    shop.cli(owner, "db", "grant", *at, "--consumer", "cdc", "--retention", "--publish", "--readonly", "grafana")
    shop.cli(owner, "track", "orders", *at, "--type", "order", "--exclude", "note")
    shop.cli(owner, "track", "orders", *at, "--type", "order")
    assert "orders" in shop.cli(owner, "tracked", *at).stdout
    reading = ("--where", "note IS NOT NULL", "--since", "1")
    for backfill in ((), reading):
        shop.cli(owner, "backfill", "public.orders", *at, *backfill)
    shop.cli(owner, "backfill", "status", *at)
    shop.cli(owner, "backfill", "cancel", *at, "1", code=5)
    shop.cli(owner, "untrack", "orders", *at)
    shop.cli(owner, "track", "orders", *at, "--type", "order")
    shop.cli(owner, "track", "odrers", *at, code=4)
    for user in (owner, "cdc"):
        shop.cli(user, "db", "verify", *at)


async def test_no_statement_of_a_consumer_takes_them(shop: Shop, owner: str, slot: str) -> None:
    router = cdc.Router()

    @router.on("order")
    async def plain(change: cdc.Change) -> None:
        if change.attempt == 1 and change.operation == "UPDATE":
            raise RuntimeError("once more")

    @router.on("written")
    async def transactional(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO public.done VALUES (%s)", [change.entity_id])

    @router.on("grouped", group=5)
    def in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("INSERT INTO public.done VALUES (%s)", [change.entity_id])

    @router.on("batch", batch=10)
    async def batch(changes: list[cdc.Change]) -> None:
        raise cdc.Failed({changes[0]: RuntimeError("not this one")})

    @router.on("unwanted")
    async def unwanted(change: cdc.Change) -> None:
        raise cdc.Discard("nothing to do")

    @router.on("dead")
    async def dead(change: cdc.Change) -> None:
        raise cdc.Reject("never")

    kinds = ("written", "grouped", "batch", "unwanted", "dead")
    settings: dict[str, Any] = {"schema": "outbox", "backoff_base": 0.01, "retention": "1s", "sweep_interval": 0.2}
    with psycopg.connect(shop.dsn("postgres"), autocommit=True, options="-c search_path=pg_catalog") as db:
        for only in ([], list(kinds)):
            async with consuming(
                shop.dsn("cdc"), router, slot_name=slot, **(settings | {"only": only} if only else settings)
            ) as app:
                for number in range(10):
                    for kind in kinds:
                        db.execute("SELECT outbox.publish_change(%s, %s)", [kind, str(number)])
                if not only:
                    db.execute("INSERT INTO public.orders SELECT n, 'x' FROM generate_series(10, 20) AS n")
                    db.execute("UPDATE public.orders SET note = 'y'")
                await eventually_async(partial(_settled, db), what="all is settled")
                await eventually_async(partial(_shows, app), what="figures are read")
            assert shop.hijacked() == []
        [(rejected,)] = db.execute(
            "SELECT count(*) FROM outbox.entity_changes WHERE entity_type <> 'order' AND dead_at IS NOT NULL"
        ).fetchall()
        assert rejected >= 20, "retention removes the processed ones meanwhile, these stay"


def test_no_command_that_looks_or_decides_takes_them(shop: Shop, owner: str, slot: str) -> None:
    at = ("--schema", "outbox")
    with psycopg.connect(shop.dsn("postgres"), autocommit=True) as db:
        for number in range(8):
            db.execute("SELECT outbox.publish_change('late', %s)", [str(number)])
        db.execute(_DEAD.encode())
    for user in (owner, "cdc"):
        shop.cli(user, "status", *at)
        for state in ("fresh", "waiting", "dead", "processed", "blocked"):
            shop.cli(user, "outbox", "list", *at, "--state", state)
        listed = json.loads(shop.cli(user, "outbox", "list", *at, "--state", "dead", "--json").stdout)
        numbers = [str(each["seq"]) for each in listed["changes"]]
        shop.cli(user, "outbox", "stats", *at)
        shop.cli(user, "outbox", "show", *at, numbers[0], "--show-payload")
        shop.cli(user, "outbox", "retry", *at, numbers[0])
        shop.cli(user, "outbox", "retry", *at, "--all", "--type", "none")
        shop.cli(user, "outbox", "discard", *at, "--yes", numbers[1])
        shop.cli(user, "outbox", "discard", *at, "--yes", "--type", "late", "--before", "2000-01-01")
        shop.cli(user, "outbox", "prune", *at, "--older-than", "1d")
    for start in ("now", "beginning", "1", "1h"):
        shop.cli(owner, "subscription", "create", f"s_{start}", *at, "--type", "late", "--from", start)
    with psycopg.connect(shop.dsn("postgres"), autocommit=True) as db:
        db.execute(_DEAD_IN_SUBSCRIPTION.encode())
    for user in (owner, "cdc"):
        shop.cli(user, "status", *at)
        shop.cli(user, "subscription", "list", *at)
        shop.cli(user, "subscription", "show", "s_beginning", *at)
        for state in ("fresh", "waiting", "dead", "blocked"):
            shop.cli(user, "outbox", "list", *at, "--state", state, "--subscription", "s_beginning")
        shop.cli(user, "outbox", "stats", *at, "--subscription", "s_beginning")
        for decision in ("retry", "discard"):
            shop.cli(user, "outbox", decision, *at, "--all", "--yes", "--subscription", "s_beginning")
        shop.cli(user, "outbox", "prune", *at, "--older-than", "1d")
    for start in ("now", "beginning", "1", "1h"):
        shop.cli(owner, "subscription", "pause", f"s_{start}", *at)
        shop.cli(owner, "subscription", "resume", f"s_{start}", *at)
        shop.cli(owner, "subscription", "drop", f"s_{start}", *at, "--yes")
    # Dropping the last slot also drops the publication, which cdc may not make.
    preferred = servers.preferred_plugin()
    for user, plugins in (("postgres", {preferred, "pgoutput"}), ("cdc", {preferred} - {"pgoutput"})):
        for plugin in plugins:
            name = f"{slot}_{plugin}"
            shop.cli(user, "slot", "create", *at, "--slot-name", name, "--plugin", plugin)
            shop.cli(user, "slot", "status", *at, "--slot-name", name)
            shop.cli(user, "slot", "list", *at)
            shop.cli(user, "slot", "advance", *at, "--slot-name", name)
            shop.cli(user, "slot", "recreate", *at, "--slot-name", name, "--yes")
            shop.cli(user, "slot", "drop", *at, "--slot-name", name, "--yes")
        done = CliRunner().invoke(command, ["doctor", *at, "--fix"], env={"CDC_DSN": shop.dsn(user)})
        assert done.exit_code in (0, 1), done.output
        assert shop.hijacked() == []


async def test_nor_the_documented_application(shop: Shop, owner: str) -> None:
    shop.cli(owner, "db", "install", "--schema", "outbox", "--with", "whatsapp")
    done = CliRunner().invoke(
        command, ["whatsapp", "smoke", "--schema", "outbox", "--timeout", "0.5"], env={"CDC_DSN": shop.dsn(owner)}
    )
    assert done.exit_code in (1, 4), done.output
    assert shop.hijacked() == []


def test_what_runs_on_a_handlers_connection_takes_nothing_of_its_path_even_before_the_servers_own(
    hostile: TempServer, shop: Shop
) -> None:
    """The path is the application's there, and may name a schema before pg_catalog."""
    with psycopg.connect(shop.dsn("postgres"), autocommit=True) as db:
        db.execute("DROP SCHEMA IF EXISTS plain CASCADE")
        migrations.install(db, "plain")
        db.execute("CREATE SCHEMA IF NOT EXISTS first")
        for name, arguments, returns in _EXACT:
            db.execute(hijackers.create_function("first", name, arguments, returns).encode())
        for left, right in (
            ("uuid", "uuid"), ("bool", "bool"), ("int4", "int4"), ("xid8", "xid8"), ("text", "text"), ("int8", "int8"),
            ("int2", "int2"), ("tid", "tid"),
        ):  # fmt: skip
            function = f'"exact {left} {right}"'
            db.execute(hijackers.create_function("first", function, (left, right), "bool").encode())
            db.execute(
                f"CREATE OPERATOR first.= (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = first.{function})".encode()
            )
        for name in ("text", "uuid", "bool", "int2", "int4", "int8", "xid8"):
            db.execute(
                f'CREATE DOMAIN first."{name}" AS pg_catalog."{name}" CHECK (pg_catalog.pg_sleep(1) IS NULL)'.encode()
            )
    statements = load("outbox.sql", "plain")
    coalesced = load("coalesced.sql", "plain")
    with psycopg.connect(make_conninfo(shop.dsn("postgres"), options="-c search_path=first,pg_catalog")) as lent:
        lent.execute("SELECT plain.publish_change('x', '1')")
        [(id_,)] = lent.execute(sql.SQL("SELECT id FROM plain.entity_changes")).fetchall()
        given = {"ids": f"{{{id_}}}", "requeued": "{f}", "failures": "{0}", "cause": "x,0"}
        [(xid,)] = lent.execute(statements["take"], given).fetchall()
        lent.execute(statements["cause"], {"cause": "x,0"})
        [(at, _)] = lent.execute(statements["mark"], {"ids": f"{{{id_}}}", "xid": xid}, binary=True).fetchall()
        seqs = [lent.execute("SELECT plain.publish_change('x', '2')").fetchone() for _ in range(2)]
        ((first,), (last,)) = [row for row in seqs if row]
        [(id_, shard)] = lent.execute("SELECT id, shard FROM plain.entity_changes WHERE seq = %s", [first]).fetchall()
        lent.execute(coalesced["indexed"])
        group = {"first": id_, "shard": shard, "later": f"{{{last}}}", "last": last, "xid": xid}
        [(marked, _, _)] = lent.execute(coalesced["mark"], group, binary=True).fetchall()
        lent.rollback()
    assert shop.hijacked() == []
    assert at is not None
    assert marked == 2


_EXACT = (
    ("set_config", ("text", "text", "bool"), "text"),
    ("current_setting", ("text", "bool"), "text"),
    ("clock_timestamp", (), "timestamptz"),
    ("concat", ("text", "int8"), "text"),
    ("pg_current_xact_id", (), "xid8"),
)


async def _shows(app: App) -> bool:
    return b"cdc_outbox_changes" in generate_latest(app.metrics.registry)


async def _settled(db: psycopg.Connection) -> bool:
    left = db.execute("SELECT FROM outbox.entity_changes WHERE NOT processed AND dead_at IS NULL LIMIT 1")
    return not left.fetchall()
