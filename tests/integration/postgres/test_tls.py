"""TLS through libpq: every session of a consumer, the replication stream too, and what is said where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.contrib.demo.temp_server import TempServer
from cdc.core.errors import NotFoundError
from cdc.core.router import Router
from cdc.postgres import grants, migrations
from tests.eventually import eventually_async
from tests.fix_consumer import ROOT, consuming, settled, slot_name
from tests.fix_outbox import fill

PASSWORD = "pw with blanks@%'"
HOST = "db.test"
"""The name in the server's certificate."""
SESSIONS = {
    "cdc: shards",
    "cdc: reader",
    "cdc: listener",
    "cdc: collector",
    "cdc: stream",
    "cdc: relay",
    "cdc: due",
    "cdc: handlers",
}
ROLES = {"by_password": "scram-sha-256", "by_certificate": "cert", "by_both": "scram-sha-256 clientcert=verify-full"}
"""Name to how it logs in."""


def _cannot(reason: str) -> NoReturn:
    if os.environ.get("CDC_REQUIRE_PG"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a folder of its own."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    def create(self) -> None:
        self.folder.mkdir()
        self._request("ca", "test authority", "-x509", "-days", "2", "-out", "ca.crt")

    def issue(self, name: str, *, alternative: str = "") -> tuple[Path, Path]:
        """A certificate for this name, and its key."""
        self._request(name, name, "-out", f"{name}.csr")
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName=DNS:{alternative}\n" if alternative else "basicConstraints=CA:FALSE\n")
        self._openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", extensions.name, "-out", f"{name}.crt",
        )  # fmt: skip
        return self.folder / f"{name}.crt", self.folder / f"{name}.key"

    def _request(self, file: str, subject: str, *rest: str) -> None:
        self._openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", f"/CN={subject}", "-keyout", f"{file}.key", *rest,
        )  # fmt: skip
        (self.folder / f"{file}.key").chmod(0o600)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@dataclass(frozen=True)
class Secured:
    """A server that takes TCP connections with TLS only."""

    server: TempServer
    authority: Authority
    stranger: Authority
    """Has signed nothing that the server knows."""

    def dsn(self, user: str = "by_password", *, proof: Authority | None = None, **parameters: str) -> str:
        """As an operator would write it; ``proof``: with a certificate that this authority has signed."""
        files = {}
        if proof:
            certificate, key = proof.folder / f"{user}.crt", proof.folder / f"{user}.key"
            files = {"sslcert": str(certificate), "sslkey": str(key)}
        given = {
            "host": HOST,
            "hostaddr": "127.0.0.1",
            "password": PASSWORD,
            "sslmode": "verify-full",
            "sslrootcert": str(self.authority.certificate),
            **files,
            **parameters,
        }
        return make_conninfo(self.server.dsn("shop", user=user, tcp=True), **given)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if shutil.which("openssl") is None:
        _cannot("no program openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(folder / "authority"), Authority(folder / "stranger")
    for each in (authority, stranger):
        each.create()
        for role in ROLES:
            each.issue(role)
    try:
        server = TempServer(durable=False, tcp=True)
    except NotFoundError as missing:
        _cannot(str(missing))
    with server:
        _secure(server, authority)
        yield Secured(server, authority, stranger)


def _secure(server: TempServer, authority: Authority) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        if admin.execute("SHOW ssl_library").fetchone() == ("",):
            _cannot("this PostgreSQL was built without TLS")
        for role in ROLES:
            admin.execute(
                sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD {}").format(
                    sql.Identifier(role), sql.Literal(PASSWORD)
                )
            )
        admin.execute("CREATE DATABASE shop")
    with psycopg.connect(server.dsn("shop"), autocommit=True) as db:
        migrations.install(db, "public")
        grants.grant(db, "public", [grants.consumer(role, retention=True) for role in ROLES])
    owner = server.data.stat()
    for source in (*authority.issue("server", alternative=HOST), authority.certificate):
        target = server.folder / source.name
        shutil.copy(source, target)
        os.chown(target, owner.st_uid, owner.st_gid)
    server.configure(
        ssl="on",
        ssl_cert_file=str(server.folder / "server.crt"),
        ssl_key_file=str(server.folder / "server.key"),
        ssl_ca_file=str(server.folder / "ca.crt"),
    )
    lines = [f"hostssl shop {role} 127.0.0.1/32 {method}" for role, method in ROLES.items()]
    (server.data / "pg_hba.conf").write_text("\n".join(["local all all trust", *lines, ""]))
    server.restart()


@pytest.fixture
def db(secured: Secured) -> Iterator[psycopg.Connection]:
    with psycopg.connect(secured.server.dsn("shop"), autocommit=True) as connection:
        yield connection


