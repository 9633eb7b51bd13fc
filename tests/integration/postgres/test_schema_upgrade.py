"""An entity_changes made from the documented SQL, with rows in it, is upgraded in place and loses nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from click.testing import CliRunner

from cdc.cli import cdc
from cdc.core.errors import SchemaError
from cdc.postgres import migration_scripts, migrations

pytestmark = pytest.mark.server

# As documented. One repair is needed to fill it: the capture function reads columns that the documented tables do not
# have, so the rows below are written by hand.
DOCUMENTED = """
-- Table to track all changes that might trigger actions
CREATE TABLE entity_changes (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  table_name TEXT NOT NULL,
  operation TEXT NOT NULL CHECK (operation IN ('INSERT', 'UPDATE', 'DELETE')),
  entity_id TEXT NOT NULL,
  entity_type TEXT, -- 'reaction', 'message', 'task', etc.
  old_data JSONB,
  new_data JSONB,
  metadata JSONB, -- Additional context like user_id, chat_id
  changed_at TIMESTAMP DEFAULT NOW(),
  processed BOOLEAN DEFAULT FALSE,
  processed_at TIMESTAMP,
  error_count INTEGER DEFAULT 0,
  last_error TEXT
);

-- Indexes for efficient processing
CREATE INDEX idx_entity_changes_unprocessed
  ON entity_changes(processed, changed_at)
  WHERE processed = FALSE;

CREATE INDEX idx_entity_changes_type
  ON entity_changes(entity_type, processed);

-- Create a function to capture changes
CREATE OR REPLACE FUNCTION capture_entity_change()
RETURNS TRIGGER AS $$
BEGIN
  INSERT INTO entity_changes (
    table_name,
    operation,
    entity_id,
    entity_type,
    old_data,
    new_data,
    metadata
  ) VALUES (
    TG_TABLE_NAME,
    TG_OP,
    CASE
      WHEN TG_OP = 'DELETE' THEN OLD.id::TEXT
      ELSE NEW.id::TEXT
    END,
    CASE
      WHEN TG_TABLE_NAME = 'whatsapp_message_reactions' THEN 'reaction'
      WHEN TG_TABLE_NAME = 'whatsapp_messages' THEN 'message'
      WHEN TG_TABLE_NAME = 'tasks' THEN 'task'
      ELSE TG_TABLE_NAME
    END,
    CASE WHEN TG_OP != 'INSERT' THEN to_jsonb(OLD) ELSE NULL END,
    CASE WHEN TG_OP != 'DELETE' THEN to_jsonb(NEW) ELSE NULL END,
    CASE
      WHEN TG_OP != 'DELETE' THEN
        jsonb_build_object(
          'user_id', NEW.user_id,
          'chat_id', COALESCE(NEW.chat_id, NEW.room_id),
          'timestamp', NOW()
        )
      ELSE NULL
    END
  );

  -- Notify for real-time processing
  PERFORM pg_notify(
    'entity_change',
    json_build_object(
      'table', TG_TABLE_NAME,
      'operation', TG_OP,
      'entity_type', CASE
        WHEN TG_TABLE_NAME = 'whatsapp_message_reactions' THEN 'reaction'
        ELSE TG_TABLE_NAME
      END
    )::text
  );

  RETURN NEW;
END;
$$ LANGUAGE plpgsql;

-- Dashboard view for monitoring
CREATE VIEW action_processing_dashboard AS
SELECT
  entity_type,
  COUNT(*) FILTER (WHERE processed = FALSE) as pending,
  COUNT(*) FILTER (WHERE processed = TRUE AND DATE(changed_at) = CURRENT_DATE) as processed_today,
  COUNT(*) FILTER (WHERE error_count > 0) as failed,
  MAX(changed_at) FILTER (WHERE processed = TRUE) as last_processed_at,
  AVG(EXTRACT(EPOCH FROM (processed_at - changed_at))) FILTER (WHERE processed = TRUE) as avg_processing_seconds
FROM entity_changes
GROUP BY entity_type;

-- Function to reprocess failed actions
CREATE OR REPLACE FUNCTION reprocess_failed_actions(
  p_entity_type TEXT DEFAULT NULL,
  p_max_errors INT DEFAULT 3
) RETURNS TABLE (requeued_count INT) AS $$
BEGIN
  UPDATE entity_changes
  SET processed = FALSE, error_count = 0
  WHERE processed = TRUE
  AND error_count >= p_max_errors
  AND (p_entity_type IS NULL OR entity_type = p_entity_type);

  RETURN QUERY SELECT COUNT(*)::INT FROM entity_changes WHERE processed = FALSE;
END;
$$ LANGUAGE plpgsql;

