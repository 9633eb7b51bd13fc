"""A transactional handler finds its connection as if nobody had had it before."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.adapt import PyFormat
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg.types.numeric import FloatLoader
from psycopg.types.string import StrDumper

import cdc
from cdc.core.router import Router
from cdc.engine import transactions
from cdc.postgres.lent import Lent
from tests.eventually import eventually_async
from tests.fix_consumer import consuming, settled, states
from tests.fix_proxy import Proxy

_LEAVE = (
    "SET search_path = pg_catalog",
    "SET statement_timeout = '1h'",
    "SET DateStyle = 'German'",
    "SELECT set_config('app.tenant', 'ada', false)",
    "LISTEN somebody",
    "SELECT pg_advisory_lock(4711)",
    "PREPARE theirs AS SELECT 1",  # twice, it is an error
    "CREATE TEMPORARY TABLE mine (a int)",
    "DECLARE open_one CURSOR WITH HOLD FOR SELECT 1",
)
_LEFT = """
SELECT current_setting('search_path'), current_setting('statement_timeout'), current_setting('DateStyle'),
    coalesce(current_setting('app.tenant', true), ''), current_role = session_user,
    (SELECT count(*) FROM pg_listening_channels()),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT count(*) FROM pg_prepared_statements WHERE name NOT LIKE '\\_pg3\\_%%'),
    to_regclass('pg_temp.mine') IS NULL, (SELECT count(*) FROM pg_cursors WHERE name = 'open_one')
