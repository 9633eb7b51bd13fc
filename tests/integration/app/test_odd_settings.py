"""All of it under settings that nobody chose for us, on the database and on the role."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.cli import cdc as command
from cdc.observability.snapshots import Role
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled

pytestmark = pytest.mark.server

_ODD: dict[str, tuple[str, ...]] = {
    "DateStyle": ("SQL, DMY", "German", "Postgres, MDY"),
    "IntervalStyle": ("iso_8601", "sql_standard", "postgres_verbose"),
    "TimeZone": ("Asia/Kathmandu", "<+07>-07", "America/St_Johns"),
    "extra_float_digits": ("-15", "3", "0"),
    "bytea_output": ("escape", "escape", "hex"),
    "array_nulls": ("off", "off", "on"),
    "standard_conforming_strings": ("off", "on", "off"),
    "backslash_quote": ("off", "on", "off"),
    "escape_string_warning": ("off", "on", "off"),
    "transform_null_equals": ("on", "on", "on"),
    "quote_all_identifiers": ("on", "off", "on"),
    "xmloption": ("document", "content", "document"),
    "search_path": ("", "nowhere", "public, pg_catalog"),
    "row_security": ("off", "on", "off"),
    "default_transaction_isolation": ("serializable", "repeatable read", "read uncommitted"),
    "default_transaction_read_only": ("on", "off", "on"),
    "default_transaction_deferrable": ("on", "off", "on"),
    "client_min_messages": ("debug5", "error", "log"),
    "lock_timeout": ("1ms", "0", "1ms"),
    "idle_in_transaction_session_timeout": ("1ms", "1ms", "0"),
    "idle_session_timeout": ("0", "60s", "0"),
    "plan_cache_mode": ("force_custom_plan", "force_generic_plan", "auto"),
    "enable_indexscan": ("off", "on", "off"),
    "enable_nestloop": ("off", "on", "off"),
    "enable_tidscan": ("off", "on", "off"),
    "enable_seqscan": ("off", "on", "off"),
    "enable_sort": ("off", "on", "off"),
    "enable_hashagg": ("off", "on", "off"),
    "jit": ("on", "off", "on"),
    "jit_above_cost": ("0", "-1", "0"),
    "work_mem": ("64kB", "1GB", "64kB"),
    "from_collapse_limit": ("1", "100", "8"),
    "join_collapse_limit": ("1", "100", "8"),
    "geqo_threshold": ("2", "12", "2"),
    "max_parallel_workers_per_gather": ("8", "0", "8"),
    "parallel_setup_cost": ("0", "1000", "0"),
    "min_parallel_table_scan_size": ("0", "8MB", "0"),
    "constraint_exclusion": ("on", "off", "on"),
    "synchronous_commit": ("off", "local", "off"),
    "lc_messages": ("C", "C", "C"),
    "check_function_bodies": ("off", "on", "off"),
    "default_toast_compression": ("pglz", "pglz", "pglz"),
    "plpgsql.extra_errors": ("all", "none", "all"),
    "plpgsql.extra_warnings": ("all", "none", "all"),
    "plpgsql.variable_conflict": ("use_variable", "use_column", "error"),
    "plpgsql.check_asserts": ("off", "on", "off"),
}
_WRITER = "-c search_path=public -c default_transaction_read_only=off -c statement_timeout=0 -c lock_timeout=0"


@pytest.fixture(
    params=[(where, turn) for where in ("DATABASE", "ROLE") for turn in range(3)], ids="{0[0]} {0[1]}".format
)
def odd(request: pytest.FixtureRequest, db: psycopg.Connection, database: str) -> Iterator[str]:
    """The DSN of a superuser, of whom or of whose database all these settings hold."""
    where, turn = request.param
    role = f"odd_{uuid.uuid4().hex[:8]}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN SUPERUSER").format(sql.Identifier(role)))
    db.execute("CREATE TABLE orders (id int PRIMARY KEY, at timestamptz DEFAULT now()); CREATE TABLE done (id text)")
    place = sql.SQL(f"{where} {{}}").format(sql.Identifier(db.info.dbname if where == "DATABASE" else role))
    for name, values in _ODD.items():
        value = sql.SQL("''") if name == "search_path" and not values[turn] else sql.SQL(_value(name, values[turn]))
        db.execute(sql.SQL("ALTER {} SET {} = {}").format(place, sql.SQL(name), value))
    yield make_conninfo(database, user=role)
    with psycopg.connect(database, autocommit=True, options=_WRITER) as admin:
        admin.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def _value(name: str, value: str) -> str:
    return value if name == "search_path" else sql.Literal(value).as_string()


def _cli(dsn: str, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(command, list(arguments), env={"CDC_DSN": dsn})
    assert done.exit_code == code, (arguments, done.output, done.exception)
    return done.stdout


def _router() -> cdc.Router:
    router = cdc.Router()

    @router.on("order")
    async def plain(change: cdc.Change) -> None:
        if change.attempt == 1 and change.entity_id == "3":
            raise RuntimeError("NULL")  # a text, whatever array_nulls says

    @router.on("written", timeout=20)
    async def written(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        with contextlib.suppress(TimeoutError):  # idle in its transaction
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        await connection.execute("INSERT INTO public.done VALUES (%s)", [change.entity_id])

    @router.on("grouped", group=5, timeout=20)
    def grouped(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("INSERT INTO public.done VALUES (%s)", [change.entity_id])

    @router.on("batch", batch=10)
    async def batch(changes: list[cdc.Change]) -> None:
        if changes[0].attempt == 1:
            raise cdc.Failed({changes[0]: RuntimeError("not this one")})

    @router.on("unwanted")
    async def unwanted(change: cdc.Change) -> None:
        raise cdc.Discard("nothing to do")

    @router.on("dead")
    async def dead(change: cdc.Change) -> None:
        raise cdc.Reject("never")

    return router


async def test_everything_works_under_settings_that_nobody_chose_for_it(odd: str, database: str, slot: str) -> None:
    async def run(*arguments: str) -> str:
        return await asyncio.to_thread(_cli, odd, *arguments)

    await run("db", "install")
    await run("db", "verify")
    await run("track", "public.orders", "--type", "order")
    settings: dict[str, Any] = {"slot_name": slot, "backoff_base": 0.01, "sweep_interval": 0.5}
    with psycopg.connect(database, autocommit=True, options=_WRITER) as db:
        async with consuming(odd, _router(), **settings) as app:
            for number in range(10):
                for kind in ("written", "grouped", "batch", "unwanted", "dead"):
                    db.execute("SELECT public.publish_change(%s, %s)", [kind, str(number)])
            db.execute("INSERT INTO orders SELECT n FROM generate_series(1, 5) AS n")

            async def streams_and_all_is_settled() -> bool:
                return app.status.role is Role.STREAMING and settled(db)

            await eventually_async(streams_and_all_is_settled, what="the slot is read, and all is settled")
        states = (
            "SELECT entity_type || CASE WHEN dead_at IS NULL THEN ' done' ELSE ' dead' END, count(*)"
            " FROM entity_changes GROUP BY 1"
        )
        expected = {f"{kind} done": 10 for kind in ("batch", "grouped", "unwanted", "written")}
        assert dict(db.execute(states).fetchall()) == {**expected, "dead dead": 10, "order done": 5}
        assert db.execute("SELECT count(*) FROM done").fetchone() == (20,)
        [(count, error)] = db.execute(
            "SELECT error_count, last_error FROM entity_changes WHERE entity_id = '3' AND entity_type = 'order'"
        ).fetchall()
        assert (count, error.split("\n")[0]) == (1, "RuntimeError: NULL")
    listed = json.loads(await run("outbox", "list", "--state", "dead", "--json"))["changes"]
    assert len(listed) == 10
    seq = str(listed[0]["seq"])
    await run("outbox", "show", seq)
    await run("outbox", "retry", seq)
    await run("outbox", "discard", seq, "--yes")
    await run("outbox", "stats")
    await run("outbox", "prune", "--older-than", "30d")
    await run("status")
    await run("slot", "status", "--slot-name", slot)
    await run("db", "upgrade")
    checks = json.loads(await asyncio.to_thread(_doctor, odd, slot))
    bad = {each.get("id") or each["check"]: each["detail"] for each in checks["findings"] if each["severity"] == "fail"}
    assert bad.keys() <= {"slot-limits"}, bad  # of the server, which is none of theirs


def _doctor(dsn: str, slot: str) -> str:
    done = CliRunner().invoke(command, ["doctor", "--json", "--slot-name", slot], env={"CDC_DSN": dsn})
    assert done.exit_code in (0, 1), (done.output, done.exception)
    return done.stdout