-- Recent action history
CREATE VIEW recent_action_history AS
SELECT
  ec.id,
  ec.entity_type,
  ec.operation,
  ec.changed_at,
  ec.processed,
  ec.processed_at,
  EXTRACT(EPOCH FROM (ec.processed_at - ec.changed_at)) as processing_delay_seconds,
  ec.error_count,
  ec.last_error,
  CASE
    WHEN ec.entity_type = 'reaction' THEN ec.new_data->>'reaction'
    WHEN ec.entity_type = 'message' THEN LEFT(ec.new_data->>'content', 50)
    ELSE NULL
  END as preview
FROM entity_changes ec
WHERE ec.changed_at > NOW() - INTERVAL '24 hours'
ORDER BY ec.changed_at DESC;
"""
TABLES = """
CREATE TABLE whatsapp_message_reactions (
  id text PRIMARY KEY, message_id text, reaction text, user_id text, chat_id text
);
CREATE TRIGGER track_reaction_changes
  AFTER INSERT OR UPDATE OR DELETE ON whatsapp_message_reactions
  FOR EACH ROW EXECUTE FUNCTION capture_entity_change();
"""
MINUTE = timedelta(minutes=1)
THEN = datetime(2026, 3, 1, 12, 0)  # noqa: DTZ001 - what the documented column holds


@pytest.fixture
def documented(db: psycopg.Connection) -> psycopg.Connection:
    """A connection to a database as the documented SQL leaves it, with rows in every condition they can be in there."""
    db.execute("SET timezone = 'Europe/Berlin'")
    db.execute(DOCUMENTED.encode())
    db.execute(TABLES.encode())
    rows = [
        # name, changed_at, processed, processed_at, error_count
        ("third", THEN + 3 * MINUTE, False, None, 0),
        ("done", THEN + 2 * MINUTE, True, THEN + 4 * MINUTE, 1),
        ("done, time unknown", THEN + 2 * MINUTE, True, None, None),
        ("first", THEN, False, None, 2),
        ("given up", THEN + MINUTE, False, None, 3),
        ("state unknown", THEN + 5 * MINUTE, None, None, None),
        ("requeued", THEN + 6 * MINUTE, False, THEN + 7 * MINUTE, 0),
        ("time unknown", None, False, None, 0),
        *((f"one transaction {n:03}", THEN + 4 * MINUTE, False, None, 0) for n in range(200)),
    ]
    db.cursor().executemany(
        "INSERT INTO entity_changes (table_name, operation, entity_id, entity_type, new_data, changed_at, processed,"
        " processed_at, error_count) VALUES ('tasks', 'INSERT', %s, 'task', '{\"a\": 1}', %s, %s, %s, %s)",
        rows,
    )
    return db


def rows_of(db: psycopg.Connection, columns: str) -> list[tuple[object, ...]]:
    return db.execute(f"SELECT {columns} FROM entity_changes ORDER BY id".encode()).fetchall()


def seqs(db: psycopg.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT entity_id, seq FROM entity_changes").fetchall())


def test_the_result_is_what_a_fresh_installation_makes(documented: psycopg.Connection):
    assert migrations.install(documented, "public") == migration_scripts.migrations()
    assert migrations.verify(documented, "public") == []
    assert migrations.install(documented, "public") == []


def test_every_row_is_kept_as_it_is(documented: psycopg.Connection):
    kept = "id, table_name, operation, entity_id, entity_type, old_data, new_data, metadata, coalesce(error_count, 0),"
    kept += " coalesce(processed, false), last_error"
    before = rows_of(documented, kept)
    migrations.install(documented, "public")
    assert rows_of(documented, kept) == before


def test_processed_rows_stay_processed_and_get_a_time_if_they_had_none(documented: psycopg.Connection):
    migrations.install(documented, "public")
    done = "SELECT entity_id, processed_at - changed_at FROM entity_changes WHERE processed ORDER BY 1"
    assert documented.execute(done.encode()).fetchall() == [("done", 2 * MINUTE), ("done, time unknown", 0 * MINUTE)]


def test_what_the_documented_processor_gave_up_is_dead_and_can_be_requeued(documented: psycopg.Connection):
    migrations.install(documented, "public")
    dead = "SELECT entity_id, processed, next_attempt_at FROM entity_changes WHERE dead_at IS NOT NULL"
    assert documented.execute(dead.encode()).fetchall() == [("given up", False, None)]
    assert documented.execute("SELECT * FROM reprocess_failed_actions()").fetchall() == [(1,)]


def test_pending_rows_are_numbered_in_the_order_of_changed_at_and_of_writing(documented: psycopg.Connection):
    migrations.install(documented, "public")
    numbered = seqs(documented)
    in_order = [
        "first", "given up", "third", *(f"one transaction {n:03}" for n in range(200)), "state unknown", "requeued",
        "time unknown",
    ]  # fmt: skip
    assert sorted(in_order, key=numbered.__getitem__) == in_order
    assert sorted(numbered.values()) == list(range(1, len(numbered) + 1))


def test_what_was_there_has_no_cause(documented: psycopg.Connection):
    migrations.install(documented, "public")
    assert set(rows_of(documented, "caused_by, depth")) == {(None, 0)}


def test_numbers_go_on_above(documented: psycopg.Connection):
    migrations.install(documented, "public")
    highest = max(seqs(documented).values())
    assert documented.execute("SELECT publish_change('t', '1')").fetchone() == (highest + 1,)


def test_an_empty_table_starts_with_1(db: psycopg.Connection):
    db.execute(DOCUMENTED.encode())
    migrations.install(db, "public")
    assert db.execute("SELECT publish_change('t', '1')").fetchone() == (1,)


def test_times_without_zone_are_read_in_the_sessions_zone(documented: psycopg.Connection):
    migrations.install(documented, "public")
    at = documented.execute("SELECT changed_at, processed_at FROM entity_changes WHERE entity_id = 'done'").fetchone()
    assert at == (datetime(2026, 3, 1, 11, 2, tzinfo=UTC), datetime(2026, 3, 1, 11, 4, tzinfo=UTC))


def test_the_documented_triggers_go_on_working_and_do_not_notify(documented: psycopg.Connection):
    migrations.install(documented, "public")
    documented.execute("LISTEN entity_change")
    documented.execute("INSERT INTO whatsapp_message_reactions VALUES ('r1', 'm1', '✅', 'u1', 'c1')")
    captured = "SELECT entity_type, operation, metadata ->> 'chat_id' FROM entity_changes WHERE entity_id = 'r1'"
    assert documented.execute(captured.encode()).fetchall() == [("reaction", "INSERT", "c1")]
    assert list(documented.notifies(timeout=0.1)) == []


def test_the_documented_indexes_go(documented: psycopg.Connection):
    migrations.install(documented, "public")
    names = "SELECT count(*) FROM pg_class WHERE relname LIKE 'idx_entity_changes_%'"
    assert documented.execute(names.encode()).fetchone() == (0,)


def test_rights_on_the_table_are_kept(documented: psycopg.Connection):
    documented.execute("CREATE ROLE upgrade_reader")
    try:
        documented.execute("GRANT SELECT ON entity_changes TO upgrade_reader")
        migrations.install(documented, "public")
        asked = "SELECT has_table_privilege('upgrade_reader', 'entity_changes', 'SELECT')"
        assert documented.execute(asked.encode()).fetchone() == (True,)
    finally:
        documented.execute("DROP OWNED BY upgrade_reader; DROP ROLE upgrade_reader")


def test_a_view_of_somebody_elses_is_named_and_nothing_is_changed(documented: psycopg.Connection):
    documented.execute("CREATE VIEW my_report AS SELECT changed_at FROM entity_changes")
    before = rows_of(documented, "*")
    with pytest.raises(SchemaError, match="my_report") as failure:
        migrations.install(documented, "public")
    assert "drop these views" in failure.value.hint
    assert rows_of(documented, "*") == before


def test_a_table_that_only_shares_the_name_is_left_alone(db: psycopg.Connection):
    db.execute("CREATE TABLE entity_changes (id int PRIMARY KEY, changed_at timestamp)")
    with pytest.raises(SchemaError, match=r"not the documented one: it has no .*table_name"):
        migrations.install(db, "public")
    assert db.execute("SELECT count(*) FROM entity_changes").fetchone() == (0,)


def test_columns_that_somebody_added_and_a_zone_that_is_there_already_are_kept(db: psycopg.Connection):
    db.execute(DOCUMENTED.replace("TIMESTAMP", "TIMESTAMPTZ").encode())
    db.execute("ALTER TABLE entity_changes ADD COLUMN note text DEFAULT 'mine'")
    db.execute("INSERT INTO entity_changes (table_name, operation, entity_id) VALUES ('t', 'INSERT', '1')")
    before = db.execute("SELECT changed_at, note FROM entity_changes").fetchall()
    migrations.install(db, "public")
    assert db.execute("SELECT changed_at, note FROM entity_changes").fetchall() == before
    assert migrations.verify(db, "public") == []


def test_functions_and_views_of_another_shape_are_replaced(documented: psycopg.Connection):
    documented.execute("DROP FUNCTION reprocess_failed_actions")
    documented.execute(
        "CREATE FUNCTION reprocess_failed_actions(kind text, most int) RETURNS int LANGUAGE sql AS 'SELECT 1'"
    )
    documented.execute("DROP VIEW action_processing_dashboard")
    documented.execute("CREATE VIEW action_processing_dashboard AS SELECT entity_type FROM entity_changes")
    migrations.install(documented, "public")
    assert migrations.verify(documented, "public") == []


def test_the_command_line_upgrades_too_by_either_name(documented: psycopg.Connection, database: str):
    upgraded = CliRunner().invoke(cdc, ["db", "upgrade", "--dsn", database], catch_exceptions=False)
    assert upgraded.exit_code == 0, upgraded.stderr
    assert "applied 0001 entity_changes" in upgraded.stderr
    again = CliRunner().invoke(cdc, ["db", "install", "--dsn", database], catch_exceptions=False)
    assert again.exit_code == 0
    assert "up to date already" in again.stderr
