"""Through a real PgBouncer: refused where a session is needed, and used by transactional handlers that are told to."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import cdc
from cdc.cli import cdc as command
from cdc.contrib.demo.temp_server import free_port
from cdc.core.errors import ConnectError
from cdc.postgres.connect import connect, connect_async
from tests.eventually import eventually, eventually_async
from tests.fix_consumer import consuming, settled

_CONF = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 5
logfile = {folder}/log
pidfile = {folder}/pid
{extra}
"""


@pytest.fixture
def bouncer(outbox: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The DSN of the outbox by way of a PgBouncer in transaction mode; ``param`` is more of its configuration."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        (pytest.fail if os.environ.get("CDC_REQUIRE_PGBOUNCER") else pytest.skip)("there is no pgbouncer here")
    folder = Path(tempfile.mkdtemp(prefix="cdc-pooler-"))
    folder.chmod(0o777)  # it refuses to run as root, and writes its log there
    given = conninfo_to_dict(outbox)
    listen = free_port()
    (folder / "users").write_text('"postgres" ""\n')
    conf = folder / "pgbouncer.ini"
    extra = getattr(request, "param", "")
    conf.write_text(_CONF.format(host=given["host"], port=given["port"], listen=listen, folder=folder, extra=extra))
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with subprocess.Popen(  # type: ignore[call-overload]
        [program, "-q", str(conf)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **user,
    ) as process:
        dsn = make_conninfo(outbox, host="127.0.0.1", port=listen)
        try:
            eventually(lambda: _answers(dsn, folder), what="the pooler answering")
            yield dsn
        finally:
            process.kill()
            shutil.rmtree(folder)


def _answers(dsn: str, folder: Path) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


_IGNORES = "ignore_startup_parameters = options"


@pytest.mark.parametrize("bouncer", ["", _IGNORES], indirect=True, ids=["as it is shipped", "dropping options"])
async def test_whatever_needs_a_session_is_refused_with_the_way_out(bouncer: str) -> None:
    with pytest.raises(ConnectError) as refused:
        connect(bouncer, application_name="test")
    assert "CDC_HANDLERS_DSN" in refused.value.hint
    with pytest.raises(ConnectError):
        await connect_async(bouncer, application_name="test")


@pytest.mark.parametrize("bouncer", ["", _IGNORES], indirect=True, ids=["as it is shipped", "dropping options"])
def test_so_are_all_commands_and_a_consumer(bouncer: str) -> None:
    for words in (["status"], ["outbox", "stats"], ["db", "verify"], ["run", "--handlers", "tests.handlers:router"]):
        done = CliRunner().invoke(command, words, env={"CDC_DSN": bouncer, "CDC_HTTP_PORT": "0"})
        assert done.exit_code == 3, done.output
        assert "CDC_HANDLERS_DSN" in " ".join(done.output.split())


@pytest.mark.parametrize("bouncer", ["", _IGNORES], indirect=True, ids=["as it is shipped", "dropping options"])
async def test_transactional_handlers_may_go_through_it(
    bouncer: str, outbox: str, outbox_db: psycopg.Connection
) -> None:
    outbox_db.execute("CREATE TABLE done (id text, attempt int)")
    router, ports = cdc.Router(), set[int]()

    @router.on("single", group=1)
    async def single(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        ports.add(connection.info.port)
        await connection.execute("INSERT INTO done VALUES (%s, %s)", [f"s{change.entity_id}", change.attempt])
        if change.attempt == 1 and change.entity_id == "7":
            raise RuntimeError("once more")

    @router.on("grouped", group=10)
    def grouped(change: cdc.Change, connection: psycopg.Connection) -> None:
        ports.add(connection.info.port)
        connection.execute("INSERT INTO done VALUES (%s, %s)", [f"g{change.entity_id}", change.attempt])

    async def all_settled() -> bool:
        return settled(outbox_db)

    outbox_db.execute(
        "SELECT publish_change(k, n::text) FROM generate_series(1, 100) AS n, unnest('{single,grouped}'::text[]) AS k"
    )
    async with consuming(outbox, router, handlers_dsn=bouncer, backoff_base=0.01):
        await eventually_async(all_settled, what="all is settled")
    assert ports == {int(conninfo_to_dict(bouncer)["port"])}
    assert outbox_db.execute("SELECT count(*), count(DISTINCT id), max(attempt) FROM done").fetchone() == (200, 200, 2)
    assert outbox_db.execute("SELECT count(*) FROM entity_changes WHERE NOT processed").fetchone() == (0,)
