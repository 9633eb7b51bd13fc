"""A password, whatever is in it and however it is handed over, opens the connection and shows up nowhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import cdc
from cdc.contrib.demo.temp_server import TempServer, free_port
from cdc.core.router import Router
from cdc.postgres import grants, migrations
from cdc.postgres.connect import connect
from tests.eventually import eventually
from tests.fix_consumer import ROOT, settled
from tests.fix_db import new_server
from tests.forked import Forked

MARK = "s3cr3t"
PASSWORD = f"{MARK}%41 @/?#&=:;,'\"`$HOME\\ {{}}[] é{MARK}"
"""No piece of it may be seen, so it begins and ends with what is looked for."""
USER, DATABASE = "keeper", "vault"

router = Router()


@router.on("x")
async def fails(change: cdc.Change, connection: psycopg.AsyncConnection) -> None:
    raise RuntimeError(f"with {connection!r}")


@router.on("y")
def fails_in_a_thread(change: cdc.Change, connection: psycopg.Connection) -> None:
    connection.execute("SELECT 1 / 0")


@pytest.fixture(scope="module")
def server() -> Iterator[TempServer]:
    """Over TCP it asks for passwords."""
    with new_server(tcp=True) as running:
        with psycopg.connect(running.dsn(), autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(sql.Identifier(USER)))
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        with psycopg.connect(running.dsn(DATABASE), autocommit=True) as db:
            migrations.install(db, "public")
            grants.grant(db, "public", [grants.consumer(USER)])
        (running.data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        running.restart()
        yield running


@pytest.fixture
def db(server: TempServer) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server.dsn(DATABASE), autocommit=True) as connection:
        yield connection


def _set_password(db: psycopg.Connection, password: str) -> None:
    db.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(USER), sql.Literal(password)))


@dataclass(frozen=True)
class Handed:
    """What is said on the command line and in the environment."""

    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def _url(port: int, password: str = PASSWORD) -> str:
    return f"postgresql://{USER}:{quote(password, safe='')}@127.0.0.1:{port}/{DATABASE}"


def _words(port: int, password: str | None = PASSWORD) -> str:
    return make_conninfo(host="127.0.0.1", port=port, user=USER, dbname=DATABASE, password=password)


def _file(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def _pass_file(port: int, folder: Path) -> Handed:
    escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    line = f"127.0.0.1:{port}:{DATABASE}:{USER}:{escaped}\n"
    return Handed(variables={"CDC_DSN": _words(port, None), "PGPASSFILE": _file(folder / "pass", line)})


def _service_file(port: int, folder: Path) -> Handed:
    lines = ["[vault]", "host=127.0.0.1", f"port={port}", f"user={USER}", f"dbname={DATABASE}", f"password={PASSWORD}"]
    service = _file(folder / "service", "\n".join([*lines, ""]))
    return Handed(variables={"CDC_DSN": "service=vault", "PGSERVICEFILE": service})


def _settings_file(port: int, folder: Path) -> Handed:
    escaped = _words(port).replace("\\", "\\\\").replace('"', '\\"')
    return Handed(options=("--config", _file(folder / "cdc.toml", f'dsn = "{escaped}"\n')))


def _libpq_variables(port: int, folder: Path) -> Handed:
    names = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": USER, "PGDATABASE": DATABASE}
    return Handed(variables={**names, "PGPASSWORD": PASSWORD})


WAYS: dict[str, Callable[[int, Path], Handed]] = {
    "CDC_DSN, a URL": lambda port, _: Handed(variables={"CDC_DSN": _url(port)}),
    "CDC_DSN, words": lambda port, _: Handed(variables={"CDC_DSN": _words(port)}),
    "CDC_DSN_FILE, a URL": lambda port, at: Handed(variables={"CDC_DSN_FILE": _file(at / "dsn", _url(port) + "\n")}),
    "CDC_DSN_FILE, words": lambda port, at: Handed(variables={"CDC_DSN_FILE": _file(at / "dsn", _words(port) + "\n")}),
    "--dsn, a URL": lambda port, _: Handed(options=("--dsn", _url(port))),
    "--dsn and --stream-dsn, words": lambda port, _: Handed(("--dsn", _words(port), "--stream-dsn", _words(port))),
    "cdc.toml": _settings_file,
    "PGPASSFILE": _pass_file,
    "PGSERVICEFILE": _service_file,
    "PGPASSWORD": _libpq_variables,
}


def _environment(handed: Handed) -> dict[str, str]:
    """Of this process, without what could decide in its place."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG"))}
    return {**clean, "PYTHONASYNCIODEBUG": "1", **handed.variables}


