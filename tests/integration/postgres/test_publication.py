"""The empty publication for pgoutput, as part of the installation."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc
from cdc.postgres import migration_scripts, migrations

pytestmark = pytest.mark.server


def publications(db: psycopg.Connection) -> set[str]:
    assert db.execute("SELECT FROM pg_publication_tables").fetchall() == []
    return {str(name) for (name,) in db.execute("SELECT pubname FROM pg_publication")}


@pytest.fixture
def owner(database: str, db: psycopg.Connection, slot: str) -> Iterator[str]:
    """The DSN of a role that owns the schema ``events`` and may create nothing else."""
    name = f"role_{slot}"
    db.execute(sql.SQL("CREATE ROLE {0} LOGIN; CREATE SCHEMA events AUTHORIZATION {0}").format(sql.Identifier(name)))
    yield make_conninfo(database, user=name)
    db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def test_each_outbox_has_its_own_and_takes_it_along(db: psycopg.Connection) -> None:
    for name in ("public", "My \"Schema\", 'x'"):
        migrations.install(db, name)
        assert migrations.verify(db, name) == []
    assert publications(db) == {"cdc_public", "cdc_My \"Schema\", 'x'"}
    assert "publication cdc_public" in migrations.uninstall(db, "public")
    assert publications(db) == {"cdc_My \"Schema\", 'x'"}


def test_the_printed_script_makes_it_as_well(db: psycopg.Connection) -> None:
    script = "\n".join(line for line in migration_scripts.print_sql("public").splitlines() if not line.startswith("\\"))
    db.execute(script.encode())
    assert publications(db) == {"cdc_public"}


def test_without_the_right_to_create_it_the_installation_is_whole_otherwise_and_says_so(
    owner: str, db: psycopg.Connection
) -> None:
    installed = CliRunner().invoke(cdc, ["db", "install", "--schema", "events", "--dsn", owner])
    assert installed.exit_code == 0, installed.stderr
    assert "no publication cdc_events" in installed.stderr
    assert "CREATE PUBLICATION cdc_events" in installed.stderr
    assert publications(db) == set()
    assert migrations.verify(db, "events") == []


def test_one_that_another_role_has_made_outlives_the_outbox(owner: str, db: psycopg.Connection) -> None:
    db.execute("CREATE PUBLICATION cdc_events")
    with psycopg.connect(owner, autocommit=True) as connection:
        migrations.install(connection, "events")
        assert not [name for name in migrations.uninstall(connection, "events") if name.startswith("publication")]
    assert publications(db) == {"cdc_events"}
