"""Row-level security on the outbox is refused, with a sentence: filtered, it would look like one without work."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.cli import cdc as command
from cdc.core.errors import SchemaError
from cdc.postgres import grants
from cdc.postgres.connect import connect_async
from cdc.postgres.migrations import verify
from cdc.postgres.outbox import Store


@pytest.fixture
def consumer(outbox: str, outbox_db: psycopg.Connection) -> Iterator[str]:
    """The DSN of a role with a consumer's rights and no others."""
    role = f"consumer_{outbox_db.info.dbname}"
    outbox_db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    grants.grant(outbox_db, "public", [grants.consumer(role)])
    yield make_conninfo(outbox, user=role)
    outbox_db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


@pytest.mark.parametrize("table", ["entity_changes", "cdc_shards"])
async def test_a_consumer_waits_and_says_what_hides_its_work(
    consumer: str, outbox_db: psycopg.Connection, table: str
) -> None:
    async with await connect_async(consumer, application_name="test") as reader:
        await Store("public").check(reader)
        outbox_db.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY".encode())
        with pytest.raises(SchemaError, match="row-level security hides rows") as refused:
            await Store("public").check(reader)
        assert table in str(refused.value)
        assert "BYPASSRLS" in refused.value.hint
        role = outbox_db.execute(sql.SQL("ALTER ROLE {} BYPASSRLS").format(sql.Identifier(reader.info.user)))
        assert role.statusmessage == "ALTER ROLE"
        await Store("public").check(reader)
    assert [finding.object for finding in verify(outbox_db, "public")] == [f"row-level security of table {table}"]


def test_commands_do_not_say_that_all_is_processed(consumer: str, outbox_db: psycopg.Connection) -> None:
    outbox_db.execute("SELECT publish_change('x', '1')")
    outbox_db.execute("ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY")
    for words in (["outbox", "stats"], ["outbox", "list"], ["status"]):
        done = CliRunner().invoke(command, words, env={"CDC_DSN": consumer})
        said = " ".join(done.output.split())
        assert done.exit_code != 0, said
        assert "row-level security" in said, said
        assert "every change is processed" not in said


def test_what_is_to_be_done_is_named_and_an_upgrade_is_not(outbox_db: psycopg.Connection, outbox: str) -> None:
    outbox_db.execute("ALTER TABLE entity_changes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    remedy = 'ALTER TABLE "public"."entity_changes" DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY;'
    for words in (["db", "verify"], ["db", "upgrade"], ["doctor", "--no-stream"]):
        done = CliRunner().invoke(command, words, env={"CDC_DSN": outbox})
        assert done.exit_code == 1
        assert remedy in done.output, done.output
        assert "compare with" not in done.output
    script = CliRunner().invoke(command, ["doctor", "--no-stream", "--fix"], env={"CDC_DSN": outbox}).stdout
    assert remedy in script
    assert "CREATE TABLE" not in script
    assert "cdc db upgrade" not in script
    outbox_db.execute(remedy.encode())
    assert verify(outbox_db, "public") == []