def _run(handed: Handed, *arguments: str, limit_s: float = 60) -> tuple[int, str]:
    """The exit code, and all that was said."""
    with tempfile.NamedTemporaryFile("r") as log:
        command = [*arguments, *handed.options]
        process = Forked("cdc", command, cwd=ROOT, environment=_environment(handed), log=Path(log.name))
        return process.wait(limit_s), log.read()


class Running:
    """``cdc run`` with its log in a file, as talkative as it can be."""

    def __init__(self, handed: Handed, log: Path, log_format: str) -> None:
        self.port = free_port()
        self._log = log
        options = ["--log-level", "debug", "--log-format", log_format, "--http-port", str(self.port),
                   "--handlers", "tests.integration.app.test_secrets:router", "--slot-mode", "temporary",
                   "--max-attempts", "1", *handed.options]  # fmt: skip
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cdc", "--debug", "run", *options],
                cwd=ROOT, env=_environment(handed), stdout=output, stderr=output,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def says(self, text: str, times: int = 1) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.log
            return self.log.count(text) >= times

        eventually(said, within_s=60, what=f"{text!r} in the log")

    @property
    def command_line(self) -> str:
        return Path(f"/proc/{self.process.pid}/cmdline").read_text().replace("\0", " ")


def _everything_seen(db: psycopg.Connection, running: Running) -> str:
    """By whoever may look at the server, the outbox, or the consumer's own pages."""
    sessions = db.execute("SELECT to_jsonb(a)::text FROM pg_stat_activity AS a").fetchall()
    changes = db.execute("SELECT to_jsonb(c)::text FROM entity_changes AS c").fetchall()
    pages = [running.get(path) for path in ("/metrics", "/livez", "/readyz", "/")]
    return "\n".join([repr(sessions), repr(changes), *pages])


@pytest.mark.parametrize("way", WAYS)
def test_a_running_consumer_shows_its_password_nowhere(
    server: TempServer, db: psycopg.Connection, tmp_path: Path, way: str
) -> None:
    _set_password(db, PASSWORD)
    handed = WAYS[way](server.port, tmp_path)
    running = Running(handed, tmp_path / "log", "json" if "URL" in way else "text")
    try:
        running.says("streaming the slot")
        db.execute("SELECT publish_change('x', '1'), publish_change('y', '1')")
        eventually(lambda: settled(db), what="both have failed")
        seen = _everything_seen(db, running)
        command_line = running.command_line
        # What is said when everything breaks at once, and is made again.
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cdc:%'")
        running.says("streaming the slot", times=2)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0, running.log
    finally:
        running.process.kill()
        running.process.wait()
    assert "RuntimeError" in running.log
    assert MARK not in running.log + seen
    # Others on the machine can read it; cdc can only leave it as it was given.
    assert (MARK in command_line) == ("--dsn" in way)


@pytest.mark.parametrize("way", WAYS)
def test_no_command_prints_a_password(server: TempServer, db: psycopg.Connection, tmp_path: Path, way: str) -> None:
    _set_password(db, PASSWORD)
    handed = WAYS[way](server.port, tmp_path)
    if handed.options[2:]:
        handed = Handed(handed.options[:2])  # one DSN is enough for these
    code, settings = _run(handed, "config", "show", *(["--json"] if "URL" in way else []))
    assert code == 0, settings
    # It ends with 1: it has something to say about any throw-away server.
    _, findings = _run(handed, "doctor")
    assert "cannot connect" not in findings
    assert MARK not in settings + findings


@pytest.mark.parametrize(
    "password",
    ["%41", "100%", "a@b@c", "a/b", "a?b", "a#b", "it's", 'say "so"', "a b  c", " a", "\\", "a\\'b", "=", "a=b c=d",
     "$HOME", "{}", "%s", "ünïcödé", "密码", "Å", "password=x", "host=elsewhere", "[::1]", "a,b", "a&b", ";", "\t"],
)  # fmt: skip
def test_every_character_may_be_in_a_password(server: TempServer, db: psycopg.Connection, password: str) -> None:
    _set_password(db, password)
    for dsn in (_url(server.port, password), _words(server.port, password)):
        with connect(dsn, application_name="test") as connection:
            assert connection.info.user == USER


# --- what goes wrong -----------------------------------------------------------------------------------------------


