"""What is attacked: a server, databases of several encodings, a consumer of each, the webhook's endpoint."""

from __future__ import annotations

import http.client
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psycopg
from click.testing import CliRunner
from psycopg import sql

from cdc.cli import cdc as root_command
from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.postgres import migrations
from tests.eventually import eventually
from tests.fix_consumer import Process
from tests.fix_webhook import Endpoint

ENCODINGS = ("UTF8", "LATIN1", "SQL_ASCII")
MEMORY_MAX_BYTES = 256 << 20
"""What the deployments that are shipped allow a consumer."""
_ANSWER_S, _SETTLE_S = 10.0, 60.0
_SESSIONS = {"cdc: shards", "cdc: reader", "cdc: listener", "cdc: stream", "cdc: collector"}
"""What a consumer that works has open. A task that ended unseen leaves one out."""


class Stage:
    """``with Stage("UTF8") as stage``: one consumer for each encoding, its database's connection in ``databases``."""

    def __init__(self, *encodings: str, webhook: bool = False) -> None:
        self._encodings = encodings
        self._webhook = webhook
        self.databases: dict[str, psycopg.Connection] = {}
        self.dsns: dict[str, str] = {}
        self.consumers: dict[str, Process] = {}
        self.ports: dict[str, int] = {}
        self.endpoint: Endpoint | None = None

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdc-fuzz-")))
            self.server = stack.enter_context(TempServer(durable=False))
            for encoding in self._encodings:
                self._add(encoding, folder, stack)
            if self._webhook:
                migrations.install(self.databases["UTF8"], "public", ["whatsapp"])
                self.endpoint = Endpoint(self.dsns["UTF8"], folder / "endpoint.log")
                stack.callback(self.endpoint.kill)
            self._stack = stack.pop_all()
        return self

    def _add(self, encoding: str, folder: Path, stack: ExitStack) -> None:
        name = f"fuzz_{encoding.lower()}"
        self.dsns[encoding] = dsn = self.server.dsn(name)
        with psycopg.connect(self.server.dsn(), autocommit=True) as admin:
            admin.execute(
                sql.SQL(
                    "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'"
                ).format(sql.Identifier(name), sql.Literal(encoding))
            )  # fmt: skip
        db = stack.enter_context(psycopg.connect(dsn, autocommit=True, client_encoding=encoding))
        migrations.install(db, "public")
        self.databases[encoding], self.ports[encoding] = db, free_port()
        self.consumers[encoding] = consumer = Process(
            dsn, folder / f"{name}.log", handlers="tests.fuzz.handlers:router", http_port=self.ports[encoding],
            slot_name=name, max_attempts=2, backoff_base=0.1, backoff_cap=0.1,
        )  # fmt: skip
        stack.callback(consumer.kill)
        consumer.wait_for("streaming the slot")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def command(self, encoding: str, *arguments: str) -> None:
        done = CliRunner().invoke(root_command, [*arguments, "--dsn", self.dsns[encoding]])
        assert done.exit_code == 0, done.output

    def holds(self, encoding: str) -> None:
        """The consumer lives, answers, stays within its memory, and handles what comes next."""
        consumer = self.consumers[encoding]
        assert consumer.process.poll() is None, f"the consumer has ended: {consumer.log[-3000:]}"
        eventually(lambda: self._livez(encoding) == 200, within_s=_ANSWER_S, what="/livez says 200")
        used = consumer.memory_bytes("VmHWM")
        assert used < MEMORY_MAX_BYTES, f"the consumer took {used >> 20} MB"
        eventually(lambda: self._sessions(encoding) >= _SESSIONS, within_s=_ANSWER_S, what=f"sessions {_SESSIONS}")
        self.settles(encoding)
        for bad in ("Traceback", "this is a bug", "fault of cdc", "a task failed"):
            assert bad not in consumer.log, f"the log has {bad!r}: {consumer.log[-3000:]}"

    def settles(self, encoding: str) -> None:
        db = self.databases[encoding]
        db.execute("SELECT publish_change('probe', 'probe')")

        def settled() -> bool:
            left = db.execute("SELECT FROM entity_changes WHERE NOT processed AND dead_at IS NULL LIMIT 1")
            return not left.fetchall()

        eventually(settled, within_s=_SETTLE_S, what="every change is processed or a dead letter")
        dead = db.execute("SELECT FROM entity_changes WHERE entity_type = 'probe' AND dead_at IS NOT NULL")
        assert not dead.fetchall(), "a change that is beyond reproach is a dead letter"

    def _sessions(self, encoding: str) -> set[str]:
        rows = self.databases[encoding].execute(
            "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
        )
        # From a database without an encoding the driver hands over bytes.
        return {name.decode() if isinstance(name, bytes) else name for (name,) in rows}

    def _livez(self, encoding: str) -> int | None:
        link = http.client.HTTPConnection("127.0.0.1", self.ports[encoding], timeout=_ANSWER_S)
        try:
            link.request("GET", "/livez")
            return link.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            link.close()