"""


def _clean(row: Any) -> bool:
    return bool(row == ('"$user", public', "0", "ISO, MDY", "", True, 0, 0, 0, True, 0))


def _spoil(connection: Any) -> None:
    """What is set on the Python object."""
    connection.row_factory = dict_row
    connection.prepare_threshold = None
    connection.prepared_max = 1
    connection.adapters.register_loader("int4", FloatLoader)
    connection.adapters.register_loader("timestamptz", FloatLoader)
    connection.add_notice_handler(lambda _: None)


def _spoilt(connection: Any) -> bool:
    noticed = connection._notice_handlers  # noqa: SLF001 - psycopg tells in no other way
    return bool(connection.row_factory is dict_row or connection.prepare_threshold is None or noticed)


@pytest.mark.parametrize(
    "register",
    [
        lambda connection: connection.adapters.register_dumper(bool, StrDumper),
        lambda connection: connection.adapters.register_loader("int4", FloatLoader),
        lambda connection: TypeInfo("of_a_handler", 4711, 0).register(connection),
        lambda connection: connection.adapters.types.clear(),
    ],
    ids=["dumper", "loader", "type", "no types"],
)
def test_what_is_registered_for_one_call_is_not_there_for_the_next(register: Any, outbox: str) -> None:
    with Lent.connect(outbox) as connection:
        before = connection.adapters
        connection.as_new()
        assert connection.adapters is before  # to make others costs time
        register(connection)
        connection.as_new()
        adapters = connection.adapters
        assert adapters.get_dumper(bool, PyFormat.TEXT) is not StrDumper
        assert type(connection.execute("SELECT 1::int4").fetchall()[0][0]) is int
        assert adapters.types.get("of_a_handler") is None
        assert adapters.types.get("int4")


def _until_settled(db: psycopg.Connection) -> Any:
    async def check() -> bool:
        return settled(db)

    return eventually_async(check, what="every change processed or dead")


@pytest.mark.parametrize("group", [1, 10])
@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_a_handler_sets_on_its_connection_is_not_there_for_the_next(
    in_thread: bool, group: int, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, found = Router(), []

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        cursor = await connection.execute("SELECT 1::int4")
        found.append((_spoilt(connection), type((await cursor.fetchall())[0][0])))
        _spoil(connection)

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        found.append((_spoilt(connection), type(connection.execute("SELECT 1::int4").fetchall()[0][0])))
        _spoil(connection)

    router.on("x", max_attempts=1, group=group)(in_a_thread if in_thread else on_loop)
    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 20) AS n")
    async with consuming(outbox, router, transactions=1):
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"processed": 20}
    assert set(found) == {(False, int)}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("in_thread", [False, True])
async def test_what_a_handler_leaves_in_its_session_is_not_there_for_the_next(
    in_thread: bool, fails: bool, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, found = Router(), []

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        found.append(await (await connection.execute(_LEFT)).fetchone())
        for statement in _LEAVE:
            await connection.execute(statement)
        if fails:
            raise ValueError

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        found.append(connection.execute(_LEFT).fetchone())
        for statement in _LEAVE:
            connection.execute(statement)
        if fails:
            raise ValueError

    router.on("x", max_attempts=1, group=1)(in_a_thread if in_thread else on_loop)
    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 12) AS n")
    async with consuming(outbox, router, transactions=1):
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"dead" if fails else "processed": 12}
    assert [row for row in found if not _clean(row)] == []


async def test_a_handler_that_deallocates_everything_affects_no_other(
    outbox: str, outbox_db: psycopg.Connection
) -> None:
    router = Router()

    @router.on("x", max_attempts=1, group=1)
    async def handle(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("DEALLOCATE ALL")

    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 30) AS n")
    async with consuming(outbox, router, transactions=1):
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"processed": 30}


@pytest.fixture
def somebody(outbox_db: psycopg.Connection) -> Iterator[str]:
    """A role that may do what marking needs, so that a handler's change of role outlives its transaction."""
    name = f"somebody_{uuid.uuid4().hex[:8]}"
    outbox_db.execute(sql.SQL("CREATE ROLE {} SUPERUSER").format(sql.Identifier(name)))
    yield name
    outbox_db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.mark.parametrize("statement", ["SET ROLE {}", "SET SESSION AUTHORIZATION {}"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_role_that_a_handler_takes_on_is_its_own(
    *, in_thread: bool, fails: bool, statement: str, somebody: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    router, found = Router(), list[Any]()
    asked = "SELECT current_user, session_user, current_setting('role')"
    takes_on = sql.SQL(statement).format(sql.Identifier(somebody))  # a literal, above

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        found.append(await (await connection.execute(asked)).fetchone())
        await connection.execute(takes_on)
        if fails:
            raise ValueError

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        found.append(connection.execute(asked).fetchone())
        connection.execute(takes_on)
        if fails:
            raise ValueError

    router.on("x", max_attempts=1, group=1)(in_a_thread if in_thread else on_loop)
    outbox_db.execute("SELECT publish_change('x', n::text) FROM generate_series(1, 6) AS n")
    async with consuming(outbox, router, transactions=1):
        await _until_settled(outbox_db)
    assert states(outbox_db) == {"dead" if fails else "processed": 6}
    assert set(found) == {outbox_db.execute(asked).fetchone()}


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_handlers_link_that_falls_silent_is_closed_at_its_limit_and_the_change_runs_again(
    in_thread: bool,
    outbox: str,
    outbox_db: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(transactions, "_ANSWER_LIMIT_S", 0.5)
    caplog.set_level(logging.INFO)
    link, router, calls = Proxy(outbox), Router(), 0

    def fall_silent() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            link.swallow()

    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT pg_sleep(0.7)")  # the handler's own statements have its own limit
        fall_silent()

    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("SELECT pg_sleep(0.7)")
        fall_silent()

    router.on("x", max_attempts=1, group=1)(in_a_thread if in_thread else on_loop)
    outbox_db.execute("SELECT publish_change('x', '1')")

    async def lost() -> bool:
        return "is read again: the connection was lost" in caplog.text

    link.start()
    try:
        async with consuming(outbox, router, transactions=1, handlers_dsn=link.dsn):
            await eventually_async(lost, within_s=20)
            link.open()
            await _until_settled(outbox_db)
    finally:
        link.stop()
    assert (states(outbox_db), calls) == ({"processed": 1}, 2)
