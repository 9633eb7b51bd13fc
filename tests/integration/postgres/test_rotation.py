"""A password that is replaced while a consumer works: on the server, and in the file that holds the DSN."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.app import config
from cdc.app.application import App
from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres import migrations
from tests.eventually import eventually_async
from tests.fix_consumer import metric, settled


@pytest.fixture
def guarded() -> Iterator[TempServer]:
    """A server that asks for a password, but not on its socket."""
    with TempServer(durable=False, tcp=True) as running:
        (running.data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        running.restart()
        with psycopg.connect(running.dsn(), autocommit=True) as admin:
            migrations.install(admin, "public")
        yield running


def set_password(admin: psycopg.Connection, file: Path, dsn: str, password: str) -> None:
    admin.execute(sql.SQL("ALTER ROLE postgres PASSWORD {}").format(sql.Literal(password)))
    file.write_text(make_conninfo(dsn, password=password))
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cdc: %'")


async def test_every_session_comes_back_with_the_new_one(
    guarded: TempServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, file = cdc.Router(), tmp_path / "dsn"

    @router.on("async")
    async def on_the_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("SELECT")

    @router.on("sync")
    def in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        connection.execute("SELECT")

    with psycopg.connect(guarded.dsn(), autocommit=True) as admin:
        set_password(admin, file, guarded.dsn(tcp=True), "first")
        settings = config.load({"http_port": 0}, environ={"CDC_DSN_FILE": str(file)}).settings
        app = App(settings, router)
        work = asyncio.create_task(app.run())

        async def works() -> bool:
            figures = admin.execute(
                "SELECT count(DISTINCT application_name) FROM pg_stat_activity"
                " WHERE application_name = ANY ('{cdc: shards,cdc: reader,cdc: stream,cdc: listener,cdc: collector}')"
            )
            return figures.fetchone() == (5,) and metric(app.metrics.registry, "cdc_stream_connected") == 1

        async def handled() -> bool:
            return settled(admin)

        for password in ("second", "third"):
            await eventually_async(works, what="all its sessions are there")
            for kind in ("async", "sync"):
                admin.execute("SELECT publish_change(%s, n::text) FROM generate_series(1, 20) n", [kind])
            await eventually_async(handled)
            set_password(admin, file, guarded.dsn(tcp=True), password)
        await eventually_async(works, what="all its sessions are back")
        app.consumer.stop()
        await work
    assert metric(app.metrics.registry, "cdc_handler_errors_total") == 0
