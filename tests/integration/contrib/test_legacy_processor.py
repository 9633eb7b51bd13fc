"""The legacy processor on the upgraded table: every statement of it works, beside consumers and before them."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import sql

import cdc
from cdc import testing
from cdc.core.errors import UsageError
from cdc.postgres import migration_scripts, migrations, tracking
from tests.fix_consumer import states
from tests.integration.postgres.test_schema_upgrade import DOCUMENTED
from tests.legacy_processor import Processor, connect

_ADD = "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type) VALUES ('x', 'INSERT', %s, %s)"


@pytest.fixture
def kept(db: psycopg.Connection) -> psycopg.Connection:
    """The documented table, upgraded for a processor that goes on."""
    db.execute(DOCUMENTED)
    migrations.install(db, "public", ["legacy_processor"])
    return db


def _process(database: str, act: Any, without: tuple[str, ...] = ()) -> None:
    """One batch."""
    with connect(database) as db:
        Processor(database, act, without).process_batch(db)


def _ok(_: psycopg.Connection, change: dict[str, Any]) -> None:
    assert change["entity_id"]


def _broken(_: psycopg.Connection, change: dict[str, Any]) -> None:
    raise ValueError("no")


def test_it_marks_fresh_rows_and_leaves_those_of_types_it_has_given_away(
    database: str, kept: psycopg.Connection
) -> None:
    kept.execute(_ADD, ["1", "message"])
    kept.execute(_ADD, ["1", "reaction"])
    _process(database, _ok, without=("reaction",))
    assert kept.execute("SELECT entity_type, processed FROM entity_changes ORDER BY seq").fetchall() == [
        ("message", True),
        ("reaction", False),
    ]


@pytest.mark.parametrize(("due", "dead"), [("1 hour", None), (None, "0"), ("infinity", "0")])
def test_what_a_consumer_left_waiting_or_dead_it_may_process_and_mark(
    due: str | None, dead: str | None, database: str, kept: psycopg.Connection
) -> None:
    kept.execute(_ADD, ["1", "message"])
    kept.execute(
        "UPDATE entity_changes SET error_count = 1, dead_at = now() - %s::interval,"
        " next_attempt_at = CASE %s::text WHEN 'infinity' THEN 'infinity' ELSE now() + %s::text::interval END",
        [dead, due, None if due == "infinity" else due],
    )
    _process(database, _ok)
    assert states(kept) == {"processed": 1}


def test_requeued_by_the_documented_function_a_change_is_done_once(database: str, kept: psycopg.Connection) -> None:
    done: list[str] = []
    kept.execute(_ADD, ["1", "message"])
    kept.execute("UPDATE entity_changes SET error_count = 3, dead_at = now()")
    assert kept.execute("SELECT * FROM reprocess_failed_actions()").fetchone() == (1,)
    for _ in range(3):
        _process(database, lambda _, change: done.append(change["entity_id"]))
    assert (done, states(kept)) == (["1"], {"processed": 1})


async def test_what_it_has_given_up_is_a_dead_letter_and_no_consumer_starts_it_again(
    database: str, kept: psycopg.Connection
) -> None:
    kept.execute(_ADD, ["1", "message"])
    for _ in range(5):
        _process(database, _broken)
    assert states(kept) == {"dead": 1}
    assert kept.execute("SELECT error_count, last_error FROM entity_changes").fetchone() == (3, "no")
    router, ran = cdc.Router(), list[cdc.Change]()
    router.on("message")(ran.append)
    await testing.drain(database, router)
    assert ran == []
    kept.execute("SELECT reprocess_failed_actions()")
    await testing.drain(database, router)
    assert len(ran) == 1


@pytest.mark.parametrize(
    "left",
    ["next_attempt_at = now()", "next_attempt_at = 'infinity', dead_at = now()", "started_by = gen_random_uuid()"],
)
@pytest.mark.parametrize("errors", [0, 1, 2])
def test_its_error_leaves_no_summary_of_a_consumers_error(
    errors: int, left: str, database: str, kept: psycopg.Connection
) -> None:
    """The summary is shown in place of last_error, which quotes rows."""
    kept.execute(_ADD, ["1", "message"])
    kept.execute(
        "UPDATE entity_changes SET error_count = %s, last_error = 'it', error_summary = 'of a consumer', " + left,
        [errors],
    )
    _process(database, _broken)
    [row] = kept.execute(
        "SELECT error_count, last_error, error_summary, dead_at IS NULL FROM entity_changes"
    ).fetchall()
    assert row == (errors + 1, "no", None, errors < 2 and "dead_at" not in left)


@pytest.mark.parametrize("failures", [1, 3])
async def test_a_consumer_beside_it_keeps_its_summaries(failures: int, database: str, kept: psycopg.Connection) -> None:
    router = cdc.Router()

    @router.on("message", max_attempts=failures)
    def fail(change: cdc.Change) -> None:
        raise KeyError

    kept.execute(_ADD, ["1", "message"])
    await testing.drain(database, router, allow_dead=True)
    [(summary,)] = kept.execute("SELECT error_summary FROM entity_changes").fetchall()
    assert summary.startswith("KeyError at ")


async def test_a_consumers_own_marks_are_as_they_are_without_it(database: str, kept: psycopg.Connection) -> None:
    router = cdc.Router()

    @router.on("message", max_attempts=5)
    def fail_four_times(change: cdc.Change) -> None:
        if change.attempt < 5:
            raise ValueError

    @router.on("reaction", max_attempts=4, dead="pause")
    def fail(_: cdc.Change) -> None:
        raise ValueError

    kept.execute(_ADD, ["1", "message"])
    kept.execute(_ADD, ["1", "reaction"])
    drained = await testing.drain(database, router, allow_dead=True)
    assert (drained.processed, drained.retried, drained.dead) == (1, 7, 1)
    assert drained.dead_letters[0].pauses_key


def test_its_query_goes_through_an_index_and_its_channel_notifies_until_the_set_is_removed(
    database: str, kept: psycopg.Connection
) -> None:
    with psycopg.connect(database, autocommit=True) as listener:
        listener.execute("LISTEN entity_change")
        kept.execute(_ADD, ["1", "reaction"])
        [heard] = listener.notifies(timeout=20, stop_after=1)
        assert heard.payload == '{"table" : "x", "operation" : "INSERT", "entity_type" : "x"}'
        assert "idx_entity_changes_unprocessed" in _plan(kept)
        assert migrations.remove(kept, "public", "legacy_processor")
        assert "idx_entity_changes_unprocessed" not in _plan(kept)
        kept.execute(_ADD, ["2", "reaction"])
        assert list(listener.notifies(timeout=0.1, stop_after=1)) == []
    assert not migrations.remove(kept, "public", "legacy_processor"), "it is gone already"
    assert migrations.verify(kept, "public") == []
    migrations.install(kept, "public", ["legacy_processor"])
    assert "idx_entity_changes_unprocessed" in _plan(kept), "the way back"


def _plan(db: psycopg.Connection) -> str:
    query = (
        "EXPLAIN SELECT * FROM entity_changes WHERE processed = FALSE AND error_count < 3 ORDER BY changed_at LIMIT 20"
    )
    with db.transaction():
        db.execute("SET LOCAL enable_seqscan = off")
        return "\n".join(line for (line,) in db.execute(query).fetchall())


@pytest.fixture
def tracked(outbox_db: psycopg.Connection) -> psycopg.Connection:
    """A tracked table whose changes are of the type message."""
    outbox_db.execute("CREATE TABLE whatsapp_messages (id int PRIMARY KEY)")
    outbox_db.execute(
        "CREATE TRIGGER capture AFTER INSERT ON whatsapp_messages FOR EACH ROW EXECUTE FUNCTION capture_entity_change()"
    )
    return outbox_db


@pytest.mark.parametrize(
    ("allowed", "handled", "left"),
    [
        (True, "message", 0), (True, "reaction,message", 0), (True, "reaction", 1), (True, "messages", 1),
        (True, "", 1), (False, "message", 1), (False, "reaction,message", 1),
    ],
)  # fmt: skip
def test_what_its_writer_handles_itself_is_captured_as_processed_where_the_trigger_allows_it(
    allowed: bool, handled: str, left: int, tracked: psycopg.Connection
) -> None:
    tracking.track(tracked, "public", "whatsapp_messages", handled=allowed, replace=True)
    tracked.execute("SELECT set_config('cdc.handled', %s, false)", [handled])
    tracked.execute("INSERT INTO whatsapp_messages VALUES (1)")
    tracked.execute("RESET cdc.handled")
    tracked.execute("INSERT INTO whatsapp_messages VALUES (2)")
    rows = tracked.execute("SELECT processed, last_error FROM entity_changes ORDER BY seq").fetchall()
    told = "discarded: its writer handles it (cdc.handled)"
    assert rows == [(True, told) if not left else (False, None), (False, None)]


@pytest.mark.parametrize("schema", ["public", 'Tenant "7" %s; it\'s é'])
def test_what_an_earlier_version_made_for_it_is_upgraded_in_place(schema: str, db: psycopg.Connection) -> None:
    migrations.install(db, schema, ["legacy_processor"])
    named = {"schema": sql.Identifier(schema), "ledger": sql.Identifier(schema, "cdc_migrations")}
    for name in ("processor_marks", "processor_notify"):
        names = {**named, "new": sql.Identifier(f"legacy_{name}"), "old": sql.Identifier(name)}
        db.execute(sql.SQL("ALTER FUNCTION {schema}.{new}() RENAME TO {old}").format(**names))
        db.execute(sql.SQL("ALTER TRIGGER {new} ON {schema}.entity_changes RENAME TO {old}").format(**names))
    former = "CREATE OR REPLACE FUNCTION {schema}.processor_marks() RETURNS trigger LANGUAGE plpgsql AS {body}"
    db.execute(sql.SQL(former).format(**named, body=sql.Literal("BEGIN RETURN NEW; END")))
    db.execute(sql.SQL("DROP TABLE {schema}.cdc_sets; DELETE FROM {ledger} WHERE version >= 7").format(**named))
    migrations.upgrade(db, schema)
    assert _functions(db) == {"legacy_processor_marks", "legacy_processor_notify"}
    [body] = db.execute("SELECT prosrc FROM pg_proc WHERE proname = 'legacy_processor_marks'").fetchone()
    assert "error_summary" in body, "what this version does"
    assert migrations.pending(db, schema) == []
    assert migrations.verify(db, schema) == []
    assert migrations.remove(db, schema, "legacy_processor")
    assert _functions(db) == set()
    assert migrations.verify(db, schema) == []


def test_a_function_of_its_former_name_that_no_trigger_calls_stops_no_installation(
    db: psycopg.Connection,
) -> None:
    db.execute("CREATE FUNCTION processor_marks() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    migrations.install(db, "public")
    assert _functions(db) == {"processor_marks"}
    assert migrations.verify(db, "public") == []


def test_the_set_is_in_the_script_when_it_is_named_and_goes_with_the_installation(kept: psycopg.Connection) -> None:
    made = "TRIGGER legacy_processor_marks"
    assert made in migration_scripts.print_sql("public", sets=["legacy_processor"])
    assert made not in migration_scripts.print_sql("public")
    assert "set legacy_processor" in migrations.uninstall(kept, "public")
    assert _functions(kept) == set()


def test_its_set_gives_a_consumer_no_more_rights() -> None:
    assert migration_scripts.consumer_rights("legacy_processor", "public", "cdc") == ""


def test_a_set_that_holds_an_applications_data_is_not_removed(kept: psycopg.Connection) -> None:
    with pytest.raises(UsageError, match="the set whatsapp stays"):
        migrations.remove(kept, "public", "whatsapp")
    with pytest.raises(UsageError, match="no set 'other'"):
        migrations.remove(kept, "public", "other")


def _functions(db: psycopg.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT proname FROM pg_proc WHERE proname ~ 'processor_'")}