def _router() -> Router:
    router = Router()

    @router.on("x")
    async def on_loop(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
        pass

    @router.on("y")
    def in_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
        pass

    return router


def _seen(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    """(application name, kind, encrypted, whose certificate) of each session of consumers."""
    return db.execute(
        "SELECT application_name, backend_type, ssl, client_dn FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)"
        " WHERE application_name LIKE 'cdc:%'"
    ).fetchall()


async def _watch(db: psycopg.Connection, wanted: set[str]) -> set[tuple[Any, ...]]:
    """Every session that was there until all the wanted ones had been, and a change of each kind was processed."""
    seen: set[tuple[Any, ...]] = set()

    async def all_of_them() -> bool:
        # Of any key: a wake-up is relayed only for what is another consumer's.
        db.execute("SELECT publish_change('x', n), publish_change('y', n) FROM (SELECT random()::text AS n) AS key")
        seen.update(_seen(db))
        return wanted <= {name for name, *_ in seen}

    await eventually_async(all_of_them, what=f"sessions {wanted}")

    async def done() -> bool:
        return settled(db)

    await eventually_async(done, what="everything is processed")
    return seen


async def test_every_session_of_a_consumer_is_encrypted_and_the_stream_is_one_of_them(
    secured: Secured, db: psycopg.Connection
) -> None:
    dsn = secured.dsn(channel_binding="require")
    shared: dict[str, Any] = {"slot_name": slot_name(), "retention": "1d"}
    wanted = {*SESSIONS, "cdc: retention"}
    fill(db, 5_000)  # so many that removing them is seen
    # The one that streams relays to the other, over one connection more.
    async with consuming(dsn, _router(), **shared), consuming(dsn, _router(), **shared):
        seen = await _watch(db, wanted)
    assert {(name, encrypted) for name, _, encrypted, _ in seen} == {(name, True) for name in wanted}
    assert {kind for name, kind, *_ in seen if name == "cdc: stream"} == {"walsender"}


@pytest.mark.parametrize("role", ["by_certificate", "by_both"])
async def test_a_consumer_logs_in_with_its_certificate_on_every_connection(
    secured: Secured, db: psycopg.Connection, role: str
) -> None:
    own = {"password": ""} if role == "by_certificate" else {}
    dsn = secured.dsn(role, proof=secured.authority, **own)
    async with consuming(dsn, _router(), slot_name=slot_name()):
        seen = await _watch(db, SESSIONS - {"cdc: relay"})
    assert {subject for _, _, _, subject in seen} == {f"/CN={role}"}


_REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a server of a stranger": ({"sslrootcert": "stranger"}, "certificate verify failed", "sslrootcert"),
    "a server with another name": ({"host": "other.test"}, "does not match host name", "certificate"),
    "a root certificate that is not there": ({"sslrootcert": "/nonexistent/ca.crt"}, "does not exist", "sslrootcert"),
    "no encryption": ({"sslmode": "disable"}, "no encryption", "sslmode"),
    "a certificate is asked for": ({"user": "by_both"}, "client certificate", "sslcert"),
    "a certificate of somebody else": ({"user": "by_both", "proof": "stranger"}, "unknown ca", "sslcert"),
    "a certificate with another name": ({"user": "by_both", "name": "by_certificate"}, "authentication", "log"),
    "a key that others may read": ({"user": "by_both", "name": "open"}, "group or world access", "chmod"),
    "no channel to bind to": ({"user": "by_certificate", "name": "by_certificate", "channel_binding": "require"},
                              "channel binding", "channel_binding"),
}  # fmt: skip
"""What is different in the DSN, a word of what is said, and one of the remedy."""


def _refused_dsn(secured: Secured, parameters: dict[str, Any]) -> str:
    given = dict(parameters)
    if given.get("sslrootcert") == "stranger":
        given["sslrootcert"] = str(secured.stranger.certificate)
    if given.pop("proof", None):
        given["proof"] = secured.stranger
    if name := given.pop("name", None):
        folder = secured.authority.folder
        if name == "open" and not (folder / "open.key").exists():
            shutil.copy(folder / "by_both.crt", folder / "open.crt")
            shutil.copy(folder / "by_both.key", folder / "open.key")
            (folder / "open.key").chmod(0o644)
        given |= {"sslcert": str(folder / f"{name}.crt"), "sslkey": str(folder / f"{name}.key")}
    return secured.dsn(**given)


@pytest.mark.parametrize(("parameters", "said", "remedy"), _REFUSED.values(), ids=_REFUSED)
def test_a_connection_that_is_not_safe_ends_with_3_and_one_sentence(
    secured: Secured, parameters: dict[str, Any], said: str, remedy: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cdc", "run", "--handlers", "tests.handlers:router", "--http-port", "0"],
        cwd=ROOT, env={**os.environ, "CDC_DSN": _refused_dsn(secured, parameters)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stderr
    [sentence, hint] = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert sentence.startswith("Error: cannot connect to host=")
    assert said in sentence
    assert remedy in hint