def _mistakes() -> dict[str, tuple[Handed, int]]:
    """What somebody has written, and how ``cdc run`` ends. PORT stands for the server's."""

    def dsn(text: str) -> Handed:
        return Handed(variables={"CDC_DSN": text})

    wrong = f"{MARK} wrong {MARK}"
    unread = {
        "% that is not encoded": f"postgresql://{USER}:{MARK}%zz{MARK}@127.0.0.1:PORT/{DATABASE}",
        "@ that is not encoded": f"postgresql://{USER}:{MARK}@{MARK}@127.0.0.1:PORT/{DATABASE}",
        "/ that is not encoded": f"postgresql://{USER}:{MARK}/{MARK}@127.0.0.1:PORT/{DATABASE}",
        "/ after digits": f"postgresql://{USER}:12/{MARK}@127.0.0.1:PORT/{DATABASE}",
        "/ and ? after digits": f"postgresql://{USER}:12/{MARK}?{MARK}={MARK}@127.0.0.1:PORT/{DATABASE}",
        "a blank that is not quoted": f"host=127.0.0.1 user={USER} password={MARK} {MARK}",
        "a quote that is not closed": f"host=127.0.0.1 user={USER} password='{MARK} {MARK}",
        "an assignment in it": f"host=127.0.0.1 user={USER} password={MARK} {MARK}={MARK}",
        "a misspelt word": f"host=127.0.0.1 user={USER} passwort={MARK}",
        "the password alone": MARK,
        "a port that is none": f"host=127.0.0.1 port={MARK}",
        "a DSN as the database": f"host=127.0.0.1 port=PORT user={USER} dbname='user=x password={MARK}'",
    }
    variables = {
        "a DSN for the name of its file": {"CDC_DSN_FILE": f"postgresql://{USER}:{MARK}@127.0.0.1/{DATABASE}"},
        "words for the name of its file": {"CDC_STREAM_DSN_FILE": f"host=127.0.0.1 password={MARK}"},
        "a DSN in PGDATABASE": {"CDC_DSN": "host=127.0.0.1", "PGDATABASE": f"postgresql://u:{MARK}@h/db"},
        "words in PGDATABASE": {"CDC_DSN": "host=127.0.0.1", "PGDATABASE": f"user=x password={MARK}"},
        "a password in PGPORT": {"CDC_DSN": f"host=127.0.0.1 user={USER}", "PGPORT": MARK},
        "a misspelt variable": {"CDC_DNS": f"postgresql://{USER}:{MARK}@127.0.0.1/{DATABASE}"},
    }
    refused = {
        "a wrong password": f"postgresql://{USER}:{quote(wrong)}@127.0.0.1:PORT/{DATABASE}",
        "a wrong host": f"postgresql://{USER}:{quote(wrong)}@nosuch.invalid:PORT/{DATABASE}",
        "a wrong port": f"postgresql://{USER}:{quote(wrong)}@127.0.0.1:CLOSED/{DATABASE}",
        "a wrong database": f"postgresql://postgres:{quote(wrong)}@127.0.0.1:PORT/nosuch",
        "a wrong parameter": f"postgresql://{USER}:{quote(wrong)}@127.0.0.1:PORT/{DATABASE}?sslmode=nosuch",
        "two wrong hosts": f"postgresql://{USER}:{quote(wrong)}@127.0.0.1:CLOSED,127.0.0.1:CLOSED/{DATABASE}",
    }
    return {
        **{name: (dsn(text), 2) for name, text in unread.items()},
        **{name: (Handed(variables=given), 2) for name, given in variables.items()},
        **{name: (dsn(text), 3) for name, text in refused.items()},
        "a broken settings file": (Handed(options=("--config", f'dsn = "postgresql://{USER}:{MARK}\n')), 2),
        "a table in the settings file": (Handed(options=("--config", f'[dsn]\npassword = "{MARK}"\n')), 2),
        "an option that is none": (Handed(options=(f"--dns=postgresql://{USER}:{MARK}@127.0.0.1/{DATABASE}",)), 2),
    }


MISTAKES = _mistakes()


def _made_ready(handed: Handed, port: int, closed: int, folder: Path) -> Handed:
    def place(text: str) -> str:
        return text.replace("PORT", str(port)).replace("CLOSED", str(closed))

    variables = {name: place(text) for name, text in handed.variables.items()}
    if handed.options[:1] == ("--config",):
        return Handed(("--config", _file(folder / "cdc.toml", handed.options[1])), variables)
    return Handed(handed.options, variables)


@pytest.mark.parametrize(("given", "ends_with"), MISTAKES.values(), ids=MISTAKES)
def test_whatever_is_wrong_the_message_does_not_quote_the_password(
    server: TempServer, db: psycopg.Connection, tmp_path: Path, given: Handed, ends_with: int
) -> None:
    _set_password(db, PASSWORD)
    with socket.socket() as closed:  # bound, and not listening: nobody else can take the port meanwhile
        closed.bind(("127.0.0.1", 0))
        handed = _made_ready(given, server.port, closed.getsockname()[1], tmp_path)
        run = ["run", "--handlers", "tests.handlers:router", "--http-port", "0"]
        code, said = _run(handed, *run)
        _, with_traceback = _run(handed, "--debug", *run)
    assert code == ends_with, said
    assert MARK not in said + with_traceback
    assert "Traceback" not in said
    assert "Error: " in said
