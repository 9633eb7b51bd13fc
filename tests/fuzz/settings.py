"""DSNs and settings, from options, variables and a file: always an exit code and a sentence, and never a secret."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner

from cdc.app.config import SETTINGS
from cdc.cli import cdc as root_command

_SECRET = "hunter2SECRET"
_COMMANDS = (
    ("config", "show"), ("config", "show", "--json"), ("status",), ("outbox", "stats"), ("db", "verify"),
    ("slot", "status"), ("doctor",), ("run", "--handlers", "tests.fuzz.handlers:router"),
)  # fmt: skip
_DSNS = (
    "host=127.0.0.1 port={port} password={secret}", "postgresql://u:{secret}@127.0.0.1:{port}/x", "host={junk}",
    "postgresql+psycopg://u:{secret}@127.0.0.1:{port}/x", "postgresql://127.0.0.1:{port}/x?password={secret}&{junk}=1",
    "{junk}", "password='{secret} host=x", "dbname={junk} password={secret}", "service={junk}", "postgresql://u:{secret}@[::1",
    "host=127.0.0.1 port={port} options='-c x=y' sslpassword={secret}", "",
)  # fmt: skip
_JUNK = (
    "\x01",
    "a b",
    "'",
    '"',
    "\\",
    "é",
    "\u202e",
    "x" * 5_000,
    "-1",
    "1e400",
    "nan",
    "99999999999999999999",
    "true",
    "[",
    "=",
)
_COMMANDS_A_ROUND = 20
_KNOWN_CODES = {0, 1, 2, 3, 4, 5}


@contextmanager
def stage() -> Iterator[None]:
    yield None


def attack(_: None, dice: random.Random) -> int:
    with tempfile.TemporaryDirectory(prefix="cdc-fuzz-") as folder:
        for _n in range(_COMMANDS_A_ROUND):
            _command(dice, Path(folder) / "cdc.toml")
    return _COMMANDS_A_ROUND


def check(_: None) -> None:
    """Each command was judged by itself."""


def _command(dice: random.Random, file: Path) -> None:
    environment: dict[str, str | None] = {name: None for name in os.environ if name.startswith(("CDC_", "PG"))}
    environment |= {"CDC_DSN": _dsn(dice), "PGCONNECT_TIMEOUT": "2", "COLUMNS": "80"}
    for setting in dice.sample(list(SETTINGS.values()), dice.randrange(4)):
        environment[setting.variable] = _value(dice).replace("\x00", "")
    file.write_text("".join(_line(dice) for _ in range(dice.randrange(4))), "utf-8", errors="replace")
    file.chmod(0o600)
    arguments = [*dice.choice(_COMMANDS)]
    if dice.random() < 0.5:
        arguments += ["--config", str(file)]
    done = CliRunner().invoke(root_command, arguments, env=environment)
    said = f"{arguments} with {sorted(name for name, value in environment.items() if value)}: {done.output[-2000:]}"
    assert done.exit_code in _KNOWN_CODES, f"exit code {done.exit_code}: {said}"
    assert done.exception is None or isinstance(done.exception, SystemExit), f"{done.exception!r}: {said}"
    for bad in ("Traceback", "fault of cdc", _SECRET):
        assert bad not in done.output, f"{bad!r} in what it says: {said}"


def _dsn(dice: random.Random) -> str:
    return dice.choice(_DSNS).format(port=1, secret=_SECRET, junk=_junk(dice))


def _junk(dice: random.Random) -> str:
    return "".join(dice.choices(_JUNK, k=dice.randrange(1, 4)))


def _value(dice: random.Random) -> str:
    return dice.choice(
        (_junk(dice), _dsn(dice), "5", "0", "", f"https://u:{_SECRET}@x/?token={_SECRET}", f"whsec_{_SECRET}")
    )


def _line(dice: random.Random) -> str:
    """Of a file that may be TOML."""
    setting = dice.choice(list(SETTINGS.values()))
    section, _, name = setting.name.rpartition(".")
    # Bare, it can be told from other words only by the name of its setting.
    secret = f'"{_SECRET}"' if setting.secret else f'"whsec_{_SECRET}"'
    value = dice.choice(('"x"', "5", "-1", "nan", "[1, 'a']", "{}", "true", secret, _junk(dice)))
    return (f"[{section}]\n" if section else "") + f"{name} = {value}\n"
