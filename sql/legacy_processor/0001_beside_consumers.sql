-- Lets the legacy processor, DatabaseActionProcessor of the documented design, go on working on the upgraded table while
-- consumers take over type by type. Safe to run again; remove.sql undoes it.
-- Locks: SHARE on entity_changes for the index, then SHARE ROW EXCLUSIVE for a moment; writers of captured tables wait.

-- Without it the processor's query, processed = FALSE AND error_count < 3, reads the whole history twice a second.
CREATE INDEX IF NOT EXISTS idx_entity_changes_unprocessed ON @schema@.entity_changes (processed, changed_at)
  WHERE processed = FALSE;

-- The processor reads two columns of the state only. So it also finds rows that wait for a retry, and dead letters with
-- fewer than three errors. A row that it marks processed is processed, whatever its other columns held. At the third
-- error it never tries the row again: a dead letter.
CREATE OR REPLACE FUNCTION @schema@.legacy_processor_marks() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $cdc$
BEGIN
  IF NEW.processed THEN
    NEW.processed_at := coalesce(NEW.processed_at, now());
    NEW.next_attempt_at := NULL;
    NEW.dead_at := NULL;
  ELSE
    -- That of the consumer's last attempt, if there was one: last_error is the processor's.
    NEW.error_summary := NULL;
    IF NEW.error_count >= 3 AND NEW.dead_at IS NULL THEN
      NEW.dead_at := now();
      NEW.next_attempt_at := NULL;
    END IF;
  END IF;
  RETURN NEW;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.legacy_processor_marks() FROM PUBLIC;

-- Costs a row lock for each settled change, a consumer's as well: one reason to remove this set. When a consumer writes an
-- error, it sets next_attempt_at, dead_at or started_by in the same statement.
CREATE OR REPLACE TRIGGER legacy_processor_marks BEFORE UPDATE OF processed, error_count ON @schema@.entity_changes
  FOR EACH ROW WHEN (
    NEW.processed AND (NEW.next_attempt_at IS NOT NULL OR NEW.dead_at IS NOT NULL OR NEW.processed_at IS NULL)
    OR NOT NEW.processed AND NEW.error_count > OLD.error_count
      AND NEW.next_attempt_at IS NOT DISTINCT FROM OLD.next_attempt_at
      AND NEW.dead_at IS NOT DISTINCT FROM OLD.dead_at AND NEW.started_by IS NOT DISTINCT FROM OLD.started_by
  )
  EXECUTE FUNCTION @schema@.legacy_processor_marks();

-- As documented. NOTIFY takes a lock of the whole cluster in every writer's commit: the other reason. The entity types are
-- those of the documented notification, which names one table.
CREATE OR REPLACE FUNCTION @schema@.legacy_processor_notify() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $cdc$
BEGIN
  PERFORM pg_notify('entity_change', json_build_object(
    'table', NEW.table_name,
    'operation', NEW.operation,
    'entity_type', CASE WHEN NEW.table_name = 'whatsapp_message_reactions' THEN 'reaction' ELSE NEW.table_name END
  )::text);
  RETURN NULL;
END
$cdc$;
REVOKE ALL ON FUNCTION @schema@.legacy_processor_notify() FROM PUBLIC;

CREATE OR REPLACE TRIGGER legacy_processor_notify AFTER INSERT ON @schema@.entity_changes
  FOR EACH ROW WHEN (NOT NEW.processed) EXECUTE FUNCTION @schema@.legacy_processor_notify();
