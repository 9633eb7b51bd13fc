"""docs/guides/migrations.md: its migrations, as Alembic and Django run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict

from cdc.cli import cdc
from cdc.postgres import migration_scripts, migrations

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = (_ROOT / "docs/guides/migrations.md").read_text("utf-8")
_ORDERS = "CREATE TABLE orders (id bigint PRIMARY KEY, total numeric)"
_ALEMBIC_ENV = """
import os

import psycopg
from alembic import context
from sqlalchemy import Column, BigInteger, MetaData, Numeric, Table, create_engine

target_metadata = MetaData()
Table("orders", target_metadata, Column("id", BigInteger, primary_key=True), Column("total", Numeric))
{include_name}
engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(os.environ["DSN"]))
with engine.connect() as connection:
    {configure}
    with context.begin_transaction():
        context.run_migrations()
"""
_DJANGO_SETTINGS = """
import json
import os

DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", **json.loads(os.environ["DATABASE"])}}
INSTALLED_APPS = ["shop"]
"""


def _blocks(heading: str) -> list[str]:
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## )", _PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def _print_to(path: Path, schema: str = "cdc") -> None:
    printed = CliRunner().invoke(cdc, ["db", "print", "--no-transaction", "--schema", schema])
    assert printed.exit_code == 0, printed.stderr
    path.write_text(printed.stdout, "utf-8")


def _run(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _is_captured(db: psycopg.Connection) -> bool:
    db.execute("INSERT INTO orders VALUES (1, 12.50)")
    found = db.execute("SELECT entity_type, entity_id, new_data FROM cdc.entity_changes").fetchall()
    return found == [("order", "1", {"id": 1, "total": 12.50})]


@pytest.fixture
def alembic(tmp_path: Path, db: psycopg.Connection) -> Path:
    db.execute(_ORDERS)
    (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\n")
    (tmp_path / "versions").mkdir()
    (tmp_path / "script.py.mako").write_text("${upgrades if upgrades else 'pass'}\n")
    (tmp_path / "env.py").write_text(
        _ALEMBIC_ENV.format(
            include_name="", configure="context.configure(connection=connection, target_metadata=target_metadata)"
        )
    )
    return tmp_path


def test_alembic_installs_the_outbox_and_tracks_a_table(alembic: Path, database: str, db: psycopg.Connection) -> None:
    migration, _ = _blocks("Alembic")
    (alembic / "versions/0001_cdc.py").write_text(migration)
    _print_to(alembic / "versions/cdc.sql")
    _run(alembic, "-m", "alembic", "upgrade", "head", DSN=database)
    assert migrations.verify(db, "cdc") == []
    assert _is_captured(db)
    # alembic_version is found again, so the path was restored; and no table of the outbox is taken for one too many.
    assert "No new upgrade operations detected" in _run(alembic, "-m", "alembic", "check", DSN=database)
    _run(alembic, "-m", "alembic", "downgrade", "base", DSN=database)
    assert db.execute("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '#cdc_%'").fetchone() == (0,)


def test_alembic_leaves_an_outbox_beside_the_models_alone(alembic: Path, database: str, db: psycopg.Connection) -> None:
    migrations.install(db, "public")
    _run(alembic, "-m", "alembic", "upgrade", "head", DSN=database)
    include_name, configure = re.split(r"\n(?=context\.)", _blocks("Alembic")[1])
    (alembic / "env.py").write_text(_ALEMBIC_ENV.format(include_name=include_name, configure=configure.strip()))
    assert "No new upgrade operations detected" in _run(alembic, "-m", "alembic", "check", DSN=database)


def test_django_installs_the_outbox_and_tracks_a_table(tmp_path: Path, database: str, db: psycopg.Connection) -> None:

    db.execute(_ORDERS)
    (tmp_path / "settings.py").write_text(_DJANGO_SETTINGS)
    folder = tmp_path / "shop/migrations"
    folder.mkdir(parents=True)
    (tmp_path / "shop/__init__.py").touch()
    (folder / "__init__.py").touch()
    [migration] = _blocks("Django")
    (folder / "0001_cdc.py").write_text(migration)
    _print_to(folder / "cdc.sql")
    names = {"host": "HOST", "port": "PORT", "dbname": "NAME", "user": "USER", "password": "PASSWORD"}
    parts = {names[key]: str(value) for key, value in conninfo_to_dict(database).items() if key in names}
    environment = {"DATABASE": json.dumps(parts), "DJANGO_SETTINGS_MODULE": "settings"}
    _run(tmp_path, "-m", "django", "migrate", **environment)
    assert migrations.verify(db, "cdc") == []
    assert _is_captured(db)
    _run(tmp_path, "-m", "django", "migrate", "shop", "zero", **environment)
    assert db.execute("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '#cdc_%'").fetchone() == (0,)


@pytest.mark.parametrize("schema", ["public", "My \"Schema\", 'x'"])
def test_the_transaction_goes_on_with_the_settings_it_had(database: str, db: psycopg.Connection, schema: str) -> None:
    script = migration_scripts.print_sql(schema, transaction=False)
    settings = ("search_path", "lock_timeout", "client_min_messages")
    with psycopg.connect(database) as connection:
        connection.execute("SET LOCAL search_path = pg_temp, 'A b'; SET LOCAL lock_timeout = '77s'")
        before = [connection.execute(f"SHOW {name}".encode()).fetchone() for name in settings]
        for _ in range(2):
            connection.execute(script.encode())
        assert [connection.execute(f"SHOW {name}".encode()).fetchone() for name in settings] == before
    assert migrations.verify(db, schema) == []
